"""Names that mean something, names that are the same, and names in messages."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from hf_cdl.data.images import readable

USUAL_SPLITS = {  # the words of `datasets`, the most usual first
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ROLES = ("student", "teacher", "nearest_class_mean", "linear_head")
"""The roles of recipes; who trains without one may name others."""
USUAL_LABELS = ("label", "labels", "fine_label", "class", "class_name", "target")


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


def role_of(name: str) -> str | None:
    """The role (train, validation, test) of a split of that name, in whatever case; None for any other name."""
    return next((role for role, words in USUAL_SPLITS.items() if name.casefold() in words), None)


def role_like(name: str) -> str | None:
    """The role whose words are in the name, as `datasets` reads them: training_set, seg_train, test2017, TestSet."""
    words = re.split(r"[-._ 0-9]+|(?<=[a-z])(?=[A-Z])|(?i:sets?|data|images)(?![a-z])", name)
    roles = {role_of(word) for word in words} - {None}
    return roles.pop() if len(roles) == 1 else None
