"""Float64 numbers stored as their bits in integer buffers, which changing a model's dtype cannot round."""

from __future__ import annotations

import torch


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on its device, or on the CPU if the device lacks float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def read(bits: torch.Tensor) -> torch.Tensor:
    """The float64 numbers encoded in a buffer of bits."""
    return movable(bits).view(torch.float64)


def write(bits: torch.Tensor, value: torch.Tensor) -> None:
    """Store float64 numbers in a buffer of bits."""
    bits.copy_(value.view(torch.int64))


def add(bits: torch.Tensor, value: torch.Tensor) -> None:
    """Add float64 numbers to a buffer of bits."""
    write(bits, read(bits) + value)
