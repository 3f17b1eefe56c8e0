"""Checks that run before any training: the parts of a trainer, and whether a role can learn a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn
from transformers.trainer_utils import IntervalStrategy

from hf_cdl.counted import counted
from hf_cdl.data.names import check_role
from hf_cdl.data.sampler import count_rounds
from hf_cdl.data.task_split import TaskSplit
from hf_cdl.distill import Objective
from hf_cdl.distill.objective import about_unlabelled
from hf_cdl.runs.run import Run
from hf_cdl.training.arguments import CDLTrainingArguments
from hf_cdl.training.labelled import check_label, check_task_labels
from hf_cdl.training.schedules import steps_per_epoch
from hf_cdl.types import Task

KNOWN = "To continue with a loaded model, tell the stream what it knows: StreamConfig(known_classes=model.tasks)."


def check_parts(model: Any, args: CDLTrainingArguments, objective: Any, teacher: Any) -> None:
    """Raise ValueError if a trainer cannot be built from these parts, or if its teacher would never be used."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective is {objective!r}, but must be an Objective: Objective(0.5, [('kd', term)]).")
    if not isinstance(model, nn.Module) or not hasattr(model, "trained_tasks"):
        raise ValueError(
            f"model is a {type(model).__name__}, which learns no tasks; give CDLForImageClassification.from_backbone("
            "...), or to train a plain image classifier on one task, ImageClassifier(model)."
        )
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ValueError(
            f"teacher is {teacher!r}, but must be a model: CDLForImageClassification.from_pretrained(...)."
        )
    if objective.needs_teacher and teacher is None:
        raise ValueError(f"The terms {', '.join(objective.terms)} need a teacher, but none was given.")
    if teacher is not None and not learns_from_teacher(model, objective):
        raise ValueError(
            "A teacher was given, but nothing learns from it: no term of the objective looks at one, and the head has "
            "no soft_targets. Give Objective a term, as Objective(0.5, [('kd', term)]), or leave the teacher out."
        )
    if teacher is not None:
        check_answers(teacher)
    layers = any(hasattr(layer, "gradient_checkpointing") for layer in model.modules())
    if args.gradient_checkpointing and not (layers and hasattr(model, "gradient_checkpointing_enable")):
        raise ValueError(
            f"activation_checkpointing is true, but the layers of this {type(model).__name__} cannot compute "
            "their activations again; leave it out."
        )


def check_answers(teacher: nn.Module) -> None:
    """Raise ValueError unless a teacher can be called as its student's trainer does."""
    try:
        signature(teacher.forward).bind(pixel_values=0, query=None, task_id=None, output_hidden_states=None)
    except TypeError as error:
        raise ValueError(
            f"teacher is a {type(teacher).__name__}, which cannot be called ({error}); give a model whose forward "
            "takes pixel_values, query, task_id and output_hidden_states (or **kwargs) and returns logits."
        ) from error


def check_used(model: Any, args: CDLTrainingArguments, callbacks: Any, run: Run | None, objective: Objective) -> None:
    """Raise ValueError for options without effect: without a run, those of storing; without a loss, those of training.

    A recipe's shared arguments may belong to another role's model; its command says what has no effect.
    """
    if not model.trains(0) and (objective.terms or objective.ce_weight != 1):
        raise ValueError(
            f"No loss trains this {type(model).__name__}, whose head is fitted, so the objective would have no "
            "effect; leave it out, or give the model a first_session."
        )
    given = {"eval_strategy": args.eval_strategy != IntervalStrategy.NO, "callbacks": bool(callbacks)}
    idle = (
        []
        if model.trains(0)
        else [name for name, used in given.items() if used and (run is None or name == "callbacks")]
    )
    if idle:
        raise ValueError(
            f"No loss trains this {type(model).__name__}, so {' and '.join(idle)} would have no effect; leave it out."
        )
    if run is None and not args.load_best_model_at_end and (args.save_steps != 500 or args.save_total_limit):
        raise ValueError(
            "save_steps or save_total_limit is set, but without a run nothing is stored; give run=Run(folder, recipe) "
            "or leave that out."
        )


def check_names(role: Any, eval_split: Any, num_tasks: Any) -> None:
    """Raise ValueError for an unknown role, an unknown split or an invalid number of tasks."""
    check_role(role)
    if eval_split not in ("test", "validation"):
        raise ValueError(f"eval_split is {eval_split!r}, but must be test or validation.")
    if num_tasks is not None and (isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1):
        raise ValueError(f"num_tasks is {num_tasks!r}, but must be a whole number of at least 1, or None.")


def check_tasks(tasks: Any) -> None:
    """Raise ValueError for anything but a list of at least one task."""
    wrong = [task for task in tasks if not isinstance(task, Task)] if isinstance(tasks, list | tuple) else [tasks]
    if wrong or not tasks:
        got = f"a {type(wrong[0]).__name__}" if wrong else "an empty list"
        raise ValueError(f"Give tasks of a stream: learn(stream[0]), answer([stream[0], stream[1]]); got {got}.")


def check_unlearnt(unlearnt: Any, tasks: Sequence[Task]) -> None:
    """Raise ValueError unless these are tasks that come after `tasks`."""
    check_tasks(unlearnt)
    if learnt := [task.name for task in unlearnt if task.index <= max(task.index for task in tasks)]:
        raise ValueError(f"unlearnt has {learnt[0]}, which was learnt; give tasks that come later, or leave it out.")


def check_order(task: Task, seen: Sequence[Task]) -> None:
    """Raise ValueError unless a task is the one after those `seen`."""
    if task.index != len(seen):
        way = f"Learn task {len(seen) + 1} first" if task.index > len(seen) else "This trainer has learnt it already"
        raise ValueError(
            f"Tasks come in order: expected task {len(seen) + 1}, got task {task.index + 1}. {way}. {KNOWN}"
        )


def check_measured(run: Run | None, role: str, seen: Sequence[Task]) -> None:
    """Raise ValueError if the previous task was stored but not measured: later its model would be gone."""
    before = run.result(role, seen[-1]) if run is not None and seen else None
    if before is not None and not before.row:
        raise ValueError(
            f"{seen[-1].name} has not been measured yet, but a run keeps the accuracies after every task. "
            "Call evaluate_seen() after each learn(task); train() does it by itself."
        )


def learnt_elsewhere(model: Any, task: Task) -> bool:
    """Whether the task was learnt elsewhere: it has no training images, and the model knows its classes."""
    return not len(task.train) and model.tasks[task.index : task.index + 1] == [list(task.class_names)]


def check_new(model: Any, task: Task) -> None:
    """Raise ValueError if a model that learns has been trained on a task already, even in part."""
    if task.index < model.trained_tasks and (model.fitted or model.trains(task.index)):
        raise ValueError(
            f"The model has been trained on task {task.index + 1} already, and would learn it a second time on top. "
            f"{KNOWN} To learn the task again, give the model as it was before."
        )


def check_not_cut_off(task: Task | None, run: Run | None, role: str) -> None:
    """Raise ValueError if `task`, which a trainer was learning, was interrupted."""
    if task is None:
        return
    start = None if run is None else run.checkpoint(role)
    way = "a model like the one this trainer began with" if start is None else f"the model from {start}"
    rest = "it begins this task again" if run is None else "with the same run it resumes from what is stored"
    raise ValueError(
        f"Learning task {task.index + 1} was interrupted, and the model of this trainer is in the middle of it. Make "
        f"a new trainer with {way}: {rest}."
    )


def check_items(data: Any, classes: int, taker: str = "evaluate", labelled: bool = True) -> None:
    """Raise ValueError unless `data` is a dataset of images with labels below `classes`; checks the first item only.

    `taker`: the method that takes the dataset, for the message. Unless `labelled`, items need no labels.
    """
    if not classes:
        raise ValueError(
            f"The model knows no class yet that {taker} could measure; give it a task first: learn(task)."
        )
    lists = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str | bytes | Mapping)
    item = data[0] if lists and len(data) else None
    needed = {"pixel_values", "labels"} if labelled else {"pixel_values"}
    if not isinstance(item, Mapping) or not needed <= {*item}:
        raise ValueError(
            f"{taker} takes a dataset with images, as task.test, whose items have {' and '.join(sorted(needed)[::-1])}"
            f"; got {'an empty ' * (lists and not len(data))}{type(data).__name__}. To measure the tasks so far use "
            "evaluate_seen()."
        )
    if "labels" in item:
        check_label(item["labels"], range(classes))


def learns_from_teacher(model: Any, objective: Objective) -> bool:
    """Whether a term or the model's head learns from a teacher."""
    return objective.needs_teacher or (model.fitted and model.head.needs_teacher)


def check_served(model: Any, task: Task) -> None:
    """Raise ImageError for training images that a checkpoint served without hf_cdl would see differently."""
    if model.served_plainly and isinstance(task.train, TaskSplit):
        task.train.check_8_bits()


def check_task(
    role: str, model: Any, objective: Any, args: CDLTrainingArguments, task: Task, teacher: Any = None
) -> None:
    """Raise ValueError if a role cannot learn a task with this model, objective and arguments."""
    images, title = len(task.train), f"The {role.replace('_', ' ')} cannot learn task {task.index + 1}"
    if not images:
        raise ValueError(f"{title}: it has no training images.")
    if images < 2 and model.unmeasured:
        raise ValueError(
            f"{title}: its head's standardise is first_task, but the deviation of one image is 0. Give the first task "
            "more training images, or standardise the file of statistics."
        )
    if model.trains(task.index):
        _refuse_data_parallel(args)
        check_training(role, model, objective, args, task.index, task.class_names, images)
    _check_unlabelled(role, model, objective, task, teacher)
    check_task_labels(task)


def _refuse_data_parallel(args: CDLTrainingArguments) -> None:
    """Raise ValueError where Trainer would split each batch by nn.DataParallel, which copies no terms or prompts."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible, but one process was started, and a process trains on one GPU. Start one "
            f"for each: accelerate launch --num_processes {args.n_gpu} -m hf_cdl train ... (or your script), or show "
            "one GPU alone: CUDA_VISIBLE_DEVICES=0."
        )


def _check_unlabelled(role: str, model: Any, objective: Objective, task: Task, teacher: Any) -> None:
    """Raise ValueError for unlabelled images, or fields about them, that would have no effect.

    A stream gives them to every role. The student learns from them in sessions in which a loss trains; later sessions
    of either may hold their features, or measure by them how features moved.
    """
    asked = _in_sessions(model)
    if task.unlabelled is None:
        if asked:
            name, value = asked[0], getattr(model.later, asked[0])
            raise ValueError(
                f"later_sessions.{name} is {value}, but {task.name} has no unlabelled images. Give the stream "
                f"some (data.unlabelled), or take the task's own: {name} task."
            )
        if model.trains(task.index) and (idle := objective.needs_unlabelled):
            raise ValueError(
                f"{', '.join(idle)} would have no effect: {task.name} has no unlabelled images. Give the stream some "
                "(data.unlabelled), or leave that out."
            )
        return
    if not len(task.unlabelled) or task.unlabelled_ratio < 1:
        raise ValueError(f"{task.name}.unlabelled has no images, or an unlabelled_ratio below 1; leave it out (None).")
    if (
        role == "student"
        and not asked
        and not _in_sessions(teacher)
        and not (model.trains(0) and objective.reads_unlabelled)
    ):
        why = "no term learns from images without labels" if model.trains(0) else "no loss trains the student"
        raise ValueError(
            f"{task.name}.unlabelled would have no effect: {why}. Give Objective a term that does, as ('kd', term), "
            "and a teacher; or leave the unlabelled images out."
        )


def _in_sessions(model: Any) -> list[str]:
    """The fields by which later sessions of a model, or of none, read unlabelled images."""
    later = getattr(model, "later", None)
    return [] if later is None else about_unlabelled(later)


def check_training(
    role: str,
    model: Any,
    objective: Any,
    args: CDLTrainingArguments,
    index: int,
    class_names: Sequence[str],
    images: int,
) -> None:
    """Raise ValueError if a role cannot be trained with a loss on task `index` with these classes and `images`."""
    _refuse_one_class(role, model, objective, index, class_names)
    processes, batch = args.world_size, args.per_device_train_batch_size
    _refuse_late(args, images)
    try:
        objective.check(len(class_names), min(batch, -(-images // processes)))
    except ValueError as error:
        raise ValueError(f"The {role.replace('_', ' ')} cannot learn task {index + 1}. {error}") from error
    if args.dataloader_drop_last and not count_rounds(images, batch, True, processes):
        on_each = f" on each of {counted(processes, 'process')}" if processes > 1 else ""
        raise ValueError(
            f"A task has {counted(images, 'training image')}, fewer than a batch of {batch}{on_each}, but "
            "dataloader_drop_last leaves incomplete batches out. Lower train.per_device_train_batch_size or set the "
            "other to false."
        )


def _refuse_late(args: CDLTrainingArguments, images: int) -> None:
    """Raise ValueError if a phase on `images` images would end before its first evaluation during training."""
    per_epoch = steps_per_epoch(args, images)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    length = steps if args.eval_strategy == IntervalStrategy.STEPS else steps / per_epoch
    if args.eval_strategy != IntervalStrategy.NO and args.eval_delay > length:
        unit = "steps" if args.eval_strategy == IntervalStrategy.STEPS else "epochs"
        raise ValueError(
            f"eval_delay is {args.eval_delay:g} {unit}, but a task of {counted(images, 'training image')} has "
            f"{length:g}: nothing would be evaluated. Lower it, or leave out eval_strategy."
        )


def _refuse_one_class(role: str, model: Any, objective: Any, index: int, class_names: Sequence[str]) -> None:
    """Raise ValueError if a role learns by comparing a task's classes, but the task has only one.

    Every loss would be 0. Compared with earlier classes only, without their images, the new class would always win.
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
