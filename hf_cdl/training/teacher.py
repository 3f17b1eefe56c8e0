"""The teacher of a role: all that its trainer asks about it, and all that it knows.

A trainer makes a `Teacher` of the model that it was given, or of None, and asks:

- `check(task)`, before anything is changed: has it learnt what it is to teach?
- `begin_task(student)`: a task begins; the student takes over what it keeps of its teacher, and so do the terms.
- `views`: the roles, beside the student, as whom a training batch must show the images.
- `phase(accelerator)`: around a phase, in which the teacher is in evaluation mode and prepared by Accelerate.
- `shares_query(batch)`: does the student's query of a batch serve the teacher too?
- `answer(batch, query, task_id)`: what the teacher says to a batch, with what the objective's terms add to it.
- `logits(batch)`: what it says to a batch for a head that learns its soft targets.

A teacher of None answers None, and has neither views nor phases. `--plan` asks one in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hf_cdl.distill import Objective
from hf_cdl.types import CDLOutput, Task


def same_weights(student: Any, teacher: Any) -> bool:
    """Whether the same weights answer the queries of both models."""
    ours, theirs = (
        (model.backbone if model.query_backbone is None else model.query_backbone).state_dict()
        for model in (student, teacher)
    )
    return ours.keys() == theirs.keys() and all(
        value.shape == theirs[name].shape and torch.equal(value.cpu(), theirs[name].cpu())
        for name, value in ours.items()
    )


class Teacher:
    """The model that a student's objective, or its head, learns from; None if there is none.

    `same_weights(student, teacher)` says whether both models query the same weights, where these cannot be compared.
    """

    def __init__(
        self,
        model: Any,
        student: Any,
        objective: Objective,
        same_weights: Callable[[Any, Any], bool] = same_weights,
    ):
        self.model, self.objective = model, objective
        self.teaches_terms = model is not None and objective.needs_teacher
        self.teaches_head = model is not None and student.fitted and student.head.needs_teacher
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.teaches_terms:
            objective.attach(model)
        self._shares = self.teaches_terms and _can_share(student, model) and same_weights(student, model)

    def place(self, accelerator: Any) -> None:
        """Move the teacher to a device; from now on it answers there, in the accelerator's precision."""
        self._autocast = accelerator.autocast
        if self.model is not None:
            self.model.to(accelerator.device)

    # ---- tasks ----

    def check(self, task: Task) -> None:
        """Raise ValueError if the teacher has not learnt the classes of a task."""
        tasks = getattr(self.model, "tasks", None)  # a module of a user's own need not say
        known = task.classes.stop if tasks is None else sum(map(len, tasks))
        if known < task.classes.stop:
            raise ValueError(
                f"The teacher knows {known} classes, but task {task.index + 1} goes up to class {task.classes.stop}: "
                "it learns a task before its student does. To teach it, give the task to a trainer of its own first: "
                'CDLTrainer(teacher, args, role="teacher").learn(task).'
            )

    def begin_task(self, student: Any) -> None:
        """A task begins, which the teacher has learnt."""
        if self.teaches_terms:
            student.follow(self.model)
            self.objective.begin_task(self.model)

    @property
    def views(self) -> tuple[str, ...]:
        """The roles, beside the student, as which the terms need to see an image."""
        return ("teacher",) if self.teaches_terms else ()

    @property
    def head_views(self) -> tuple[str, ...]:
        """The same for a head's soft targets."""
        return ("teacher",) if self.teaches_head else ()

    @contextmanager
    def phase(self, accelerator: Any) -> Iterator[None]:
        """In evaluation mode and prepared by Accelerate, for the terms; afterwards as it was."""
        if not self.teaches_terms:
            yield
            return
        mode = self.model.training  # its own phase left it in training mode
        self.model = accelerator.prepare_model(self.model.eval(), evaluation_mode=True)
        try:
            yield
        finally:
            self.model = unprepared(accelerator, self.model)
            self.model.train(mode)

    # ---- batches ----

    def shares_query(self, batch: Mapping[str, Any]) -> bool:
        """Whether the student's query serves the teacher too: the same frozen weights are shown the same pixels."""
        return self._shares and "teacher_pixel_values" not in batch

    def answer(
        self, batch: Mapping[str, Any], query: torch.Tensor | None = None, task_id: int | None = None
    ) -> CDLOutput | None:
        """What the teacher says to a batch, without gradient, with what the terms add to it, with gradient.

        `query` (B, D_q): the student's, which is used if it may be shared. None if no term looks at a teacher.
        """
        if not self.teaches_terms:
            return None
        asked = {
            "pixel_values": self._pixels(batch),
            "query": query if self.shares_query(batch) else None,
            "task_id": task_id,
            "output_hidden_states": self.objective.hidden_states("teacher") or None,
        }
        with torch.no_grad(), self._autocast():
            answer = self.model(**asked)
        with self._autocast():  # with gradient: a term may tune a path of its own beside the teacher's
            return self.objective.consult(answer, asked)

    def logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Logits (B, C) over all classes that the teacher knows, without gradient."""
        with torch.no_grad():
            return self.model.eval()(pixel_values=self._pixels(batch)).logits

    def _pixels(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The images as the teacher sees them: there by name if it sees another view of the same crop."""
        return batch.get("teacher_pixel_values", batch["pixel_values"])


def unprepared(accelerator: Any, model: Any) -> Any:
    """The bare model. A mark of Accelerate's left on it would keep it from being wrapped for the next task."""
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False
    return model


def _can_share(student: Any, teacher: Any) -> bool:
    """Whether the student's query could serve its teacher: both have one, of frozen weights and the same pixels."""
    asks = teacher.needs_query and student.needs_query and not student.config.train_backbone
    return asks and teacher.config.query_view is None
