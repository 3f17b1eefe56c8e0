"""How long a task is trained on, and learning-rate schedules that are constant within an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

from hf_cdl.data.sampler import count_rounds
from hf_cdl.training.arguments import CDLTrainingArguments


def steps_per_epoch(args: CDLTrainingArguments, images: int) -> int:
    """Steps of an epoch of so many images."""
    rounds = count_rounds(images, args.per_device_train_batch_size, args.dataloader_drop_last, args.world_size)
    return max(1, -(-rounds // args.gradient_accumulation_steps))


def epochs_begun(args: CDLTrainingArguments, images: int) -> int:
    """Epochs, the last perhaps in part, for which a task of so many images is trained on."""
    steps = args.max_steps
    return math.ceil(args.num_train_epochs) if steps <= 0 else -(-steps // steps_per_epoch(args, images))


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
