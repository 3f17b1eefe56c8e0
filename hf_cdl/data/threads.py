"""One function of very many images, in threads and with a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

Found = TypeVar("Found")
_BLOCK, _BLOCKS = 64, 32
"""Most items in a block, and most waiting blocks: one waiting call per item would take a kB each."""


def in_threads(function: Callable[[Any], Found], items: Sequence[Any] | np.ndarray, title: str) -> Iterator[Found]:
    """Yield the function of each of the items (a sequence that can be sliced), in order."""
    size = max(1, min(_BLOCK, len(items) // _BLOCKS))

    def of_block(start: int) -> list[Found]:
        return [function(item) for item in items[start : start + size]]

    starts = range(0, len(items), size)
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(items), desc=title, unit="image", disable=None, leave=False) as bar,
    ):
        for first in range(0, len(starts), _BLOCKS):
            for found in pool.map(of_block, starts[first : first + _BLOCKS]):
                yield from found
                bar.update(len(found))
