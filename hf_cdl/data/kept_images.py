"""Decoded images, kept in memory while there is room: every epoch, role and evaluation reads the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from PIL import Image
from torch.utils.data import get_worker_info

_MOST = 2**28
"""Bytes that the images of all splits take in a process."""
_ALL: WeakSet[KeptImages] = WeakSet()


class KeptImages:
    """The decoded images of a split, by row. Worker processes keep none: they are many, and live for an epoch."""

    def __init__(self) -> None:
        self._images: dict[int, Image.Image] = {}
        self._bytes = 0

    def __reduce__(self) -> Any:
        return KeptImages, ()

    def find(self, row: int, decode: Callable[[], Image.Image]) -> Image.Image:
        """An image in RGB, which is the caller's to change."""
        if (found := self._images.get(row)) is not None:
            return found.copy()
        image = decode()
        size = 3 * image.width * image.height
        if get_worker_info() is None and self._has_room(size):
            _ALL.add(self)
            self._images[row] = image.copy()
            self._bytes += size
        return image

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes fit in, if need be in place of other splits' images: this split is in use now."""
        if self._bytes + size > _MOST:
            return False
        others = [kept for kept in _ALL if kept is not self]
        if sum(kept._bytes for kept in others) + self._bytes + size > _MOST:
            for kept in others:
                kept._images, kept._bytes = {}, 0
        return True
