"""Read the header and the end of an image's file, without decoding it."""

from __future__ import annotations

import os
from typing import IO, Any, NamedTuple

from hf_cdl.data.images import identify

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
"""How a whole file ends, but for padding by zeros. Beside these, a WebP's header says how long the file is."""
_PADDED = 64


class Header(NamedTuple):
    """`size`: (width, height) in pixels; `wide`: a single channel of 16 bits."""

    size: tuple[int, int]
    wide: bool


def read_header(file: IO[bytes]) -> Header | None:
    """Read the header of an open file; None if only decoding shows whether the image can be used.

    This is so if the header cannot be read, if the file does not end as its format requires, and for other formats.
    """
    try:
        image = identify(file)
        return Header(image.size, image.mode.startswith("I")) if _is_whole(image, file) else None
    except Exception:  # Pillow raises all kinds of errors for corrupt bytes; decoding says which image it is
        return None


def _is_whole(image: Any, file: IO[bytes]) -> bool:
    length = file.seek(0, os.SEEK_END)
    if image.format == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= length
    file.seek(max(0, length - _PADDED))
    return image.format in _ENDS and file.read().rstrip(b"\0").endswith(_ENDS[image.format])
