"""How a head would score images of a class that it never learnt: the class is taken out of its sums."""

from __future__ import annotations

import copy
from typing import Any

import torch

_CLASSES = 8
"""Classes that are left out, one after another."""


@torch.no_grad()
def unlearnt(head: Any, features: torch.Tensor, labels: torch.Tensor, layers: torch.Tensor) -> torch.Tensor | None:
    """Known scores (N,) of images by a head that never learnt their class; None if no class can be left out.

    `features` (B, D), `labels` (B,), `layers` (B, 3, W) as they were learnt. A class can be left out if all its images
    are there; at most 8 are. Whatever the head chose or fitted stays.
    """
    gram, total, count = head.own_sums(head.gram_matrix())
    squares, sums = head.layer_sums()
    whole = [c for c in labels.unique().tolist() if int((labels == c).sum()) == int(count[c]) < int(count.sum())]
    x, layers, found = head.own(head.prepare(features).double()), layers.double(), []  # as summed, to the bit
    for label in whole[:: -(-len(whole) // _CLASSES) or 1]:
        own, rest = labels == label, [c for c in range(len(count)) if c != label]
        scores = head.class_left_out(head.prepare(features[own]), label)
        if scores is None:
            return None
        without = copy.deepcopy(head.known)
        centres = without.solve(
            gram - x[own].T @ x[own],
            total[rest],
            count[rest],
            squares - torch.einsum("nlw,nlv->lwv", layers[own], layers[own]),
            sums - layers[own].sum(dim=0),
        )
        found.append(without(x[own], layers[own], head.scaled(scores[:, rest]), centres))
    return torch.cat(found) if found else None
