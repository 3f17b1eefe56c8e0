"""A Trainer whose phases may be steered by the accuracy during training: best epoch, early stopping, plateau.

That accuracy is measured on validation images. Early stopping counts within one phase; what callbacks count survives
an interruption.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cdl.runs.files import RunError
from hf_cdl.runs.run import Run
from hf_cdl.training.arguments import STEERED, CDLTrainingArguments
from hf_cdl.training.checking import check_items
from hf_cdl.training.progress import phase_title
from hf_cdl.types import Task, TaskSplit


class SteeredTrainer(Trainer):
    """Chooses the images for evaluation during training, and ends a phase with its best state if requested.

    Subclasses set the attributes below and define what a phase changes.
    """

    args: CDLTrainingArguments
    model: Any
    run: Run | None
    role: str
    eval_split: str
    seen: list[Task]
    """The tasks so far; the last one is the current phase's."""
    eval_dataset: Any
    """The user's own images for evaluation during training, instead of the newest task's."""
    num_tasks: int | None
    _best: dict[str, torch.Tensor]
    """The tensors of the phase's best evaluation, when there is no run to store them."""

    def _changing(self) -> dict[str, torch.Tensor]:
        """The tensors a phase changes, by name."""
        raise NotImplementedError

    @property
    def _steering(self) -> list[str]:
        """Everything that lets the accuracy during training change the training; user callbacks always count.

        Any event of a callback counts: the state it receives holds what was logged, and it may act on that.
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
        """Images for evaluation during training: validation images if their accuracy can change the training.

        The user's own `eval_dataset` takes precedence.
        """
        if self.eval_dataset is not None:
            return self.eval_dataset
        return task.validation if self._steering else getattr(task, self.eval_split)

    def check(self, task: Task) -> None:
        """Raise ValueError if this task lacks the images that the arguments and callbacks need."""
        steering, fixed = self._steering, not self.model.trains(task.index)
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
        """Reset early stopping, which counts within one phase; a callback of the user's keeps its state."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):  # may be added after the arguments were created
                self.args.choose_by_accuracy()
                fresh: Any = type(callback)(**callback.state()["args"])
                for name, value in fresh.state()["attributes"].items():
                    setattr(callback, name, value)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch as Trainer does, unless the phase had already stopped when it was interrupted."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in Trainer, but keep the best state regardless of save_steps."""
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            if self.run is None:
                self._best = {name: value.detach().clone() for name, value in self._changing().items()}
            else:
                self.control.should_save = True
        return better

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, with the path of the best state set anew: it changes when a run's folder is moved."""
        self.state.best_model_checkpoint = self._best_checkpoint
        if self._best:
            self._put_back(self._best)
            self._best = {}
        return super()._finalize_training(*args, **kwargs)

    @property
    def _best_checkpoint(self) -> str | None:
        """Path of the phase's best stored state; None if it is not needed or does not exist."""
        step = self.state.best_global_step
        if self.run is None or not self.args.load_best_model_at_end or not step:
            return None
        return str(self.run.work_folder(self.role, self.seen[-1]) / f"checkpoint-{step}")

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        if not (best / "trained.safetensors").is_file():
            raise RunError(
                f"The best state of {self._title(self.seen[-1])}, {best}, no longer exists. Delete {best.parent} "
                "and run the same command again: the task is learnt again."
            )
        self._load_from_checkpoint(str(best))

    def _put_back(self, stored: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._changing().items():
                value.copy_(stored[name])

    def _title(self, task: Task) -> str:
        return phase_title(task.index, self.num_tasks, self.role)
