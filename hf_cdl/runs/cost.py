"""The inference cost of a model: its parameters and the latency for one image."""

from __future__ import annotations

import platform
import time
from statistics import median
from typing import Any

import torch
from torch import nn

from hf_cdl.counted import counted

_WARM_UP, _PASSES = 5, 30


def cost_in_use(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Measure a model's parameters and latency.

    Returns `parameters`; `latency_ms`, the median over several passes of one image of `size` (height, width); and
    `device`. Buffers that a fitted head computes with count as parameters; its sums for further learning do not.
    """
    device = next(model.parameters()).device
    head = getattr(model, "head", nn.Identity())
    numbers = [*model.parameters(), *(buffer for buffer in head.buffers() if buffer.is_floating_point())]
    image = torch.zeros(1, 3, *size, device=device)
    seconds = []
    model.eval()
    with torch.inference_mode():
        for _ in range(_WARM_UP + _PASSES):
            start = time.perf_counter()
            model(pixel_values=image).logits.argmax().item()  # .item() also waits for a GPU
            seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(tensor.numel() for tensor in numbers),
        "latency_ms": 1000 * median(seconds[_WARM_UP:]),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The device in words, with the threads that compute on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {counted(threads, 'thread')}"
