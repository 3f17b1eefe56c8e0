r"""Logits of a fitted head, scaled so that their softmax is a trustworthy confidence.

    z_c = T (f_c - m) / \sqrt{0.8 s^2 + 0.2 v}

with scores f_c over all classes, their mean m and variance s^2 for this image, and v the mean of s^2 over images
(ours). The order of the classes is that of the scores. v and T are fitted to leave-one-out scores, each from a head
that has learnt all images but the one in question, because scores of images that a head was fitted to are too good. T
is chosen so that the mean confidence equals the accuracy.
"""

from __future__ import annotations

import torch

_MOST = 10_000
"""Images whose features are kept until their task ends; of twice as many, every second one, and so on."""
_OWN = 0.8
"""Share of an image's own variance in what its scores are divided by."""
_RANGE, _STEPS = (1e-3, 1e6), 60


class RecentImages:
    """Labels (N,) and tensors of images learnt since the head was last solved, evenly thinned out.

    `most`: number of images kept, if there are that many; up to twice as many.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._stride, self._seen = 1, 0

    def add(self, labels: torch.Tensor, *read: torch.Tensor) -> None:
        """Keep images of a batch: their labels (B,), and tensors (B, ...)."""
        numbers = torch.arange(self._seen, self._seen + len(labels), device=labels.device)
        own = numbers % self._stride == 0
        self._parts.append(tuple(value[own].detach() for value in (labels, *read)))
        self._seen += len(labels)
        if sum(len(labels) for labels, *_ in self._parts) > 2 * self._most:
            self._parts = [tuple(value[::2] for value in self._joined())]
            self._stride *= 2

    def take(self) -> tuple[torch.Tensor, ...] | None:
        """Return what was kept, and forget it; None if there is nothing."""
        found = self._joined() if self._parts else None
        self._parts, self._stride, self._seen = [], 1, 0
        return found

    def _joined(self) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.cat, zip(*self._parts, strict=True)))


def standardised(scores: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Scores (N, C) of mean 0 and a variance near 1 over the classes; `variance`: the mean one of images, v above."""
    scores = scores - scores.mean(dim=-1, keepdim=True)
    own = scores.square().mean(dim=-1, keepdim=True)
    return scores / (_OWN * own + (1 - _OWN) * variance).clamp(min=torch.finfo(scores.dtype).tiny).sqrt()


def fit_scale(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The factor T at which the mean largest softmax of scores (N, C) is the accuracy on labels (N,); by bisection."""
    right = int((scores.argmax(dim=1) == labels).sum())
    accuracy, low, high = (right + 1) / (len(labels) + 2), *_RANGE
    for _ in range(_STEPS):
        scale = (low * high) ** 0.5
        if (scale * scores.double()).softmax(dim=1).amax(dim=1).mean() > accuracy:
            high = scale
        else:
            low = scale
    return (low * high) ** 0.5
