"""A Trainer whose phases may go by the accuracy during training: the best epoch, early stopping, a plateau.

Such accuracies are those of validation images. What the phase counts is its own, and goes on where it was cut off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cdl.runs.files import RunError
from hf_cdl.runs.run import Run
from hf_cdl.training.arguments import STEERED, CDLTrainingArguments
from hf_cdl.training.checking import check_items
from hf_cdl.training.progress import phase_title
from hf_cdl.types import Task, TaskSplit


class SteeredTrainer(Trainer):
    """Says which images evaluation during training reads, and ends a phase with its best state if that is asked for.

    A subclass sets the attributes below, and says what a phase changes.
    """

    args: CDLTrainingArguments
    model: Any
    run: Run | None
    role: str
    eval_split: str
    seen: list[Task]
    """The tasks so far; the last one is the phase's."""
    eval_dataset: Any
    """A user's own images for evaluation during training, in place of the newest task's."""
    num_tasks: int | None
    _best: dict[str, torch.Tensor]
    """What the phase's best evaluation had learnt, without a run to store it."""

    def _changing(self) -> dict[str, torch.Tensor]:
        """What a phase changes, by name."""
        raise NotImplementedError

    @property
    def _steering(self) -> list[str]:
        """What lets the accuracy during training change the training; every callback of a user's is taken to.

        Whatever event it waits for: what was logged is in the state that it is given, and what it does is its own.
        """
        args = self.args
        named = {
            f"lr_scheduler_type {args.lr_scheduler_type}": args.lr_scheduler_type in STEERED,
            "load_best_model_at_end": args.load_best_model_at_end,
            "save_strategy best": args.save_strategy == SaveStrategy.BEST,
        }
        return [name for name, used in named.items() if used] + [
            type(callback).__name__
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
            or not type(callback).__module__.startswith(("transformers.", "hf_cdl."))
        ]

    def _evaluation_images(self, task: Task) -> TaskSplit | None:
        """Those of a task that evaluation during training reads: for validation, if their accuracy changes anything.

        A dataset of a user's own (`eval_dataset`) comes before them.
        """
        if self.eval_dataset is not None:
            return self.eval_dataset
        return task.validation if self._steering else getattr(task, self.eval_split)

    def check(self, task: Task) -> None:
        """Raises ValueError if what the arguments and callbacks ask for cannot be done on this task."""
        steering, fixed = self._steering, self.model.fitted and (task.index > 0 or not self.model.config.first_session)
        stopping = any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        if self.args.eval_strategy == IntervalStrategy.NO:
            if stopping:
                raise ValueError("EarlyStoppingCallback goes by the accuracy in training; set eval_strategy epoch.")
        elif not fixed and self.eval_dataset is not None:
            check_items(self.eval_dataset, task.classes.stop, "eval_dataset")
            if steering and self.eval_dataset is task.test:
                raise ValueError(
                    f"{' and '.join(steering)} of the {self.role} would choose by test images: eval_dataset is those "
                    f"of {task.name}, and nothing else may change the training. Give it images for validation, or "
                    f"leave out {' and '.join(steering)}."
                )
        elif not fixed and not len(self._evaluation_images(task) or ()):
            if steering:
                raise ValueError(
                    f"{' and '.join(steering)} of the {self.role} would choose by test images: {task.name} has no "
                    "validation images, and nothing else may change the training. Give the data a validation split "
                    f"(data.validation_split names one), or leave out {' and '.join(steering)}."
                )
            raise ValueError(
                f"eval_strategy is set, but {task.name} has no {self.eval_split} images. Give it some, or set "
                "eval_strategy no."
            )
        self._check_split(task)

    def _check_split(self, task: Task) -> None:
        if getattr(task, self.eval_split) is None:
            raise ValueError(
                f"eval_split is {self.eval_split}, but {task.name} has no such images. Give it some, or choose the "
                "other: test or validation."
            )

    def _begin_callbacks(self) -> None:
        """What callbacks count, as early stopping does, is of one phase."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):  # it may have been added after the arguments were made
                self.args.go_by_accuracy()
            if isinstance(callback, ExportableState):
                fresh: Any = type(callback)(**callback.state()["args"])
                for name, value in fresh.state()["attributes"].items():
                    setattr(callback, name, value)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, if the phase had not been stopped before it was cut off."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; keeps the best state, whatever save_steps says."""
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            if self.run is None:
                self._best = {name: value.detach().clone() for name, value in self._changing().items()}
            else:
                self.control.should_save = True
        return better

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which goes by the path of the best state: it is another where a run was moved."""
        self.state.best_model_checkpoint = self._best_checkpoint
        if self._best:
            self._put_back(self._best)
            self._best = {}
        return super()._finalize_training(*args, **kwargs)

    @property
    def _best_checkpoint(self) -> str | None:
        """Where the phase's best state is stored, if that is of any use."""
        step = self.state.best_global_step
        if self.run is None or not self.args.load_best_model_at_end or not step:
            return None
        return str(self.run.work_folder(self.role, self.seen[-1]) / f"checkpoint-{step}")

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        if not (best / "trained.safetensors").is_file():
            raise RunError(
                f"The best state of {self._title(self.seen[-1])}, {best}, is not there any more. Delete {best.parent} "
                "and run the same command again: the task is learnt anew."
            )
        self._load_from_checkpoint(str(best))

    def _put_back(self, stored: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._changing().items():
                value.copy_(stored[name])

    def _title(self, task: Task) -> str:
        return phase_title(task.index, self.num_tasks, self.role)
