"""A class-incremental stream: an image-classification data set cut into tasks with disjoint classes."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from hf_cdl.tasks.benchmarks import BENCHMARKS
from hf_cdl.tasks.tables import choose_columns, choose_splits, draw_rows, file_sizes, load_splits, read_labels, some
from hf_cdl.tasks.transforms import ImageError, Preprocess, decode, same_view
from hf_cdl.types import Task


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class StreamConfig:
    """The `data` section of a recipe. Raises ValueError, naming every field that is out of range."""

    path: str | None = _option(None, "Hub id, local folder (class folders of images, parquet files) or benchmark name")
    name: str | None = _option(None, "configuration of the data set on the Hub")
    revision: str | None = _option(None, "commit, tag or branch on the Hub")
    image_column: str | None = _option(None, "none: the only column of type Image")
    label_column: str | None = _option(None, "none: the only ClassLabel, or the column called label, class ...")
    train_split: str | None = _option(None, "none: train")
    validation_split: str | None = _option(None, "none: validation, val, valid or dev, if there is one")
    test_split: str | None = _option(None, "none: test, if there is one")
    test_fraction: float | None = _option(None, "without a test split: fraction of each class held out for testing")
    split_seed: int = _option(0, "seed of test_fraction and of the max_*_per_class subsets")
    classes_per_task: int | list[int] | list[list[str]] | None = _option(
        10,
        "classes in every task (the last task takes the rest), or a list: sizes, or class names, task by task; "
        "none: one task",
    )
    class_order_seed: int | None = _option(None, "shuffles the classes; none: natural order 0, 1, 2 ...")
    max_classes: int | None = _option(None, "keep only the first classes of the order")
    known_classes: list[list[str]] | None = _option(
        None, "class names, task by task, that the models learnt elsewhere: tasks before the first one of these data"
    )
    known_train: Literal["refuse", "ignore"] = _option(
        "refuse", "training images of known classes: an error, or left out (test images of theirs are always used)"
    )
    max_train_per_class: int | None = _option(None, "keep a random subset of each class's training images")
    max_eval_per_class: int | None = _option(None, "the same for validation and test images")
    crop_scale: tuple[float, float] = _option((0.08, 1.0), "training view: range of the crop's area / image area")
    crop_ratio: tuple[float, float] = _option((3 / 4, 4 / 3), "training view: range of the crop's width / height")
    crop_padding: int | None = _option(
        None, "training view: instead, black pixels added on every side, then a random crop of the image's own size"
    )
    flip: float = _option(0.5, "training view: probability of a horizontal flip")
    eval_split: Literal["test", "validation"] = _option("test", "images on which accuracy is measured")

    def __post_init__(self) -> None:
        problems: list[str] = []
        sizes = self.classes_per_task if isinstance(self.classes_per_task, list) else [self.classes_per_task]
        if not sizes or not all(size if isinstance(size, list) else size is None or size > 0 for size in sizes):
            problems.append(f"classes_per_task is {sizes}, but every task needs at least one class")
        known = [name for task in self.known_classes or () for name in task]
        if not all(self.known_classes or ()) or len({*known}) < len(known):
            problems.append(f"known_classes is {some(known)}, but tasks are not empty and a class belongs to one task")
        if names := [name for size in sizes if isinstance(size, list) for name in size]:
            if both := sorted({*names} & {*known}):
                problems.append(f"classes_per_task names {some(both)}, which known_classes has too")
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
        if self.crop_padding is not None and self.crop_padding < 0:
            problems.append(f"crop_padding is {self.crop_padding}, but must be a number of pixels, like 4")
        if not 0 <= self.flip <= 1:
            problems.append(f"flip is {self.flip}, but a probability lies between 0 and 1")
        if problems:
            raise ValueError("These settings make no stream of tasks:\n- " + "\n- ".join(problems))


class TaskStream:
    """The tasks of a class-incremental stream, in order.

    `processors`: the image processor of each role (`student`, `teacher` ...), or one for all; a role that is not named
    sees what the first one sees. `seed`: of the augmented views. `dataset`: the data themselves (a DatasetDict)
    instead of `config.path`. `config`: with a benchmark's values filled in. Splits, columns, labels and classes are
    checked here, the images by `check_images`. Raises ValueError if no stream can be made of the data.
    """

    def __init__(
        self,
        config: StreamConfig,
        processors: BaseImageProcessor | Mapping[str, BaseImageProcessor],
        seed: int = 0,
        dataset: Mapping[str, Dataset] | None = None,
    ):
        preset = BENCHMARKS.get(config.path or "", {}) if dataset is None else {}
        config = replace(config, **{k: v for k, v in preset.items() if k == "path" or getattr(config, k) is None})
        self.config = config
        named = {"train": config.train_split, "validation": config.validation_split, "test": config.test_split}
        found = dataset or load_splits(config.path, config.name, config.revision, named.values())
        needed = {"train", "test", config.eval_split} - ({"test"} if config.test_fraction else set())
        splits = choose_splits(found, named, needed)
        tables = {role: found[name] for role, name in splits.items()}
        image_column, label_column = choose_columns(tables, config.image_column, config.label_column)
        names, labels = read_labels(tables, label_column)
        known = config.known_classes or []
        learnt = {name: index for index, task in enumerate(known) for name in task}
        if config.known_train == "refuse":
            _refuse_known(names, labels["train"], learnt)
        plan = _plan(names, [c for c, name in enumerate(names) if name not in learnt], config)
        limit = config.max_eval_per_class
        limits = {"train": config.max_train_per_class, "validation": limit, "test": limit}
        rows = draw_rows(names, labels, range(len(names)), config.split_seed, config.test_fraction, limits)
        for role in ("train", "test", config.eval_split):
            if empty := [names[c] for classes in plan for c in classes if not len(rows[role][c])]:
                raise ValueError(
                    f"Classes without {role} images: {some(empty)}. Every class needs some (two for test_fraction): "
                    "remove the names from the ClassLabel, or name the classes to learn in classes_per_task."
                )
        tasks = [*known, *([names[c] for c in classes] for classes in plan)]
        number = {name: i for i, name in enumerate(name for task in tasks for name in task)}
        views: dict[str, Preprocess] = {}  # of a role; roles that see the same share one object
        for role, processor in (processors if isinstance(processors, Mapping) else {"student": processors}).items():
            crop = (config.crop_scale, config.crop_ratio, config.flip, config.crop_padding)
            own = Preprocess(processor, seed, *crop)
            views[role] = next((view for view in views.values() if same_view(view.processor, processor)), own)
        images: dict[str, Dataset] = {}  # not decoded here but by TaskSplit, so that errors name the image
        for role, table in tables.items():
            column = table.with_format(None).select_columns([image_column])
            images[role] = column.cast_column(image_column, ImageFeature(decode=False))
        self._tasks: list[Task] = []
        for index, class_names in enumerate(tasks):
            classes, old = [c for c, name in enumerate(names) if name in class_names], index < len(known)
            parts: dict[str, TaskSplit] = {}
            for role, own in rows.items():
                source = role if role in tables else "train"  # a held-out test set is a part of train
                used = () if old and source == "train" else (own[c] for c in classes)  # they were learnt from such
                where = np.sort(np.concatenate([np.empty(0, np.int64), *used]))
                targets = [number[names[c]] for c in labels[source][where].tolist()]
                if targets or role in ("train", "test", config.eval_split):  # a task may have no validation images
                    parts[role] = TaskSplit(images[source], splits[source], index, where, targets, views)
            splits_of = (parts["train"], parts.get("validation"), parts["test"])
            self._tasks.append(Task(index, tuple(class_names), number[class_names[0]], *splits_of))

    def __getitem__(self, index: int) -> Task:
        return self._tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def class_names(self) -> list[str]:
        """In stream order, the order of the logits."""
        return [name for task in self for name in task.class_names]

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

    @property
    def images(self) -> dict[str, list[int]]:
        """Split -> numbers of its images in each class, in stream order; for splits that have some."""
        found = {role: [] for role in ("train", "validation", "test")}
        for role, counts in found.items():
            for task in self:
                split: Any = getattr(task, role) or []
                labels = np.array(getattr(split, "labels", []), np.int64) - task.first_class
                counts += np.bincount(labels, minlength=len(task.class_names)).tolist()
        return {role: counts for role, counts in found.items() if any(counts)}

    def check_images(self) -> None:
        """Decodes every image of the stream once, in threads. Raises ImageError naming the first ten bad ones."""
        splits = [split for task in self for _, split in _parts(task)]
        bad: list[str] = []
        with (
            ThreadPoolExecutor() as pool,
            tqdm(total=sum(map(len, splits)), desc="Checking images", unit="image", disable=None) as bar,
        ):
            for split in splits:
                for problem in pool.map(split.problem, range(len(split))):
                    bad += [problem] if problem else []
                    bar.update()
        if bad:
            more = f"\n- and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise ImageError(f"{len(bad)} images cannot be used:\n- " + "\n- ".join(bad[:10]) + more)


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """Rows of one split of the data: `split[i]` is the evaluation view, `split[(i, v)]` the augmented view v.

    An item is {"pixel_values": (3, H, W), "labels": number of the class in stream order}; `seen_by` chooses the role
    whose image processor makes the pixel values. `rows` are indices into the whole split of that `name`; the
    augmentation knows the samples by them. Raises ImageError for a bad image.
    """

    data: Dataset
    name: str
    task: int
    rows: np.ndarray
    labels: list[int]
    views: Mapping[str, Preprocess]
    roles: tuple[str, ...] = ("student",)

    def __len__(self) -> int:
        return len(self.rows)

    def seen_by(self, *roles: str) -> TaskSplit:
        """The same images as the model of the first role sees them, in `pixel_values`.

        Each further role with another view of them adds `ROLE_pixel_values`: of an augmented view, the same crop.
        """
        return replace(self, roles=roles)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """A batch of evaluation views or of augmented views (not both), by one call of each image processor."""
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        samples = [(self.task, int(self.rows[key[0]]), key[1]) for key in keys if isinstance(key, tuple)]
        images = [self.image(i) for i in indices]
        items: list[dict[str, Any]] = [{} for _ in indices]
        for name, view in self._pixel_values().items():
            pixels = view.training(images, samples) if samples else view.evaluation(images)
            for item, p in zip(items, pixels, strict=True):
                item[name] = p
        return [{**item, "labels": self.labels[i]} for item, i in zip(items, indices, strict=True)]

    def _pixel_values(self) -> dict[str, Preprocess]:
        """What makes each tensor of an item, without those that would be the first again."""
        first, *others = (self.views.get(role) or next(iter(self.views.values())) for role in self.roles)
        more = {f"{role}_pixel_values": view for role, view in zip(self.roles[1:], others, strict=True)}
        return {"pixel_values": first, **{name: view for name, view in more.items() if view is not first}}

    def image(self, index: int) -> Image.Image:
        """The decoded image, in RGB."""
        row = int(self.rows[index])
        (cell,) = self.data[row].values()
        try:
            return decode(cell)
        except ImageError as error:
            raise ImageError(f"split {self.name!r}, row {row}: {error}") from error

    def problem(self, index: int) -> str | None:
        """Why an image cannot be used; None if it can."""
        try:
            self.image(index)
        except ImageError as error:
            return str(error)


def _parts(task: Task) -> list[tuple[str, TaskSplit]]:
    parts = {"train": task.train, "validation": task.validation, "test": task.test}
    return [(role, split) for role, split in parts.items() if isinstance(split, TaskSplit)]


def _refuse_known(names: list[str], labels: np.ndarray, learnt: Mapping[str, int]) -> None:
    """Raises ValueError if there are training images of classes that were learnt in earlier tasks."""
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
    """The class numbers of each task, of those in `order`."""
    if not order and names:
        raise ValueError("The data have no class that is not among the known ones.")
    sizes = config.classes_per_task
    if isinstance(sizes, list) and isinstance(sizes[0], list):
        groups = [group for group in sizes if isinstance(group, list)]
        for name in [name for group in groups for name in group if name not in names]:
            close = difflib.get_close_matches(name, names) or names
            raise ValueError(f"classes_per_task names {name!r}, which is no class; close are {some(close, 3)}.")
        return [[names.index(name) for name in group] for group in groups]
    if config.class_order_seed is not None:
        order = np.random.default_rng(config.class_order_seed).permutation(order).tolist()
    if (config.max_classes or 0) > len(order):
        raise ValueError(f"max_classes is {config.max_classes}, but there are {len(order)} classes.")
    order = order[: config.max_classes]
    if sizes is None:
        return [order]
    if isinstance(sizes, int):
        if sizes > len(order):
            raise ValueError(f"classes_per_task is {sizes}, but there are only {len(order)} classes.")
        return [order[i : i + sizes] for i in range(0, len(order), sizes)]
    numbers = [size for size in sizes if isinstance(size, int)]
    if sum(numbers) != len(order):
        raise ValueError(f"classes_per_task adds up to {sum(numbers)}, but there are {len(order)} classes.")
    ends = np.cumsum(numbers).tolist()
    return [order[end - size : end] for end, size in zip(ends, numbers, strict=True)]
