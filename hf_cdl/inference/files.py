"""The files to classify, and the tables of their answers, written row by row: csv, jsonl, parquet."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_cdl.data.folders import image_files
from hf_cdl.escape import visible
from hf_cdl.runs.files import RunError, make_folder, replace, saving, sync

Row = Mapping[str, str | float | None]
_TABLES = (".parquet", ".arrow")
_GROUP = 10_000
"""Rows that are kept until they are written to a parquet file together."""
_END = "\r\n"
"""The csv module quotes a cell only for the characters of its own line end, but readers end lines at both."""


def files_of(places: Sequence[Path]) -> list[str]:
    """The images named by a user: files in the given order, and all that are in folders and below, sorted; each once.

    Raises ValueError for a place that does not exist, and for a folder without any.
    """
    found: dict[str, None] = {}
    for place in places:
        if not place.exists():
            raise ValueError(f"There is no {visible(place)}. Give images, or folders of images.")
        files = [file for file in image_files(place) if not file.endswith(_TABLES)] if place.is_dir() else [str(place)]
        if not files:
            raise ValueError(
                f"The folder {visible(place)} has no image files, nor have those below it. Name another one; tables "
                "of labelled images (parquet) are read by hf-cdl evaluate."
            )
        found |= dict.fromkeys(files)
    return [*found]


class Table(ABC):
    """A table that rows are added to, in a file."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Add a row."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class CsvTable(Table):
    """Comma-separated values, in UTF-8 if in a file."""

    def __init__(self, file: Path | IO[str], columns: Sequence[str]):
        self.stream = file.open("w", newline="", encoding="utf-8") if isinstance(file, Path) else file
        ends: Any = SimpleNamespace(write=lambda line: self.stream.write(f"{line.removesuffix(_END)}\n"))
        self.writer = csv.DictWriter(ends, columns, lineterminator=_END)
        self.writer.writeheader()

    def write(self, row: Row) -> None:
        self.writer.writerow(row)

    def close(self) -> None:
        self.stream.close()


class JsonTable(Table):
    """One JSON object per line, without empty fields."""

    def __init__(self, file: Path, columns: Sequence[str]):
        self.stream = file.open("w", encoding="utf-8")

    def write(self, row: Row) -> None:
        given = {name: value for name, value in row.items() if value is not None}
        self.stream.write(f"{json.dumps(given, ensure_ascii=False)}\n")

    def close(self) -> None:
        self.stream.close()


class ParquetTable(Table):
    """Parquet, a row group at a time."""

    def __init__(self, file: Path, columns: Sequence[str]):
        kinds = {name: pa.float64() if name.startswith("score") else pa.string() for name in columns}
        self.schema = pa.schema([*kinds.items()])
        self.writer, self.rows = pq.ParquetWriter(str(file), self.schema), list[Row]()

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) == _GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
            self.rows = []


TABLES: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".csv": CsvTable,
    ".jsonl": JsonTable,
    ".parquet": ParquetTable,
}


def check_new_files(files: Sequence[Path], endings: Sequence[str]) -> None:
    """Raise RunError for a file that exists or is named twice, or whose name has none of these endings."""
    for file in files:
        _check_new_file(file, endings)
    places = [file.resolve() for file in files]
    if twice := [file for file, place in zip(files, places, strict=True) if places.count(place) > 1]:
        raise RunError(f"{visible(twice[-1])} is named twice; leave one of them out.")


def _check_new_file(file: Path, endings: Sequence[str]) -> None:
    shown = visible(file)
    if file.suffix.lower() not in endings:
        raise RunError(f"--out {shown} must end in {', '.join(endings[:-1])} or {endings[-1]}, which says what it is.")
    if file.exists() or file.is_symlink():
        raise RunError(f"{shown} exists, and nothing was written over it. Choose another name, or move it away.")
    above = next((folder for folder in file.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise RunError(f"{shown} cannot be written: {visible(above)} is a file. Choose another folder.")


def _check_still_new(file: Path) -> None:
    if file.exists() or file.is_symlink():
        raise RunError(
            f"{visible(file)} has appeared while this command ran; it stays, and nothing was "
            "written over it. Run this again with another name."
        )


@contextlib.contextmanager
def atomic_files(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield other names to write to; at the end, and only without an error, the files get their own names.

    Raises RunError if one of them has appeared meanwhile, as by the same command in another window.
    """
    partial = [file.with_name(f".{file.name}.{os.getpid()}.partial") for file in files]  # no other process's
    made = list[Path]()
    try:
        for file in files:
            with saving(f"write {visible(file)}"):
                made = [*make_folder(file.absolute().parent), *made]
        yield partial
        for path in partial:
            sync(path)
        for file in files:
            _check_still_new(file)
        for path, file in zip(partial, files, strict=True):
            replace(path, file)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # of a folder with files in it
                folder.rmdir()


def utf8(text: str) -> str:
    """Text that every table can hold: in a file name that is not UTF-8, invalid bytes are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
