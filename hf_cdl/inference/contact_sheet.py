"""A page of the images that a model is least sure of, with its answers: one HTML file that needs no network.

Its size is bounded: it has at most MOST_SHOWN small thumbnails. Which images these are is known only at the end, so
only their names are kept, and the images are read once more.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_cdl.data.images import ImageError
from hf_cdl.inference.answering import Answer
from hf_cdl.inference.summary import Summary
from hf_cdl.runs.page import rendered

MOST_SHOWN = 500
_MOST_LISTED = 100
_SIDE = 192
"""Pixels of a thumbnail's longer side."""
_BARS = 20
TEMPLATE = Path(__file__).with_name("contact_sheet.html.jinja")


class ContactSheet:
    """Collects answers and keeps those that the model is least sure of, rejected images first."""

    def __init__(self, most: int = MOST_SHOWN) -> None:
        self.most = most
        self._kept: list[tuple[float, int, str, Answer]] = []  # a heap with the surest one first
        self._unreadable: list[tuple[str, str]] = []
        self._number = 0

    def add(self, image: str, answer: Answer) -> None:
        self._number += 1
        item = (answer.unknown - answer.confidence, -self._number, image, answer)
        (heapq.heappush if len(self._kept) < self.most else heapq.heappushpop)(self._kept, item)

    def add_unreadable(self, image: str, problem: str) -> None:
        if len(self._unreadable) < _MOST_LISTED:
            self._unreadable.append((image, problem))

    def write(
        self, file: Path, title: str, summary: Summary, lines: Sequence[str], decode: Callable[[str], Any]
    ) -> None:
        """Write the page; `decode(image)` reads an image once more, `lines` are shown above all."""
        shown = [item[2:] for item in sorted(self._kept, key=lambda item: (-item[0], -item[1]))]
        most = summary.classes.most_common(_BARS)
        page = rendered(
            TEMPLATE,
            title=title,
            lines=lines,
            images=summary.images,
            most=most,
            others=summary.images - sum(count for _, count in most),
            classes=len(summary.classes),
            shown=[(image, answer, _thumbnail(image, decode)) for image, answer in shown],
            count=len(shown),
            unreadable=self._unreadable,
            unreadable_count=summary.unreadable,
            rejected=summary.rejected,
        )
        file.write_text(page, encoding="utf-8")


def _thumbnail(image: str, decode: Callable[[str], Any]) -> str | None:
    """A small JPEG in base64; None if the image has gone since."""
    try:
        small = decode(image)
    except ImageError:
        return None
    small.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
