"""Convert a model's pixel values for a query backbone of another resolution or normalisation."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def to_query_view(pixel_values: torch.Tensor, size: list[int], scale: list[float], shift: list[float]) -> torch.Tensor:
    """Convert pixels (B, 3, H, W) to (B, 3, *size): resize (bilinear, antialias), then channel * scale + shift."""
    pixels = pixel_values.float()  # some devices cannot resize in half precision
    if pixels.shape[2:] != tuple(size):
        pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)
    factor, offset = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (scale, shift))
    return (pixels * factor + offset).to(pixel_values.dtype)
