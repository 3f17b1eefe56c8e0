"""Checks of class names and label maps from users and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from io import IOBase
from typing import Any
from unicodedata import normalize

from hf_cdl.checked import short
from hf_cdl.counted import counted


def class_list(names: Any) -> list[str]:
    """The class names of a task as a list. Raises ValueError for unordered collections and invalid names."""
    if isinstance(names, str | bytes | Mapping | Set | IOBase) or not isinstance(names, Iterable):
        way = f"for a task of one class give [{names!r}]" if isinstance(names, str) else "give a list: it has an order"
        kind = "" if isinstance(names, str) or names is None else f"a {type(names).__name__}, "
        raise ValueError(f"The class names of a task are a list of texts; got {kind}{short(names)}. So {way}.")
    names = list(names)
    if not names:
        raise ValueError("A task needs at least one class; got an empty list of class names.")
    if wrong := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise ValueError(f"A class name must be a text with something in it; got {short(wrong[0])} in {short(names)}.")
    return [str(name) for name in names]


def label_names(labels: Any, count: int) -> list[str]:
    """The names of `count` classes from an id2label. Raises ValueError unless each class has a unique name."""
    ids = _whole(labels) if isinstance(labels, Mapping) else None
    if ids is None or sorted(ids) != [*range(count)]:
        raise ValueError(
            f"id2label is {short(labels)}, but it must name all {counted(count, 'class')}, by the numbers 0 to "
            f"{count - 1}. Change single names in model.config.id2label, or give all of them."
        )
    names = class_list([ids[number] for number in range(count)]) if count else []
    if twice := repeated(names):
        raise ValueError(f"id2label gives {short(twice[0])} to more than one class; classes have different names.")
    return names


def is_inverse(label2id: Any, names: list[str]) -> bool:
    """Whether a label2id matches these names; in JSON its numbers may be strings."""
    return isinstance(label2id, Mapping) and {str(k): str(v) for k, v in label2id.items()} == {
        name: str(number) for number, name in enumerate(names)
    }


def _whole(labels: Mapping[Any, Any]) -> dict[int, Any] | None:
    """The same with integer keys (strings in JSON); None if a key is not an integer, or repeated."""
    texts = [str(key) for key in labels]
    fits = all(text.isdecimal() for text in texts) and len({int(text) for text in texts}) == len(texts)
    return {int(text): name for text, name in zip(texts, labels.values(), strict=True)} if fits else None


def same_name(first: str, second: str) -> bool:
    """Whether two class names are the same text; different Unicode encodings of it count as one."""
    return normalize("NFC", first) == normalize("NFC", second)


def one_encoding(names: Iterable[str]) -> list[str]:
    """The same names; of those that are the same text in different Unicode encodings, all like the first."""
    first: dict[str, str] = {}
    return [first.setdefault(normalize("NFC", name), name) for name in names]


def alike(name: str) -> str:
    """The same text for all spellings of a class name: capitals, spaces, hyphens and forms of characters aside."""
    return " ".join(normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ").split())


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, sorted; different Unicode encodings of the same text count as one name."""
    return sorted(name for name, count in Counter(normalize("NFC", name) for name in names).items() if count > 1)
