"""Which hidden states a pass keeps: those that the caller asks for, and those that a head reads."""

from __future__ import annotations

from typing import Any

import torch


def with_read(asked: bool | list[int] | None, read: list[int]) -> bool | list[int] | None:
    """The hidden states to keep: those that were asked for, and those that a head reads."""
    return (asked or read or None) if not isinstance(asked, list | tuple) else [*asked, *read]


def asked_for(states: Any, asked: bool | list[int] | None) -> Any:
    """The hidden states that were asked for, None in place of others; None if none were."""
    if not asked or not isinstance(asked, list | tuple) or states is None:
        return states if asked else None
    return tuple(s if n in asked or n - len(states) in asked else None for n, s in enumerate(states))


def patch_means(states: Any, read: list[int], has_cls: bool) -> torch.Tensor | None:
    """Mean patch tokens (B, N, D) of the N hidden states that are read; None for none."""
    return torch.stack([states[number][:, int(has_cls) :].mean(dim=1) for number in read], dim=1) if read else None
