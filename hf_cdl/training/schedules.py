"""Learning-rate schedules that are constant within an epoch: the CDL authors' `epoch_cosine`, and `lr_steps`."""

from __future__ import annotations

import math
from collections.abc import Callable

from hf_cdl.training.arguments import CDLTrainingArguments


def epoch_factor(arguments: CDLTrainingArguments, epochs: int) -> Callable[[int], float] | None:
    """Learning-rate factor in epoch e = 0 .. epochs - 1, for schedules that change per epoch; otherwise None.

    `epoch_cosine`: cos(99 pi max(e - 1, 0) / (200 (K - 1))), K epochs. The CDL authors' scheduler starts one count
    late, so the second epoch still runs at the full rate and the last one does not reach the formula's end; trained
    models depend on it.
    """
    if arguments.epoch_cosine:
        return lambda epoch: math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * max(epochs - 1, 1)))
    if arguments.lr_steps:
        return lambda epoch: arguments.lr_decay ** sum(epoch >= step for step in arguments.lr_steps or [])
    return None
