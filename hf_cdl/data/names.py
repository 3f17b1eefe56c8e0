"""Role names, Unicode normalisation of names, and names in messages."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

from hf_cdl.data.images import readable

ROLES = ("student", "teacher", "nearest_class_mean", "linear_head", "ridge_head")
"""The roles used in recipes; training without a recipe may use others."""


def some(items: Iterable[Any], limit: int = 10) -> str:
    """Join at most `limit` items with commas, and add how many more there are."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(readable(str(item)) for item in items[:limit]) or "none") + more


def nfc(name: str) -> str:
    """Normalise a name to Unicode NFC: macOS and Linux encode the same letter differently."""
    return unicodedata.normalize("NFC", name)


def check_role(role: Any) -> None:
    """Raise ValueError for anything but a role name, and for a likely misspelling of a known one, such as techer."""
    near = difflib.get_close_matches(role, ROLES, n=1) if isinstance(role, str) else []
    if role in ROLES or (isinstance(role, str) and role.strip() and not near):
        return
    way = f"did you mean {near[0]!r}?" if near else "it must be a name."
    raise ValueError(f"The role {readable(repr(role))} is none of {', '.join(ROLES)}; {way}")
