"""Labelled images that a student is measured on: one split of a folder or data set, without those that it learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature

from hf_cdl.counted import counted
from hf_cdl.data.cells import Cells, cells_of
from hf_cdl.data.images import MAX_PIXELS, Decoded, readable
from hf_cdl.data.loading import load_splits, read_labels
from hf_cdl.data.names import nfc, some
from hf_cdl.data.splits_and_columns import choose_columns, choose_splits
from hf_cdl.inference.learnt_images import learnt_rows
from hf_cdl.inference.students import Student
from hf_cdl.runs.files import RunError


@dataclass(frozen=True)
class Labelled:
    """Images of one split; `labels`: the class name of each, `classes`: all class names of the data."""

    table: Dataset
    labels: list[str]
    classes: list[str]
    cells: Cells
    split: str
    notes: list[str]

    def decode(self, index: int) -> Decoded:
        """The image at an index. Raises ImageError for a bad one."""
        (cell,) = self.table[index].values()
        return self.cells.decode(cell)

    def name(self, index: int) -> str:
        """Name an image for messages."""
        (cell,) = self.table[index].values()
        return (
            cell["path"] if cell and cell["path"] else f"split {self.split}, one of the images of {self.labels[index]}"
        )

    def chosen(self, rows: Sequence[int]) -> Labelled:
        """These rows of the images."""
        return replace(self, table=self.table.select(rows), labels=[self.labels[row] for row in rows])


def read_labelled(
    path: str, named: str | None, student: Student, image: str | None = None, label: str | None = None
) -> Labelled:
    """Read the images of a split: the one that is `named`, or test, validation, or the only one.

    `image`, `label`: their columns, if there are several candidates. Images that the student learnt, as far as they
    are known, are left out, unless the split is named. Raises ValueError if there are none, and for labels without a
    name.
    """
    found = load_splits(path, None, None, [named], label)
    split = _chosen(found, named)
    table = found[split]
    image, label = choose_columns({"train": table}, image, label)
    if not len(table):
        raise ValueError(f"The split {split!r} of {readable(path)} has no images. Put some there, or name another.")
    names, numbers = read_labels({"train": table}, label)
    notes = [*getattr(found, "notes", ())]
    if others := [name for name in found if name != split]:
        notes.append(f"measured on the split {split}; not read: {some(others)}")
    data = table.with_format(None).select_columns([image]).cast_column(image, ImageFeature(decode=False))
    labels = [nfc(names[number]) for number in numbers["train"]]
    images = Labelled(data, labels, [*map(nfc, names)], cells_of(path, MAX_PIXELS), split, notes)
    return _without_learnt(images, path, student, named is not None)


def _chosen(found: Any, named: str | None) -> str:
    """The name of the split to measure on. Raises ValueError if it is not clear which."""
    if named is not None and named not in found:
        raise ValueError(f"--split is {named!r}, but the splits are {some(found)}; give one of these.")
    roles = choose_splits(found, {"train": None, "validation": None, "test": named}, set())
    usual = [roles[role] for role in ("test", "validation", "train") if role in roles]
    if not usual and len(found) != 1:
        raise ValueError(f"Which of the splits {some(found)} should be measured on? Name one with --split.")
    return (usual or [*found])[0]


def _without_learnt(images: Labelled, path: str, student: Student, asked: bool) -> Labelled:
    """The images but for those that the student learnt; if their split is `asked` for, they stay, with a note."""
    try:
        learnt, same = learnt_rows(images.table, images.cells, images.split, path, student)
    except (OSError, ValueError, RunError) as error:
        reason = readable(str(error).splitlines()[0], 200)
        return _noted(images, f"these are the data that it learnt from, and which of them is not known ({reason})")
    if not learnt:
        return images
    if asked:
        return _noted(images, f"{len(learnt):,} of these images it learnt from, so its accuracy on them says little")
    kept = [row for row in range(len(images.labels)) if row not in learnt]
    changed = "" if same else "; the data have changed since, so some of these may be left"
    if not kept:
        raise ValueError(
            f"All images of the split {images.split!r} of {readable(path)} were learnt by the student, so its "
            "accuracy on them says little. Give other images, or --split to measure on them all the same."
        )
    return _noted(images.chosen(kept), f"left out: {counted(len(learnt), 'image')} that it learnt from{changed}")


def _noted(images: Labelled, note: str) -> Labelled:
    return replace(images, notes=[*images.notes, note])


def numbers_of(labels: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """The model's index of each label's class; -1 if it does not know a class of that name."""
    places = {nfc(name): number for number, name in enumerate(known)}
    return np.array([places.get(nfc(label), -1) for label in labels], dtype=np.int64)
