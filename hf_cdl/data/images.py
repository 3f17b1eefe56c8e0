"""Decoding image files to RGB, the same way for training, the commands, the demo and the served model.

The first frame or page of a file is used, rotated according to its orientation tag. Grey becomes three equal channels,
palettes become their colours, CMYK, YCbCr and LAB are converted by Pillow, and transparency is dropped, keeping the
colours below it. 16 bits are reduced to the upper eight. 32-bit integers and floating-point values have no defined
black and white and are refused, as are colour modes that Pillow does not convert.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_cdl.escape import visible

MAX_PIXELS = 100_000_000
"""Default maximum number of pixels (width * height) of an image: 300 MB in RGB."""

_PROGRAMS = ("EPS",)  # formats that Pillow passes to another program (Ghostscript)
_SIXTEEN = ("PNG", "PPM")  # 32-bit values from these formats are 0 ... 65535
_PHOTOMETRIC = 262
"""TIFF tag that is 0 if zero is white."""


class ImageError(ValueError):
    """An image that cannot be read; the message says which one and what to do.

    DataLoader re-raises a worker's with the whole traceback in the message, which is removed.
    """

    def __init__(self, message: str):
        if "\nOriginal Traceback (most recent call last):\n" in message:
            message = message.rpartition(f"{__name__}.{ImageError.__name__}: ")[2].strip()
        super().__init__(message)


class Decoded(NamedTuple):
    """An RGB image.

    `deep`: its file has 16 bits per channel, of which the upper eight are kept; `wide`: it has only one such channel,
    which Pillow's own conversion would clip.
    """

    image: Image.Image
    wide: bool
    deep: bool


def decode(image: Any, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PIL image, a path, bytes, or the {"bytes", "path"} of a `datasets` column to RGB.

    `name`: for messages, if it has no path. Raises ImageError, naming the image, if it is missing, truncated, not an
    image, not a regular file, larger than `max_pixels` (checked before decompression), or of an unsupported mode.
    """
    return decode_fully(image, name, max_pixels).image


def decode_fully(image: Any, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """As `decode`, plus the bit depth of the file."""
    if isinstance(image, dict):
        name = image.get("path") or name
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    elif name is None and isinstance(image, str | os.PathLike):
        name = str(image)
    name = readable(name or "image")
    if image is None:
        raise ImageError(f"{name}: the image is missing (empty cell); remove the row or supply the image")
    try:
        with _opened(image) as opened:
            return _to_rgb(opened, max_pixels)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # Pillow raises all kinds of errors for corrupt bytes
        if _is_empty(image):
            raise ImageError(f"{name}: the image is empty (0 bytes); supply it or remove it") from error
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else readable(str(error))
        raise ImageError(f"{name}: cannot be read as an image ({reason}); repair or remove it") from error


def _is_empty(image: Any) -> bool:
    """Whether an unreadable image is an empty file or the empty content of one."""
    if isinstance(image, bytes | bytearray):
        return not image
    return isinstance(image, str | os.PathLike) and os.path.isfile(image) and not os.path.getsize(image)


def holds_16_bits(image: Any) -> bool:
    """Whether a path or a file's bytes hold a single 16-bit channel, judging by the header; False if unreadable."""
    try:
        with _opened(image) as opened:
            return opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in _SIXTEEN)
    except Exception:  # `decode` reports what is wrong
        return False


def readable(text: str, limit: int = 300) -> str:
    """Format untrusted text for a one-line message: escape special characters, cut long text in the middle."""
    return visible(text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}")


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Return os.stat of a regular file. Raises ImageError for anything else: opening a pipe or device may block."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        kinds = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
        kind = next((kind for kind, fits in kinds.items() if fits(state.st_mode)), "a device")
        raise ImageError(f"is {kind}, but only regular files are read; supply the image or remove the row")
    return state


@contextmanager
def _opened(image: Any) -> Iterator[Image.Image]:
    if isinstance(image, Image.Image):
        yield image
    elif isinstance(image, bytes | bytearray | memoryview):
        yield identify(io.BytesIO(image))
    elif isinstance(image, str | os.PathLike):
        check_regular(image)
        with open(image, "rb") as file:
            yield identify(file)
    else:
        raise ImageError(f"is a {type(image).__name__}; allowed are a path, the file's bytes or a PIL image")


def identify(file: IO[bytes]) -> Image.Image:
    """As Image.open, but without its pixel limit, which is global to the process (the caller has its own)."""
    prefix = file.read(16)
    for prepare in (Image.preinit, Image.init):  # common formats first
        prepare()
        for kind in list(Image.ID):
            factory, accept = Image.OPEN[kind]
            accepted = accept is None or accept(prefix)
            if not accepted or isinstance(accepted, str):  # a string is the reason why not
                continue
            if kind in _PROGRAMS:
                raise ImageError(f"is of the format {kind}, a program that would be run; save it as PNG")
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # another format, as in Image.open
                continue
    raise UnidentifiedImageError


def _check_size(image: Image.Image, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ImageError(
            f"has {image.width} x {image.height} = {pixels:,} pixels, more than the {max_pixels:,} allowed; scale it "
            "down, or raise the limit: data.max_pixels of a recipe, `max_pixels` of a pipeline"
        )


def check_resized(size: tuple[int, int], processor: Any, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError for an image of `size` (width, height) so thin that resizing it would give too many pixels.

    An image processor that sets the shortest side scales the other one in proportion.
    """
    sides = getattr(processor, "size", None) or {}
    short, pct = sides.get("shortest_edge"), getattr(processor, "crop_pct", None)
    if not short or sides.get("height") or (pct and short >= 384):  # from there on ConvNeXt's squeezes to a square
        return
    pixels = math.ceil((short / (pct or 1)) ** 2 * max(size) / max(1, min(size)))
    if pixels > max_pixels:
        raise ImageError(
            f"has {size[0]} x {size[1]} pixels, so the image processor, which makes the shortest side {short}, would "
            f"make {pixels:,} of them, more than the {max_pixels:,} allowed; crop it, or remove it"
        )


def _is_deep(image: Image.Image) -> bool:
    """Whether a file, not yet read, has several 16-bit channels: Pillow keeps the upper eight bits of each."""
    for *_, told in getattr(image, "tile", ()):  # decoder arguments: "RGB;16B", or ("RGB;16L", ...) for a TIFF
        if any(isinstance(part, str) and ";16" in part for part in (told if isinstance(told, tuple) else (told,))):
            return True
    return False


def _to_rgb(image: Image.Image, max_pixels: int) -> Decoded:
    _check_size(image, max_pixels)
    sixteen, deep = image.format in _SIXTEEN, _is_deep(image)
    negative = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    image = ImageOps.exif_transpose(image)
    _check_size(image, max_pixels)  # an icon may be larger than declared, within Pillow's limit
    if image.mode.startswith("I;16") or (image.mode == "I" and sixteen):
        upper = np.asarray(image).clip(0, 65535) >> 8  # Pillow's own conversion would clip at 255
        upper = 255 - upper if negative else upper  # Pillow does this for 8 bits, but not for 16
        return Decoded(Image.fromarray(upper.astype(np.uint8)).convert("RGB"), wide=True, deep=True)
    if image.mode in ("I", "F"):
        numbers = "32-bit whole numbers" if image.mode == "I" else "floating-point numbers"
        raise ImageError(
            f"holds {numbers} (mode {image.mode}), which have no defined black and white; scale them to 0 ... 255 or "
            "0 ... 65535 and save it with 8 or 16 bits a channel (numpy: uint8 or uint16)"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about direct conversion; the colours are the same
    try:
        return Decoded(image.convert("RGB"), wide=False, deep=deep)
    except ValueError as error:
        raise ImageError(f"has the colour mode {image.mode}, which Pillow does not convert; save it as RGB") from error
