"""Adapt a trained model and its image processor to another image size."""

from __future__ import annotations

import copy
from typing import Any

from hf_cdl.backbones.families import FAMILIES, check_image_size, resize
from hf_cdl.data.views import MOST_SIDE
from hf_cdl.export.preprocessing import resized


def at_size(model: Any, processor: Any, side: int) -> tuple[Any, Any]:
    """Copies of both for images of `side` pixels a side. Raises ValueError for a model that is tied to its size."""
    model = copy.deepcopy(model)
    backbone = model.base_model
    kind = backbone.config.model_type
    row = FAMILIES.get(kind)
    if not 1 <= side <= MOST_SIDE:
        raise ValueError(f"--size is {side}, but the side of an image must have 1 to {MOST_SIDE:,} pixels.")
    if row is None or not (row.any_size or row.resizes):
        able = ", ".join(sorted(name for name, row in FAMILIES.items() if row.any_size or row.resizes))
        raise ValueError(f"A {kind} backbone has a fixed image size; leave --size out. It works with {able}.")
    if getattr(model, "query_backbone", None) is not None:
        raise ValueError("A second backbone computes this model's queries, at its own size; leave --size out.")
    if row.resizes:
        resize(backbone, side)
    check_image_size(backbone.config, (side, side))
    return model, resized(processor, side)
