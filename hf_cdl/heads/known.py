r"""How known an image is: a score that tells images of known classes from all others ("none of these").

    s = z(A) + z(B) + z(E) + z(Q)    A = -\min_c d_c^2    B = d_0^2 - \min_c d_c^2    E = \sum_c p_c \log p_c
    Q = -mean_l z(\log q_l^2)^2

with Mahalanobis distances of an image's own features: d_c to the mean of class c by the scatter within classes (Lee et
al. 2018, arXiv 1807.03888), d_0 to the mean of all images by their total scatter, so that B is the relative distance
(Ren et al. 2021, arXiv 2106.09022); probabilities p_c of the head's logits; and q_l, distances like d_0 of the mean
patch token of the embeddings, the middle and the last layer. An image that is too typical is foreign too: Q is
two-sided. The sum is ours. z(.) is (. - mean) / deviation over images of known classes, each left out of the sums.

All covariances come from sums over images, see scatter.py.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from hf_cdl.heads.scatter import deviations, distances, left_out, shrunk

LAYERS = 3
"""Layers whose mean patch token is read: the embeddings, the middle one and the last."""
_STEPS = 200
"""Steps of the tables of quantiles: shares are accurate to half a percent."""

_FAR = 6e4
"""Coordinates of the centre of a class without images, to which nothing is near; float16 holds them."""
_SMALLEST = 1e-2
"""Least deviation that z divides by: the entropies of a head that is always sure hardly vary."""


def layers_read(depth: int) -> list[int]:
    """Indices of the hidden states that the score uses, for a backbone with `depth` layers."""
    return [0, depth // 2, depth]


def _like(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A buffer where x is, in its dtype; a device may lack that, so it moves first."""
    return value.to(x.device).to(x.dtype)


class Known(nn.Module):
    """Score (N,) of features x (N, D), means of layers (N, 3, W) and logits (N, C); higher is more known."""

    def __init__(self, size: int, layer_size: int):
        super().__init__()
        self.within: torch.Tensor
        self.total: torch.Tensor
        self.mean: torch.Tensor
        self.layers: torch.Tensor
        self.layer_means: torch.Tensor
        self.gauge: torch.Tensor
        self.quantiles: torch.Tensor
        self.strange: torch.Tensor
        self.register_buffer("within", torch.zeros(size, size))
        self.register_buffer("total", torch.zeros(size, size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("layers", torch.zeros(LAYERS, layer_size, layer_size))
        self.register_buffer("layer_means", torch.zeros(LAYERS, layer_size))
        self.register_buffer("gauge", torch.zeros(2, LAYERS + 4))
        self.register_buffer("quantiles", torch.zeros(_STEPS + 1))
        self.register_buffer("strange", torch.zeros(_STEPS + 1))
        self._own: tuple[float, ...] = ()

    def reset(self) -> None:
        """Initialise, with transformers' functions that skip loaded buffers."""
        for value in self.buffers():
            init.zeros_(value)

    @property
    def fitted(self) -> bool:
        """Whether the score has been fitted to images, so that it can be used."""
        return bool(self.gauge[1].any())

    # ---- at a task's end ----

    @torch.no_grad()
    def solve(
        self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor, grams: torch.Tensor, sums: torch.Tensor
    ) -> torch.Tensor:
        """Take the scatter from sums, in float64, and return the mapped class means (C, D) that `forward` reads.

        `gram` (D, D), class sums `total` (C, D) and counts (C,) of x; `grams` (3, W, W) and `sums` (3, W) of layers.
        """
        images, classes = max(1, int(count.sum())), int((count > 0).sum())
        means, mean = total / count.clamp(min=1)[:, None], total.sum(dim=0) / images
        about = gram - images * torch.outer(mean, mean)
        inside = gram - means.T @ (count[:, None] * means)
        scale = deviations(gram, mean, images)
        if images <= classes or inside.diagonal().sum() <= 1e-9 * about.diagonal().sum():
            inside = about  # every class has one image, so nothing is known about the scatter within
        found = [shrunk(inside, images - classes, scale), shrunk(about, images - 1, scale)]
        self.within.copy_(found[0].factor)
        self.total.copy_(found[1].factor)
        self.mean.copy_(mean)
        for number, (square, centre) in enumerate(zip(grams, sums / images, strict=True)):
            around = square - images * torch.outer(centre, centre)
            found.append(shrunk(around, images - 1, deviations(square, centre, images)))
            self.layers[number].copy_(found[-1].factor)
            self.layer_means[number].copy_(centre)
        self._own = tuple(scatter.own for scatter in found)
        return ((means - mean) @ found[0].factor).masked_fill((count == 0)[:, None], _FAR)

    @torch.no_grad()
    def fit(
        self,
        x: torch.Tensor,
        layers: torch.Tensor,
        labels: torch.Tensor,
        logits: torch.Tensor,
        centres: torch.Tensor,
        count: torch.Tensor,
        share: float,
    ) -> None:
        """Fit z and the quantiles to images that are in the sums, each left out in turn. Call `solve` first.

        `labels` (N,), `logits` (N, C) with the image left out likewise, `centres` (C, D) from `solve`, class counts
        (C,); `share`: weight of these images relative to earlier ones.
        """
        x, layers, logits, centres = (value.double() for value in (x, layers, logits, centres))
        near, around, deep = self._left_out(x, layers, labels, centres, count)
        there = near.isfinite().any(dim=1)  # the only image of the only class leaves nothing to be near to
        if not there.any():
            return
        near, around, deep, logits, labels = (value[there] for value in (near, around, deep, logits, labels))
        parts = self._parts(near.amin(dim=1), around, deep, logits)
        share = share if self.fitted else 1.0
        gauge = torch.stack([parts.mean(dim=0), parts.std(dim=0, correction=0).clamp(min=_SMALLEST)])
        gauge = torch.cat([gauge, torch.zeros_like(gauge[:, :1])], dim=1)
        unusual = -((parts[:, 3:] - gauge[0, 3:-1]) / gauge[1, 3:-1]).square().mean(dim=1)
        gauge[0, -1], gauge[1, -1] = unusual.mean(), unusual.std(correction=0).clamp(min=_SMALLEST)
        self.gauge.lerp_(gauge.to(self.gauge), share)
        self._note(self.quantiles, self._sum(parts), share)

    def carry(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Move z in the way that `parts` (N, 6) of the same images moved while classes were learnt."""
        (low, was), (high, now) = ((value.mean(dim=0), value.var(dim=0, correction=0)) for value in (before, after))
        old = self.gauge[1, :-1].double().square()
        new = torch.where(now > was, old + now - was, old * now / was.clamp(min=1e-12))
        self.gauge[:, :-1] = torch.stack([self.gauge[0, :-1] + high - low, new.sqrt().clamp(min=_SMALLEST)])

    def note_unlearnt(self, scores: torch.Tensor, share: float) -> None:
        """Note scores (N,) of images by heads that never learnt their classes; `share` as in `fit`."""
        self._note(self.strange, scores, share if self.strange.any() else 1.0)

    def _left_out(
        self, x: torch.Tensor, layers: torch.Tensor, labels: torch.Tensor, centres: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared distances to classes (N, C), to all (N,) and of layers (N, 3), without each image."""
        within, total, *own = self._own
        apart, images = x - _like(x, self.mean), int(count.sum())
        mapped = apart @ _like(x, self.within)
        u = mapped - centres[labels]
        square, number = u.square().sum(dim=1), count[labels].to(x)
        along = (u * mapped).sum(dim=1, keepdim=True) - u @ centres.T
        gain = within * number / (number - 1).clamp(min=1)
        near = distances(mapped, centres) + (gain / (1 - gain * square).clamp(min=1e-3))[:, None] * along.square()
        alone = torch.where(number > 1, left_out(square, within, number), torch.inf)
        near = near.scatter(1, labels[:, None], alone[:, None])
        around = left_out((apart @ _like(x, self.total)).square().sum(dim=1), total, images)
        deep = self._deep(layers)
        deep = torch.stack([left_out(deep[:, n], own[n], images) for n in range(LAYERS)], dim=1)
        return near, around, deep

    @staticmethod
    def _note(table: torch.Tensor, scores: torch.Tensor, share: float) -> None:
        steps = torch.linspace(0, 1, len(table), dtype=scores.dtype, device=scores.device)
        table.lerp_(torch.quantile(scores, steps).to(table), share)

    # ---- the score ----

    def forward(
        self, x: torch.Tensor, layers: torch.Tensor, logits: torch.Tensor, centres: torch.Tensor
    ) -> torch.Tensor:
        x, layers, logits, centres = (value.float() for value in (x, layers, logits, centres))
        return self._sum(self.parts(x, layers, logits, centres))

    def parts(
        self, x: torch.Tensor, layers: torch.Tensor, logits: torch.Tensor, centres: torch.Tensor
    ) -> torch.Tensor:
        """A, B, E and log q^2 of the layers (N, 3 + 3)."""
        apart = x - _like(x, self.mean)
        near = distances(apart @ _like(x, self.within), centres).amin(dim=1)
        around = (apart @ _like(x, self.total)).square().sum(dim=1)
        return self._parts(near, around, self._deep(layers), logits)

    def _deep(self, layers: torch.Tensor) -> torch.Tensor:
        """Squared distances (N, 3) of the means of layers."""
        apart = layers - _like(layers, self.layer_means)
        return torch.einsum("nlw,lwv->nlv", apart, _like(layers, self.layers)).square().sum(dim=2)

    @staticmethod
    def _parts(near: torch.Tensor, around: torch.Tensor, deep: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """A, B, E and log q^2 of the layers (N, 3 + 3)."""
        log = logits.log_softmax(dim=1)
        parts = torch.stack([-near, around - near, (log.exp() * log).sum(dim=1)], dim=1)
        return torch.cat([parts, deep.clamp(min=1e-12).log()], dim=1)

    def _sum(self, parts: torch.Tensor) -> torch.Tensor:
        mean, deviation = self.gauge.to(parts)
        deviation = deviation.clamp(min=_SMALLEST)  # 0 before anything was learnt
        scaled = (parts - mean[:-1]) / deviation[:-1]
        unusual = -scaled[:, 3:].square().mean(dim=1)
        return scaled[:, :3].sum(dim=1) + (unusual - mean[-1]) / deviation[-1]

    # ---- shares ----

    def threshold(self, share: float) -> float:
        """The score that this share of images of known classes reaches. Below it, an image is `unknown`."""
        at = (1 - share) * _STEPS
        low = min(int(at), _STEPS - 1)
        least, most = self.quantiles[low : low + 2].double()
        return float(torch.lerp(least, most, at - low))

    def more_known(self, score: float) -> float:
        """The share of images of known classes that are more known than this score."""
        return float((self.quantiles > score).double().mean())

    def passing(self, share: float) -> float | None:
        """The share of images of classes never learnt that would reach that score: an estimate, None if unknown."""
        below = int((self.strange < self.threshold(share)).sum())
        return 1 - min(1.0, max(0, below - 0.5) / _STEPS) if self.strange.any() else None
