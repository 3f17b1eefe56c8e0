"""Local folders as data sets: detect the layout and read the tables. Nothing is written to the folder.

Recognised layouts: parquet files named after their split, Dataset.save_to_disk output, metadata.csv next to images as
read by `datasets`, class folders inside split folders, split folders inside class folders, and class folders alone;
all but the last also one level down, if there is only one subfolder. Ambiguous layouts are refused: a folder named
like a split is a class only inside a split folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from datasets.fingerprint import generate_random_fingerprint
from PIL import Image

from hf_cdl.counted import counted
from hf_cdl.data.files import (
    Tables,
    cut_by_split,
    metadata_table,
    parquet_table,
    parquet_tables,
    saved_table,
    saved_tables,
)
from hf_cdl.data.images import readable
from hf_cdl.data.names import nfc, some
from hf_cdl.data.splits_and_columns import role_like, role_of

# Files often found next to images. Any other file counts as an image; if it is not one, `check_images` reports it.
_NO_IMAGES = tuple(".txt .md .html .csv .tsv .json .jsonl .xml .yaml .npy .mat .db .ini".split())
_TABLES = (".csv", ".tsv", ".json", ".jsonl")
_NO_FOLDERS = ("__MACOSX", "@eaDir")  # added by macOS and Synology
LAYOUTS = (
    "parquet files called after their split (train.parquet, test.parquet), class folders of images inside split "
    "folders (train/CLASS/x.png, test/CLASS/y.png) or alone with test_fraction, what save_to_disk writes, or images "
    "with a metadata.csv"
)


class ClassFolders(dict[str, Dataset]):
    """Split name -> table of paths, where classes are folders; `notes`: what was found but left out."""

    def __init__(self, tables: Tables, notes: Iterable[str] = ()):
        super().__init__(tables)
        self.notes = list(notes)


def read_folder(root: Path, named: Iterable[str], label_column: str | None) -> Tables:
    """Read a local folder as split name -> table. `named`: further names of split folders.

    Raises ValueError, listing the folder's content, if it is not a data set or is ambiguous.
    """
    named = set(named)
    found, folders = _recognised(root, named, label_column), _folders(root)
    if found is None and len(folders) == 1 and role_of(folders[0].name) is None and not _pictures(folders[0]):
        found = _recognised(folders[0], named, label_column)
    found = _class_folders(root) if found is None else found
    if not any(map(len, found.values())):
        lying = sorted(f.name + "/" * f.is_dir() for f in root.iterdir() if not f.name.startswith("."))
        raise ValueError(
            f"The folder {readable(str(root))} cannot be read as a data set; in it lie {some(lying)}. Allowed are "
            f"{LAYOUTS}. Unpack archives; give other data to TaskStream(dataset=...), as `load_dataset` reads them."
        )
    return found


def is_among_images(place: Path, root: Path, named: Iterable[str] = (), classes: bool = True) -> bool:
    """Whether what is put into `place` would be read as images of a local folder; `classes`: of class folders."""
    root, place = root.resolve(), place.resolve()
    if not root.is_dir() or root not in (place, *place.parents) or _has_table(root):
        return False
    if any(part.startswith(".") for part in place.relative_to(root).parts):
        return False
    if classes and (splits := _split_folders(root, {*named})):
        return any(folder in (place, *place.parents) for folder in splits.values())
    return not any(map(_has_table, _folders(root))) and any(
        not file.lower().endswith(_NO_IMAGES) for _, files in _walked(root) for file in files
    )


def _recognised(root: Path, named: set[str], label_column: str | None) -> Tables | None:
    """The tables of a folder whose layout is explicit; None if it is not."""
    found = saved_tables(root) or parquet_tables(root)
    if found:
        return found
    table = metadata_table(root, label_column, _has_pictures)
    if table is not None:
        return cut_by_split(root, table)
    if splits := _split_folders(root, named):
        return _of_split_folders(root, splits, label_column)
    holders = {folder.name: tables for folder in _folders(root) if (tables := parquet_tables(folder))}
    if holders and not any(map(_pictures, _folders(root))):
        if len(holders) > 1:
            raise ValueError(f"Several folders of {root} hold parquet files: {some(holders)}. Set data.path to one.")
        return next(iter(holders.values()))
    return _splits_in_classes(root)


def _split_folders(root: Path, named: set[str]) -> dict[str, Path]:
    """Split name -> folder, for folders named after a split that hold folders or tables.

    If there are none: usual split name -> folder, for names containing a split's name, such as training_set, whose
    class folders must have the same names.
    """
    filled = [folder for folder in _folders(root) if _folders(folder) or _has_table(folder)]
    exact = {folder.name: folder for folder in filled if folder.name in named or role_of(folder.name)}
    like = {role: folder for folder in filled if (role := role_like(folder.name))}
    if exact:
        return exact
    inner = {role: {f.name for f in _folders(_inner(folder))} for role, folder in like.items()}
    if len(like) < 2 or not all(names <= inner.get("train", set()) for names in inner.values()):
        return {}
    names = [folder.name for folder in filled if role_like(folder.name)]
    if len(like) < len(names):
        raise ValueError(f"{root}: which of {some(names)} are train and test? Say so by train_split and test_split.")
    return like


def _has_table(folder: Path) -> bool:
    names = ("state.json", "metadata.csv", "metadata.jsonl")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.parquet"))


def _of_split_folders(root: Path, splits: dict[str, Path], label_column: str | None) -> Tables:
    tables: dict[str, Dataset | None] = {}
    for name, folder in splits.items():
        table = saved_table(folder)
        table = parquet_table(folder) if table is None else table
        tables[name] = metadata_table(folder, label_column, _has_pictures) if table is None else table
    others = {name: table for name, table in tables.items() if table is not None}
    if others and len(others) < len(tables):
        raise ValueError(
            f"{root}: the split folders {some(others)} hold tables, but {some(tables.keys() - others.keys())} class "
            "folders. Give all of them the same layout."
        )
    return others or _class_tables(root, splits)


def _inner(split: Path) -> Path:
    """The folder with the classes: the split folder, or its only subfolder if that is of the same role."""
    folders = _folders(split)
    if len(folders) != 1 or not role_like(split.name) or role_like(folders[0].name) != role_like(split.name):
        return split
    if _folders(folders[0]):
        return folders[0]
    raise ValueError(
        f"{split} holds one folder, {folders[0].name}, which is called like a split but has no class folders. Put the "
        f"images into {split}/CLASS/."
    )


def _class_tables(root: Path, splits: dict[str, Path]) -> ClassFolders:
    left = [folder.name for folder in _folders(root) if folder not in splits.values()]
    splits = {name: _inner(folder) for name, folder in splits.items()}
    notes = [f"{root}: not read are the folders {some(left)}, which are no splits with class folders."] if left else []
    for folder in splits.values():
        _refuse_splits_within(folder)
        _refuse_two_levels(folder)
        notes += _left_out(folder)
    return ClassFolders(
        _tables({n: [(f.name, f) for f in _folders(split)] for n, split in splits.items()}, root), notes
    )


def _splits_in_classes(root: Path) -> ClassFolders | None:
    """The tables of CLASS/train, CLASS/test; None if not all folders have this layout."""
    splits: dict[str, list[tuple[str, Path]]] = {}
    classes = _folders(root)
    for folder in classes:
        inner = _folders(folder)
        if not inner or _pictures(folder) or not all(role_of(f.name) and _pictures(f) for f in inner):
            return None
        for f in inner:
            splits.setdefault(str(role_of(f.name)), []).append((folder.name, f))
    return ClassFolders(_tables(splits, root)) if len(classes) > 1 else None


def _class_folders(root: Path) -> ClassFolders:
    """The tables of class folders without splits. Raises ValueError if they are ambiguous."""
    classes = _folders(root)
    splits = [folder.name for folder in classes if role_of(folder.name)]
    like = [role_like(folder.name) for folder in classes]
    if None not in like and len(set(like)) == len(like) > 1:  # training_set, test_set
        splits = [folder.name for folder in classes]
    if splits:
        raise ValueError(
            f"{root} has folders called like splits, but without class folders in them: {some(splits)} (beside "
            f"{some(f.name for f in classes if f.name not in splits)}). Put the images of each split into class "
            "folders (train/CLASS/x.png); if it is the name of a class, rename it, or use such split folders for all "
            "classes."
        )
    _refuse_splits_within(root)
    _refuse_two_levels(root)
    return ClassFolders(_tables({"train": [(folder.name, folder) for folder in classes]}, root), _left_out(root))


def _refuse_splits_within(root: Path) -> None:
    """Raise ValueError if there are folders named like splits anywhere in the class folders."""
    within = [str(f.relative_to(root)) for folder in _folders(root) for f in _below(folder) if role_of(f.name)]
    if within:
        raise ValueError(
            f"{root}: some class folders hold folders called like splits ({some(within)}), so that test images would "
            "be trained on. Use train/CLASS/ and test/CLASS/, or such folders in every class folder."
        )


def _left_out(root: Path) -> list[str]:
    """Notes for the user on what was left out of a folder with class folders."""
    notes, classes = [], _folders(root)
    if loose := _pictures(root):
        notes.append(f"{root}: left out, being in no class folder: {counted(len(loose), 'image')}, {some(loose, 3)}.")
    inner = {folder: [f.name for f in _folders(folder)] for folder in classes}
    names = {*chain.from_iterable(inner.values())}
    if len(names) > 1 and all(inner.values()) and not any(map(_pictures, classes)):
        notes.append(
            f"{root}: the classes are the folders {some((f.name for f in classes), 3)}, not {some(sorted(names), 3)} "
            "in them."
        )
    files = sorted(f.name for f in root.iterdir() if f.suffix.lower() in _TABLES and not f.name.startswith("."))
    if files and len(classes) == 1:
        notes.append(f"{root}: not read is {some(files)}; the only class is the folder {classes[0].name}.")
    return notes


def _refuse_two_levels(root: Path) -> None:
    """Raise ValueError if class folders hold only uniquely named folders: it is unclear which are the classes."""
    classes = _folders(root)
    inner = {folder.name: [f.name for f in _folders(folder)] for folder in classes}
    names = [*chain.from_iterable(inner.values())]
    if len(names) > len(inner) and len(set(names)) == len(names) and all(inner.values()):
        if not any(map(_pictures, classes)) and _has_pictures(root):
            shown = [f"{name} ({some(below, 3)})" for name, below in inner.items()]
            raise ValueError(
                f"{readable(str(root))} has folders of folders: {some(shown, 3)}. If the inner ones are the classes, "
                "put them side by side; if the outer ones are, put their images directly into them."
            )


def _tables(splits: dict[str, list[tuple[str, Path]]], root: Path) -> Tables:
    """Tables of paths. Not by `imagefolder`, which would take a class named "train" or "test" for a split."""
    names = sorted({nfc(_utf8(root, name)) for classes in splits.values() for name, _ in classes})
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
    tables = {}
    for split, classes in splits.items():
        paths = [_paths(root, folder) for _, folder in classes]
        numbers = [names.index(nfc(name)) for name, _ in classes]
        labels = np.repeat(np.array(numbers, np.int64), [*map(len, paths)])
        tables[split] = _table(features, paths, label=pa.array(labels))
    return tables


def _table(features: Features, paths: list[pa.Array], **columns: pa.Array) -> Dataset:
    """A table of images by their paths, made from arrow's arrays: a million cells as objects would take a gigabyte."""
    joined = pa.concat_arrays([pa.array([], pa.string()), *paths])
    image = pa.StructArray.from_arrays([pa.nulls(len(joined), pa.binary()), joined], ["bytes", "path"])
    table = pa.table({"image": image, **columns}).cast(features.arrow_schema)
    return Dataset(table, DatasetInfo(features=features), fingerprint=generate_random_fingerprint())


def all_images(root: Path) -> Dataset:
    """A table of the paths of all images in a folder and below it."""
    features = Features({"image": datasets.Image(decode=False)})
    return _table(features, [_paths(root, root)])


def _paths(root: Path, folder: Path) -> pa.Array:
    """The paths of a folder's images. Raises ValueError, naming the first that is not UTF-8."""
    files = image_files(folder)
    try:
        return pa.array(files, pa.string())
    except UnicodeEncodeError:
        return pa.array([_utf8(root, file) for file in files], pa.string())


def _utf8(root: Path, name: str) -> str:
    """Return the name. Raises ValueError if it is not UTF-8, since tables could not hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{root}: the name {readable(name)} is not UTF-8; rename it (convmv can rename many)."
        ) from None
    return name


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and e.name not in _NO_FOLDERS and e.is_dir()]
    return sorted(folder / name for name in names)


def _has_pictures(folder: Path) -> bool:
    """Whether there are images one or two levels below a folder."""
    return any(_pictures(f) for outer in _folders(folder) for f in (outer, *_folders(outer)))


def _pictures(folder: Path) -> list[str]:
    """Names of the files directly in a folder that have an image extension."""
    known = Image.registered_extensions()
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in known)


def image_files(folder: Path) -> list[str]:
    """All files in the folder and below, except hidden files and those with a known non-image extension."""
    found = [*_walked(folder)]
    files = [path for _, files in found for path in files if not path.lower().endswith(_NO_IMAGES)]
    return sorted(files, key=(lambda path: path.split(os.sep)) if len(found) > 1 else None)


def _below(folder: Path) -> list[Path]:
    """All folders below a folder."""
    return [place for place, _ in _walked(folder)][1:]


def _walked(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, with their files, without hidden ones; links are followed, but not in cycles."""
    places, seen = [folder], set[Path]()
    for place in places:
        files, start = [], os.path.join(place, "")
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    files.append(start + entry.name)
                    continue
                seen = seen or {folder.resolve()}  # of most class folders it is never asked
                if (real := (inner := Path(entry.path)).resolve()) not in seen:
                    seen.add(real)
                    places.append(inner)
        yield place, files
