r"""Sums over images that are moved as features move, when a backbone goes on learning without those images.

    x' = x + (x - m) A + d    A = V diag(s / (s^2 + \lambda)) U^T (Y - Y_m)    d = y_m

is a ridge regression of the change Y (N, M) of some images' features on the features X (N, M) that they had before,
centred, with the singular value decomposition U diag(s) V^T of the centred X. \lambda is chosen by generalised
cross-validation (Golub et al. 1979). Along directions in which those images do not vary nothing is moved but by the
mean d. Class sums and Gram matrices of x' follow from those of x alone.

After semantic drift compensation (SDC, Yu et al. 2020, arXiv 2004.00440), which moves class means by a kernel
smoother, and learnable drift compensation (LDC, Gomez-Villa et al. 2024, arXiv 2407.08536), which moves them by a
linear map; that it moves second moments too is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_GRID = torch.logspace(-6, 4, 41, dtype=torch.float64)
"""Candidates of lambda, in units of the mean squared singular value."""
_ROUNDING = 1e-12
"""Squared singular values below this share of the largest are 0."""


class Drift(NamedTuple):
    """A map of features (M,): `into` (M, K), `out` (K, M) with A = into out; `mean` (M,); `shift` (M,).

    `change`: how far the images moved, as a share of how far they are from their mean; `explained`: the share of the
    squared change, beyond its mean, that the map tells of images left out; `strength`: lambda.
    """

    into: torch.Tensor
    out: torch.Tensor
    mean: torch.Tensor
    shift: torch.Tensor
    change: float
    explained: float
    strength: float

    def sums(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Sums (..., M) of `count` (...,) images each, moved."""
        count = count.to(total)[..., None]
        return total + (total - count * self.mean) @ self.into @ self.out + count * self.shift

    def gram(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
        """A Gram matrix (M, M) of `count` images, whose sum is `total` (M,), moved."""
        offset = self.shift - self.mean @ self.into @ self.out
        half = gram + (gram @ self.into) @ self.out
        moved = half + self.out.T @ (self.into.T @ half)
        across = torch.outer(total + (total @ self.into) @ self.out, offset)
        return moved + across + across.T + count * torch.outer(offset, offset)

    def part(self, size: int) -> Drift:
        """The map of the first `size` dimensions, by these alone."""
        return self._replace(
            into=self.into[:size], out=self.out[:, :size], mean=self.mean[:size], shift=self.shift[:size]
        )


def fit_drift(before: torch.Tensor, after: torch.Tensor) -> Drift:
    """The drift of images whose features were `before` (N, M) and are `after` (N, M), by ridge regression."""
    x, moved = before.double(), after.double() - before.double()
    mean, shift = x.mean(dim=0), moved.mean(dim=0)
    x, y = x - mean, moved - shift
    images, width = x.shape
    wide = images <= width
    squares, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = squares > _ROUNDING * squares[-1].clamp(min=torch.finfo(torch.float64).tiny)
    squares, vectors = squares[kept], vectors[:, kept]
    left = vectors if wide else x @ vectors / squares.sqrt()  # U (N, K)
    right = x.T @ vectors / squares.sqrt() if wide else vectors  # V (M, K)
    along = left.T @ y
    spread, told = x.square().sum(), along.square().sum(dim=1)
    change = float((moved.square().sum() / spread.clamp(min=torch.finfo(torch.float64).tiny)).sqrt())
    total = y.square().sum()
    if not len(squares) or total == 0:
        return Drift(right, torch.zeros_like(along), mean, shift, change, 0.0, 0.0)
    strength, error = _chosen(squares, told, total, images)
    explained = 1 - error * max(1, images - 1) ** 2 / (images * float(total))
    return Drift(
        right, (squares.sqrt() / (squares + strength))[:, None] * along, mean, shift, change, explained, strength
    )


def _chosen(squares: torch.Tensor, told: torch.Tensor, total: torch.Tensor, images: int) -> tuple[float, float]:
    r"""Lambda, and N |R|^2 / (N - 1 - df)^2 with it: R is what is left of Y, df = \sum s^2 / (s^2 + \lambda)."""
    strengths = _GRID.to(squares) * squares.mean()
    shares = squares / (squares + strengths[:, None])
    rest = (total - told.sum()).clamp(min=0) + ((1 - shares).square() * told).sum(dim=1)
    free = (images - 1 - shares.sum(dim=1)).clamp(min=1e-6)
    errors = images * rest / free.square()
    best = int(errors.argmin())
    return float(strengths[best]), float(errors[best])
