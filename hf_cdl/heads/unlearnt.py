"""What a head would say of images of a class that it never learnt: of images whose class is taken out of its sums."""

from __future__ import annotations

import copy
from typing import Any

import torch

_CLASSES = 8
"""Classes that are left out, one after another: each needs a solution of its own."""


@torch.no_grad()
def unlearnt(head: Any, features: torch.Tensor, labels: torch.Tensor, layers: torch.Tensor) -> torch.Tensor | None:
    """How known images are (N,) to heads that never learnt their class; None if no class can be left out.

    `features` (B, D), `labels` (B,), `layers` (B, 3, W) as they were learnt. Classes of which there are all images can
    be left out; of many, 8 are. The option that the head chose stays.
    """
    count = head.of_classes("count").tolist()
    whole = [label for label in labels.unique().tolist() if int((labels == label).sum()) == count[label]]
    if len(count) < 2 or head.needs_teacher:
        return None
    found = []
    for label in whole[:: -(-len(whole) // _CLASSES) or 1]:
        own = labels == label
        without = copy.deepcopy(head)
        without.accumulate(features[own], labels[own], sign=-1, layers=layers[own])
        task, row = _place(head, label)
        without.keep(task, [other for other in range(len(head.blocks[task].count)) if other != row])
        without.solve_all(without.gram_matrix(), without.of_classes("total"), without.of_classes("count"))
        found.append(without.how_known(features[own], layers[own], without(features[own])))
    return torch.cat(found) if found else None


def _place(head: Any, label: int) -> tuple[int, int]:
    """Task and row of a class."""
    for task, block in enumerate(head.blocks):
        if label < len(block.count):
            return task, label
        label -= len(block.count)
    raise IndexError(label)
