"""Labels of a dataset, checked before training and again as items are read: whole numbers that are classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_cdl.data.task_split import TaskSplit
from hf_cdl.types import Task


class Labelled:
    """A dataset whose items come with their labels as int, or all without one. Raises ValueError for other items.

    Items of a stream's split also say which `images` they are, by the name of their pixel values.
    `classes`: the labels that are allowed.
    """

    def __init__(self, data: Any, classes: range):
        self.data, self.classes = data, classes
        self.has_labels: bool | None = None  # until the first item was read
        self._identity = data.identity if isinstance(data, TaskSplit) and data.views else {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return self._checked(self.data[key])

    def __getitems__(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        batched = getattr(self.data, "__getitems__", None)
        items = [self._checked(item) for item in (batched(keys) if batched else [self.data[key] for key in keys])]
        for key, item in zip(keys, items, strict=True) if self._identity else ():
            index, view = key if isinstance(key, tuple) else (key, None)
            row = int(self.data.rows[index])
            item["images"] = {name: (*of_split, row, view) for name, of_split in self._identity.items()}
        return items

    def _checked(self, item: Mapping[str, Any]) -> dict[str, Any]:
        labelled = "labels" in item
        if self.has_labels not in (None, labelled):
            raise ValueError("Some items of the dataset have `labels` and others have none; give them to all or none.")
        self.has_labels = labelled
        return {**item, "labels": check_label(item["labels"], self.classes)} if labelled else {**item}


class OneView:
    """A split's images, each in its augmented view number `view`."""

    def __init__(self, data: Any, view: int):
        self.data, self.view = data, view

    def seen_by(self, *roles: str) -> OneView:
        return OneView(self.data.seen_by(*roles), self.view) if hasattr(self.data, "seen_by") else self

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[(index, self.view)]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        keys, batched = [(index, self.view) for index in indices], getattr(self.data, "__getitems__", None)
        return batched(keys) if batched else [self.data[key] for key in keys]


def check_label(label: Any, classes: range, where: str = "The dataset", whose: str = "the model") -> int:
    """The label as an int. Raises ValueError unless it is a whole number among these classes, which are `whose`."""
    array = isinstance(label, np.ndarray | torch.Tensor)
    number = label.item() if array and label.ndim == 0 else label
    first, last = classes.start, classes.stop - 1
    if isinstance(number, bool) or not isinstance(number, Integral):
        kind = f"{type(label).__name__}{f' of {label.dtype}, shape {tuple(label.shape)}' if array else ''}"
        way = "Leave out items without a label" if label is None else "Make it the whole number that it stands for"
        way = "The model's config.label2id gives a name's number" if isinstance(label, str) else way
        raise ValueError(
            f"{where} has the label {label if array else repr(label):.60} ({kind}), but labels are whole numbers "
            f"from {first} to {last}: the places of {whose}'s class names in the stream. {way}."
        )
    if number not in classes:
        raise ValueError(f"{where} has the label {number}, but {whose}'s lie between {first} and {last}.")
    return int(number)


def check_task_labels(task: Task) -> None:
    """Raise ValueError for splits of a task that cannot be trained on, or whose labels are not those of the task.

    Of images that are only made when asked for, and without `labels` beside them, it checks the first.
    """
    classes = range(task.classes.start, task.classes.stop)
    if isinstance(task.train, list | tuple | Dataset):
        raise ValueError(
            f"{task.name}.train is a {type(task.train).__name__}, which has no augmented views: training asks for "
            "split[(i, v)]. Give TaskStream the data, or a class of your own with __len__ and __getitem__."
        )
    for part in ("train", "validation", "test"):
        split = getattr(task, part)
        if split is None or not len(split):
            continue
        known = getattr(split, "labels", None)
        if isinstance(known, np.ndarray) and known.dtype.kind in "iu" and known.shape == (len(split),):
            known = [known.min(), known.max()]  # all others lie between them
        elif not (isinstance(known, list | tuple) and len(known) == len(split)):
            item = split[0]
            if not isinstance(item, Mapping) or not {"pixel_values", "labels"} <= {*item}:
                got = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"the type {type(item).__name__}"
                raise ValueError(f"{task.name}.{part} has items of {got}; give them pixel_values and labels.")
            known = [item["labels"]]
        for label in known:
            check_label(label, classes, f"{task.name}.{part}", "the task")
