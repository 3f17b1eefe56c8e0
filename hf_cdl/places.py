"""Shortening of local paths in recipes to bare names before they are shared.

An absolute path reveals the user's name and the machine's layout, and is useless elsewhere. It becomes `./NAME`, which
is not a Hub id and is found again if such a folder is in the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NAMES = ("known_classes", "classes_per_task", "card")
"""Fields with class names, which may look like paths, and with the author's own text."""


def is_private(path: str) -> bool:
    """Whether text is a path that starts at the root, the home directory or above the working directory."""
    parts = re.split(r"[\\/]", path)
    return len(parts) > 1 and (parts[0] in ("", "~", "file:") or parts[0].endswith(":") or ".." in parts)


def by_name(path: str) -> str:
    """Return the last part of a path."""
    parts = [part for part in re.split(r"[\\/]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else Path(path).resolve().name


def shareable(recipe: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Copy a recipe with every path that starts at the root, at home or above replaced by `./NAME`.

    Backbones and data that are folders here, but could be taken for a Hub id elsewhere, get a `./` prefix. `known`:
    names of data that are not folders.
    """
    shared = {key: _shared(value, key) for key, value in recipe.items()}
    for section, field in (("data", "path"), ("data", "unlabelled"), ("student", "backbone"), ("teacher", "backbone")):
        name = (shared.get(section) or {}).get(field)
        if isinstance(name, str) and name not in known and HUB_ID.fullmatch(name) and Path(name).exists():
            shared[section][field] = f"./{name}"
    return shared


def _shared(value: Any, key: str) -> Any:
    if key in _NAMES:
        return value
    if isinstance(value, str):
        return f"./{by_name(value)}" if is_private(value) else value
    if isinstance(value, dict):
        return {name: _shared(item, name) for name, item in value.items()}
    return [_shared(item, "") for item in value] if isinstance(value, list | tuple) else value


def short_name(student: str) -> str:
    """The name of a student's repository, or of its run's folder."""
    place = Path(student)
    if not place.is_dir():
        return student.split("/")[-1]
    parts = place.resolve().parts
    inside = 2 if parts[-1].startswith("task-") else 1 if parts[-1] in ("student", "teacher") else 0
    return parts[-1 - inside] if len(parts) > inside + 1 else parts[-1]
