"""Statistics fitted to earlier images, carried over to a head that has learnt more classes since.

New classes change a head's scores of earlier images, and these images are gone. But the sums describe how they were
distributed: as normal distributions around the class means. So some are drawn from these, and their scores compared.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_cdl.heads.bits import movable

_IMAGES = 512
"""Number of images drawn, equally many of each class."""


@torch.no_grad()
def sample_images(head: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw own features (N, D) and layers (N, 3, W) of images of learnt classes, from the sums that were solved."""
    known, centres = head.known, head.of_classes("centre").double()[learnt(head)]
    generator = torch.Generator().manual_seed(0)  # the same when a run resumes
    noise = torch.randn(-(-_IMAGES // len(centres)), *centres.shape, dtype=torch.float64, generator=generator)
    mapped = (noise.to(centres) + centres).flatten(0, 1)
    within, mean, factors, means = (
        movable(value).double() for value in (known.within, known.mean, known.layers, known.layer_means)
    )
    deep = torch.randn(len(factors), len(mapped), means.shape[1], dtype=torch.float64, generator=generator)
    layers = torch.linalg.solve(factors, deep.to(mapped), left=False).transpose(0, 1) + means
    return torch.linalg.solve(within, mapped, left=False) + mean, layers


@torch.no_grad()
def score_parts(head: Any, x: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    """The parts (N, 6) of the known score of own features (N, D) and layers (N, 3, W), from learnt classes only."""
    own = learnt(head)
    scores = head.mapped(x) @ head.of_classes("weight").to(x)[own].T
    scores = scores if not head.has_bias else scores + head.of_classes("bias").to(x)[own]
    return head.known.parts(x, layers, head.scaled(scores), head.of_classes("centre").to(x)[own])


def learnt(head: Any) -> torch.Tensor:
    """Which classes (C,) have been solved for."""
    return head.of_classes("weight").any(dim=1)
