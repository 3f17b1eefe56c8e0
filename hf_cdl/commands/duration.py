"""Estimate how long a run may take, from one timed pass of each model over a few images on this machine.

A rough guide: a step counts as a fixed number of passes, and how much will be cached is not known yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch

from hf_cdl.counted import counted
from hf_cdl.data import ImageError
from hf_cdl.data.views import output_size
from hf_cdl.escape import visible
from hf_cdl.runs.cost import device_name
from hf_cdl.runs.verdict import baselines

_FEW = 8
_STEP = 3
"""Passes that a training step counts as: forward, backward, and a query or the gradients of the weights."""
_TRIES = 3
"""Timed passes, of which the fastest counts: a core that is briefly busy elsewhere would distort the estimate."""
_MINUTES = (1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 90)


def announcement(name: str, tasks: Sequence[Any], trainers: Sequence[Any]) -> str:
    """What a run is about to do, and how long that may take; `tasks`: those still to be learnt."""
    beside = baselines(trainer.role for trainer in trainers)
    who = [visible(trainer.role) for trainer in trainers if trainer.role not in beside]
    who += [counted(len(beside), "baseline")] if beside else []
    said = f"{visible(name)}: {' and '.join([', '.join(who[:-1]), *who[-1:]][not who[1:] :])} will learn "
    said += f"{counted(sum(len(task.class_names) for task in tasks), 'class')} in {counted(len(tasks), 'task')}"
    expected = seconds(tasks, trainers)
    where = device_name(trainers[-1].args.device)
    return said if expected is None else f"{said}; this may take {in_words(expected)} ({where})"


def in_words(expected: float) -> str:
    """Seconds in units that fit: `about 2 minutes`."""
    if expected < 45:
        return "less than a minute"
    if expected < 100 * 60:
        return f"about {counted(min(_MINUTES, key=lambda some: abs(some - expected / 60)), 'minute')}"
    hours = expected / 3600
    return f"about {counted(round(hours), 'hour')}" if hours < 48 else f"about {counted(round(hours / 24), 'day')}"


def seconds(tasks: Sequence[Any], trainers: Sequence[Any]) -> float | None:
    """Expected seconds to learn and measure the tasks; None if a teacher is sharded over several processes."""
    if any(getattr(trainer.args, "shard_teacher", False) for trainer in trainers):
        return None
    passes, computing, read, queried = {}, 0.0, 0.0, False
    for trainer in trainers:
        own = passes[trainer.role] = _pass(trainer)
        trained, looked = _images(trainer, tasks)
        plain = getattr(trainer.model, "is_plain", False)  # it reads the queries that another role computed
        taught = passes.get("teacher", 0.0) if trainer.role == "student" and trainer.teacher.model is not None else 0.0
        computing += trained * (own * ((not queried) if plain else _STEP) + taught) + looked * own
        read, queried = max(read, trained, looked), queried or (trained > 0 and not plain)
    args = trainers[0].args
    return (computing + read * _reading(tasks[0]) / max(1, args.dataloader_num_workers)) / args.world_size


def _images(trainer: Any, tasks: Sequence[Any]) -> tuple[float, int]:
    """How many images a loss trains on, over all epochs, and how many more are seen in fitting and evaluation."""
    trained, looked, measured, args = 0.0, 0, 0, trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    for task in tasks:
        measured += len(getattr(task, trainer.eval_split) or ())
        looked += measured + len(task.train) * trainer.model.fitted
        if trainer.model.trains(task.index):
            trained += args.max_steps * batch if args.max_steps > 0 else args.num_train_epochs * len(task.train)
    return trained, looked


def _pass(trainer: Any) -> float:
    """Seconds per image of a forward pass without prompts."""
    model, few = trainer.model, trainer.args.per_device_train_batch_size
    run = model.compute_query if hasattr(model, "compute_query") else lambda pixels: model.model(pixels).logits
    device, training = next(model.parameters()).device, model.training
    few = few if device.type == "cuda" else min(few, _FEW)
    images = torch.zeros(few, 3, *output_size(trainer.processing_class), device=device)
    model.eval()
    with torch.no_grad():  # not inference_mode: what a model keeps of this pass must be fit for training
        run(images)  # the first pass also sets up kernels and threads
        taken = []
        for _ in range(_TRIES):
            started = time.perf_counter()
            run(images)[0, 0].item()  # waits for a GPU
            taken.append(time.perf_counter() - started)
    model.train(training)
    return min(taken) / few


def _reading(task: Any) -> float:
    """Seconds to prepare a training image; an unreadable one is reported when it is used."""
    few, started = range(min(_FEW, len(task.train))), time.perf_counter()
    with contextlib.suppress(ImageError):
        for index in few:
            task.train[(index, 0)]
    return (time.perf_counter() - started) / max(1, len(few))
