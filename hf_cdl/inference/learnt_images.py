"""Find the labelled images that a student learnt: its accuracy on them says little about other images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_cdl.data import TaskStream
from hf_cdl.data.cells import Cells
from hf_cdl.data.labelled import cell_digest
from hf_cdl.inference.students import Student
from hf_cdl.recipe import build_recipe, untrained
from hf_cdl.runs.files import read_json
from hf_cdl.runs.learnt import labels_now
from hf_cdl.runs.ledger import labelled_part


def learnt_rows(table: Dataset, cells: Cells, split: str, path: str, student: Student) -> tuple[set[int], bool]:
    """Rows of a split of the data at `path` that the student learnt, and whether its data are still the same.

    In the data of its run they are identified by their place. In a folder inside or around these data, and among
    images that the student was changed with later, they are identified by their content. Raises ValueError or OSError
    if the data cannot be read.
    """
    rows, same = _of_tasks(table, cells, split, path, student)
    if digests := _of_changes(student):
        rows |= _alike(table, cells, range(len(table)), digests)
    return rows, same


def _of_tasks(table: Dataset, cells: Cells, split: str, path: str, student: Student) -> tuple[set[int], bool]:
    recipe = (student.results or {}).get("recipe", {})
    own = recipe["data"].get("path") if isinstance(recipe.get("data"), dict) else None
    if not isinstance(own, str) or not (_same(path, own) or _nested(path, own)):
        return set(), True
    built = build_recipe(untrained(recipe))
    stream = TaskStream(built.data.labelled, {}, seed=built.seed)
    same = stream.fingerprint == labelled_part((student.results or {}).get("stream"))
    parts: list[Any] = [task.train for task in stream]
    if _same(path, own):
        return {int(row) for part in parts for row in part.rows if part.name == split}, same
    sizes, digests, theirs = cells.sizes(table), set[str](), set[int]()
    for part in parts:
        of_part = part.cells.sizes(part.data)[part.rows]
        alike = part.rows[np.isin(of_part, sizes) & (of_part >= 0)]
        digests |= {_digest(part.cells, part.data, int(row)) for row in alike}
        theirs |= {*of_part.tolist()}
    return _alike(table, cells, np.flatnonzero(np.isin(sizes, [*theirs]) & (sizes >= 0)).tolist(), digests), same


def _of_changes(student: Student) -> set[str]:
    """Digests of the images that a student in a run's folder was changed with, up to its state."""
    place = Path(student.place)
    if student.state is None or not place.is_dir() or not (file := place.resolve().parents[1] / "run.json").is_file():
        return set()
    ledger = read_json(file)
    changes = [change for change in ledger.get("changes", []) if change["revision"] <= int(student.state[5:])]
    return {*labels_now(file.parent, {**ledger, "changes": changes}, {})[0]}


def _alike(table: Dataset, cells: Cells, rows: Iterable[int], digests: set[str]) -> set[int]:
    found = set[int]()
    for row in rows:
        try:
            found |= {row} if _digest(cells, table, row) in digests else set()
        except (OSError, ValueError):  # unreadable; that is reported where it is measured
            continue
    return found


def _digest(cells: Cells, table: Dataset, row: int) -> str:
    (cell,) = table[row].values()
    return cell_digest(cells, cell)


def _same(path: str, other: str) -> bool:
    """Whether two paths are the same folder, or two Hub ids the same."""
    places = Path(path).expanduser(), Path(other).expanduser()
    return path == other or (all(place.is_dir() for place in places) and places[0].samefile(places[1]))


def _nested(path: str, other: str) -> bool:
    """Whether one of two folders lies in the other one."""
    one, two = (Path(place).expanduser().resolve() for place in (path, other))
    return one.is_dir() and two.is_dir() and (one in two.parents or two in one.parents)
