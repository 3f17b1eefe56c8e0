r"""The strength of ridge regression by generalised cross-validation, from sums alone (Golub, Heath and Wahba 1979).

    GCV(\lambda) = (RSS / n) / (1 - df / n)^2
    RSS = tr Y^T Y - 2 tr W^T C + tr W^T G W    df = tr G (G + \lambda I)^{-1}    W = (G + \lambda I)^{-1} C

for n images with one-hot targets Y (n, C), Gram matrix G (M, M) and class sums C (M, C). GCV estimates the squared
error on images that were left out. Less shrinkage is enough for the right class to have the largest score: half of the
minimiser was as good or better on every stream that was tried (ours).
"""

from __future__ import annotations

import math

import torch

_ZERO, _LEVEL = 1e-12, 1.001
"""Eigenvalues below this share of the largest are 0; of strengths whose GCV is level, the largest is taken."""
_FREE = 0.5
"""Least n - df, as a share of n: with fewer images than features GCV becomes 0 / 0 as the strength falls."""
_LEAST, _MOST, _PER_DECADE, _SHARE = 1e-7, 10.0, 4, 0.5
"""Range of the strengths, as shares of the largest eigenvalue of G (below, rounding decides); steps; share taken."""


def choose_strength(gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor, images: int) -> float:
    """Half of the strength with the least GCV.

    `gram` (M, M) of all `images`; `total` (C, M), class sums; `count` (C,), the images of each class.
    """
    values, vectors = directions(gram, images)
    there = values > _ZERO * values[-1]
    found, rank = values[there], int(there.sum())
    if not rank:
        return 1.0  # without images, or if all features are 0, every strength gives weights of 0
    inside = (total @ vectors[:, there]).square().sum(dim=0) / found  # of tr Y^T Y, by direction: nothing cancels
    outside = 0.0 if rank >= images else max(0.0, (count.sum() - inside.sum()).item())
    ends = (math.log10(share * values[-1].item()) * _PER_DECADE for share in (_LEAST, _MOST))
    first, last = math.ceil(next(ends)), math.floor(next(ends))

    def error(strength: float) -> float:
        kept = strength / (found + strength)
        residual = (inside * kept.square()).sum().item() + outside
        free = max(0, images - rank) + kept.sum().item()  # n - df
        return residual / free**2 if free >= _FREE * images else math.inf

    strengths = [10 ** (step / _PER_DECADE) for step in range(first, last + 1)]
    errors = {strength: error(strength) for strength in strengths}
    least = min(errors.values())
    return _SHARE * max(strength for strength, found in errors.items() if found <= _LEVEL * least)


def directions(gram: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending eigenvalues (r) and eigenvectors (M, r) of the Gram matrix (M, M) of `images`.

    With few images r is their number: all directions in which they vary lie in the range of G, and as many products
    of G with random vectors are a basis of it (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, Alg. 4.1).
    """
    if not 0 < images <= len(gram) // 2:
        return torch.linalg.eigh(gram)
    drawn = torch.randn(len(gram), images, dtype=gram.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(gram @ drawn.to(gram.device)).Q
    values, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
    return values, basis @ vectors
