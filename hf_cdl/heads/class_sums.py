"""What the images of a task's classes leave in a head of sums, and symmetric matrices packed to a triangle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_ZERO, _STRANGE = 1e-12, 1e-6
"""Eigenvalues below this share of the largest are 0; features may have this share of their square along those."""


class ClassSums(nn.Module):
    """What the images of a task's C_t classes leave: `total` (C_t, M) and `count` (C_t,), and the solved weights.

    With `per_class` also `grams` (C_t, M (M + 1) / 2), the upper triangle of each class's Gram matrix. Float64 numbers
    are stored as their bits in integers, which changing the model's dtype cannot round.
    """

    def __init__(self, width: int, num_classes: int, sums: bool | str, bias: bool):
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.total: torch.Tensor
        self.count: torch.Tensor
        self.grams: torch.Tensor
        packed = torch.zeros(num_classes, width * (width + 1) // 2, dtype=torch.int64) if sums == "per_class" else None
        self.register_buffer("weight", torch.zeros(num_classes, width))
        self.register_buffer("bias", torch.zeros(num_classes) if bias else None)
        self.register_buffer("total", torch.zeros(num_classes, width, dtype=torch.int64) if sums else None)
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64) if sums else None)
        self.register_buffer("grams", packed)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight, self.bias)


def sums_of(block: Any) -> ClassSums:
    """A head's block, as what it is."""
    return block


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle (M (M + 1) / 2,) of a symmetric matrix (M, M)."""
    row, column = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[row, column]


def unpacked(width: int, upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix (width, width) with this upper triangle."""
    row, column = torch.triu_indices(width, width, device=upper.device)
    matrix = torch.zeros(width, width, dtype=upper.dtype, device=upper.device)
    matrix[row, column] = upper
    return matrix + matrix.triu(diagonal=1).T


def outside(gram: torch.Tensor, features: torch.Tensor) -> int:
    """Number of features (B, M) outside the span of those summed up in a Gram matrix (M, M), so not among them."""
    values, vectors = torch.linalg.eigh(gram)
    along = features @ vectors[:, values < _ZERO * values[-1]]
    return int((along.square().sum(dim=1) > _STRANGE * features.square().sum(dim=1)).sum())
