"""The hidden states that a forward pass keeps: those that the caller or a head requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def to_keep(asked: bool | list[int] | None, read: list[int]) -> bool | list[int] | None:
    """The hidden states to keep: those that were asked for, and those that a head reads."""
    return (asked or read or None) if not isinstance(asked, list | tuple) else [*asked, *read]


def requested_only(states: Any, asked: bool | list[int] | None) -> Any:
    """The hidden states that were asked for, None in place of others; None if none were."""
    if not asked or not isinstance(asked, list | tuple) or states is None:
        return states if asked else None
    return tuple(s if n in asked or n - len(states) in asked else None for n, s in enumerate(states))


def patch_means(states: Any, read: list[int], has_cls: bool) -> torch.Tensor | None:
    """Mean patch tokens (B, N, D) of the N hidden states that are read; None for none."""
    return torch.stack([states[number][:, int(has_cls) :].mean(dim=1) for number in read], dim=1) if read else None


def image_tokens(
    states: Any, unprompted: Callable[[int, torch.Tensor], torch.Tensor], skip: int
) -> tuple[torch.Tensor | None, ...] | None:
    """Hidden states of CLS and patches only; None for layers that were not requested.

    `unprompted`: takes the prompts' tokens out of a state, by its number; `skip`: the family's own tokens behind CLS.
    """
    if states is None:
        return None
    found = [None if state is None else unprompted(number, state) for number, state in enumerate(states)]
    if skip:
        found = [None if state is None else torch.cat([state[:, :1], state[:, 1 + skip :]], dim=1) for state in found]
    return tuple(found)
