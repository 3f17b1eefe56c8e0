"""Tables in a local folder: parquet files, Dataset.save_to_disk output, and metadata.csv with images."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, load_dataset

from hf_cdl.data.images import check_regular, readable
from hf_cdl.data.names import some
from hf_cdl.data.splits_and_columns import USUAL_LABELS, USUAL_SPLITS, role_of

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLIT_NAMES = sum(USUAL_SPLITS.values(), ())

Tables = Mapping[str, Dataset]


def parquet_tables(root: Path) -> Tables:
    """Split name -> data of a folder's parquet files; a file not named after a split is its own split."""
    files: dict[str, list[str]] = {}
    for file in _parquet_files(root):
        usual = re.match(rf"({'|'.join(_SPLIT_NAMES)})(?![a-z])", file.stem, re.IGNORECASE)
        split = usual[1] if usual else re.sub(r"-\d+-of-\d+$", "", file.stem)
        files.setdefault(split, []).append(str(file))
    return {split: _load("parquet", names) for split, names in files.items()}


def _parquet_files(root: Path) -> list[Path]:
    """A folder's parquet files, sorted. Raises ValueError if a part is missing."""
    found = [f for f in sorted(root.glob("*.parquet")) if f.name not in METADATA and not f.name.startswith(".")]
    parts: dict[tuple[str, int], list[int]] = {}
    for file in found:
        if part := re.fullmatch(r"(.*)-(\d+)-of-(\d+)", file.stem):
            parts.setdefault((part[1], int(part[3])), []).append(int(part[2]))
    for (name, count), numbers in parts.items():
        if len(numbers) != count:
            raise ValueError(
                f"{readable(str(root))} holds {len(numbers)} of the {count} parts of {readable(name)} (there are "
                f"{some(numbers)}). Get the missing ones, or rename the files if these are all."
            )
    return found


def parquet_table(root: Path) -> Dataset | None:
    """All parquet files of a folder as one table; None if there are none."""
    files = [str(file) for file in _parquet_files(root)]
    return _load("parquet", files) if files else None


def _load(kind: str, files: list[str]) -> Dataset:
    for file in files:
        _read(Path(file), check_regular, file)
    return _read(Path(files[0]), load_dataset, kind, data_files=[*map(glob.escape, files)], split="train")


def _read(place: Path, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `read`, turning any error into a one-line ValueError that names the file or folder."""
    try:
        return read(*args, **options)
    except Exception as error:  # readers of arrow, json, csv and `datasets` raise all kinds of errors
        cause = error.__cause__ or error
        reason = readable(f"{type(cause).__name__}: {cause}".split("\n")[0])
        raise ValueError(f"{readable(str(place))} cannot be read: {reason}. Repair it, or take it away.") from error


def saved_tables(root: Path) -> Tables | None:
    """Split name -> data that `save_to_disk` wrote to a folder; None if there is none."""
    if not (root / "dataset_dict.json").is_file():
        table = saved_table(root)
        return None if table is None else {str(table.split or "train"): table}
    names = _read(root / "dataset_dict.json", lambda: json.loads((root / "dataset_dict.json").read_text())["splits"])
    tables = {name: saved_table(root / _inside(root / "dataset_dict.json", name)) for name in names}
    if missing := [name for name, table in tables.items() if table is None]:
        raise ValueError(f"{root}/dataset_dict.json names {some(missing)}, but there is no such split. Save it again.")
    return {name: table for name, table in tables.items() if table is not None}


def saved_table(root: Path) -> Dataset | None:
    """The table that Dataset.save_to_disk wrote to a folder; None if there is none."""
    state = root / "state.json"
    if not state.is_file():
        return None
    files = _read(state, lambda: [part["filename"] for part in json.loads(state.read_text())["_data_files"]])
    for name in files:
        _read(root / _inside(state, name), check_regular, root / name)
    return _read(root, Dataset.load_from_disk, str(root))


def _inside(file: Path, name: Any) -> str:
    """The name of a file or folder next to `file`. Raises ValueError if it points elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
        raise ValueError(f"{file} names {readable(repr(name))}, which is not in its folder. Save the data again.")
    return name


def metadata_table(root: Path, label_column: str | None, class_folders: Callable[[Path], bool]) -> Dataset | None:
    """The table that `datasets` makes from a metadata file next to images; None if there is none.

    `class_folders`: whether a folder has subfolders that could be classes. They take precedence, and the result is
    None, if the file has no classes or the same ones. Raises ValueError if they differ and no `label_column` is set.
    """
    files = [root / name for name in METADATA if (root / name).is_file()]
    if not files:
        return None
    if len(files) > 1:
        raise ValueError(f"{root} has {some(f.name for f in files)}; leave one of them.")
    has_classes = class_folders(root)
    try:
        table = _load("imagefolder", [os.path.abspath(files[0])])
    except ValueError:
        if has_classes and not _lists_files(files[0]):  # not a metadata file despite its name
            return None
        raise
    column = label_column or next((name for name in USUAL_LABELS if name in table.column_names), None)
    if not has_classes or (label_column is not None and label_column in table.column_names):
        return table
    if column is None or column not in table.column_names:
        return None
    labels, folders = map(str, table[column]), [path.parent.name for path in image_paths(table)]
    if all(folder == label for folder, label in zip(folders, labels, strict=True)):
        return None
    if len(set(folders)) == 1 or all(map(role_of, folders)):
        return table
    raise ValueError(
        f"{files[0]} and the folders beside it disagree about the classes: its column {column!r}, or the folders "
        f"{some(sorted(set(folders)))}? Set label_column to {column}, or take the file away."
    )


def _lists_files(file: Path) -> bool:
    """Whether the file starts with the column that `datasets` needs, in any notation."""
    with file.open("rb") as content:
        return b"file_name" in content.read(4096)


def image_paths(table: Dataset) -> list[Path]:
    """Return the paths in the first image column."""
    column = next(name for name, feature in table.features.items() if isinstance(feature, datasets.Image))
    cells = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))[column]
    return [Path(cell["path"] or "") for cell in cells]


def cut_by_split(root: Path, table: Dataset) -> Tables:
    """Split name -> rows, by the column "split" or the images' folders; without either, everything is "train".

    Raises ValueError if only some rows have the name of a split.
    """
    if "split" in table.column_names:
        names, what = [str(name) for name in table["split"]], "column 'split'"
    else:
        within = Path(os.path.abspath(root))
        names = [path.relative_to(within).parts[0] for path in image_paths(table)]
        what = "folders"
    if not any(map(role_of, names)):
        return {"train": table}
    if others := sorted({name for name in names if role_of(name) is None}):
        raise ValueError(f"The {what} of the metadata in {root} names no split in some rows: {some(others)}.")
    return {name: table.select(np.flatnonzero(np.array(names) == name)) for name in dict.fromkeys(names)}
