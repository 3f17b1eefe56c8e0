"""Trainer's interface here: each argument and method is either supported, or refused by name with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput, speed_metrics

from hf_cdl.data import TaskStream
from hf_cdl.runs.run import Run
from hf_cdl.types import Task

_OPTIMIZER = (
    "every task begins with a new optimizer and schedule; set them in args (optim, learning_rate, lr_scheduler_type "
    "...), or override create_optimizer in a subclass"
)
KEYWORDS = {
    "data_collator": "samples become batches as transformers' default_data_collator has it; change what the items of "
    "the dataset hold",
    "model_init": "a continual model grows from task to task and is never built again; give it as `model`",
    "compute_loss_func": "the loss is the objective's, a sum of named terms; write a Term for what else is to be "
    "learnt, and give it to Objective",
    "optimizers": _OPTIMIZER,
    "optimizer_cls_and_kwargs": _OPTIMIZER,
    "preprocess_logits_for_metrics": "the logits are those of the classes, which are few; give compute_metrics, "
    "which sees them as they are",
}
"""Arguments of Trainer that are not supported here, and why."""

_LOSS = "it would measure by the loss of the newest task alone; use evaluate(dataset) or predict(dataset)"
_SEARCH = "hyperparameter_search"
METHODS = {
    _SEARCH: "every trial needs a new model and a stream of its own; make a trainer for each, or "
    "compare variants with hf-cdl compare",
    "push_to_hub": "model.push_to_hub(...) pushes the model, hf-cdl push a run with its card and tasks",
    "create_model_card": "the card of a continual model tells its tasks: hf-cdl card writes a run's",
    "evaluation_loop": _LOSS,
    "prediction_step": _LOSS,
}
"""Methods of Trainer that would not do here what their names promise, and why."""


def check_keywords(given: dict[str, Any], known: list[str]) -> None:
    """Raise ValueError for unsupported arguments of Trainer, and TypeError for unknown ones; `known`: all names."""
    for name in given:
        if name in KEYWORDS:
            raise ValueError(f"{name} is not an argument of CDLTrainer: {KEYWORDS[name]}.")
        near = "".join(f"; did you mean {near!r}?" for near in get_close_matches(name, known, 1))
        raise TypeError(f"CDLTrainer has no argument {name!r}{near or '; it has ' + ', '.join(known) + '.'}")


def check_given(compute_metrics: Any, callbacks: Any, processing_class: Any, eval_dataset: Any, run: Any) -> None:
    """Raise ValueError for arguments of the wrong kind."""
    items = callbacks if isinstance(callbacks, list | tuple) else [0]
    kinds = [item if isinstance(item, type) else type(item) for item in items]
    lists = hasattr(eval_dataset, "__len__") and hasattr(eval_dataset, "__getitem__")
    metrics = "a function of an EvalPrediction (predictions, label_ids) that gives a dict"
    processor = "an image processor, with save_pretrained: AutoImageProcessor.from_pretrained(...)"
    for name, value, fits, wanted in (
        ("compute_metrics", compute_metrics, callable(compute_metrics), metrics),
        (
            "callbacks",
            callbacks,
            all(issubclass(kind, TrainerCallback) for kind in kinds),
            "a list of TrainerCallbacks",
        ),
        ("processing_class", processing_class, hasattr(processing_class, "save_pretrained"), processor),
        ("eval_dataset", eval_dataset, lists and not isinstance(eval_dataset, str | bytes), "a dataset of images"),
        ("run", run, isinstance(run, Run), "a Run: Run(folder, recipe)"),
    ):
        if value is not None and not fits:
            raise ValueError(f"{name} is {value!r}, but must be {wanted}.")


def refused(name: str) -> Callable[..., NoReturn]:
    """A method that replaces Trainer's of that name and raises ValueError with the reason."""

    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"{name} is not a method of CDLTrainer: {METHODS[name]}.")

    method.__name__ = name
    method.__doc__ = f"Refused: {METHODS[name]}."
    return method


def tasks_of(train_dataset: Any) -> list[Task]:
    """The tasks `train()` learns, from a stream, a list or a single task. Raises ValueError for anything else."""
    if train_dataset is None:
        return []
    tasks = [train_dataset] if isinstance(train_dataset, Task) else train_dataset
    lists = isinstance(tasks, TaskStream | list | tuple)
    if not lists or not len(tasks) or any(not isinstance(task, Task) for task in tasks):
        raise ValueError(
            f"train_dataset is {'an empty ' * (lists and not len(tasks))}{type(train_dataset).__name__}, but must be "
            "a TaskStream, a list of its tasks, or a task: a plain dataset does not say which classes come in which "
            "task. Make a stream of it: TaskStream(StreamConfig(path=..., classes_per_task=10), processor)."
        )
    indices = [task.index for task in tasks]
    if indices != [*range(indices[0], indices[0] + len(indices))]:
        raise ValueError(
            f"train_dataset has the tasks {', '.join(str(index + 1) for index in indices)}, but tasks come in order, "
            "each once. Give a TaskStream, or a list of its tasks as they come."
        )
    return [*tasks]


def check_train(resume_from_checkpoint: Any, trial: Any, ignore_keys: Any, has_run: bool) -> None:
    """Raise ValueError for arguments of Trainer.train that would have no effect."""
    if trial is not None:
        raise ValueError(f"trial is {trial!r}, but there is no hyperparameter_search: {METHODS[_SEARCH]}.")
    if ignore_keys:
        raise ValueError(f"ignore_keys_for_eval is {ignore_keys!r}, but only logits are looked at; leave it out.")
    if isinstance(resume_from_checkpoint, bool | None) and (has_run or not resume_from_checkpoint):
        return
    where = "its ledger says from where; leave it out" if has_run else "without a run nothing is stored; give one"
    raise ValueError(
        f"resume_from_checkpoint is {resume_from_checkpoint!r}, but a trainer with a run (run=Run(folder, recipe)) "
        f"resumes by itself where it stopped, and {where}."
    )


@dataclass
class Total:
    """Totals of `train()` so far: optimizer steps, this process's own steps with their summed loss, and images."""

    steps: int = 0
    own_steps: int = 0
    loss: float = 0.0
    images: int = 0

    def output(self, start: float) -> TrainOutput:
        """Trainer's output over all tasks since `start`; if no loss trained anything, it is NaN and not a metric."""
        metrics: dict[str, float] = speed_metrics("train", start, num_samples=self.images, num_steps=self.own_steps)
        if not self.own_steps:
            return TrainOutput(self.steps, float("nan"), metrics)
        loss = self.loss / self.own_steps
        return TrainOutput(self.steps, loss, {**metrics, "train_loss": loss})
