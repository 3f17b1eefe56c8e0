"""A model's query: checks of its settings, and conversion of pixels to its resolution and normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def check_query(config: Any, own: bool, needed: bool) -> None:
    """Raise ValueError for query settings that would have no effect.

    `own`: whether the model's pool reads one; `needed`: whether a forward pass needs an un-prompted one.
    """
    if config.query == "one_pass" and not own:
        raise ValueError(
            f"query is one_pass, but prompts of type {config.prompt['type']} read no query. Set query two_pass, "
            "the default (from_pretrained takes it too), or give prompts that read one."
        )
    if config.query == "one_pass" and config.query_config is not None:
        raise ValueError("A one-pass query comes from the model's own tokens; leave out the query backbone.")
    given = [name for name in ("query_config", "query_view") if getattr(config, name) is not None]
    if given and not needed and not own:
        raise ValueError(
            f"{' and '.join(given)} would have no effect: prompts of type {config.prompt['type']} read no query. "
            "Leave the query backbone (query_name) and its view out, or give prompts that read one."
        )


def to_query_view(pixel_values: torch.Tensor, size: list[int], scale: list[float], shift: list[float]) -> torch.Tensor:
    """Convert pixels (B, 3, H, W) to (B, 3, *size): resize (bilinear, antialias), then channel * scale + shift."""
    pixels = pixel_values.float()  # some devices cannot resize in half precision
    if pixels.shape[2:] != tuple(size):
        pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)
    factor, offset = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (scale, shift))
    return (pixels * factor + offset).to(pixel_values.dtype)
