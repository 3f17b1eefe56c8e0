"""Which images the changes of a run's student added, moved and removed, in files that stay in the run's folder.

`learnt/task-07.json` lists [digest, label before, label after] per image of the change that made this revision; null
means not learnt. It holds no image, and is never pushed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from hf_cdl.runs.files import RunError, read_json
from hf_cdl.runs.ledger import CHANGED, revision_name

Moves = Sequence[tuple[str, str | None, str | None]]
"""Digest of an image, and its label before and after a change."""


def moves_file(folder: Path, revision: int) -> Path:
    """The file of the images that a change moved."""
    return folder / "learnt" / f"{revision_name(revision)}.json"


def labels_now(
    folder: Path, ledger: Mapping[str, Any], first: Mapping[str, Iterable[str]]
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Digest -> how often the student counts that image in each class now; and the changes that are not known.

    `first`: the labels of images that were learnt in the tasks.
    """
    labels = {digest: Counter(map(_nfc, names)) for digest, names in first.items()}
    unknown = []
    for change in lasting_changes(ledger):
        try:
            moves = _moves(moves_file(folder, change["revision"])) if change["images"] else []
        except RunError:
            unknown.append(revision_name(change["revision"]))
            continue
        for digest, before, after in moves:
            of_image = labels.setdefault(digest, Counter())
            if before is not None:
                of_image[_nfc(before)] -= 1
            if after is not None:
                of_image[_nfc(after)] += 1
        for of_image in labels.values():
            _rename(of_image, change.get("classes", {}))
    return {digest: +of_image for digest, of_image in labels.items() if +of_image}, unknown


def names_at(ledger: Mapping[str, Any], names: Iterable[str], revision: int) -> dict[str, str | None]:
    """Of the classes `names` of a student's tasks, what a revision calls each; None: it was removed."""
    found: dict[str, str | None] = {name: _nfc(name) for name in names}
    for change in lasting_changes(ledger, revision):
        new = {_nfc(old): name and _nfc(name) for old, name in change.get("classes", {}).items()}
        found = {name: now and new.get(now, now) for name, now in found.items()}
    return found


def lasting_changes(ledger: Mapping[str, Any], revision: int | None = None) -> list[dict[str, Any]]:
    """The changes that a revision, by default the newest, has gone through, oldest first, without undone ones."""
    state: list[dict[str, Any]] = []
    states = {len(ledger["entries"].get(CHANGED, [])): state}
    for change in ledger.get("changes", []):
        state = states[change["state"]] if "state" in change else [*state, change]
        states[change["revision"]] = state
    return state if revision is None else states.get(revision, [])


def _moves(file: Path) -> list[Any]:
    moves = read_json(file)
    if not isinstance(moves, list) or not all(
        isinstance(move, list) and len(move) == 3 and isinstance(move[0], str) for move in moves
    ):
        raise RunError(f"{file} was not written by hf_cdl.")
    return moves


def _rename(labels: Counter[str], classes: Mapping[str, str | None]) -> None:
    for new, count in [(new, labels.pop(_nfc(old), 0)) for old, new in classes.items()]:
        if new is not None:
            labels[_nfc(new)] += count


def _nfc(name: str) -> str:
    return normalize("NFC", name)
