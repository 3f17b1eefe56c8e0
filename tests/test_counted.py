"""Numbers with what they count: one function says them all, so that no message speaks of 1 images."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT

from hf_cdl.counted import counted, plural

NOUNS = (
    "image class task weight file row pair label entry accuracy character byte token layer checkpoint process thread "
    "change recipe result digit tensor word contrast step epoch baseline minute hour day"
).split()
COUNTED = re.compile(rf"^ (?:(?:unlabelled|training|test|more|new) )?(?:{'|'.join(map(plural, NOUNS))})\b")
TEXTS = {"role", "split", "field", "reference.split", "self.eval_split", "own.split", "rate"}
"""What stands before such a noun and is no number, as in `{split} images`."""
SPACE = ROOT / "hf_cdl" / "commands" / "space"
FILES = [file for file in sorted((ROOT / "hf_cdl").rglob("*.py")) if SPACE not in file.parents]


def uncounted(source: str) -> list[str]:
    """The f-strings in which a number stands before a plural without `counted`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue):
                continue
            text = str(after.value) if isinstance(after, ast.Constant) else ""
            if COUNTED.match(text) and ast.unparse(value.value) not in TEXTS:
                found.append(f"{ast.unparse(value.value)} before {text[:20]!r}, line {node.lineno}")
    return found


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (2000, "training image", "2,000 training images"),
        (2, "class", "2 classes"),
        (2, "entry", "2 entries"),
        (2, "day", "2 days"),
        (2, "batch", "2 batches"),
        (2, "epoch", "2 epochs"),
    ],
)
def test_a_number_with_what_it_counts(number: int, thing: str, said: str) -> None:
    assert counted(number, thing) == said


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_message_counts_by_itself(file: Path) -> None:
    assert uncounted(file.read_text()) == []


def test_an_uncounted_number_is_found() -> None:
    assert uncounted('f"there are {n:,} training images"') and uncounted('f"{len(x)} classes"')
    assert not uncounted("""f"{counted(n, 'image')} here, {split} images, {n} of them" """)
