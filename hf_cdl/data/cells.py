"""Image cells of a table, which hold bytes or name a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.config import HF_CACHE_HOME, HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE

from hf_cdl.data.headers import Header, read_header
from hf_cdl.data.images import MAX_PIXELS, Decoded, ImageError, check_regular, decode_fully, holds_16_bits, readable


@dataclass(frozen=True)
class Cells:
    """How the image cells of a data set are read.

    `max_pixels`: limit per image; `folders`: where files named by cells must be (relative paths start at the first),
    None: anywhere, for data made by the user's own program. Links in these folders are followed.
    """

    max_pixels: int = MAX_PIXELS
    folders: tuple[str, ...] | None = None

    def file(self, cell: Mapping[str, Any]) -> str | None:
        """Return the image's file, None if the cell has the bytes. Raises ImageError for a file outside `folders`."""
        path = cell["path"]
        if cell["bytes"] is not None or not path or self.folders is None:
            return path if cell["bytes"] is None else None
        places = [os.path.normpath(os.path.join(base, path)) for base in (os.getcwd(), self.folders[0])]
        inside = [p for p in places if any(p.startswith(os.path.join(folder, "")) for folder in self.folders)]
        if not inside:
            raise ImageError(
                f"{readable(path)}: this file is not in the data's folder {self.folders[0]}; put it there, or its "
                "bytes into the cell (Dataset.save_to_disk)"
            )
        return next(filter(os.path.exists, inside), inside[0])

    def decode(self, cell: Mapping[str, Any] | None) -> Decoded:
        """Decode the image to RGB. Raises ImageError for a bad one."""
        file = None if cell is None else self.file(cell)
        return decode_fully(file or cell, cell["path"] if cell else None, self.max_pixels)

    def header(self, cell: pa.StructScalar) -> Header | None:
        """What the header of the image in an arrow cell says; None if only decoding shows whether it can be used."""
        content, path = cell["bytes"].as_buffer(), cell["path"].as_py()
        try:
            if content is not None:
                return read_header(pa.BufferReader(content))
            if not (file := self.file({"bytes": None, "path": path})):
                return None
            check_regular(file)
            with open(file, "rb") as opened:
                return read_header(opened)
        except (OSError, ImageError):
            return None

    def holds_16_bits(self, cell: Mapping[str, Any] | None) -> bool:
        """Whether the image has a single 16-bit channel; False for a bad image."""
        try:
            file = None if cell is None else self.file(cell)
        except ImageError:
            return False
        return cell is not None and holds_16_bits(file or cell["bytes"])

    def sizes(self, data: Dataset) -> np.ndarray:
        """Size of every image in bytes (N,); -1 for a missing, irregular or misplaced file."""
        found, inside = [np.empty(0, "<i8")], dict[str, bool]()
        for batch in data.with_format("arrow").iter(1000):
            for chunk in pa.table(batch).column(0).chunks:
                content, paths = chunk.flatten()  # no byte of an image is read for its size
                length: Any = pc.binary_length(content)  # type: ignore[attr-defined]
                sizes = length.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8")
                named = np.flatnonzero(content.is_null())
                sizes[named] = [self._file_size(path, inside) for path in paths.take(pa.array(named)).to_pylist()]
                found.append(sizes)
        return np.concatenate(found)

    def _file_size(self, path: str | None, inside: dict[str, bool]) -> int:
        """`inside`: folder -> whether a path that begins with it is the file itself, in one of `folders`."""
        folder, _, name = (path or "").rpartition(os.sep)
        if folder not in inside:
            whole = os.path.isabs(folder) and os.path.normpath(folder) == folder
            inside[folder] = whole and any(f"{folder}{os.sep}".startswith(f"{f}{os.sep}") for f in self.folders or ())
        try:
            plain = inside[folder] and name not in ("", os.curdir, os.pardir)
            file = path if plain else self.file({"bytes": None, "path": path})
            return -1 if not file else check_regular(file).st_size
        except (OSError, ValueError):  # `check_images` reports what is wrong
            return -1


def cells_of(path: str | None, max_pixels: int) -> Cells:
    """How to read the cells of the data at `data.path`; None: the user's own data."""
    if path is None:
        return Cells(max_pixels)
    root = Path(path).expanduser()
    caches = (HF_CACHE_HOME, HF_DATASETS_CACHE, HF_HUB_CACHE)
    places = (root,) if root.is_dir() else caches
    return Cells(max_pixels, tuple(f(place) for place in places for f in (os.path.abspath, os.path.realpath)))
