"""The teacher of a role, as its trainer sees it.

A trainer wraps the model it was given, or None, in a `Teacher` and uses:

- `check(task)`, before anything is changed: has the teacher learnt what it should teach?
- `begin_task(student)`: a task begins; the student and the terms copy what they keep of the teacher.
- `views`: the roles, besides the student, whose view of the images a training batch must have.
- `phase(accelerator)`: context of a phase, with the teacher in evaluation mode and prepared by Accelerate.
- `read`: set by the trainer; it returns queries and outputs that are already known.
- `shares_query(batch)`: can the teacher reuse the student's query for a batch?
- `answer(batch, query, task_id)`: the teacher's output for a batch, extended by the objective's terms.
- `logits(batch)`: its logits for a batch, for a head that learns soft targets.

A teacher of None returns None and has neither views nor phases. `--plan` uses one in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hf_cdl.counted import counted
from hf_cdl.distill import Objective, Term
from hf_cdl.training.kept import Query, Recall
from hf_cdl.training.kept.weights import equal, query_backbone_of
from hf_cdl.training.precision import in_float32
from hf_cdl.types import CDLOutput, Task


def same_weights(student: Any, teacher: Any) -> bool:
    """Whether both models compute their queries with the same weights."""
    return equal(query_backbone_of(student), query_backbone_of(teacher))


class Teacher:
    """The model that a student's objective or head learns from, or None.

    `same_weights(student, teacher)` says whether both models compute queries with the same weights; pass one where
    the weights themselves cannot be compared.
    """

    def __init__(
        self,
        model: Any,
        student: Any,
        objective: Objective,
        same_weights: Callable[[Any, Any], bool] = same_weights,
    ):
        self.model, self.objective = model, objective
        self.read: tuple[Query | None, Recall | None] = (None, None)
        """Functions for its queries and its outputs that reuse known ones."""
        self.teaches_terms = model is not None and objective.needs_teacher
        self.teaches_head = model is not None and student.fitted and student.head.needs_teacher
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._frozen: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.teaches_head and self.fitted_head is not None and self.fitted_head.fitted_scale is not None:
            raise ValueError(
                "The teacher's head has scale: auto, so its logits do not give the scores that a student's "
                "soft_targets are made of. Give the teacher's head a number as its scale."
            )
        if self.teaches_terms:
            objective.attach(model)
        self._shares = self.teaches_terms and _can_share(student, model) and same_weights(student, model)

    def place(self, accelerator: Any, frozen: Callable[[], AbstractContextManager[Any]]) -> None:
        """Move the teacher to the accelerator's device; from now on it runs there, in the accelerator's precision.

        While something is learnt, its passes run within `frozen()` too.
        """
        self._autocast, self._frozen = accelerator.autocast, frozen
        if self.model is not None:
            self.model.to(accelerator.device)

    # ---- tasks ----

    def check(self, task: Task) -> None:
        """Raise ValueError if the teacher has not learnt the classes of a task."""
        tasks = getattr(self.model, "tasks", None)  # a user's own module need not have it
        known = task.classes.stop if tasks is None else sum(map(len, tasks))
        if known < task.classes.stop:
            raise ValueError(
                f"The teacher knows {counted(known, 'class')}, but task {task.index + 1} goes up to class "
                f"{task.classes.stop}: it learns a task before its student does. To teach it, give the task to a "
                "trainer of its own first: "
                'CDLTrainer(teacher, args, role="teacher").learn(task).'
            )

    def begin_task(self, student: Any) -> None:
        """Begin a task that the teacher has already learnt."""
        if self.teaches_terms:
            student.follow(self.model)
            self.objective.begin_task(self.model)

    @property
    def views(self) -> tuple[str, ...]:
        """The roles, besides the student, whose views of an image the terms need."""
        return ("teacher",) if self.teaches_terms else ()

    @property
    def head_views(self) -> tuple[str, ...]:
        """Like `views`, for a head's soft targets."""
        return ("teacher",) if self.teaches_head else ()

    @contextmanager
    def phase(self, accelerator: Any) -> Iterator[None]:
        """Keep the teacher in evaluation mode and prepared by Accelerate for the terms; restore it afterwards."""
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

    @property
    def fitted_head(self) -> Any:
        """The teacher's head if it is a fitted one; a user's own module need not have any."""
        return self.model.head if getattr(self.model, "fitted", False) else None

    # ---- batches ----

    def shares_query(self, batch: Mapping[str, Any]) -> bool:
        """Whether the teacher can reuse the student's query: same frozen weights, same pixels."""
        return self._shares and "teacher_pixel_values" not in batch

    def answer(
        self,
        batch: Mapping[str, Any],
        query: torch.Tensor | None = None,
        task_id: int | None = None,
        learning: bool = True,
    ) -> CDLOutput | None:
        """The teacher's output for a batch, without gradient, extended by the terms, with gradient.

        `query` (B, D_q): the student's, used if it can be shared. `learning`: whether something learns from the
        output; otherwise it is evaluated. Returns None if no term needs a teacher.
        """
        if not self.teaches_terms:
            return None
        frozen = self._frozen if learning else nullcontext
        hidden = self.objective.hidden_states("teacher") or None
        shown = {"pixel_values": self._pixels(batch), "task_id": task_id, "output_hidden_states": hidden}

        def asked() -> dict[str, Any]:
            return {**shown, "query": query if self.shares_query(batch) else self._own_query(batch, hidden)}

        with torch.no_grad(), self._autocast(), frozen():
            if self.read[1] is None or "images" not in batch:
                inputs = asked()
                answer = self.model(**inputs)
            else:
                inputs, images = shown, batch["images"][self._name(batch)]
                answer = self.read[1](
                    shown["pixel_values"], images, (task_id, tuple(hidden or ())), lambda: self.model(**asked())
                )
            answer = in_float32(answer)
        with self._autocast():  # with gradient: a term may train its own path alongside the teacher's
            return self.objective.consult(answer, inputs)

    def _own_query(self, batch: Mapping[str, Any], hidden: Any) -> torch.Tensor | None:
        name, read = self._name(batch), self.read[0]
        if hidden and getattr(self.model, "is_plain", False):
            return None  # its states need the pass that a query would save
        if read is None or "images" not in batch:
            return None
        return read(batch[name], batch["images"][name])

    @property
    def is_extended(self) -> bool:
        """Whether a term adds its own path to the teacher's."""
        kinds: list[Any] = [type(term) for term in self.objective.terms.values()]
        return any(kind.consult is not Term.consult for kind in kinds)

    def logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Logits (B, C) over all classes the teacher knows, without gradient."""

        def compute() -> CDLOutput:
            return self.model.eval()(pixel_values=self._pixels(batch))

        with torch.no_grad(), self._frozen():
            if self.read[1] is None or "images" not in batch:
                return compute().logits
            return self.read[1](self._pixels(batch), batch["images"][self._name(batch)], "alone", compute).logits

    def _pixels(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The images as the teacher sees them: a separate batch entry if its view of the crop differs."""
        return batch[self._name(batch)]

    @staticmethod
    def _name(batch: Mapping[str, Any]) -> str:
        return "teacher_pixel_values" if "teacher_pixel_values" in batch else "pixel_values"


def unprepared(accelerator: Any, model: Any) -> Any:
    """Unwrap a model. Accelerate's mark must go too, or the model would not be wrapped again for the next task."""
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False
    return model


def _can_share(student: Any, teacher: Any) -> bool:
    """Whether the teacher could reuse the student's query: both need one, from frozen weights and the same pixels."""
    asks = getattr(teacher, "needs_query", False) and student.needs_query and not student.config.train_backbone
    return asks and teacher.config.query_view is None
