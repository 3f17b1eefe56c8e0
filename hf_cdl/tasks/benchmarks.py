"""Where the images come from: benchmark names, the Hub, local folders."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, load_dataset, load_from_disk
from PIL import Image

from hf_cdl.tasks.tables import USUAL_SPLITS, some

# The values fill the fields of StreamConfig that were left at None. Set `revision` in a recipe to pin the data:
# no commit is named here, so the newest version on the Hub is loaded.
BENCHMARKS: dict[str, dict[str, Any]] = {
    "cifar100": {
        "path": "uoft-cs/cifar100",
        "name": "cifar100",
        "revision": None,
        "image_column": "img",
        "label_column": "fine_label",
        "train_split": "train",
        "test_split": "test",
    },
    "imagenet_r": {  # one split for all 30,000 images; there is no official division into training and test
        "path": "axiong/imagenet-r",
        "revision": None,
        "image_column": "image",
        "label_column": "wnid",
        "train_split": "test",
        "test_fraction": 0.2,
    },
    "cub200": {
        "path": "bentrevett/caltech-ucsd-birds-200-2011",
        "revision": None,
        "image_column": "image",
        "label_column": "label",
        "train_split": "train",
        "test_split": "test",
    },
}

_METADATA = ("csv", "jsonl", "parquet")
_SPLIT_NAMES = sum(USUAL_SPLITS.values(), ())


def load_splits(path: str, name: str | None = None, revision: str | None = None) -> dict[str, Dataset]:
    """Split name -> data, from a local folder or the Hub. Nothing is written into a local folder.

    A local folder (`name` chooses a folder inside it) is read as the first of these that fits:
    saved by `save_to_disk`; parquet files, in it or in its folder `data`, called after their split (train.parquet,
    train-00000-of-00002.parquet); class folders of image files, inside folders train / validation / test or, without
    those, as one split "train"; anything else `datasets.load_dataset` can read (an imagefolder with metadata, say).
    Raises ValueError if there is nothing to read or the Hub cannot be reached.
    """
    root = Path(path).expanduser()
    with _quiet():
        if root.is_dir():
            return _load_folder(root / name if name and (root / name).is_dir() else root)
        if root.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
            raise ValueError(f"The folder {path} does not exist (data.path).")
        try:
            return _by_name(load_dataset(path, name, revision=revision))
        except OSError as error:
            raise ValueError(
                f"The data set {path!r} cannot be loaded: it is no local folder, no benchmark ({some(BENCHMARKS)}), "
                f"and the Hub answered: {error}. Without a network, use a local copy: where there is one, run "
                f"`hf download {path} --repo-type dataset --local-dir FOLDER`, copy FOLDER here and set data.path "
                "to it (and data.name, image_column, label_column and the splits as for the Hub)."
            ) from error


def _load_folder(root: Path) -> dict[str, Dataset]:
    if (root / "dataset_dict.json").is_file():
        return _by_name(load_from_disk(str(root)))
    for folder in (root, root / "data"):
        files: dict[str, list[str]] = {}
        for file in sorted(folder.glob("*.parquet")):
            if file.stem != "metadata":
                files.setdefault(_split_of(file.stem), []).append(glob.escape(str(file)))
        if files:
            return {split: load_dataset("parquet", data_files=f, split="train") for split, f in files.items()}
    described = any((f / f"metadata.{kind}").is_file() for f in [root, *_folders(root)] for kind in _METADATA)
    if not described and (splits := _class_folders(root)):
        return splits
    try:
        return _by_name(load_dataset(str(root)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The folder {root} cannot be read as a data set ({error}). Allowed are parquet files named after their "
            "split (train.parquet, test.parquet) or class folders of images (train/CLASS/x.png, test/CLASS/y.png)."
        ) from error


def _by_name(data: Any) -> dict[str, Dataset]:
    return {str(split): table for split, table in data.items()}


def _split_of(stem: str) -> str:
    usual = re.match(rf"({'|'.join(sorted(_SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", stem.lower())
    return usual[1] if usual else re.sub(r"-\d+-of-\d+$", "", stem)


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _class_folders(root: Path) -> dict[str, Dataset]:
    """Tables of paths. Not `imagefolder`, which takes a class called "train" or "test" for a split."""
    extensions = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def images(folder: Path, deep: bool) -> list[str]:
        found = []
        for base, folders, files in os.walk(folder, followlinks=True):
            folders[:] = sorted(f for f in folders if deep and not f.startswith("."))
            found += [os.path.join(base, f) for f in sorted(files) if os.path.splitext(f)[1].lower() in extensions]
        return found

    top = {f.name: f for f in _folders(root) if _folders(f) and not images(f, deep=False)}
    splits = top if set(top) & set(_SPLIT_NAMES) else {"train": root}
    names = sorted({f.name for split in splits.values() for f in _folders(split)})
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
    tables = {}
    for split, folder in splits.items():
        pairs = [(path, names.index(f.name)) for f in _folders(folder) for path in images(f, deep=True)]
        columns = {"image": [path for path, _ in pairs], "label": [label for _, label in pairs]}
        tables[split] = Dataset.from_dict(columns, features=features)
    return tables if any(len(table) for table in tables.values()) else {}


@contextmanager
def _quiet() -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
