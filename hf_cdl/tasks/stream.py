"""A class-incremental stream: an image-classification data set cut into tasks with disjoint classes."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from hf_cdl.tasks.benchmarks import BENCHMARKS, load_splits
from hf_cdl.tasks.tables import (
    TaskSplit,
    choose_columns,
    choose_splits,
    draw_rows,
    file_sizes,
    missing_classes,
    read_labels,
    some,
)
from hf_cdl.tasks.transforms import ImageError, Preprocess
from hf_cdl.types import Task


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class StreamConfig:
    """The `data` section of a recipe. Raises ValueError, naming every field that is out of range."""

    path: str | None = _option(None, "Hub id, local folder (class folders of images, parquet files) or benchmark name")
    name: str | None = _option(None, "configuration of the data set; of a local folder: the folder inside it to read")
    revision: str | None = _option(None, "commit, tag or branch on the Hub")
    image_column: str | None = _option(None, "none: the only column of type Image")
    label_column: str | None = _option(None, "none: the only ClassLabel, or the column called label, class ...")
    train_split: str | None = _option(None, "none: train")
    validation_split: str | None = _option(None, "none: validation, val, valid or dev, if there is one")
    test_split: str | None = _option(None, "none: test, if there is one")
    test_fraction: float | None = _option(None, "without a test split: fraction of each class held out for testing")
    split_seed: int = _option(0, "seed of test_fraction and of the max_*_per_class subsets")
    classes_per_task: int | list[int] | list[list[str]] = _option(
        10, "classes in every task (the last task takes the rest), or a list: sizes, or class names, task by task"
    )
    class_order_seed: int | None = _option(None, "shuffles the classes; none: natural order 0, 1, 2 ...")
    max_classes: int | None = _option(None, "keep only the first classes of the order")
    max_train_per_class: int | None = _option(None, "keep a random subset of each class's training images")
    max_eval_per_class: int | None = _option(None, "the same for validation and test images")
    crop_scale: tuple[float, float] = _option((0.08, 1.0), "training view: range of the crop's area / image area")
    crop_ratio: tuple[float, float] = _option((3 / 4, 4 / 3), "training view: range of the crop's width / height")
    flip: float = _option(0.5, "training view: probability of a horizontal flip")
    eval_split: Literal["test", "validation"] = _option("test", "images on which accuracy is measured")

    def __post_init__(self) -> None:
        problems: list[str] = []
        sizes = self.classes_per_task if isinstance(self.classes_per_task, list) else [self.classes_per_task]
        if not sizes or not all(size if isinstance(size, list) else size > 0 for size in sizes):
            problems.append(f"classes_per_task is {sizes}, but every task needs at least one class")
        if names := [name for size in sizes if isinstance(size, list) for name in size]:
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                problems.append(f"classes_per_task repeats {some(repeated)}, but a class belongs to one task")
            if self.class_order_seed is not None or self.max_classes is not None:
                problems.append("classes_per_task names the classes: leave out class_order_seed and max_classes")
        splits = [s for s in (self.train_split, self.validation_split, self.test_split) if s is not None]
        if len(set(splits)) < len(splits):
            problems.append(f"train_split, validation_split and test_split must differ, but are {some(splits)}")
        for limit in ("max_classes", "max_train_per_class", "max_eval_per_class"):
            if (value := getattr(self, limit)) is not None and value < 1:
                problems.append(f"{limit} is {value}, but must be at least 1")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            problems.append(f"test_fraction is {self.test_fraction}, but must lie between 0 and 1, like 0.2")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            problems.append(f"crop_scale is {self.crop_scale}, but must be (low, high) with 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            problems.append(f"crop_ratio is {self.crop_ratio}, but must be (low, high) with 0 < low <= high")
        if not 0 <= self.flip <= 1:
            problems.append(f"flip is {self.flip}, but a probability lies between 0 and 1")
        _complain(problems)


def _complain(problems: list[str]) -> None:
    if problems:
        raise ValueError("No stream of tasks can be made of this:\n- " + "\n- ".join(problems))


class TaskStream:
    """The tasks of a class-incremental stream, in order.

    `dataset`: the data themselves (a DatasetDict) instead of `config.path`. `seed`: of the augmented views.
    `class_names`: in stream order, the order of the logits. `config`: with a benchmark's values filled in.
    Splits, columns, labels and classes are checked here, the images by `check_images`.
    Raises ValueError with all the problems that were found.
    """

    def __init__(
        self,
        config: StreamConfig,
        processor: BaseImageProcessor,
        seed: int = 0,
        dataset: Mapping[str, Dataset] | None = None,
    ):
        preset = BENCHMARKS.get(config.path or "", {}) if dataset is None else {}
        config = replace(config, **{k: v for k, v in preset.items() if k == "path" or getattr(config, k) is None})
        self.config = config
        preprocess = Preprocess(processor, seed, config.crop_scale, config.crop_ratio, config.flip)
        self.splits, tables, image_column, label_column = self._open(dataset)
        names, labels, problems = read_labels(tables, label_column)
        _complain(problems)
        plan, problems = self._plan(names)
        limit = config.max_eval_per_class
        limits = {"train": config.max_train_per_class, "validation": limit, "test": limit}
        used = [c for task in plan for c in task]
        rows = draw_rows(labels, names, used, config.split_seed, config.test_fraction, limits)
        _complain(problems + missing_classes(names, rows, needed={"train", "test", config.eval_split}))
        for role, table in tables.items():  # one column is kept; images are decoded here, so that errors name them
            table = table.with_format(None).select_columns([image_column])
            tables[role] = table.cast_column(image_column, ImageFeature(decode=False))
        number = np.zeros(len(names), dtype=np.int64)  # of a class in the data set -> in the stream
        number[used] = np.arange(len(used))

        def split(role: str, index: int) -> TaskSplit:
            source = role if role in tables else "train"  # a held-out test set is a part of train
            where = np.sort(np.concatenate([rows[role][c] for c in plan[index]]))
            labels_here = number[labels[source][where]]
            return TaskSplit(tables[source], self.splits[source], index, where, labels_here, preprocess)

        first = 0
        self._tasks: list[Task] = []
        for index, classes in enumerate(plan):
            parts = {role: split(role, index) for role in rows}
            validation = parts.get("validation") or None  # also none if this task has no validation images
            class_names = tuple(names[c] for c in classes)
            self._tasks.append(Task(index, class_names, first, parts["train"], validation, parts["test"]))
            first += len(classes)

    def _open(self, dataset: Mapping[str, Dataset] | None) -> tuple[dict[str, str], dict[str, Dataset], str, str]:
        config = self.config
        if dataset is None and config.path is None:
            _complain(["data.path is missing; give a Hub id, a local folder or a benchmark: " + some(BENCHMARKS)])
        found = dict(dataset) if dataset is not None else load_splits(str(config.path), config.name, config.revision)
        named = {"train": config.train_split, "validation": config.validation_split, "test": config.test_split}
        needed = {"train", config.eval_split, "test"} - {"test" if config.test_fraction is not None else ""}
        splits, problems = choose_splits(list(found), named, needed)
        _complain(problems)
        tables = {role: found[name] for role, name in splits.items()}
        image, label, problems = choose_columns(tables["train"], config.image_column, config.label_column)
        for role, name in splits.items():
            for column in sorted({image, label} - {"", *(columns := tables[role].column_names)}):
                problems.append(f"the split {name!r} has no column {column!r}; columns: {some(columns)}")
        _complain(problems)
        return splits, tables, image, label

    def _plan(self, names: list[str]) -> tuple[list[list[int]], list[str]]:
        """(class numbers of each task, problems); with problems, one task of all the classes that are known."""
        config, sizes = self.config, self.config.classes_per_task
        if isinstance(sizes, list) and isinstance(sizes[0], list):
            groups = [group for group in sizes if isinstance(group, list)]
            number, problems = {name: i for i, name in enumerate(names)}, []
            for name in [name for group in groups for name in group if name not in number]:
                close = difflib.get_close_matches(name, names) or names
                problems.append(f"classes_per_task names {name!r}, which is no class; close are {some(close, 3)}")
            return [[number[name] for name in group if name in number] for group in groups], problems
        order = np.arange(len(names))
        if config.class_order_seed is not None:
            order = np.random.default_rng(config.class_order_seed).permutation(order)
        if (config.max_classes or 0) > len(names):
            return [order.tolist()], [f"max_classes is {config.max_classes}, but there are {len(names)} classes"]
        order = order[: config.max_classes].tolist()
        if isinstance(sizes, int):
            if sizes > len(order):
                return [order], [f"classes_per_task is {sizes}, but there are only {len(order)} classes"]
            return [order[i : i + sizes] for i in range(0, len(order), sizes)], []
        numbers = [size for size in sizes if isinstance(size, int)]
        if sum(numbers) != len(order):
            return [order], [f"classes_per_task adds up to {sum(numbers)}, but there are {len(order)} classes"]
        ends = np.cumsum(numbers).tolist()
        return [order[end - size : end] for end, size in zip(ends, numbers, strict=True)], []

    def __getitem__(self, index: int) -> Task:
        return self._tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def class_names(self) -> list[str]:
        return [name for task in self for name in task.class_names]

    def tasks_until(self, index: int) -> list[Task]:
        """Tasks 0 ... index, that one included: what has been seen when task `index` is learnt."""
        return self._tasks[: index + 1]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the classes, their order, the tasks, the rows and the files' sizes.

        Not with the folder or the machine: the same data in another place have the same fingerprint.
        """
        digest = hashlib.sha256()
        sizes: dict[str, np.ndarray] = {}
        for task in self:
            digest.update(repr(task.class_names).encode())
            for role, split in _parts(task):
                if split.name not in sizes:
                    sizes[split.name] = file_sizes(split.data)
                digest.update(f"{role} {split.name} {split.labels}".encode())
                digest.update(split.rows.astype("<i8").tobytes() + sizes[split.name][split.rows].tobytes())
        return digest.hexdigest()[:16]

    def check_images(self, progress: bool = True) -> None:
        """Decodes every image of the stream once, in threads. Raises ImageError naming the first ten bad ones."""

        def problem(job: tuple[TaskSplit, int]) -> str | None:
            try:
                job[0].image(job[1])
            except ImageError as error:
                return str(error)

        splits = [split for task in self for _, split in _parts(task)]
        jobs = ((split, i) for split in splits for i in range(len(split)))
        bad: list[str] = []
        with (
            ThreadPoolExecutor() as pool,
            tqdm(total=sum(map(len, splits)), desc="Checking images", unit="image", disable=not progress) as bar,
        ):
            while batch := list(islice(jobs, 256)):
                bad += filter(None, pool.map(problem, batch))
                bar.update(len(batch))
        if bad:
            more = f"\n- and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise ImageError(f"{len(bad)} images cannot be used:\n- " + "\n- ".join(bad[:10]) + more)


def _parts(task: Task) -> list[tuple[str, TaskSplit]]:
    parts = {"train": task.train, "validation": task.validation, "test": task.test}
    return [(role, split) for role, split in parts.items() if isinstance(split, TaskSplit)]
