"""From a path to tables and labels: which splits a data set has, and which column holds the images and the classes."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, load_dataset

from hf_cdl.tasks.benchmarks import BENCHMARKS

USUAL_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}
USUAL_LABELS = ("label", "labels", "fine_label", "class", "class_name", "target")
_SPLIT_NAMES = sum(USUAL_SPLITS.values(), ())
# What often lies beside images. Any other file counts as one; if it is none, `check_images` names it.
_NO_IMAGES = tuple(".txt .md .html .csv .tsv .json .jsonl .xml .yaml .npy .mat .db .ini".split())


class NoDataError(ValueError):
    """There is nothing to read where `data.path` points, or it cannot be reached."""


def some(items: Iterable[Any], limit: int = 10) -> str:
    """The items joined by commas, at most `limit` of them, and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(items[:limit]) or "none") + more


def load_splits(
    path: str | None, name: str | None, revision: str | None, named: Collection[str | None]
) -> Mapping[str, Dataset]:
    """Split name -> data, from a local folder or the Hub. Nothing is written into a local folder.

    A local folder holds parquet files called after their split (train.parquet, train-00000-of-00002.parquet) or class
    folders of images, these inside folders called after a split (the usual names and those in `named`) or, without
    such folders, as one split "train". Raises ValueError if there is nothing to read or the Hub cannot be reached.
    """
    if path is None:
        raise ValueError(f"data.path is missing; give a Hub id, a local folder or a benchmark: {some(BENCHMARKS)}.")
    root = Path(path).expanduser()
    if root.is_dir():
        return _parquet_files(root) or _class_folders(root, {*_SPLIT_NAMES, *named})
    if root.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise NoDataError(f"The folder {path} does not exist (data.path).")
    try:
        found: Any = load_dataset(path, name, revision=revision)
        return {str(split): table for split, table in found.items()}
    except OSError as error:
        raise NoDataError(
            f"The data set {path!r} cannot be loaded: it is no local folder, no benchmark ({some(BENCHMARKS)}), and "
            f"the Hub answered: {error}. Without a network, use a local copy: where there is one, run `hf download "
            f"{path} --repo-type dataset --local-dir FOLDER`, copy FOLDER here and set data.path to the folder in it "
            "that holds the parquet files (and image_column, label_column and the splits as for the Hub)."
        ) from error


def _parquet_files(root: Path) -> dict[str, Dataset]:
    files: dict[str, list[str]] = {}
    for file in sorted(root.glob("*.parquet")):
        usual = re.match(rf"({'|'.join(_SPLIT_NAMES)})(?![a-z])", file.stem)
        split = usual[1] if usual else re.sub(r"-\d+-of-\d+$", "", file.stem)
        files.setdefault(split, []).append(glob.escape(str(file)))
    return {split: load_dataset("parquet", data_files=names, split="train") for split, names in files.items()}


def _class_folders(root: Path, split_names: set[str | None]) -> dict[str, Dataset]:
    """Tables of paths. Not `imagefolder`, which takes a class called "train" or "test" for a split."""
    splits = {f.name: f for f in _folders(root) if f.name in split_names and _folders(f)} or {"train": root}
    names = sorted({f.name for split in splits.values() for f in _folders(split)})
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
    tables = {}
    for split, folder in splits.items():
        found = [(str(file), f.name) for f in _folders(folder) for file in _images(f)]
        columns = {"image": [path for path, _ in found], "label": [name for _, name in found]}
        tables[split] = Dataset.from_dict(columns, features=features)
    if not any(map(len, tables.values())):
        raise ValueError(
            f"The folder {root} cannot be read as a data set. Allowed are parquet files called after their split "
            "(train.parquet, test.parquet) or class folders of images (train/CLASS/x.png, test/CLASS/y.png)."
        )
    return tables


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """All files in the folder and below, but hidden ones and those that are plainly something else."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() not in _NO_IMAGES)
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def choose_splits(found: Collection[str], named: Mapping[str, str | None], needed: set[str]) -> dict[str, str]:
    """Role (train, validation, test) -> split name; a role without a split is left out.

    Raises ValueError if a `named` split does not exist or a `needed` role has none.
    """
    chosen = {role: name for role, name in named.items() if name is not None}
    for role, name in chosen.items():
        if name not in found:
            raise ValueError(f"{role}_split is {name!r}, but the splits are {some(found)}.")
    for role, usual in USUAL_SPLITS.items():
        free = [name for name in usual if name in found and name not in chosen.values()]
        if role not in chosen and free:
            chosen[role] = free[0]
        if role not in chosen and role in needed:
            instead = ", or hold images out with test_fraction" if role == "test" else ""
            raise ValueError(
                f"There is no split for {role} (usual names: {some(usual)}); the splits are {some(found)}. "
                f"Name one with {role}_split{instead}."
            )
    return chosen


def choose_columns(tables: Mapping[str, Dataset], image: str | None, label: str | None) -> tuple[str, str]:
    """(image column, label column); one without a name is found by its type, labels also by their name.

    Raises ValueError if a column does not exist in all splits, is not of images or is not the only candidate.
    """
    features = tables["train"].features
    images = [column for column, feature in features.items() if _holds_images(feature)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [column for column in USUAL_LABELS if column in features]
    chosen = []
    for what, named, candidates in (("image", image, images), ("label", label, labels)):
        column = candidates[0] if named is None and len(candidates) == 1 else named
        if column is None:
            raise ValueError(
                f"{'Several columns' if candidates else 'No column'} could be the {what}; candidates: "
                f"{some(candidates)}; columns: {some(features)}. Name it with {what}_column."
            )
        for role, table in tables.items():
            if column not in table.column_names:
                raise ValueError(
                    f"The {role} split has no {what} column {column!r}; columns: {some(table.column_names)}. "
                    f"Name it with {what}_column."
                )
        chosen.append(column)
    if chosen[0] not in images:
        raise ValueError(f"image_column {chosen[0]!r} holds {features[chosen[0]]}, not images; with images: {images}.")
    return chosen[0], chosen[1]


def _holds_images(feature: Any) -> bool:
    """Whether a column is of type Image, or has its fields (a parquet file that `datasets` did not write)."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def read_labels(tables: Mapping[str, Dataset], column: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """(class names, role -> class number of each row); strings are sorted, plain numbers are their own names.

    Raises ValueError for missing labels, numbers without a class, gaps, and splits that disagree about the classes.
    """
    kind = tables["train"].features[column]
    values: dict[str, np.ndarray] = {}
    for role, table in tables.items():
        if table.features[column] != kind:
            kinds = {role: table.features[column] for role, table in tables.items()}
            shown = [f"{role}: {some(getattr(kind, 'names', [kind]))}" for role, kind in kinds.items()]
            raise ValueError(
                f"The splits disagree about the classes ({'; '.join(shown)}). Give them the same ClassLabel."
            )
        cells = table.select_columns([column]).with_format("arrow")[:][column]
        if cells.null_count:
            raise ValueError(f"{cells.null_count} labels of the {role} split are missing (null). Remove these rows.")
        if not any(fits(cells.type) for fits in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
            raise ValueError(f"Labels are of type {cells.type}; allowed: ClassLabel, whole numbers and strings.")
        values[role] = cells.to_numpy()
    present = np.unique(np.concatenate(list(values.values())))
    if isinstance(kind, ClassLabel):
        names = list(kind.names)
    else:
        names = [str(value) for value in present]
        if present.dtype == object:
            return names, {role: np.searchsorted(present, cells) for role, cells in values.items()}
    wrong = present[(present < 0) | (present >= len(names))]
    if len(wrong):
        raise ValueError(
            f"Labels must be 0 ... {len(names) - 1} for {len(names)} classes, but there are {some(wrong)}. Renumber "
            "labels with gaps; -1 usually means unlabelled images: remove them or name another split."
        )
    return names, values


def draw_rows(
    names: list[str],
    labels: Mapping[str, np.ndarray],
    classes: Iterable[int],
    seed: int,
    test_fraction: float | None,
    limits: Mapping[str, int | None],
) -> dict[str, dict[int, np.ndarray]]:
    """Role -> class -> its rows, for the given classes. What is drawn depends on a class's name and own rows alone.

    `test_fraction` is held out of the training rows if there is no role test. `limits`: role -> rows kept per class;
    a smaller limit keeps a subset of what a larger one keeps.
    """

    def shuffled(rows: np.ndarray, purpose: str, c: int) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{purpose}/{names[c]}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(rows)

    rows = {role: {c: np.flatnonzero(values == c) for c in classes} for role, values in labels.items()}
    if "test" not in rows:
        rows["test"] = {}
        for c, own in rows["train"].items():
            own = shuffled(own, "hold out", c)
            held = min(max(1, round(len(own) * (test_fraction or 0))), max(0, len(own) - 1))
            rows["test"][c], rows["train"][c] = np.sort(own[:held]), np.sort(own[held:])
    return {
        role: {c: shuffled(own, role, c)[: limits[role]] for c, own in of_class.items()}
        for role, of_class in rows.items()
    }


def file_sizes(data: Dataset) -> np.ndarray:
    """Bytes of every image (N,); -1 where the file is missing."""
    sizes: list[int] = []
    for batch in data.with_format("arrow").iter(1000):
        for cell in pa.table(batch).column(0):
            content, path = cell["bytes"].as_buffer(), cell["path"].as_py()
            on_disk = os.path.getsize(path) if content is None and path and os.path.exists(path) else -1
            sizes.append(on_disk if content is None else content.size)
    return np.array(sizes, dtype="<i8")
