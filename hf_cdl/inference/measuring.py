"""How right a model is on labelled images: accuracy, per class too, confusions, and confidence against accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_cdl.data.names import some
from hf_cdl.inference import answering
from hf_cdl.inference.labelled import Labelled, numbers_of
from hf_cdl.models.classifier import labels_of
from hf_cdl.training.classification_metric import ClassificationMetric
from hf_cdl.training.evaluation import BINS
from hf_cdl.types import is_ours

_CONFUSED = 10


@dataclass
class Measured:
    """What was measured of one revision. `labels`, `answers`, `confidence`: (N,) of the images of known classes.

    `classes`: all that the model knows, whose numbers labels and answers are; `indices` (N,): of the images;
    `unknown`: images per class that it does not know; `metrics` in percent.
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
        """What was taken for what, and how often, the most frequent first."""
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
        }


def measure(
    revision: str, model: Any, processor: Any, images: Labelled, batch_size: int, workers: int | None, bar: Any
) -> Measured:
    """Measure a model on the images of the classes that it knows.

    Raises ValueError if it knows none of the classes, or none of the images can be read.
    """
    classes = labels_of(model.config)
    labels = numbers_of(images.labels, classes)
    (rows,) = np.nonzero(labels >= 0)
    unknown = Counter(label for label, number in zip(images.labels, labels.tolist(), strict=True) if number < 0)
    if not len(rows):
        raise ValueError(_nothing_known(revision, classes, images.classes))
    own = images.chosen(rows.tolist())
    prepared = answering.Images(own.decode, own.name, len(rows), processor, not is_ours(model.config))
    metric = ClassificationMetric()
    indices, answers, confidence, unreadable = (
        list[int](),
        list[torch.Tensor](),
        list[torch.Tensor](),
        dict[int, str](),
    )
    for batch in answering.answer(model, prepared, batch_size, workers, bar):
        unreadable |= {int(rows[index]): problem for index, problem in batch.unreadable.items()}
        if batch.indices:
            places = rows[batch.indices]
            metric.add_batch(predictions=batch.logits.numpy(), references=labels[places])
            best = batch.logits.softmax(dim=-1).max(dim=-1)
            indices += places.tolist()
            confidence.append(best.values)
            answers.append(best.indices)
    if not indices:
        raise ValueError(f"None of the {len(rows):,} images can be read. The first: {next(iter(unreadable.values()))}")
    return Measured(
        revision,
        classes,
        np.array(indices),
        labels[indices],
        torch.cat(answers).numpy(),
        torch.cat(confidence).double().numpy(),
        metric.compute() or {},
        dict(unknown),
        unreadable,
    )


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
