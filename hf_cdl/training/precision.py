"""The precision of passes that no loss trains (`frozen_bf16`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from hf_cdl.training.arguments import CDLTrainingArguments

Output = TypeVar("Output")


def frozen_autocast(args: CDLTrainingArguments) -> AbstractContextManager[Any]:
    """The precision of passes that no loss trains, while something is learnt: bfloat16 if asked for."""
    return torch.autocast(args.device.type, torch.bfloat16) if args.frozen_bf16 else nullcontext()


def in_float32(output: Output) -> Output:
    """A model's output with what is in half precision in float32: what reads it there computes in float32."""

    def widened(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(widened, value))
        half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if half else value

    return replace(output, **{f.name: widened(getattr(output, f.name)) for f in fields(output)})  # type: ignore[type-var,arg-type]
