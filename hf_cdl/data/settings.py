"""The `data` section of a recipe."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_cdl.data.images import MAX_PIXELS
from hf_cdl.data.names import nfc, some

_PADDING = 1000
"""Maximum crop_padding in pixels: more would give images of pure padding and exhaust memory."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class StreamConfig:
    """The `data` section of a recipe. Raises ValueError, naming every field that is out of range."""

    path: str | None = _option(None, "Hub id, local folder (see read_folder) or benchmark name")
    name: str | None = _option(None, "configuration of the data set on the Hub")
    revision: str | None = _option(None, "commit, tag or branch on the Hub")
    image_column: str | None = _option(None, "none: the only column of type Image")
    label_column: str | None = _option(None, "none: the only ClassLabel, or the column called label, class ...")
    train_split: str | None = _option(None, "none: train or training, in upper or lower case")
    validation_split: str | None = _option(None, "none: validation, val, valid or dev, if there is one")
    test_split: str | None = _option(None, "none: test, testing, eval or evaluation, if there is one")
    test_fraction: float | None = _option(None, "fraction of each class held out for testing, without a test split")
    split_seed: int = _option(0, "seed of test_fraction and of the max_*_per_class subsets")
    classes_per_task: int | list[int] | list[list[str]] | None = _option(
        10,
        "classes in every task (the last task takes the rest), a list of sizes, or a list of lists of class names; "
        "none: one task",
    )
    class_order_seed: int | None = _option(None, "seed that shuffles the classes; none: natural order 0, 1, 2 ...")
    max_classes: int | None = _option(None, "keep only the first classes of the order")
    known_classes: list[list[str]] | None = _option(
        None, "class names, task by task, that the models already know; these tasks come before those of the data"
    )
    known_train: Literal["refuse", "ignore"] = _option(
        "refuse", "training images of known classes: an error, or left out (their test images are always used)"
    )
    max_train_per_class: int | None = _option(None, "keep a random subset of each class's training images")
    max_eval_per_class: int | None = _option(None, "the same for validation and test images")
    crop_scale: tuple[float, float] = _option((0.08, 1.0), "training view: range of the crop's area / image area")
    crop_ratio: tuple[float, float] = _option((3 / 4, 4 / 3), "training view: range of the crop's width / height")
    crop_padding: int | None = _option(
        None, "training view, instead: black pixels added on every side, then a random crop of the image's size"
    )
    flip: float = _option(0.5, "training view: probability of a horizontal flip")
    views: int | None = _option(
        None,
        "augmented views of each training image. Epoch e repeats the view and the batches of epoch e mod views, in "
        "another order, so that the teacher computes each batch once; none: every epoch has new views",
    )
    eval_split: Literal["test", "validation"] = _option("test", "images on which accuracy is measured")
    unlabelled: str | None = _option(
        None,
        "Hub id or local folder of images on which the teacher also teaches the student in every session; labels are "
        "not read",
    )
    unlabelled_split: str | None = _option(
        None, "their split; none: the one called unlabelled or unlabeled, or train, or the only one"
    )
    unlabelled_ratio: int = _option(1, "unlabelled images per training image, in every batch")
    foreign: str | None = _option(
        None,
        "Hub id or local folder of images of none of the classes. The results say how many of them would not be "
        "answered with unknown (see a head's known); labels are not read",
    )
    check: Literal["headers", "all", "none"] = _option(
        "headers",
        "before training, headers reads the headers of all images and decodes all (a random sample, if there are very "
        "many); all decodes all; none checks none. A bad image found later stops the run; repair it and resume",
    )
    max_pixels: int = _option(MAX_PIXELS, "an image of more pixels (width * height) is refused before it is unpacked")

    def __post_init__(self) -> None:
        problems = [*self._class_problems(), *self._split_problems(), *self._number_problems(), *self._view_problems()]
        if problems:
            raise ValueError("These settings make no stream of tasks:\n- " + "\n- ".join(problems))

    @property
    def labelled(self) -> StreamConfig:
        """The stream without its unlabelled and foreign images."""
        return replace(self, unlabelled=None, unlabelled_split=None, unlabelled_ratio=1, foreign=None)

    def _class_problems(self) -> list[str]:
        """Problems of the tasks and class names given here."""
        problems: list[str] = []
        sizes = self.classes_per_task if isinstance(self.classes_per_task, list) else [self.classes_per_task]
        named = [size for size in sizes if isinstance(size, list)]
        if not sizes or not all(named) or not all(_whole(size, 1) or size is None for size in _but(sizes, list)):
            shown = some(sizes) if sizes else "an empty list"
            problems.append(f"classes_per_task is {shown}, but every task needs at least one class (whole numbers)")
        elif isinstance(self.classes_per_task, list) and (None in sizes or 0 < len(named) < len(sizes)):
            problems.append("classes_per_task mixes sizes, names and null; give all sizes, or the names of all tasks")
        tasks = self.known_classes or []
        if not all(isinstance(task, list | tuple) for task in tasks):
            problems.append(f"known_classes is {some(tasks)}, but must be a list of tasks, each a list of class names")
            tasks = []
        names, known = ([name for task in tasks for name in task] for tasks in (named, tasks))
        for part, given in (("classes_per_task", names), ("known_classes", known)):
            if wrong := [repr(name) for name in given if not _text(name)]:
                problems.append(f"{part} has {some(wrong)}, but a class name is a text that is not empty")
        counts = [Counter(map(nfc, filter(_text, given))) for given in (names, known)]
        if not all(tasks) or max(counts[1].values(), default=0) > 1:
            problems.append(f"known_classes is {some(known)}, but tasks are not empty and a class belongs to one task")
        if self.known_train == "ignore" and not tasks:
            problems.append("known_train is ignore, but there are no known_classes; leave it out")
        if names:
            if both := sorted(counts[0].keys() & counts[1].keys()):
                problems.append(f"classes_per_task names {some(both)}, which known_classes has too")
            if repeated := sorted(name for name, count in counts[0].items() if count > 1):
                problems.append(f"classes_per_task repeats {some(repeated)}, but a class belongs to one task")
            if self.class_order_seed is not None or self.max_classes is not None:
                problems.append("classes_per_task names the classes: leave out class_order_seed and max_classes")
        return problems

    def _split_problems(self) -> list[str]:
        splits = [s for s in (self.train_split, self.validation_split, self.test_split) if s is not None]
        problems = []
        if not all(isinstance(name, str) and name.strip() for name in splits):
            problems.append(
                f"train_split, validation_split and test_split are names, but are {some(map(repr, splits))}"
            )
        if len(set(splits)) < len(splits):
            problems.append(f"train_split, validation_split and test_split must differ, but are {some(splits)}")
        for source in (
            "path",
            "name",
            "revision",
            "image_column",
            "label_column",
            "unlabelled",
            "unlabelled_split",
            "foreign",
        ):
            if (value := getattr(self, source)) is not None and not str(value).strip():
                problems.append(f"{source} is {value!r}, but must not be empty; give one, or leave it out")
        if self.eval_split not in ("test", "validation"):
            problems.append(f"eval_split is {self.eval_split!r}, but must be test or validation")
        if self.known_train not in ("refuse", "ignore"):
            problems.append(f"known_train is {self.known_train!r}, but must be refuse or ignore")
        if self.check not in ("headers", "all", "none"):
            problems.append(f"check is {self.check!r}, but must be headers, all or none")
        return problems

    def _number_problems(self) -> list[str]:
        problems = []
        for limit in ("max_classes", "max_train_per_class", "max_eval_per_class", "max_pixels"):
            value = getattr(self, limit)
            if not _whole(value, 1) and not (value is None and limit != "max_pixels"):
                problems.append(f"{limit} is {value}, but must be a whole number of at least 1")
        if not _whole(self.unlabelled_ratio, 1):
            problems.append(f"unlabelled_ratio is {self.unlabelled_ratio}, but must be a whole number of at least 1")
        for seed in ("split_seed", "class_order_seed"):
            value = getattr(self, seed)
            if not (_whole(value, 0) and value < 2**63) and not (value is None and seed == "class_order_seed"):
                problems.append(f"{seed} is {value}, but must be a whole number of at least 0 and below 2**63")
        if self.test_fraction is not None and not (_number(self.test_fraction) and 0 < self.test_fraction < 1):
            problems.append(f"test_fraction is {self.test_fraction}, but must lie between 0 and 1, like 0.2")
        return problems

    def _view_problems(self) -> list[str]:
        """Problems of the training view."""
        problems = []
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            value, rule = getattr(self, name), "0 < low <= high" + (" <= 1" if name == "crop_scale" else "")
            pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_number, value))
            if not pair or not 0 < value[0] <= value[1] <= most:
                problems.append(f"{name} is {value}, but must be (low, high) with {rule}, finite numbers")
        if self.views is not None and not _whole(self.views, 1):
            problems.append(f"views is {self.views}, but must be a whole number of at least 1")
        if self.crop_padding is not None and not (_whole(self.crop_padding, 0) and self.crop_padding <= _PADDING):
            problems.append(
                f"crop_padding is {self.crop_padding}, but must be a number of pixels, like 4 (at most {_PADDING})"
            )
        elif self.crop_padding is not None and not problems:
            for name in ("crop_scale", "crop_ratio"):
                if tuple(getattr(self, name)) != self.__dataclass_fields__[name].default:
                    problems.append(
                        f"{name} is {getattr(self, name)}, but with crop_padding a crop has the image's own "
                        "size; leave one of them out"
                    )
        if not _number(self.flip) or not 0 <= self.flip <= 1:
            problems.append(f"flip is {self.flip}, but a probability lies between 0 and 1")
        return problems


def _but(values: list[Any], kind: type) -> list[Any]:
    return [value for value in values if not isinstance(value, kind)]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
