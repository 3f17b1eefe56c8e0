"""A Trainer's passes that no loss trains: queries, teacher, features of a fitted head; computed once if possible."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_cdl.training.kept import Collate, Kept, Query, Recall, kept_with, open_folder
from hf_cdl.training.kept.features import KeptFeatures
from hf_cdl.training.precision import frozen_autocast
from hf_cdl.training.schedules import epochs_begun
from hf_cdl.training.task_trainer import TaskTrainer
from hf_cdl.training.teacher import Teacher
from hf_cdl.types import CDLOutput, Task, TaskResult


class FrozenTrainer(TaskTrainer):
    """Adds to a Trainer the passes without gradient and what is kept of them. Subclasses set `teacher`."""

    teacher: Teacher
    _kept: Kept
    _kept_features: KeptFeatures
    _own_query: Query | None
    """Gives the model's queries; None if every pass computes its own."""
    _own_features: Recall | None
    """Gives the features of a model whose head is fitted and whose features are fixed."""
    _recurring: bool
    """Whether training batches come again within the task."""

    def _begin_keeping(self, cache: str | Path | None) -> None:
        """Share what is kept with the other trainers of the run, or of the teacher; `cache`: its folder, if any."""
        self._kept, self._recurring = kept_with(self.run, self.teacher.model, self.model), False
        if cache is not None:
            open_folder(self._kept, cache, warnings.warn if self.run is None else self.run.say)
        self.data_collator = Collate(by_content=self._kept.files is not None)
        self._read_kept()

    @property
    def cache_use(self) -> str | None:
        """How many bytes the trainers of the run read from their cache and wrote into it; None without one."""
        return None if self._kept.files is None else str(self._kept.files)

    def _used(self) -> dict[str, int]:
        """Bytes that trainers of the run hold in memory, and that they found, read and wrote so far."""
        shared, own, files = self._kept, self._kept_features, self._kept.files
        return {
            "held_bytes": shared.held + own.held,
            "found_bytes": shared.found + own.found,
            "read_bytes": files.read if files else 0,
            "written_bytes": files.written if files else 0,
        }

    def _say_kept(self, result: TaskResult, before: dict[str, int]) -> None:
        """Add to a result what is kept, and what was used of it since `before`."""
        now = self._used()
        used = {name: result.kept.get(name, 0) + now[name] - before[name] for name in now}
        result.kept = {**used, "held_bytes": now["held_bytes"]}

    def _read_kept(self, task: Task | None = None) -> None:
        """From now on, until weights change, reuse outputs that are known already; `task`: the one that trains now."""
        self._recurring = task is not None and recurs(task, self.args)
        teacher, model = self.teacher.model, self.model
        self._own_query = self._own_features = None
        self.teacher.read = (None, None)
        self._own_query = self._kept.reader(model, self._recurring)
        if getattr(model, "fitted", False) and model.session_head is None:
            reads = f"features {model.head.reads_layers}"
            self._own_features = self._kept.outputs(model, reads, heads=False)
        if teacher is not None:
            answers = self._kept.outputs(teacher, "answer", recurring=self._recurring) if self._keeps_answers else None
            self.teacher.read = (self._kept.reader(teacher, self._recurring), answers)

    @property
    def _keeps_answers(self) -> bool:
        """Whether the teacher stays as it is while the student learns, and nothing runs beside it."""
        trained = {id(p) for part in (self.model, self.objective) for p in part.parameters() if p.requires_grad}
        shared = any(id(parameter) in trained for parameter in self.teacher.model.parameters())
        return not shared and not self.teacher.is_extended

    def _query(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The model's query for a batch, without gradient."""
        pixels = batch["pixel_values"]
        if self._own_query is None or "images" not in batch:
            with torch.no_grad():
                return self.model.compute_query(pixels)
        return self._own_query(pixels, batch["images"]["pixel_values"])

    def _output(self, batch: Mapping[str, Any]) -> CDLOutput:
        """The model's output for a batch that nothing learns from by a loss, without gradient."""
        pixels, found = batch["pixel_values"], batch.get("images")
        known = {"query": self._query(batch)} if self._own_query and found is not None else {}
        with torch.no_grad():
            if self._own_features is None or found is None:
                return self.model(pixel_values=pixels, **known)
            return self.model.answer(
                self._own_features(
                    pixels, found["pixel_values"], None, lambda: features_of(self.model(pixel_values=pixels, **known))
                )
            )

    def _student_and_teacher(
        self, model: nn.Module, batch: dict[str, Any], task_id: int | None
    ) -> tuple[CDLOutput, CDLOutput | None]:
        """Outputs of the model and, if terms need one, its teacher for a batch; a shared query is computed once.

        Images behind those with `labels` have none.
        """
        pixels, query = batch["pixel_values"], None
        hidden, labelled = self.objective.hidden_states("student") or None, len(batch["labels"])
        learning = self.model.training
        frozen = frozen_autocast(self.args) if learning else nullcontext()
        apart = "images" in batch or (learning and self.args.frozen_bf16)
        known = self._own_query is not None and apart and not (hidden and self.model.is_plain)
        if known or self.objective.needs_query or self.teacher.shares_query(batch):
            with torch.no_grad(), self.accelerator.autocast(), frozen:
                query = self._query(batch)
            query = query.float() if learning and self.args.frozen_bf16 else query
        teacher = self.teacher.answer(batch, query, task_id, learning)
        more = {"labelled": labelled} if labelled < len(pixels) else {}  # a user's own model need not know it
        student: CDLOutput = model(
            pixel_values=pixels, query=query, task_id=task_id, output_hidden_states=hidden, **more
        )
        return student, teacher


def features_of(output: CDLOutput) -> CDLOutput:
    """The fields of an output that heads read and `answer` needs."""
    return CDLOutput(features=output.features, kd_features=output.kd_features, layers=output.layers)


def recurs(task: Task, args: Any) -> bool:
    """Whether whole batches of augmented views come again while a task is trained on."""
    return task.views is not None and task.views < epochs_begun(args, len(task.train))
