"""Checks of images before they are used; all bad images are reported in one message."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from hf_cdl.counted import counted
from hf_cdl.data.images import ImageError
from hf_cdl.data.names import some
from hf_cdl.data.task_split import TaskSplit
from hf_cdl.data.threads import in_threads

_IMAGES, _PIXELS = 5_000, 5_000_000_000
"""Images, and pixels (a minute or two of a core), up to which `headers` decodes all; beyond, a sample of that size."""


class Part(NamedTuple):
    """Images that a stream uses; `class_names`: of training images, by their label less `first_class`."""

    split: TaskSplit
    class_names: tuple[str, ...] = ()
    first_class: int = 0


def check_images(parts: Sequence[Part], how: str, plain: bool) -> list[str]:
    """Check the images as `data.check` says; returns notes for the user. See TaskStream.check_images."""
    images = _Images(parts, plain)
    if how == "none":
        return [f"none of the {counted(len(images), 'image')} is checked before it is used (data.check: none)"]
    chosen = np.arange(len(images))
    if how == "headers" and len(images) > _IMAGES:
        chosen = _drawn(np.fromiter(in_threads(images.pixels, chosen, "Reading images' headers"), np.int64))
    found = _Findings(images, chosen)
    if more := found.undecided():  # whether each class has an image that is not blank
        found.take(np.array(more))
    notes = found.notes()
    if found.count < len(images):
        notes.insert(
            0,
            f"the headers of all {counted(len(images), 'image')} were read, and {counted(found.count, 'image')} "
            "decoded whole, drawn at random or because their headers do not tell enough; the others are when they are "
            "used (all of them ahead: --data.check all)",
        )
    return notes


def _drawn(pixels: np.ndarray) -> np.ndarray:
    """The images to decode, by the pixels (N,) of each: those below 0, and a sample that is the same every time."""
    order = np.random.default_rng(0).permutation(len(pixels))
    fitting = np.searchsorted(np.cumsum(pixels[order].clip(0)), _PIXELS, "right")
    return np.union1d(order[: max(_IMAGES, int(fitting))], np.flatnonzero(pixels < 0))


class _Images:
    """The images of several parts, numbered through."""

    def __init__(self, parts: Sequence[Part], plain: bool):
        self.parts, self.plain = parts, plain
        self.starts = [0, *accumulate(len(part.split) for part in parts)]
        self._headers = [part.split.headers(plain) for part in parts]

    def __len__(self) -> int:
        return self.starts[-1]

    def at(self, number: int) -> tuple[int, int]:
        """The part that holds an image, and the image's index in it."""
        part = bisect(self.starts, number) - 1
        return part, int(number) - self.starts[part]

    def pixels(self, number: int) -> int:
        part, index = self.at(number)
        return self._headers[part](index)

    def examine(self, number: int) -> Any:
        part, index = self.at(number)
        return self.parts[part].split.examine(index, self.plain)


@dataclass
class _Flat:
    """Numbers of a class's training images: all, those decoded, and which of these are blank."""

    all: int = 0
    decoded: int = 0
    blank: list[str] = field(default_factory=list)


class _Findings:
    """What decoding some of the images has shown."""

    def __init__(self, images: _Images, chosen: np.ndarray):
        self.images, self.chosen, self.count = images, chosen, 0
        self.bad: list[str] = []
        self.flat: dict[str, _Flat] = {}  # per class
        for part in images.parts:
            for label, count in zip(*np.unique(part.split.labels, return_counts=True), strict=True):
                if part.class_names:
                    self.flat.setdefault(part.class_names[label - part.first_class], _Flat()).all += int(count)
        self.take(chosen)

    def take(self, chosen: np.ndarray) -> None:
        self.count += len(chosen)
        for number, (problem, flaw) in zip(
            chosen, in_threads(self.images.examine, chosen, "Checking images"), strict=True
        ):
            self.bad += [problem] if problem else []
            at, index = self.images.at(number)
            if (part := self.images.parts[at]).class_names:
                flat = self.flat[part.class_names[part.split.labels[index] - part.first_class]]
                flat.decoded += 1
                flat.blank += [f"{part.split.place(index)}: {flaw}"] if flaw else []

    def _all_blank(self) -> list[str]:
        return [name for name, found in self.flat.items() if 0 < found.decoded == len(found.blank)]

    def undecided(self) -> list[int]:
        """The other training images of classes of which all that were decoded are blank."""
        names = {name for name in self._all_blank() if self.flat[name].decoded < self.flat[name].all}
        found: list[int] = []
        for start, part in zip(self.images.starts, self.images.parts, strict=False):
            labels = [part.first_class + n for n, name in enumerate(part.class_names) if name in names]
            found += (start + np.flatnonzero(np.isin(part.split.labels, labels))).tolist() if labels else []
        return sorted({*found} - {*self.chosen.tolist()}) if found else []

    def notes(self) -> list[str]:
        """Notes for the user. Raises ImageError for images that cannot be used."""
        if self.bad:
            raise ImageError(f"{counted(len(self.bad), 'image')} cannot be used:\n- " + _first(self.bad))
        if lost := self._all_blank():
            raise ImageError(
                f"All training images of the classes {some(lost)} are of one colour or almost black once they are "
                f"decoded, such as\n- {_first(self.flat[lost[0]].blank, 2)}\nScale them to the full range (12-bit "
                "values in 16 bits: times 16), or remove these classes."
            )
        seen = [image for found in self.flat.values() for image in found.blank]
        return [f"training images that show nothing once decoded: {len(seen)}\n- {_first(seen)}"] if seen else []


def _first(lines: list[str], limit: int = 10) -> str:
    more = f"\n- and {len(lines) - limit} more" if len(lines) > limit else ""
    return "\n- ".join(lines[:limit]) + more
