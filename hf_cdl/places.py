"""Folders and files of this machine that a recipe names, by their own name alone in what others get to see.

An absolute path tells who its user is and how a machine is laid out, and says nothing elsewhere. `./NAME` is what is
left of it: no Hub id, and found again if such a folder is put where the command is run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NAMES = ("known_classes", "classes_per_task", "card")
"""Fields that hold names of classes, which may look like paths, and what the author says."""


def is_private(path: str) -> bool:
    """Whether a text is a path that starts at the root, at home or above the working folder."""
    parts = re.split(r"[\\/]", path)
    return len(parts) > 1 and (parts[0] in ("", "~", "file:") or parts[0].endswith(":") or ".." in parts)


def by_name(path: str) -> str:
    """The last part of a path."""
    parts = [part for part in re.split(r"[\\/]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else Path(path).resolve().name


def shareable(recipe: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """A recipe in which every path that starts at the root, at home or above is `./NAME`.

    Backbones and data that are folders here, but could be taken for a Hub id elsewhere, begin with `./`. `known`:
    names of data that are no folders.
    """
    shared = {key: _shared(value, key) for key, value in recipe.items()}
    for section, field in (("data", "path"), ("student", "backbone"), ("teacher", "backbone")):
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
