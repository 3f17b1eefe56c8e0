"""Images with class names, to be added to a trained classifier or corrected in it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_cdl.data.cells import Cells, cells_of
from hf_cdl.data.images import MAX_PIXELS, ImageError, check_regular, decode, readable
from hf_cdl.data.loading import load_splits, read_labels
from hf_cdl.data.names import nfc, some
from hf_cdl.data.splits_and_columns import choose_columns, choose_splits


@dataclass(frozen=True)
class LabelledImages:
    """Images that are decoded when accessed, as `images[3:5]`; `labels`: the class name of each."""

    data: Dataset | Sequence[Path]
    labels: list[str]
    cells: Cells = Cells()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, chosen: slice) -> list[Image.Image]:
        return [self._decoded(index) for index in range(*chosen.indices(len(self)))]

    def digest(self, index: int) -> str:
        """16 hex digits of the SHA-256 of an image's file. Raises ValueError if it cannot be read."""
        if not isinstance(self.data, Dataset):
            return file_digest(self.data[index])
        (cell,) = self.data[index].values()
        return cell_digest(self.cells, cell)

    def size(self, index: int) -> int:
        """Size of an image's file in bytes; -1 if there is none."""
        if isinstance(self.data, Dataset):
            return int(self.cells.sizes(self.data.select([index]))[0])
        file = Path(self.data[index])
        return file.stat().st_size if file.is_file() else -1

    def place(self, index: int) -> str:
        """Name an image for messages."""
        if not isinstance(self.data, Dataset):
            return readable(str(self.data[index]))
        (cell,) = self.data[index].values()
        return readable(cell["path"]) if cell and cell["path"] else f"row {index}"

    def chosen(self, indices: Sequence[int]) -> LabelledImages:
        """The images at these indices."""
        data = self.data.select(indices) if isinstance(self.data, Dataset) else [self.data[i] for i in indices]
        return replace(self, data=data, labels=[self.labels[index] for index in indices])

    def _decoded(self, index: int) -> Image.Image:
        if not isinstance(self.data, Dataset):
            return decode(self.data[index])
        (cell,) = self.data[index].values()
        try:
            return self.cells.decode(cell).image
        except ImageError as error:
            raise ImageError(f"row {index}: {error}") from error


def read_images(path: str) -> LabelledImages:
    """Read the training images of a folder or a data set on the Hub, as `data.path` of a recipe.

    Raises ValueError if there are none, and for labels without a name.
    """
    found = load_splits(path, None, None, [])
    splits = choose_splits(found, dict.fromkeys(("train", "validation", "test")), {"train"})
    table = found[splits["train"]]
    image, label = choose_columns({"train": table}, None, None)
    names, labels = read_labels({"train": table}, label)
    if not len(table):
        raise ValueError(f"{readable(path)} has no training images. Put some there, in a folder for each class.")
    others = [name for name in found if name != splits["train"]]
    notes = [
        *getattr(found, "notes", ()),
        *([f"not read are the splits {some(others)} of the data"] if others else []),
    ]
    data = table.with_format(None).select_columns([image]).cast_column(image, ImageFeature(decode=False))
    return LabelledImages(
        data, [names[number] for number in labels["train"]], cells_of(path, MAX_PIXELS), tuple(notes)
    )


def file_digest(file: str | Path) -> str:
    """The digest of an image by its file. Raises ImageError if it cannot be read."""
    try:
        check_regular(file)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ImageError(f"{readable(str(file))} cannot be read: {error.strerror}; supply the image") from error


def cell_digest(cells: Cells, cell: Any) -> str:
    """The digest of an image by its cell in a table. Raises ImageError if there is none."""
    if not cell or (cell["bytes"] is None and not cell["path"]):
        raise ImageError("an image is missing in the table; supply it or remove the row")
    file = cells.file(cell)
    return hashlib.sha256(cell["bytes"]).hexdigest()[:16] if file is None else file_digest(file)


def read_class(folders: Sequence[Path], name: str) -> LabelledImages:
    """Read the images of one class: those in each folder, or in its subfolder of that name.

    Raises ValueError for a folder without any, and one that is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"The folders {some(folders)} are not all different; name each of them once.")
    files = [file for folder in folders for file in _files_of_class(folder, name)]
    return LabelledImages(files, [name] * len(files))


def _files_of_class(folder: Path, name: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{readable(str(folder))} is not a folder; name the folder with the images of {name!r}.")
    inside = [place for place in folder.rglob("*") if place.is_dir() and nfc(place.name) == nfc(name)]
    if len(inside) > 1:
        raise ValueError(
            f"Several folders are called {name!r}: {some(inside)}. Name the one with the training images."
        )
    (place,) = inside or [folder]
    files = [file for file in sorted(place.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise ValueError(
            f"{readable(str(folder))} has no images of {name!r}: neither there, nor in a folder {name}/. Put them "
            "there, or name another folder."
        )
    return files


def read_corrections(file: Path) -> tuple[LabelledImages, list[str]]:
    """Read a CSV of images with their right labels; returns these and the labels that they were learnt with.

    Columns: `image` (a path, relative to the file's folder), `label`, and `was`. Without `was`, the name of an image's
    folder is the class it was learnt as. Raises ValueError, naming the line, for an invalid file.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{readable(str(file))} cannot be read as a CSV of corrections: {error}") from error
    if not {"image", "label"} <= {*columns} or {*columns} - {"image", "label", "was"}:
        raise ValueError(
            f"{readable(str(file))} has the columns {some(columns)}, but corrections have image, label and, if the "
            "images' folders are not called like the class that they were learnt as, was. Write these into "
            "its first line."
        )
    if not rows:
        raise ValueError(f"{readable(str(file))} has no corrections below its line of columns.")
    for number, row in enumerate(rows, start=2):
        if empty := [name for name in columns if not isinstance(row[name], str) or not row[name].strip()]:
            raise ValueError(f"Line {number} of {readable(str(file))} has no {some(empty)}; give one for every image.")
        if None in row:
            raise ValueError(f"Line {number} of {readable(str(file))} has more cells than there are columns.")
    paths = [file.parent / row["image"] for row in rows]
    images = [path.resolve() for path in paths]
    if twice := sorted({str(path) for path in images if images.count(path) > 1}):
        raise ValueError(f"{readable(str(file))} has {readable(twice[0])} more than once.")
    was = [
        row["was"].strip() if "was" in columns else path.resolve().parent.name
        for row, path in zip(rows, paths, strict=True)
    ]
    return LabelledImages(paths, [row["label"].strip() for row in rows]), was
