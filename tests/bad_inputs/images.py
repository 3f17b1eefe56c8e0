"""Images that cannot be read, or that should not be."""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from helpers import picture, png
from PIL import Image

from bad_inputs.data import data, photos
from bad_inputs.parts import Parts
from bad_inputs.runner import WAY, Row, rows
from hf_cdl.data.views import decode


def encoded(kind: str, image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@functools.cache
def bomb(side: int = 30_000) -> bytes:
    """A PNG of side x side black pixels in a few hundred kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(1), b"\0" * (side // 8 + 1)
    rows = b"".join([packer.compress(row) for _ in range(side)]) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def noise(dtype: Any, scale: float = 1.0) -> Image.Image:
    return Image.fromarray((np.random.default_rng(0).random((16, 16)) * scale).astype(dtype))


WHOLE = png(picture(0, 0, 64))
WRONG_SUM = WHOLE[:60] + bytes([WHOLE[60] ^ 255]) + WHOLE[61:]
FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a PNG that is cut off": ("x.png", lambda: WHOLE[: len(WHOLE) // 2]),
    "a PNG without its data": ("x.png", lambda: WHOLE[:33]),
    "a PNG with a wrong sum": ("x.png", lambda: WRONG_SUM),
    "a JPEG that is cut off": ("x.jpg", lambda: encoded("JPEG", picture(0, 0, 64))[:400]),
    "a WebP that is cut off": ("x.webp", lambda: encoded("WEBP", picture(0, 0, 64))[:60]),
    "no bytes": ("x.png", lambda: b""),
    "a text called .png": ("x.png", lambda: b"not a picture\n"),
    "an error page called .jpg": ("x.jpg", lambda: b"<!DOCTYPE html><html>404 Not Found</html>"),
    "a Git LFS pointer": ("x.png", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "a drawing in SVG": ("x.svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "a bomb": ("x.png", bomb),
    "a TIFF of NaN": ("x.tif", lambda: encoded("TIFF", noise(np.float32, np.nan))),
    "a TIFF of floats": ("x.tif", lambda: encoded("TIFF", noise(np.float32, 5000))),
    "a TIFF of whole numbers": ("x.tif", lambda: encoded("TIFF", noise(np.int32, 2**30))),
}


def put(name: str, content: Callable[[], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / "train" / "bee" / name).write_bytes(content())


IN_FOLDERS = [data(name, photos(put(*file)), file[0]) for name, file in FILES.items()]
IN_FOLDERS.append(data("an empty file", photos(put("y.png", lambda: b"")), "y.png", "is empty"))


def in_table(name: str, cell: Callable[[Parts], Any], *says: str) -> Row:
    """A table whose third image is `cell` as it is; `datasets` would store the file's content for a path."""

    def build(parts: Parts) -> None:
        cells = [{"bytes": png(picture(number % 2, number)), "path": None} for number in range(4)]
        cells[2] = cell(parts)
        images = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        os.mkdir("bad")
        for split in ("train", "test"):
            pq.write_table(pa.table({"image": images, "label": ["ant", "bee"] * 2}), f"bad/{split}.parquet")

    return data(f"a cell with {name}", build, *says)


def fifo(parts: Parts) -> dict[str, Any]:
    os.mkfifo("pipe")
    return {"bytes": None, "path": os.path.abspath("pipe")}


def outside(parts: Parts) -> dict[str, Any]:
    picture(0, 2).save("secret.png")
    return {"bytes": None, "path": os.path.abspath("secret.png")}


IN_TABLES = [
    in_table("nothing", lambda parts: None, "row 2"),
    in_table("neither bytes nor path", lambda parts: {"bytes": None, "path": None}, "row 2"),
    in_table("no bytes", lambda parts: {"bytes": b"", "path": None}, "row 2"),
    in_table("a text", lambda parts: {"bytes": b"x" * 99, "path": "a.png"}, "a.png|row 2"),
    in_table("a path to nothing", lambda parts: {"bytes": None, "path": "gone.png"}, "gone.png"),
    in_table("a path to a folder", lambda parts: {"bytes": None, "path": "/tmp"}, "/tmp"),
    in_table("a path to a pipe", fifo, "pipe"),
    in_table("a path to a device", lambda parts: {"bytes": None, "path": "/dev/zero"}, "/dev/zero"),
    in_table("a path to a file outside", outside, "secret.png"),
    in_table("a path that climbs", lambda parts: {"bytes": None, "path": "../../secret.png"}, "secret.png"),
    in_table("an address", lambda parts: {"bytes": None, "path": "https://example.com/a.png"}, "example.com"),
    in_table("a bomb", lambda parts: {"bytes": bomb(), "path": "big.png"}, "big.png|row 2"),
]


def decoded(name: str, image: Any, *says: str) -> Row:
    def make(parts: Parts) -> Callable[[], Any]:
        given = image() if callable(image) else image
        return lambda: decode(given, "the photo")

    return Row(f"decode {name}", make, says or ("the photo",), WAY)


def pipe() -> str:
    os.mkfifo("pipe")
    return "pipe"


DECODED = [
    decoded("nothing", None),
    decoded("a number", 3),
    decoded("a list of numbers", [1, 2, 3]),
    decoded("no bytes", b"", "the photo", "is empty"),
    decoded("a path to nothing", "gone.png", "gone.png|the photo"),
    decoded("a folder", Path("."), "the photo|."),
    decoded("a pipe", pipe, "pipe|the photo"),
    decoded("a device", "/dev/zero", "/dev/zero|the photo"),
    decoded("random bits without end", {"bytes": None, "path": "/dev/urandom"}, "/dev/urandom"),
    decoded("an empty dict", dict),
    decoded("a dict with text", {"bytes": "x", "path": None}),
    decoded("a bomb", bomb),
    decoded("an array of NaN", lambda: noise(np.float32, np.nan)),
]

ROWS = rows("image", IN_FOLDERS, IN_TABLES, DECODED)
