"""Names that mean something, names that are the same, and names in messages."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

from hf_cdl.data.images import readable

ROLES = ("student", "teacher", "nearest_class_mean", "linear_head")
"""The roles of recipes; who trains without one may name others."""


def some(items: Iterable[Any], limit: int = 10) -> str:
    """The items joined by commas, at most `limit` of them, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(readable(str(item)) for item in items[:limit]) or "none") + more


def nfc(name: str) -> str:
    """The name as Unicode composes it: macOS and Linux write the same letter in two ways."""
    return unicodedata.normalize("NFC", name)


def check_role(role: Any) -> None:
    """Raise ValueError for what is no name of a role, and for a name that is almost one of the known: techer."""
    near = difflib.get_close_matches(role, ROLES, n=1) if isinstance(role, str) else []
    if role in ROLES or (isinstance(role, str) and role.strip() and not near):
        return
    way = f"did you mean {near[0]!r}?" if near else "it must be a name."
    raise ValueError(f"The role {readable(repr(role))} is none of {', '.join(ROLES)}; {way}")
