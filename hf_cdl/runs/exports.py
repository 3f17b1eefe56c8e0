"""Facts about a student's files for devices: export.json beside them, which the run's results and card show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_cdl.runs.files import read_json, write_json

NAME = "device"
"""Folder of a run that its exported files are in."""
FILE = "export.json"


def exports_in(folder: Path) -> list[Any]:
    """The content of a folder's export.json, unchecked, for each file that still exists."""
    if not (folder / FILE).is_file():
        return []
    content = read_json(folder / FILE)
    listed = content if isinstance(content, list) else [content]
    return [facts for facts in listed if not isinstance(facts, dict) or _is_there(folder, facts.get("file"))]


def _is_there(folder: Path, name: Any) -> bool:
    """Whether a file is in the folder; an invalid name is left to later checks."""
    return not isinstance(name, str) or Path(name).name != name or (folder / name).is_file()


def add_export(folder: Path, facts: dict[str, Any]) -> None:
    """Record a file in its folder's export.json, replacing an earlier entry of that name."""
    kept = [other for other in exports_in(folder) if isinstance(other, dict) and other.get("file") != facts["file"]]
    write_json(folder / FILE, [*kept, facts])
