"""What a query backbone of another resolution or normalisation sees, made from the model's own pixel values."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def to_query_view(pixel_values: torch.Tensor, size: list[int], scale: list[float], shift: list[float]) -> torch.Tensor:
    """(B, 3, *size) from pixel values (B, 3, H, W): resized (bilinear, antialias), each channel * scale + shift."""
    pixels = pixel_values.float()  # not every device resizes in half precision
    if pixels.shape[2:] != tuple(size):
        pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)
    factor, offset = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (scale, shift))
    return (pixels * factor + offset).to(pixel_values.dtype)
