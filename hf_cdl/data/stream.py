"""Class-incremental streams: an image-classification data set split into tasks with disjoint classes."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers.image_processing_utils import BaseImageProcessor

from hf_cdl.counted import counted
from hf_cdl.data.benchmarks import BENCHMARKS
from hf_cdl.data.cells import cells_of
from hf_cdl.data.folders import LAYOUTS, ClassFolders
from hf_cdl.data.image_check import Part, check_images
from hf_cdl.data.images import ImageError
from hf_cdl.data.loading import check_tables, draw_rows, load_splits, read_labels
from hf_cdl.data.names import check_role, nfc, some
from hf_cdl.data.settings import StreamConfig
from hf_cdl.data.splits_and_columns import choose_columns, choose_splits
from hf_cdl.data.task_split import TaskSplit
from hf_cdl.data.unlabelled import Unlabelled, add_unlabelled, foreign_images
from hf_cdl.data.views import Preprocess, same_view
from hf_cdl.types import Task


class TaskStream:
    """The tasks of a class-incremental stream, in order.

    `processors`: the image processor of each role (`student`, `teacher` ...), or one for all; roles without one use
    the first; with none at all there are no pixel values. `seed`: seed of the augmented views. `dataset`: the data
    itself (a DatasetDict, or one Dataset with `test_fraction`) instead of `config.path`; `unlabelled`: images without
    labels, instead of `config.unlabelled`. The attribute `config` has a benchmark's values filled in. Splits, columns,
    labels and classes are checked here, images by `check_images`. `notes` lists data and settings that are not used.
    Raises ValueError if the data cannot be made into a stream.
    """

    def __init__(
        self,
        config: StreamConfig,
        processors: BaseImageProcessor | Mapping[str, BaseImageProcessor],
        seed: int = 0,
        dataset: Mapping[str, Dataset] | Dataset | None = None,
        unlabelled: Dataset | None = None,
    ):
        _check_arguments(config, processors)
        preset = BENCHMARKS.get(config.path or "", {}) if dataset is None else {}
        held_out = config.test_fraction
        config = replace(config, **{k: v for k, v in preset.items() if k == "path" or getattr(config, k) is None})
        self.config = config
        named = {"train": config.train_split, "validation": config.validation_split, "test": config.test_split}
        found = _load(config, [*named.values()], bool(preset)) if dataset is None else _given(config, dataset)
        needed = {"train", "test", config.eval_split} - ({"test"} if config.test_fraction else set())
        splits = choose_splits(found, named, needed)
        tables = {role: found[name] for role, name in splits.items()}
        self.notes = _notes(found, splits, held_out is not None, config)
        image_column, label_column = choose_columns(tables, config.image_column, config.label_column)
        names, labels = read_labels(tables, label_column)
        known = config.known_classes or []
        learnt = {nfc(name): index for index, task in enumerate(known) for name in task}
        if config.known_train == "refuse":
            _refuse_known(names, labels["train"], learnt)
        plan = _plan(names, [c for c, name in enumerate(names) if name not in learnt], config)
        limit = config.max_eval_per_class
        limits = {"train": config.max_train_per_class, "validation": limit, "test": limit}
        rows = draw_rows(names, labels, range(len(names)), config.split_seed, config.test_fraction, limits)
        _check_filled(names, plan, rows, config.eval_split, splits if isinstance(found, ClassFolders) else {})
        images = {role: _undecoded(table, image_column) for role, table in tables.items()}
        cells = cells_of(config.path if dataset is None else None, config.max_pixels)
        views = _views(config, processors, seed)
        source = _Source(images, splits, rows, labels, names, views, cells)
        tasks = [*known, *([names[c] for c in classes] for classes in plan)]
        alone = list(source.cut(tasks, len(known), config.eval_split))
        self._tasks, notes = add_unlabelled(alone, config, unlabelled, views)
        self._tasks = [replace(task, views=config.views) for task in self._tasks]
        self.foreign, more = foreign_images(config, views)
        self.notes += [*notes, *more]

    def __getitem__(self, index: int) -> Task:
        return self._tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def class_names(self) -> list[str]:
        """Class names in stream order, which is the order of the logits."""
        return [name for task in self for name in task.class_names]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the classes, their order, the tasks, the rows and the file sizes.

        Independent of folder and machine: the same data elsewhere has the same fingerprint. If there are unlabelled
        or foreign images, a + and 16 digits that depend on their content follow.
        """
        return self.fingerprint_before(("", 0, 0))

    def fingerprint_before(self, image: tuple[str, int, int]) -> str:
        """The fingerprint that the stream had when this image, (split, row, bytes), had so many bytes."""
        digest = hashlib.sha256()
        sizes: dict[str, np.ndarray] = {}
        for task in self:
            digest.update(repr(task.class_names).encode())
            for role, split in _parts(task):
                if split.name not in sizes:
                    sizes[split.name] = split.cells.sizes(split.data)
                    if image[0] == split.name and 0 <= image[1] < len(split.data):
                        sizes[split.name][image[1]] = image[2]
                digest.update(f"{role} {split.name} {split.labels.tolist()}".encode())
                digest.update(split.rows.astype("<i8").tobytes() + sizes[split.name][split.rows].tobytes())
        beside = [images.fingerprint for images in (self.unlabelled, self.foreign) if images is not None]
        return "+".join([digest.hexdigest()[:16], *beside])

    @property
    def unlabelled(self) -> Unlabelled | None:
        """The unlabelled images of the stream; None if there are none."""
        return next((task.unlabelled for task in self if isinstance(task.unlabelled, Unlabelled)), None)

    @property
    def images(self) -> dict[str, list[int]]:
        """Split -> number of images per class, in stream order; only for non-empty splits."""
        found = {role: [] for role in ("train", "validation", "test")}
        for role, counts in found.items():
            for task in self:
                split: Any = getattr(task, role) or []
                labels = getattr(split, "labels", np.empty(0, np.int64)) - task.first_class
                counts += np.bincount(labels, minlength=len(task.class_names)).tolist()
        return {role: counts for role, counts in found.items() if any(counts)}

    def found(self, error: ImageError) -> tuple[str, int, int] | None:
        """Split, row and bytes of the labelled image that an error is about; None if it is about no such image."""
        splits = {split.name: split for task in self for _, split in _parts(task)}
        for name, split in splits.items():
            start = split.row_named("")
            if row := re.match(r"\d+", str(error).removeprefix(start)) if str(error).startswith(start) else None:
                return name, int(row[0]), int(split.cells.sizes(split.data.select([int(row[0])]))[0])
        return None

    def check_images(self, plain: bool = False) -> list[str]:
        """Check the images of the stream in threads, as `config.check` says; return notes for the user.

        Small streams are decoded completely. Of larger ones the headers are read and a sample is decoded. The notes
        report training images of a single colour, or almost black because they hold 12 bits in 16. `plain`: a model
        will be served by transformers' own pipeline, which decodes 16-bit images differently, so these are refused.
        Raises ImageError naming the first ten bad images, or if all training images of a class are blank.
        """
        parts = [
            Part(split, task.class_names if role == "train" else (), task.first_class)
            for task in self
            for role, split in _parts(task)
        ]
        parts += [Part(images) for images in (self.unlabelled, self.foreign) if images is not None]
        return check_images(parts, self.config.check, plain)


@dataclass(frozen=True)
class _Source:
    """What tasks are made from: undecoded images, split names, rows and labels per role; class names; views."""

    images: dict[str, Dataset]
    splits: dict[str, str]
    rows: dict[str, dict[int, np.ndarray]]
    labels: dict[str, np.ndarray]
    names: list[str]
    views: dict[str, Preprocess]
    cells: Any

    def cut(self, tasks: list[list[str]], known: int, eval_split: str) -> Iterator[Task]:
        """Yield the tasks with these class names; the first `known` tasks have no training images."""
        number = {nfc(name): i for i, name in enumerate(chain.from_iterable(tasks))}
        numbers = np.array([number.get(name, -1) for name in self.names], np.int64)  # of classes in stream order
        class_of = {name: c for c, name in enumerate(self.names)}
        for index, class_names in enumerate(tasks):
            classes = [class_of[name] for name in map(nfc, class_names) if name in class_of]
            parts: dict[str, TaskSplit] = {}
            for role, own in self.rows.items():
                source = role if role in self.images else "train"  # a held-out test set is part of train
                learnt = index < known and source == "train"
                used = () if learnt else (own[c] for c in classes)
                where = np.sort(np.concatenate([np.empty(0, np.int64), *used]))
                targets = numbers[self.labels[source][where]]
                if len(targets) or role in ("train", "test", eval_split):  # a task may have no validation images
                    data = (self.images[source], self.splits[source])
                    parts[role] = TaskSplit(*data, index, where, targets, self.views, self.cells)
            splits = (parts["train"], parts.get("validation"), parts["test"])
            yield Task(index, tuple(class_names), number[nfc(class_names[0])], *splits)


def _check_arguments(config: Any, processors: Any) -> None:
    if not isinstance(config, StreamConfig):
        raise ValueError(
            f"config is of the type {type(config).__name__}, but must be a StreamConfig: "
            "StreamConfig(path=..., classes_per_task=...)."
        )
    for role in processors if isinstance(processors, Mapping) else ():
        check_role(role)


def _load(config: StreamConfig, named: list[str | None], is_benchmark: bool) -> Mapping[str, Dataset]:
    """Load the splits at the config's path."""
    name = None if is_benchmark and Path(str(config.path)).is_dir() else config.name  # a benchmark's copy has none
    return load_splits(config.path, name, config.revision, named, config.label_column)


def _given(config: StreamConfig, dataset: Mapping[str, Dataset] | Dataset) -> Mapping[str, Dataset]:
    """The splits of a given data set. Raises ValueError if the config names another source."""
    if given := [name for name in ("path", "name", "revision") if getattr(config, name) is not None]:
        raise ValueError(f"{some(given)} in the config would not be used beside `dataset`; leave out one of them.")
    return check_tables(dataset, config.test_fraction)


def _notes(
    found: Mapping[str, Dataset], splits: Mapping[str, str], holds_out: bool, config: StreamConfig
) -> list[str]:
    """Notes on data and settings that are not used."""
    notes = [*getattr(found, "notes", ())]
    if unused := [name for name in found if name not in splits.values()]:
        notes.append(f"not read are the splits {some(unused)} of the data")
    if holds_out and "test" in splits:
        notes.append(nothing_held_out(splits["test"]))
    drawn = "test" not in splits or config.max_train_per_class or config.max_eval_per_class
    if config.split_seed and not drawn:
        notes.append(f"split_seed {config.split_seed} has no effect, since nothing is drawn by it")
    return notes


def _check_filled(
    names: list[str], plan: list[list[int]], rows: Mapping[str, Any], eval_split: str, folders: Mapping[str, str]
) -> None:
    """Raise ValueError for planned classes without images; `folders`: each role's, if classes are folders."""
    for role in ("train", "test", eval_split):
        if empty := [names[c] for classes in plan for c in classes if not len(rows[role][c])]:
            way = "remove the names from the ClassLabel"
            if folders:
                way = f"put some into their folders in {folders.get(role, folders['train'])}/, remove their folders"
            raise ValueError(
                f"Classes without {role} images: {some(empty)}. Every class needs some (two for test_fraction): "
                f"{way}, or name the classes to learn in classes_per_task."
            )


def _views(config: StreamConfig, processors: Any, seed: int) -> dict[str, Preprocess]:
    """The view of each role; roles with identical views share one object."""
    views: dict[str, Preprocess] = {}
    for role, processor in (processors if isinstance(processors, Mapping) else {"student": processors}).items():
        crop = (config.crop_scale, config.crop_ratio, config.flip, config.crop_padding)
        own = Preprocess(processor, seed, *crop)
        views[role] = next((view for view in views.values() if same_view(view.processor, processor)), own)
    return views


def _undecoded(table: Dataset, column: str) -> Dataset:
    """The images of a table; TaskSplit decodes them, so that errors name the image."""
    return table.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))


def nothing_held_out(test_split: str) -> str:
    """Note that test_fraction has no effect."""
    return f"nothing is held out by test_fraction, since there is a test split, {test_split!r}"


def _parts(task: Task) -> list[tuple[str, TaskSplit]]:
    parts = {"train": task.train, "validation": task.validation, "test": task.test}
    return [(role, split) for role, split in parts.items() if isinstance(split, TaskSplit)]


def _refuse_known(names: list[str], labels: np.ndarray, learnt: Mapping[str, int]) -> None:
    """Raise ValueError if there are training images of classes learnt in earlier tasks."""
    present = [names[c] for c in np.unique(labels) if names[c] in learnt]
    if present:
        shown = some([f"{name} (task {learnt[name] + 1})" for name in present])
        raise ValueError(
            f"There are training images of classes that the models know already: {shown}. What earlier tasks "
            "learnt is frozen, so more images of their classes cannot improve it; under a second name they would "
            "compete with it. Take them out of the training images (test images of theirs measure what was "
            "forgotten), or leave them out with --data.known_train ignore."
        )


def _plan(names: list[str], order: list[int], config: StreamConfig) -> list[list[int]]:
    """The class indices of each task, taken from `order`."""
    if not order and names:
        raise ValueError(
            f"known_classes has all {counted(len(names), 'class')} of the data, so there is nothing to learn. Give "
            "images of new classes."
        )
    sizes = config.classes_per_task
    if isinstance(sizes, list) and isinstance(sizes[0], list):
        groups = [[nfc(name) for name in group] for group in sizes if isinstance(group, list)]
        class_of = {name: c for c, name in enumerate(names)}
        for name in [name for group in groups for name in group if name not in class_of]:
            close = difflib.get_close_matches(name, names) or names
            raise ValueError(f"classes_per_task names {name!r}, which is no class; close are {some(close, 3)}.")
        return [[class_of[name] for name in group] for group in groups]
    if config.class_order_seed is not None:
        order = np.random.default_rng(config.class_order_seed).permutation(order).tolist()
    if (config.max_classes or 0) > len(order):
        raise ValueError(
            f"max_classes is {config.max_classes}, but the data have {counted(len(order), 'class')}; lower it."
        )
    order = order[: config.max_classes]
    if sizes is None:
        return [order]
    if isinstance(sizes, int):
        if sizes > len(order):
            layout = f"; if these are not the classes, lay the data out as {LAYOUTS}" if config.path else ""
            raise ValueError(
                f"classes_per_task is {sizes}, but the data have only {counted(len(order), 'class')}: "
                f"{some(names[c] for c in order)}. Lower it (null: one task){layout}."
            )
        return [order[i : i + sizes] for i in range(0, len(order), sizes)]
    numbers = [size for size in sizes if isinstance(size, int)]
    if sum(numbers) != len(order):
        raise ValueError(
            f"classes_per_task adds up to {sum(numbers)}, but the data have {counted(len(order), 'class')}; make that "
            "the sum."
        )
    ends = np.cumsum(numbers).tolist()
    return [order[end - size : end] for end, size in zip(ends, numbers, strict=True)]
