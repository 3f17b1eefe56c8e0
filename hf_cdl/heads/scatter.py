"""Covariances from sums over images, and Mahalanobis distances by them.

They are shrunk towards a diagonal; the images determine by how much (OAS, Chen et al. 2010, arXiv 0907.4698).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_LEAST = 1e-2
"""Least deviation of a dimension, as a share of the mean deviation."""
_ROUNDING, _NONE = 1e-6, 1e-3
"""The same as a share of the mean size, and least variance in units of it: less may be rounding."""


class Scatter(NamedTuple):
    """A shrunk covariance of D-dimensional images.

    `factor` (D, D): F with inverse covariance F F^T. `own`: the share of one image's square in the covariance.
    """

    factor: torch.Tensor
    own: float


def shrunk(scatter: torch.Tensor, images: int, scale: torch.Tensor) -> Scatter:
    """The covariance of a sum of squares about means (D, D), with OAS shrinkage; `scale` (D,): typical deviations."""
    count, size = max(1, images), len(scatter)
    covariance = scatter / count / torch.outer(scale, scale)
    mean = covariance.diagonal().mean()
    if mean < _NONE:  # equal images: nothing but rounding
        return Scatter(torch.diag(1 / scale), 0.0)
    covariance = covariance / mean
    square = covariance.square().sum() / size
    over = (images + 1 - 2 / size) * (square - 1)  # 0 for a multiple of the identity
    share = min(1.0, float(((1 - 2 / size) * square + size) / over)) if over > 0 else 1.0
    covariance.mul_(1 - share).diagonal().add_(share)
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if failed:  # rounding outweighs what is seen
        lower, share = torch.eye(size, dtype=scatter.dtype, device=scatter.device), 1.0
    factor = torch.linalg.inv(lower).T
    return Scatter(factor / (scale[:, None] * mean.sqrt()), (1 - share) / count)


def deviations(gram: torch.Tensor, mean: torch.Tensor, images: int) -> torch.Tensor:
    """Standard deviations (D,), from a Gram matrix (D, D) and the mean (D,), none of them too small."""
    square = gram.diagonal() / images
    found = (square - mean.square()).clamp(min=0).sqrt()
    least = torch.maximum(_LEAST * found.mean(), _ROUNDING * square.mean().sqrt())
    return torch.maximum(found, least).clamp(min=torch.finfo(torch.float32).tiny)


def left_out(square: torch.Tensor, own: float, images: torch.Tensor | int) -> torch.Tensor:
    """Squared distances (N,) to a mean of `images` (N,) from statistics without the image, given those with it."""
    gain = images / (torch.as_tensor(images) - 1).clamp(min=1)
    return gain**2 * square / (1 - own * gain * square).clamp(min=1e-3)


def distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances (N, C) of points (N, D) to centres (C, D)."""
    squares = points.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return (squares - 2 * points @ centres.T).clamp(min=0)
