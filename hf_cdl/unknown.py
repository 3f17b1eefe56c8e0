"""The answer `unknown`, for images that are less known to a model than almost all images of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_cdl.checked import check_share, near, short
from hf_cdl.labels import alike, same_name

UNKNOWN = "unknown"
"""The label."""


def thresholds(model: Any, reject: Any) -> torch.Tensor:
    """The threshold (C,) that a model's `known` must reach, for each class that may be the answer.

    `reject`: the share of images of known classes that keep their answer, as 0.95; True for that in the head's config;
    or a share for single classes, as {"cat": 0.99}; the others have that of the config. Raises ValueError for
    anything else, and for a model that cannot recognise unknown images.
    """
    known = _known(model)
    names = [name for task in model.tasks for name in task]
    if called := [name for name in names if alike(name) == UNKNOWN]:
        raise ValueError(
            f"The model has a class called {called[0]!r}, so the answer {UNKNOWN!r} would be ambiguous; rename the "
            f"class: hf-cdl rename STUDENT {called[0]!r} NEW, in Python model.rename({called[0]!r}, ...)."
        )
    if reject is not True and not isinstance(reject, Mapping):
        return torch.full((len(names),), known.threshold(check_share(reject, "reject")))
    found = torch.full((len(names),), known.threshold(model.head.config.known))
    for name, share in reject.items() if isinstance(reject, Mapping) else ():
        index = next((i for i, other in enumerate(names) if isinstance(name, str) and same_name(name, other)), None)
        if index is None:
            raise ValueError(
                f"reject names {short(name)}, which the model has no class of{near(str(name), names)} "
                f"Give names of its classes, such as {short(names[0])}."
            )
        found[index] = known.threshold(check_share(share, f"reject of {short(name)}"))
    return found


def rejected(thresholds: torch.Tensor, known: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Which images (B,) are unknown, of `known` (B,), which may be NaN, and logits (B, C)."""
    return ~(known.float() >= thresholds.to(known.device)[logits.argmax(dim=-1)])


def unknown_score(model: Any, known: float) -> float:
    """The score of the answer: the share of images of known classes that are more known than this one."""
    return _known(model).more_known(known)


def _known(model: Any) -> Any:
    known = getattr(getattr(model, "head", None), "known", None)
    if known is None:
        raise ValueError(
            "This model cannot tell which images are of none of its classes. A model with a head of sums can: set "
            "`known: 0.95` in its head, in a recipe (student.head), and train it."
        )
    if not known.fitted:
        raise ValueError("This model cannot tell unknown images yet, because it has learnt none; train it first.")
    return known
