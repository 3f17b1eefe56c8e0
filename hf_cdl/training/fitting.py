"""Fitting a head in one pass over a task's images, once what computes their features is fixed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from hf_cdl.training.evaluation import ANY, EvaluatingTrainer
from hf_cdl.training.labelled import OneView
from hf_cdl.training.precision import frozen_autocast, in_float32
from hf_cdl.training.schedules import epochs_begun
from hf_cdl.training.trainer_contract import Total
from hf_cdl.types import CDLOutput, Task, TaskResult

_VIEWS = 3
"""Augmented views of each of a task's images, beside the image as it is, that show how features moved."""


class FittingTrainer(EvaluatingTrainer):
    """A Trainer that fits heads. Subclasses set the attributes."""

    _session: Any
    """What a session after the first keeps until its head is fitted; None outside one."""
    _total: Total

    def _measure(self, task: Task) -> None:
        """Measure and fix the feature statistics on the first task, for heads that standardise with them."""
        if self.model.unmeasured:
            for output, *_ in self._features(task):
                self.model.measure(output)

    def _fit_head(self, task: Task, result: TaskResult) -> None:
        """Fit the head in one pass over the task's un-augmented images; what computes its features is now frozen."""
        start = time.perf_counter()
        self.model.end_session()
        if self._session is not None:
            gather, precision = self.accelerator.gather_for_metrics, partial(frozen_autocast, self.args)
            result.drift = self._session.follow(self._anchors(task), gather, precision)
            self._session = None
        self._measure(task)
        for output, labels, taught in self._features(task):
            self.model.accumulate(output, labels, taught)
        seconds = time.perf_counter() - start
        result.train_seconds += seconds
        if not result.images_per_second:  # if it trained, that rate stays
            result.images_per_second = len(task.train) / seconds
            self._total.images += len(task.train)

    def _anchors(self, task: Task) -> Iterator[dict[str, Any]]:
        """Batches of the images that show how features moved in a session, labelled with -1 if they are unlabelled.

        The task's also come in augmented views that nothing was trained on, which improve a map fitted to few images.
        """
        anchors, first = self.model.eval().later.anchors, epochs_begun(self.args, len(task.train))
        if anchors != "unlabelled":
            for split in (task.train, *(OneView(task.train, first + number) for number in range(_VIEWS))):
                yield from self._loader(split, classes=task.classes)
        if anchors != "task":
            for batch in self._loader(task.unlabelled, classes=ANY):
                pixels = batch["pixel_values"]
                yield {"pixel_values": pixels, "labels": torch.full((len(pixels),), -1, device=pixels.device)}

    def _features(self, task: Task) -> Iterator[tuple[CDLOutput, torch.Tensor, torch.Tensor | None]]:
        """Features of the task's un-augmented images, gathered from all processes, batch by batch.

        Yields the model's outputs, the labels, and the head's targets from its teacher's logits over the task's
        classes, if it has one.
        """
        self.model.eval()
        self._read_kept()
        loader = self._loader(task.train, *self.teacher.head_views, classes=task.classes)
        for batch in self._bar(self._title(task), iterable=loader):
            taught = None
            with torch.no_grad():
                with frozen_autocast(self.args):
                    output = in_float32(self._output(batch))
                if self.teacher.teaches_head:
                    taught = self.teacher.logits(batch)[:, task.classes].float()
                    taught = self.model.head.targets(taught, self.teacher.fitted_head)
            found: Any = {name: output[name] for name in ("features", "kd_features", "layers") if name in output}
            found |= {"labels": batch["labels"]} | ({} if taught is None else {"taught": taught})
            found = self.accelerator.gather_for_metrics(found)
            labels, taught = found.pop("labels"), found.pop("taught", None)
            yield CDLOutput(**found), labels, taught
