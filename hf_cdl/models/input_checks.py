"""Checks of a model's inputs: images, labels and task."""

from __future__ import annotations

from typing import Any

import torch

from hf_cdl.backbones.prefix_attention import IMPLEMENTATIONS
from hf_cdl.checked import short
from hf_cdl.counted import counted


def check_pixels(pixel_values: Any, channels: int) -> None:
    """Raise ValueError unless these are floating-point images (B, channels, H, W)."""
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(f"pixel_values is a {type(pixel_values).__name__}; give a tensor (B, {channels}, H, W).")
    if pixel_values.dim() != 4 or pixel_values.shape[1] != channels or not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}, but the model takes "
            f"(B, {channels}, H, W) of floating point: what its image processor makes of RGB images."
        )


def check_labels(labels: Any, batch: int, classes: int) -> None:
    """Raise ValueError unless these are labels (B,) from 0 to classes - 1, or -100 for images to ignore."""
    if not isinstance(labels, torch.Tensor) or labels.shape != (batch,) or labels.dtype not in _WHOLE:
        got = (tuple(labels.shape), labels.dtype) if isinstance(labels, torch.Tensor) else short(labels)
        raise ValueError(f"labels is {got}; give a tensor of {batch} whole numbers, one for each image.")
    if torch.compiler.is_compiling() or not batch or type(labels) is not torch.Tensor or labels.is_meta:
        return
    real = labels[labels != -100]
    if len(real) and not 0 <= int(real.min()) <= int(real.max()) < classes:
        raise ValueError(
            f"labels go from {int(real.min())} to {int(real.max())}, but the model knows {counted(classes, 'class')}, "
            f"0 to {classes - 1}. Call begin_task(class_names) for more."
        )


def check_task(task_id: Any, tasks: int) -> None:
    """Raise ValueError unless this is None or the index of a task."""
    if task_id is not None and (isinstance(task_id, bool) or not isinstance(task_id, int) or not 0 <= task_id < tasks):
        raise ValueError(
            f"task_id is {short(task_id)}; the model has {counted(tasks, 'task')}, 0 to {tasks - 1}. None: any."
        )


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_attention(name: Any) -> str:
    """The attention implementation of the whole model. Raises ValueError for one that ignores prompts."""
    if isinstance(name, dict) and {*name} <= {""}:
        name = name.get("", "sdpa")
    if not isinstance(name, str):
        raise ValueError(
            f"attn_implementation is {short(name)}, but it is one name for the whole model; allowed: "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    name = name.removeprefix("prefix_")
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation '{name}' would ignore the prompts; allowed: {', '.join(IMPLEMENTATIONS)}."
        )
    return name
