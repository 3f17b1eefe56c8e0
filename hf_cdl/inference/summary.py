"""A summary of the answers for many images: counts per class, confidence, and whether the images look different."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from hf_cdl.counted import counted
from hf_cdl.escape import visible
from hf_cdl.inference.answering import Answer
from hf_cdl.inference.students import Student

_APART = 5.0
"""Difference of mean confidence, in points, that is reported if it is not chance either."""
_SHOWN = 8


class Reference(NamedTuple):
    """A run's record of its own evaluation images: their mean confidence in percent, and their number."""

    confidence: float
    images: int
    split: str
    changes: int


@dataclass
class Summary:
    """Running figures over the answers; memory is a number per class."""

    classes: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    rejected: int = 0
    _sum: float = 0.0
    _squares: float = 0.0

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self.classes[answer.answers[0][0]] += 1
        self.rejected += answer.unknown
        self._sum += answer.confidence
        self._squares += answer.confidence**2

    @property
    def images(self) -> int:
        """Images that were answered."""
        return self.classes.total()

    @property
    def confidence(self) -> float:
        """Mean confidence in percent."""
        return 100 * self._sum / self.images

    def spread(self, mean: float) -> float:
        """Standard deviation of the confidence in points, estimated cautiously.

        One more image is counted, with the largest variance that a confidence of this `mean`, in percent, can have.
        Otherwise a single image, or a few similar ones, would have almost no variance, and any difference would seem
        proven.
        """
        own = max(0.0, self._squares - self._sum**2 / self.images)
        return math.sqrt((100**2 * own + mean * (100 - mean)) / (self.images + 1))

    def lines(self, seconds: float, reference: Reference | str, share: float | None = None) -> Iterator[str]:
        """The summary in words; `reference`: what to compare with, or why there is nothing.

        `share` of the images of known classes keep their answer, if others are rejected.
        """
        rate = f"{self.images / seconds:,.1f}" if seconds else "–"
        yield f"{counted(self.images, 'image')} in {seconds:,.1f} s ({rate} images/s)" + (
            f"; {self.unreadable:,} could not be read" if self.unreadable else ""
        )
        most = self.classes.most_common(_SHOWN)
        more = len(self.classes) - len(most)
        said = ", ".join(f"{visible(name)} {count:,}" for name, count in most)
        yield f"answers: {said}" + (f", and {more:,} more" if more else "")
        yield self.compared(reference)
        if share is not None:
            yield self.rejected_text(1 - share)

    def rejected_text(self, expected: float) -> str:
        """Compare the share of rejected images with that of known classes, in 0..1: more means other images."""
        own = self.rejected / self.images
        said = f"rejected as unknown: {100 * own:.1f} %; of images of its own classes {100 * expected:.3g} % would be"
        chance = 2 * math.sqrt(max(expected * (1 - expected), 1 / self.images) / self.images)
        if own > expected + chance:
            return f"{said}. Some of these images are of none of its classes, or look different from all it learnt."
        return f"{said}. {'The difference may be chance' if own > expected else 'That is no more than expected'}."

    def compared(self, reference: Reference | str) -> str:
        """Compare the confidence with that on images of known accuracy: lower means that these images differ."""
        said = f"mean confidence: {self.confidence:.1f} %"
        if isinstance(reference, str):
            return f"{said}; {reference}"
        before = "" if not reference.changes else f", before its {counted(reference.changes, 'change')}"
        said += (
            f"; on the run's own {reference.split} images ({reference.images:,}{before}): {reference.confidence:.1f} %"
        )
        gap = self.confidence - reference.confidence
        chance = 2 * self.spread(reference.confidence) * math.sqrt(1 / self.images + 1 / reference.images)
        if abs(gap) <= chance:
            return f"{said}. The difference may be chance."
        if gap <= -_APART:
            return f"{said}. These images look different from those: expect a lower accuracy than was measured there."
        if gap < 0:
            return f"{said}. These images look much like those, if a little harder."
        return f"{said}. By this the images are no harder than those."


def reference_of(student: Student) -> Reference | str:
    """The confidence that a student's run recorded, or the reason why it is not known."""
    results, task = student.results, student.measured
    if results is None or task is None:
        return "no results of a run lie beside this model, so there is nothing to compare it with"
    entry = results["roles"][student.role]
    listed = entry.get("confidence")
    value = listed[task] if isinstance(listed, list) and task < len(listed) else None
    images = sum(entry["counts"][: task + 1])
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100 or not images:
        return "its run recorded none to compare it with"
    data = results["recipe"].get("data")
    split = data.get("eval_split") if isinstance(data, dict) else None
    return Reference(value, images, "validation" if split == "validation" else "test", student.changes)
