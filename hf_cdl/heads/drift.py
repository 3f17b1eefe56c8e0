r"""Move sums over images as the features move, when a backbone continues to learn without those images.

    x' = x + (x - m) A + d    A = V diag(s / (s^2 + \lambda)) U^T (Y - Y_m)    d = y_m

is a ridge regression of the change Y (N, M) of some images' features on the features X (N, M) that they had before,
centred, with the singular value decomposition U diag(s) V^T of the centred X. Along directions in which those images
do not vary, only the mean d moves anything. Class sums and Gram matrices of x' follow from those of x alone.

The sums belong to other classes than those images, so \lambda is chosen by leaving out whole classes. With
H = U diag(s^2 / (s^2 + \lambda)) U^T + 1 / N and a class's rows g, the map fitted to all other classes leaves an error
of (I - H_{gg})^{-1} (Y - H Y)_g in the change of its images.

After semantic drift compensation (SDC, Yu et al. 2020, arXiv 2004.00440), which moves class means by a kernel
smoother, and learnable drift compensation (LDC, Gomez-Villa et al. 2024, arXiv 2407.08536), which moves them by a
linear map. Ours: second moments are moved too, as SLDC (Rao et al. 2025, arXiv 2511.09926) does with covariances, from
sums alone; and classes are left out to choose \lambda.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_GRID = torch.logspace(-4, 4, 25, dtype=torch.float64)
"""Candidates of lambda, in units of the mean squared singular value."""
_FOLD, _READ = 16, 64
"""Images without a class that are left out together; largest directions of the change, by which lambda is chosen."""
_ROUNDING = 1e-12
"""Squared singular values below this share of the largest are 0."""


class Drift(NamedTuple):
    """A map of features (M,): `into` (M, K), `out` (K, M) with A = into out; `mean` (M,); `shift` (M,).

    `change`: how far the images moved, relative to their distance from their mean. `explained`: the share of a class's
    squared change, beyond the mean change, that the map fitted to all other classes predicts. `strength`: lambda.
    """

    into: torch.Tensor
    out: torch.Tensor
    mean: torch.Tensor
    shift: torch.Tensor
    change: float
    explained: float
    strength: float

    def sums(self, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Move sums (..., M) of `count` (...,) images each."""
        count = count.to(total)[..., None]
        return total + (total - count * self.mean) @ self.into @ self.out + count * self.shift

    def gram(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
        """Move a Gram matrix (M, M) of `count` images, whose sum is `total` (M,)."""
        offset = self.shift - self.mean @ self.into @ self.out
        half = gram + (gram @ self.into) @ self.out
        moved = half + self.out.T @ (self.into.T @ half)
        across = torch.outer(total + (total @ self.into) @ self.out, offset)
        return moved + across + across.T + count * torch.outer(offset, offset)

    def part(self, size: int) -> Drift:
        """The map of the first `size` dimensions, from these alone."""
        return self._replace(
            into=self.into[:size], out=self.out[:, :size], mean=self.mean[:size], shift=self.shift[:size]
        )


def fit_drift(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor | None = None) -> Drift:
    """The drift of images whose features were `before` (N, M) and are `after` (N, M), by ridge regression.

    `labels` (N,): images with the same label, in all their views, are left out together; below 0: no class.
    """
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
    spread = x.square().sum()
    change = float((moved.square().sum() / spread.clamp(min=torch.finfo(torch.float64).tiny)).sqrt())
    if not len(squares) or not y.any():
        return Drift(right, torch.zeros_like(along), mean, shift, change, 0.0, 0.0)
    strength, explained = _chosen(left, squares, y, _folds(labels, images))
    out = (squares.sqrt() / (squares + strength))[:, None] * along
    return Drift(right, out, mean, shift, change, explained, strength)


def _folds(labels: torch.Tensor | None, images: int) -> list[torch.Tensor]:
    """Rows of the images that are left out together: a class, or some without one; each alone if that were all."""
    labels = torch.full((images,), -1) if labels is None else labels.cpu()
    known = [(labels == label).nonzero()[:, 0] for label in labels.unique().tolist() if label >= 0]
    folds = [fold for fold in (*known, *(labels < 0).nonzero()[:, 0].split(_FOLD)) if len(fold)]
    return folds if len(folds) > 1 else [*torch.arange(images).split(1)]


def _chosen(
    left: torch.Tensor, squares: torch.Tensor, y: torch.Tensor, folds: list[torch.Tensor]
) -> tuple[float, float]:
    """Lambda, and the share of the squared change that it explains for images left out, for U (N, K) and Y (N, M)."""
    if y.shape[1] > _READ:  # the same in the basis of the largest directions, at a fraction of the cost
        y = y @ torch.linalg.eigh(y.T @ y).eigenvectors[:, -_READ:]
    along = left.T @ y

    def error(shares: torch.Tensor) -> float:
        rest, told = y - left @ (shares[:, None] * along), 0.0
        for own in folds:
            hat = (left[own] * shares) @ left[own].T + 1 / len(y)
            told += torch.linalg.solve(torch.eye(len(own)).to(hat) - hat, rest[own]).square().sum().item()
        return told

    strengths = _GRID.to(squares) * squares.mean()
    errors = [error(squares / (squares + strength)) for strength in strengths]
    best = min(range(len(errors)), key=errors.__getitem__)
    return float(strengths[best]), 1 - errors[best] / error(torch.zeros_like(squares))
