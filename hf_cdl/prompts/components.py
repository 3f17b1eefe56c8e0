r"""Prompt components and attention over them, for CODA-Prompt and the prompt mapping of CDL-Prompt.

    p = \sum_m \alpha_m P_m,    \alpha_m = \gamma(q \odot A_m, K_m)

(Smith et al., CVPR 2023, arXiv 2211.13218, Eqs. 2-4.) P (M, l, D) are the components, K and A (M, D_q) their keys and
attention vectors, \gamma is cosine similarity. Every task adds a block of rows, orthogonal to the earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

_FEW = 50
"""Earlier rows up to which everything is computed as in the authors' code, to the last bit. Beyond, projections
are subtracted in one product, in a twentieth of the time at a thousand rows, and the graph leaves earlier rows out."""


class ComponentBlock(nn.Module):
    """The components of one task, all layers stacked: prompt (L, m, l, D), key and attention (L, m, D_q)."""

    def __init__(self, layers: int, rows: int, length: int, hidden_size: int, query_size: int, attention: bool = True):
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(layers, rows, length, hidden_size))
        self.key = nn.Parameter(torch.empty(layers, rows, query_size))
        self.attention = nn.Parameter(torch.empty(layers, rows, query_size)) if attention else None


@torch.no_grad()
def init_block(blocks: Any, task: int) -> None:
    """Initialise block `task` with normal draws, orthogonalised against all earlier rows and scaled to unit length.

    A new block is still on the CPU when the earlier ones are on a GPU; draws do not depend on the device.
    """
    earlier = [*blocks][:task]
    for name, new in blocks[task].named_parameters():
        if getattr(new, "_is_hf_initialized", False):  # loaded: nothing to draw
            continue
        draws = torch.randn(new.shape, device=new.device).flatten(2)  # (L, m, D)
        orthogonal = [
            orthogonalise(draw, rows(earlier, name, index).flatten(1).to(draw) if task else draw[:0])
            for index, draw in enumerate(draws)
        ]
        init.copy_(new, torch.stack(orthogonal).view_as(new))


def rows(blocks: Any, name: str, index: int) -> torch.Tensor:
    """Rows (M, ...) of one layer from all blocks."""
    return torch.cat([block._parameters[name][index] for block in blocks])  # a module's own look-up is slow


def weights(blocks: Any, index: int, query: torch.Tensor) -> torch.Tensor:
    r"""Compute the weights \alpha (B, M) of queries (B, D_q) in one layer; without A, plain cosines with the keys."""

    def of(some: Any) -> torch.Tensor:
        key = rows(some, "key", index)
        if some[0].attention is None:
            return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T
        return component_weights(query, rows(some, "attention", index), key)

    return _with_gradient(of, [*blocks], query)


def weighted_sum(blocks: Any, index: int, weight: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Combine the components of one layer with the weights (B, M) of queries (B, D_q) into prompts (B, l, D)."""

    def of(some: Any) -> torch.Tensor:
        prompt = rows(some, "prompt", index)
        return (weight[:, -len(prompt) :] @ prompt.flatten(1)).unflatten(1, prompt.shape[1:])

    return _with_gradient(of, [*blocks], query)


def _with_gradient(of: Callable[[Any], torch.Tensor], blocks: list[Any], query: torch.Tensor) -> torch.Tensor:
    """What `of` computes from all blocks; beside many frozen earlier rows, with the gradient of the newest alone.

    A graph over all rows would compute gradients that nobody reads: at a thousand rows, most of a backward pass.
    """
    *earlier, newest = blocks
    few = len(earlier) * newest.key.shape[1] <= _FEW
    if few or query.requires_grad or not torch.is_grad_enabled() or any(map(_learns, earlier)):
        return of(blocks)
    with torch.no_grad():
        value = of(blocks)
    own = of([newest])
    zero = own - own.detach()
    return value + F.pad(zero, (value.shape[-1] - zero.shape[-1], 0))


def _learns(block: Any) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in block._parameters.values())


def component_weights(query: torch.Tensor, attention: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    r"""Weights (B, M), \alpha_m = cos(q \odot A_m, K_m) (Eq. 4), of queries (B, D_q); attention and keys (M, D_q).

    With \hat K the row-normalised keys, \alpha = q (A \odot \hat K)^T / sqrt(q^2 (A^2)^T): two matrix products instead
    of a (B, M, D_q) tensor.
    """
    product = query @ (attention * F.normalize(key, dim=-1)).T
    norm = (query.square() @ attention.square().T).clamp_min(1e-24).sqrt()
    return product / norm


def orthogonalise(draws: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt of new rows (m, D) against earlier ones (n, D), as in the authors' code.

    From each draw its projections onto all rows before it are subtracted: the earlier rows as trained (not orthogonal
    to each other) and the new rows, not yet normalised. All projections are of the original draw; rows are normalised
    only at the end. With more rows than dimensions a draw can vanish; it is then kept as drawn.
    """
    at_once = len(earlier) > _FEW
    left = draws - (draws @ earlier.T / earlier.square().sum(dim=1).clamp_min(1e-24)) @ earlier if at_once else draws
    for row in () if at_once else earlier:  # for all draws at once
        along = torch.stack([draw @ row for draw in draws]) / (row @ row).clamp_min(1e-24)
        left = left - along[:, None] * row
    found: list[torch.Tensor] = []
    for draw, new in zip(draws, left, strict=True):
        for row in [*found]:
            new = new - (draw @ row) / (row @ row).clamp_min(1e-24) * row
        found.append(new if new.norm() > 1e-6 * draw.norm() else draw)
    return F.normalize(torch.stack(found), dim=-1)
