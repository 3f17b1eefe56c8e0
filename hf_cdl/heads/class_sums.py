"""The sums that a head keeps of the images of a task's classes, and symmetric matrices packed to a triangle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hf_cdl.heads.bits import read
from hf_cdl.heads.known import LAYERS

_ZERO, _STRANGE = 1e-12, 1e-6
"""Eigenvalues below this share of the largest are 0; features may have this share of their square along those."""


class ClassSums(nn.Module):
    """Sums over the images of a task's C_t classes, `total` (C_t, M) and `count` (C_t,), and the solved weights.

    With `per_class` also `grams` (C_t, M (M + 1) / 2), the upper triangle of each class's Gram matrix. With `known`
    (D, W), the widths of features and layers, `layer_total` (C_t, 3, W) and perhaps `layer_grams` likewise, of the
    means of layers, and `centre` (C_t, D), see known.py; with `soft` too, where targets are not the labels alone,
    `own_total` (C_t, D), sums of the images with a label. Float64 numbers are stored as their bits in integers, which
    changing the model's dtype cannot round.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        sums: bool | str,
        bias: bool,
        known: tuple[int, int] | None = None,
        soft: bool = False,
    ):
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.total: torch.Tensor
        self.count: torch.Tensor
        self.grams: torch.Tensor
        self.own_total: torch.Tensor | None
        self.layer_total: torch.Tensor
        self.layer_grams: torch.Tensor
        self.centre: torch.Tensor
        self.register_buffer("weight", torch.zeros(num_classes, width))
        self.register_buffer("bias", torch.zeros(num_classes) if bias else None)
        size, layer = known or (0, 0)
        kept = {"total": (width,), "count": ()} | ({"layer_total": (LAYERS, layer)} if known else {})
        kept |= {"own_total": (size,)} if known and soft else {}
        per_class = {"grams": (_upper(width),)} | ({"layer_grams": (LAYERS, _upper(layer))} if known else {})
        kept = (kept if sums else {}) | (per_class if sums == "per_class" else {})
        for name in ("total", "count", "grams", "own_total", "layer_total", "layer_grams"):
            shape = kept.get(name)
            empty = None if shape is None else torch.zeros(num_classes, *shape, dtype=torch.int64)
            self.register_buffer(name, empty)
        self.register_buffer("centre", torch.zeros(num_classes, size) if known else None)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight, self.bias)


def sums_of(block: Any) -> ClassSums:
    """A head's block, with its type."""
    return block


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangles (..., M (M + 1) / 2) of symmetric matrices (..., M, M)."""
    row, column = torch.triu_indices(*matrix.shape[-2:], device=matrix.device)
    return matrix[..., row, column]


def unpacked(width: int, upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrices (..., width, width) with these upper triangles."""
    row, column = torch.triu_indices(width, width, device=upper.device)
    matrix = torch.zeros(*upper.shape[:-1], width, width, dtype=upper.dtype, device=upper.device)
    matrix[..., row, column] = upper
    return matrix + matrix.triu(diagonal=1).mT


def _upper(width: int) -> int:
    """Number of elements in a triangle with its diagonal."""
    return width * (width + 1) // 2


@torch.no_grad()
def count_never_learnt(head: Any, mapped: torch.Tensor, labels: torch.Tensor) -> int:
    """Number of images (B, M), as they are summed, that a head certainly never learnt with these labels (B,)."""
    if head.gram is not None:
        return _outside(read(head.gram), mapped)
    grams = torch.cat([read(sums_of(block).grams) for block in head.blocks])
    return sum(_outside(unpacked(head.width, grams[own]), mapped[labels == own]) for own in labels.unique().tolist())


def _outside(gram: torch.Tensor, features: torch.Tensor) -> int:
    """Number of features (B, M) outside the span of those summed up in a Gram matrix (M, M), so not among them."""
    values, vectors = torch.linalg.eigh(gram)
    along = features @ vectors[:, values < _ZERO * values[-1]]
    return int((along.square().sum(dim=1) > _STRANGE * features.square().sum(dim=1)).sum())
