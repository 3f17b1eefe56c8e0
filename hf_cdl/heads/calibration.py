"""Fitting the scale of a fitted head's scores, so that its softmax is a confidence that one can trust.

The scores of images that a head was fitted to are too good. So the scale is fitted to leave-one-out scores: those of a
head that has learnt all images but the one in question, which follow from the fitted head without fitting it again.
"""

from __future__ import annotations

import torch

_MOST = 10_000
"""Images whose features are kept until their task ends: every second one of twice as many, and so on."""
_RANGE, _STEPS = (1e-3, 1e6), 100


class RecentImages:
    """Features (N, D) and labels (N,) of images learnt since the head was last solved, evenly thinned out."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stride, self._seen = 1, 0

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep images of a batch."""
        numbers = torch.arange(self._seen, self._seen + len(labels), device=labels.device)
        own = numbers % self._stride == 0
        self._parts.append((features[own].detach(), labels[own]))
        self._seen += len(labels)
        if sum(len(part) for _, part in self._parts) > 2 * _MOST:
            self._parts = [tuple(value[::2] for value in self._joined())]  # type: ignore[list-item]
            self._stride *= 2

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what was kept, and forget it; None if there is nothing."""
        found = self._joined() if self._parts else None
        self._parts, self._stride, self._seen = [], 1, 0
        return found

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        features, labels = zip(*self._parts, strict=True)
        return torch.cat(features), torch.cat(labels)


def fit_scale(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The factor of scores (N, C) that minimises the cross-entropy with labels (N,).

    The cross-entropy is convex in it, so its derivative is bisected.
    """
    scores, low, high = scores.double(), *_RANGE
    right = scores.gather(1, labels[:, None])[:, 0]
    for _ in range(_STEPS):
        scale = (low * high) ** 0.5
        if ((scale * scores).softmax(dim=1) * scores).sum(dim=1).mean() > right.mean():
            high = scale
        else:
            low = scale
    return (low * high) ** 0.5
