"""A memory cache of decoded images and of pixel values, as far as there is room.

Every epoch, role and evaluation reads the same images, every evaluation and fitted head the same pixel values of them,
and all roles of a task train on the same augmented views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakSet

from PIL import Image
from torch.utils.data import get_worker_info

_MOST = 2**28
"""Limit in bytes, per process, for the images of all splits and what is made from them."""
_ALL: WeakSet[KeptImages] = WeakSet()


class KeptImages:
    """The decoded images of a split, by row, and the pixel values `made` from them, which are evicted first.

    Worker processes keep none: there are many of them, and each lasts an epoch.
    """

    _taken: ClassVar[int] = 0  # bytes of all splits; adding up hundreds of splits for each image takes longer than it

    def __init__(self) -> None:
        self._images: dict[int, Image.Image] = {}
        self._made: dict[Any, Any] = {}
        self._bytes = self._bytes_made = 0

    def __del__(self) -> None:
        self._count(-self._bytes, -self._bytes_made)

    def __reduce__(self) -> Any:
        return KeptImages, ()

    def find(self, row: int, decode: Callable[[], Image.Image]) -> Image.Image:
        """An image in RGB; the caller may modify it."""
        if (found := self._images.get(row)) is not None:
            return found.copy()
        image = decode()
        size = 3 * image.width * image.height
        if get_worker_info() is None and self._has_room(size):
            _ALL.add(self)
            self._images[row] = image.copy()
            self._count(size, 0)
        return image

    def made(self, key: Any) -> Any:
        """What was made of an image (do not modify it); None if it is not kept. `key` includes the view."""
        return self._made.get(key)

    def keep_made(self, key: Any, value: Any, size: int) -> None:
        """Keep what was made of an image if there is room; what was made of other splits is evicted."""
        if get_worker_info() is not None or self._bytes + self._bytes_made + size > _MOST:
            return
        _ALL.add(self)
        if self._taken + size > _MOST:
            for kept in [kept for kept in _ALL if kept is not self]:
                kept._drop_made()
        if self._taken + size <= _MOST:
            self._made[key] = value
            self._count(0, size)

    def _has_room(self, size: int) -> bool:
        """Whether this many bytes fit, if need be by evicting other splits' images: this split is in use now."""
        if self._bytes + size > _MOST:
            return False
        if self._taken + size > _MOST:
            for kept in [*_ALL]:
                kept._drop_made()
        if self._taken + size > _MOST:
            for kept in [kept for kept in _ALL if kept is not self]:
                kept._images = {}
                kept._count(-kept._bytes, 0)
        return True

    def _drop_made(self) -> None:
        self._made = {}
        self._count(0, -self._bytes_made)

    def _count(self, images: int, made: int) -> None:
        self._bytes += images
        self._bytes_made += made
        KeptImages._taken += images + made
