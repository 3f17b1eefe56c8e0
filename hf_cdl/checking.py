"""What a role could not learn, said before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_cdl.tasks.sampler import count_rounds
from hf_cdl.tasks.split import TaskSplit
from hf_cdl.training_args import CDLTrainingArguments
from hf_cdl.types import Task


def check_task(role: str, model: Any, objective: Any, args: CDLTrainingArguments, task: Task) -> None:
    """Raise ValueError if a role could not learn a task with that model, objective and those arguments.

    So do images that its checkpoint, served without hf_cdl, would see otherwise (ImageError).
    """
    images, title = len(task.train), f"The {role.replace('_', ' ')} cannot learn task {task.index + 1}"
    if not images:
        raise ValueError(f"{title}: it has no training images.")
    if model.served_plainly and isinstance(task.train, TaskSplit):
        task.train.check_8_bits()
    if images < 2 and model.unmeasured:
        raise ValueError(
            f"{title}: its head's standardise is first_task, but the deviation of one image is 0. Give the first task "
            "more training images, or standardise the file of statistics."
        )
    if model.trains(task.index):
        check_training(role, model, objective, args, task.index, task.class_names, images)


def check_training(
    role: str,
    model: Any,
    objective: Any,
    args: CDLTrainingArguments,
    index: int,
    class_names: Sequence[str],
    images: int,
) -> None:
    """Raise ValueError if a loss could not train a role on the task `index` with these classes and so many images."""
    _refuse_one_class(role, model, objective, index, class_names)
    processes, batch = args.world_size, args.per_device_train_batch_size
    try:
        objective.check(len(class_names), min(batch, -(-images // processes)))
    except ValueError as error:
        raise ValueError(f"The {role.replace('_', ' ')} cannot learn task {index + 1}. {error}") from error
    if args.dataloader_drop_last and not count_rounds(images, batch, True, processes):
        on_each = f" on each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"A task has {images} training images, fewer than a batch of {batch}{on_each}, but dataloader_drop_last "
            "leaves incomplete batches out. Lower train.per_device_train_batch_size or set the other to false."
        )


def _refuse_one_class(role: str, model: Any, objective: Any, index: int, class_names: Sequence[str]) -> None:
    """Raise ValueError if a role learns by comparing a task's classes, and the task has only one.

    Every loss would be 0. Against earlier classes alone, with no image of theirs, the new one would win everywhere.
    """
    if len(class_names) > 1 or (model.fitted and not objective.compares_classes):
        return
    ways = {"linear_head": "or leave linear_head out of baselines"}
    way = "or learn classes one by one with a fitted head (model: cdl, head: {type: ridge}, prompt none, distill [])"
    if model.fitted:
        way = "or leave out first_session and what learns in it (prompts, lora, train_backbone, distill)"
    raise ValueError(
        f"The {role.replace('_', ' ')} cannot learn task {index + 1}, which has one class ({class_names[0]!r}): it is "
        "trained by comparing the classes of a task, so every loss would be 0.\nGive each task at least two classes "
        f"(data.classes_per_task, a number or a list of sizes), {ways.get(role, way)}."
    )
