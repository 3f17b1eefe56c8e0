"""What is in a data set's tables: which split and column is which, the labels, and the images of chosen rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset
from PIL import Image

from hf_cdl.tasks.transforms import ImageError, Preprocess, decode

USUAL_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}
USUAL_LABELS = ("label", "labels", "fine_label", "class", "class_name", "target")


def some(items: Iterable[Any], limit: int = 10) -> str:
    """The items joined by commas, at most `limit` of them, and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(items[:limit]) or "none") + more


def choose_splits(
    found: list[str], named: dict[str, str | None], needed: set[str]
) -> tuple[dict[str, str], list[str]]:
    """(role -> split name, problems) for the roles train, validation, test; a role without a split is left out."""
    chosen, problems = {role: name for role, name in named.items() if name is not None}, []
    for role, name in chosen.items():
        if name not in found:
            problems.append(f"{role}_split is {name!r}, but the splits are {some(found)}")
    for role in USUAL_SPLITS:
        free = [name for name in USUAL_SPLITS[role] if name in found and name not in chosen.values()]
        if role not in chosen and free:
            chosen[role] = free[0]
        if role not in chosen and role in needed:
            instead = ", or hold images out with test_fraction" if role == "test" else ""
            problems.append(
                f"there is no split for {role} (usual names: {some(USUAL_SPLITS[role])}); the splits are "
                f"{some(found)}. Name one with {role}_split{instead}"
            )
    return chosen, problems


def choose_columns(data: Dataset, image: str | None, label: str | None) -> tuple[str, str, list[str]]:
    """(image column, label column, problems); a column without a name is found by its type, labels also by name."""
    features, problems = data.features, []

    def choose(what: str, named: str | None, candidates: list[str], need: str) -> str:
        if (named in features) if named else len(candidates) == 1:
            return named or candidates[0]
        got = (
            f"{what}_column is {named!r}, which does not exist"
            if named
            else (f"several columns could be the {what}" if candidates else f"no {what} column was found ({need})")
        )
        problems.append(
            f"{got}; columns: {some(features)}; candidates: {some(candidates)}. Name it with {what}_column"
        )
        return ""

    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    images = images or [c for c, f in features.items() if isinstance(f, dict) and set(f) == {"bytes", "path"}]
    labels = [c for c, f in features.items() if isinstance(f, ClassLabel)]
    labels = labels or [c for c in USUAL_LABELS if c in features]
    image = choose("image", image, images, "a column of type Image")
    label = choose("label", label, labels, f"a ClassLabel, or a column called {' / '.join(USUAL_LABELS)}")
    kind = features.get(image)
    if (
        image
        and not isinstance(kind, datasets.Image | dict)
        and getattr(kind, "dtype", "") not in ("string", "binary")
    ):
        problems.append(f"image_column {image!r} holds {kind}, not images, their paths or their bytes")
    return image, label, problems


def read_labels(data: Mapping[str, Dataset], column: str) -> tuple[list[str], dict[str, np.ndarray], list[str]]:
    """(class names, role -> class number of each row, problems); plain numbers are their own names."""
    values: dict[str, np.ndarray] = {}
    kinds: dict[str, str | list[str]] = {}
    problems: list[str] = []
    for role, table in data.items():
        feature = table.features[column]
        cells = table.select_columns([column]).with_format("arrow")[:][column]
        number = pa.types.is_integer(cells.type)
        if cells.null_count:
            problems.append(f"{role}: {cells.null_count} labels are missing (null); remove these rows")
        elif not (number or pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
            problems.append(f"{role}: labels of type {cells.type}; allowed: ClassLabel, whole numbers and strings")
        else:
            kinds[role] = feature.names if isinstance(feature, ClassLabel) else "numbers" if number else "strings"
            values[role] = cells.to_numpy()
            if number and (values[role] < 0).any():
                problems.append(
                    f"{role}: {(values[role] < 0).sum()} labels are negative ({values[role].min()}), which usually "
                    "means unlabelled images; remove them or name another split"
                )
            elif isinstance(feature, ClassLabel) and (values[role] >= len(feature.names)).any():
                problems.append(
                    f"{role}: label {values[role].max()}, but there are only {len(feature.names)} class names"
                )
    if any(kind != kinds.get("train", kind) for kind in kinds.values()):
        shown = "; ".join(f"{role}: {some(kind) if isinstance(kind, list) else kind}" for role, kind in kinds.items())
        problems.append(f"the splits disagree about the classes ({shown}); give them the same ClassLabel")
    if problems:
        return [], {}, problems
    if kinds["train"] == "strings":
        names = sorted({str(value) for column_values in values.values() for value in column_values})
        index = {name: i for i, name in enumerate(names)}
        return names, {role: np.array([index[v] for v in cells], dtype=np.int64) for role, cells in values.items()}, []
    if kinds["train"] != "numbers":
        return list(kinds["train"]), values, []
    highest = max(int(numbers.max(initial=-1)) for numbers in values.values())
    images = sum(map(len, values.values()))
    if highest >= images:
        return [], {}, [f"the labels have gaps: they go up to {highest}, but there are {images} images; renumber them"]
    return [str(i) for i in range(highest + 1)], values, []


def draw_rows(
    labels: dict[str, np.ndarray],
    names: list[str],
    used: list[int],
    seed: int,
    test_fraction: float | None,
    limits: dict[str, int | None],
) -> dict[str, dict[int, np.ndarray]]:
    """Role -> class -> its rows. What is drawn for a class depends on its name and its own rows alone.

    `used`: the classes of the stream; `test_fraction`: held out of the training rows if there is no role test;
    `limits`: role -> rows kept per class. A smaller limit keeps a subset of what a larger one keeps.
    """

    def shuffled(rows: np.ndarray, purpose: str, c: int) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{purpose}/{names[c]}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(rows)

    rows: dict[str, dict[int, np.ndarray]] = {}
    for role, values in labels.items():
        order = np.argsort(values, kind="stable")
        starts = np.searchsorted(values[order], np.arange(len(names) + 1))
        rows[role] = {c: order[starts[c] : starts[c + 1]] for c in used}
    if "test" not in rows:
        rows["test"] = {}
        for c, own in rows["train"].items():
            own = shuffled(own, "hold out", c)
            held = min(max(1, round(len(own) * (test_fraction or 0))), max(0, len(own) - 1))
            rows["test"][c], rows["train"][c] = np.sort(own[:held]), np.sort(own[held:])
    return {
        role: {c: shuffled(own, role, c)[: limits[role]] for c, own in classes.items()}
        for role, classes in rows.items()
    }


def missing_classes(names: list[str], rows: dict[str, dict[int, np.ndarray]], needed: set[str]) -> list[str]:
    """The problems of classes without images in a needed role."""
    empty = {role: [c for c, own in classes.items() if not len(own)] for role, classes in rows.items()}
    nowhere = set.intersection(*map(set, empty.values()))
    problems = []
    if nowhere:
        problems.append(
            f"classes without any image: {some(names[c] for c in sorted(nowhere))}. If labels are numbers, renumber "
            f"them 0 ... {len(names) - len(nowhere) - 1} without gaps; otherwise remove these names"
        )
    for role in [role for role in rows if role in needed]:
        if lacking := [names[c] for c in empty[role] if c not in nowhere]:
            problems.append(f"classes without {role} images (test_fraction needs two of a class): {some(lacking)}")
    return problems


class TaskSplit(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of one data set split: `split[i]` is the evaluation view, `split[(i, v)]` the augmented view v.

    An item is {"pixel_values": (3, H, W), "labels": number of the class in stream order}. `rows` are indices into the
    whole data set split; the augmentation knows the samples by them. Raises ImageError for a bad image.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        name: str,
        task: int,
        rows: np.ndarray,
        labels: np.ndarray,
        preprocess: Preprocess,
    ):
        self.data = data
        self.name = name
        self.task = task
        self.rows = rows
        self.labels: list[int] = labels.tolist()
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """A batch of evaluation views or of augmented views (not both), by one call of the image processor."""
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        samples = [(self.task, int(self.rows[key[0]]), key[1]) for key in keys if isinstance(key, tuple)]
        images = [self.image(i) for i in indices]
        pixels = self.preprocess.training(images, samples) if samples else self.preprocess.evaluation(images)
        return [{"pixel_values": p, "labels": self.labels[i]} for p, i in zip(pixels, indices, strict=True)]

    def image(self, index: int) -> Image.Image:
        """The decoded image, in RGB."""
        row = int(self.rows[index])
        (cell,) = self.data[row].values()
        try:
            return decode(cell)
        except ImageError as error:
            raise ImageError(f"split {self.name!r}, row {row}: {error}") from error


def file_sizes(data: Dataset) -> np.ndarray:
    """Bytes of every image (N,); -1 where the file is missing."""
    sizes: list[int] = []
    for batch in data.with_format("arrow").iter(1000):
        for cell in pa.table(batch).column(0):
            content, path = cell["bytes"].as_buffer(), cell["path"].as_py()
            on_disk = os.path.getsize(path) if content is None and path and os.path.exists(path) else -1
            sizes.append(on_disk if content is None else content.size)
    return np.array(sizes, dtype="<i8")
