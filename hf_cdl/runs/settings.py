"""The settings with which a role has learnt in a run, stored in the ledger: it may only resume with the same ones.

For commands, the recipe describes them. A trainer made in Python has arguments, an objective, a model and a teacher
without a recipe; it describes them as sections of JSON values, the `settings` below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_cdl.runs.files import RunError
from hf_cdl.runs.ledger import differences, shortened


def check_settings(folder: Path, ledger: Mapping[str, Any], role: str, settings: Mapping[str, Any]) -> None:
    """Raise RunError if a role has learnt in the run with other settings, whole tasks or part of one.

    Fields of a section, or of a term in it, that an older version did not store are not compared.
    """
    stored = ledger.get("settings", {}).get(role)
    learnt = ledger["entries"].get(role) or any(folder.glob(f"work/{role}-*/checkpoint-*"))
    if stored is None or not learnt:
        return
    if changes := [*_changes(stored, settings)]:
        raise RunError(
            f"What the {role.replace('_', ' ')} has learnt in {folder} was learnt with other settings; nothing was "
            "touched. Differences (there -> here):\n"
            + shortened(changes)
            + "\nGive the trainer the same ones to go on, or choose another folder: Run(OTHER_FOLDER, recipe)."
        )


def _changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for section, old in stored.items():
        new = now.get(section)
        yield from differences(old, _as_stored(old, new, True), section)


def _as_stored(old: Any, new: Any, section: bool = False) -> Any:
    """`new` without the fields of a section, or of what a class is named for, that `old` lacks."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    known = old if section or "class" in old else new
    return {name: _as_stored(old.get(name), value) for name, value in new.items() if name in known}
