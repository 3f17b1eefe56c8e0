"""Measure a model on labelled images: accuracy (also per class), confusions, and confidence against accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_cdl.counted import counted
from hf_cdl.data.names import some
from hf_cdl.inference import answering
from hf_cdl.inference.labelled import Labelled, numbers_of
from hf_cdl.models.classifier import labels_of
from hf_cdl.training.classification_metric import ClassificationMetric
from hf_cdl.training.evaluation import BINS, ood_metrics
from hf_cdl.types import is_ours
from hf_cdl.unknown import rejected, thresholds

_CONFUSED = 10


class Options(NamedTuple):
    """Images at a time, processes that read them, and the share of images of known classes to keep; None: all."""

    batch_size: int = 32
    workers: int | None = None
    reject: float | bool | None = None


@dataclass
class Measured:
    """What was measured of one revision. `labels`, `answers`, `confidence`: (N,) of the images of known classes.

    `classes`: all classes the model knows; labels and answers are indices into it. `indices` (N,): those of the
    images. `unknown`: images per class that the model does not know. `metrics` and `told` are in percent; `told` says
    how many images of known classes are kept, and how well those of unknown ones are told from them, see ood_metrics.
    `tasks`: the classes by task. `means` (C, D): the mean feature of each class; `usage` (C, M): how much its images
    use each prompt; NaN for classes without images, None for a model without. `brought`: how many tasks brought
    prompts of their own.
    """

    revision: str
    classes: list[str]
    indices: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    confidence: np.ndarray
    metrics: dict[str, float]
    unknown: dict[str, int]
    unreadable: dict[int, str] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)
    tasks: list[list[str]] = field(default_factory=list)
    means: np.ndarray | None = None
    usage: np.ndarray | None = None
    brought: int = 0

    @property
    def correct(self) -> np.ndarray:
        return self.labels == self.answers

    def counts(self) -> dict[str, int]:
        """Images per class, of the classes that have any, in the model's order."""
        numbers = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        return {name: count for name, count in zip(self.classes, numbers, strict=True) if count}

    def class_accuracy(self) -> dict[str, float]:
        """Accuracy per class in percent, of the classes that have images."""
        hits = np.bincount(self.labels[self.correct], minlength=len(self.classes)).tolist()
        own = self.counts()
        return {name: 100 * hit / own[name] for name, hit in zip(self.classes, hits, strict=True) if name in own}

    def accuracy_on(self, chosen: np.ndarray) -> float:
        """Accuracy in percent on those of the images `chosen` (indices) that were measured."""
        return 100 * float(self.correct[np.isin(self.indices, chosen)].mean())

    def confusion(self) -> np.ndarray:
        """Images by true class and answer, (C, C)."""
        size = len(self.classes)
        return np.bincount(self.labels * size + self.answers, minlength=size * size).reshape(size, size)

    def confused(self) -> list[tuple[str, str, int]]:
        """(true class, answer, count) of confusions, the most frequent first."""
        wrong = Counter(zip(self.labels[~self.correct].tolist(), self.answers[~self.correct].tolist(), strict=True))
        pairs = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:_CONFUSED]
        return [(self.classes[true], self.classes[answer], count) for (true, answer), count in pairs]

    def calibration(self) -> list[dict[str, float]]:
        """Mean confidence, accuracy (percent) and images of each bin of confidence that has any."""
        bins = np.clip(np.ceil(self.confidence * BINS).astype(int), 1, BINS)
        return [
            {
                "confidence": 100 * float(self.confidence[bins == place].mean()),
                "accuracy": 100 * float(self.correct[bins == place].mean()),
                "images": int((bins == place).sum()),
            }
            for place in np.unique(bins)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "classes": self.classes,
            "images": len(self.labels),
            **self.metrics,
            "class_accuracy": self.class_accuracy(),
            "class_images": self.counts(),
            "confused": [[*pair] for pair in self.confused()],
            "calibration": self.calibration(),
            "unknown_classes": self.unknown,
            **({"told": self.told} if self.told else {}),
        }


@dataclass
class _Found:
    """What accumulates over the batches; `rest` and `known`: how known images of no class and of known ones are."""

    indices: list[int] = field(default_factory=list)
    answers: list[torch.Tensor] = field(default_factory=list)
    confidence: list[torch.Tensor] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    known: list[torch.Tensor] = field(default_factory=list)
    rest: list[torch.Tensor] = field(default_factory=list)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)


def measure(
    revision: str, model: Any, processor: Any, images: Labelled, options: Options, bar: Any = None
) -> Measured:
    """Measure a model on images of the classes it knows; with a share to keep, also how well it rejects others.

    Raises ValueError if it knows none of the classes, if no image can be read, or if it cannot reject images.
    """
    classes = labels_of(model.config)
    limits = None if options.reject is None else thresholds(model, options.reject)
    labels = numbers_of(images.labels, classes)
    if not (labels >= 0).any():
        raise ValueError(_nothing_known(revision, classes, images.classes))
    (rows,) = np.nonzero(labels >= (0 if limits is None else -1))
    own = images.chosen(rows.tolist())
    prepared = answering.Images(own.decode, own.name, len(rows), processor, not is_ours(model.config))
    metric, found = ClassificationMetric(), _Found()
    for batch in answering.outputs(model, prepared, options.batch_size, options.workers, bar):
        found.unreadable |= {int(rows[index]): problem for index, problem in batch.unreadable.items()}
        if batch.indices:
            _take(found, metric, batch, rows[batch.indices], labels, limits)
    if not found.indices:
        first = next(iter(found.unreadable.values()))
        raise ValueError(f"None of the {counted(int((labels >= 0).sum()), 'image')} can be read. The first: {first}")
    means: dict[str, Any] = _means(found, labels[found.indices], len(classes))
    measured = Measured(
        revision,
        classes,
        np.array(found.indices),
        labels[found.indices],
        torch.cat(found.answers).numpy(),
        torch.cat(found.confidence).double().numpy(),
        metric.compute() or {},
        dict(Counter(label for label, number in zip(images.labels, labels.tolist(), strict=True) if number < 0)),
        found.unreadable,
        tasks=getattr(model.config, "tasks", None) or [classes],
        brought=len(getattr(getattr(model, "pool", None), "blocks", ())),
        **means,
    )
    if limits is not None:
        measured.told = _ood_metrics(measured, found, float(limits[0]))
    return measured


def _take(
    found: _Found,
    metric: ClassificationMetric,
    batch: answering.Batch,
    places: np.ndarray,
    labels: np.ndarray,
    limits: torch.Tensor | None,
) -> None:
    """Take the outputs for the images at these places among all."""
    mine = torch.from_numpy(labels[places] >= 0)
    if limits is not None and batch.known is not None:
        found.rest.append(batch.known[~mine])
        found.known.append(batch.known[mine])
        found.kept.append(~rejected(limits, batch.known, batch.logits)[mine])
    if mine.any():
        logits, places = batch.logits[mine], places[mine.numpy()]
        metric.add_batch(predictions=logits.numpy(), references=labels[places])
        best = logits.softmax(dim=-1).max(dim=-1)
        found.indices += places.tolist()
        found.confidence.append(best.values)
        found.answers.append(best.indices)
        for name, values in (("means", batch.features), ("usage", batch.usage)):
            if values is not None:
                empty = torch.zeros(logits.shape[-1], values.shape[-1], dtype=torch.float64)
                own = torch.from_numpy(labels[places])
                found.sums.setdefault(name, empty).index_add_(0, own, values[mine].double())


def _means(found: _Found, labels: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Means by class (C, ...) of what was summed."""
    counts = np.bincount(labels, minlength=classes).astype(float)
    counts[counts == 0] = np.nan
    return {name: sums.numpy() / counts[:, None] for name, sums in found.sums.items()}


def _ood_metrics(measured: Measured, found: _Found, least: float) -> dict[str, float]:
    """How many images of known classes are kept and right, and how well others are told from them, in percent."""
    kept, known, rest = torch.cat(found.kept), torch.cat(found.known), torch.cat(found.rest)
    right = measured.correct[kept.numpy()]
    told = {"kept": 100 * kept.double().mean().item()}
    told |= {"accuracy_of_kept": 100 * float(right.mean())} if len(right) else {}
    return {**told, **(ood_metrics(known, rest, least) if len(rest) else {})}


def common(measured: Sequence[Measured]) -> np.ndarray:
    """The images that all of them were measured on."""
    found = measured[0].indices
    for other in measured[1:]:
        found = np.intersect1d(found, other.indices)
    return found


def _nothing_known(revision: str, classes: Sequence[str], others: Sequence[str]) -> str:
    return (
        f"{revision} knows none of the classes of these images: it knows {some(classes, 5)}, and they are of "
        f"{some(others, 5)}. Give images of its classes; hf-cdl rename gives a class another name."
    )
