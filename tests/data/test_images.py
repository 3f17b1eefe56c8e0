"""The same conversion from image file to RGB in training, in the stream's views and in the pipeline, for all modes."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from helpers import ROOT, make_backbone, train, write_recipe
from PIL import Image
from transformers import (
    ConvNextImageProcessorPil,
    ImageClassificationPipeline,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_cdl import CDLForImageClassification
from hf_cdl.data import StreamConfig, TaskStream
from hf_cdl.data.images import MAX_PIXELS, ImageError, decode
from hf_cdl.serving import CDLImageClassificationPipeline

PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (24, 31, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (24, 31), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (24, 31), dtype=np.uint16)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(COLOURS).convert(mode)


def with_alpha(mode: str) -> Image.Image:
    image = rgb(mode)
    image.putalpha(Image.fromarray(GREY))
    return image


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def png_file(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG of compressed lines, each preceded by a zero: also of types and sizes that Pillow cannot write."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0), b"IDAT": data, b"IEND": b""}
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sixteen_bit_rgb_png() -> bytes:
    deep = RNG.integers(0, 65536, (24, 31, 3), dtype=np.uint16).byteswap()
    return png_file(31, 24, 16, 2, zlib.compress(b"".join(b"\0" + line.tobytes() for line in deep)))


def frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.fromarray(255 - COLOURS), rgb("L").convert("RGB")]}


FILES: dict[str, Callable[[], bytes]] = {
    "1 png": lambda: saved(rgb("1"), "PNG"),
    "1 tiff": lambda: saved(rgb("1"), "TIFF"),
    "L png": lambda: saved(rgb("L"), "PNG"),
    "L png with tRNS": lambda: saved(rgb("L"), "PNG", transparency=7),
    "RGB png with tRNS": lambda: saved(rgb(), "PNG", transparency=tuple(COLOURS[0, 0].tolist())),
    "RGB bmp": lambda: saved(rgb(), "BMP"),
    "RGB jpeg": lambda: saved(rgb(), "JPEG"),
    "RGB webp": lambda: saved(rgb(), "WEBP", lossless=True),
    "16-bit RGB png": sixteen_bit_rgb_png,
    "P png": lambda: saved(rgb("P"), "PNG"),
    "P png with tRNS bytes": lambda: saved(rgb("P"), "PNG", transparency=bytes(range(256))),
    "P png with one tRNS": lambda: saved(rgb("P"), "PNG", transparency=3),
    "RGBA png": lambda: saved(with_alpha("RGB"), "PNG"),
    "RGBA webp": lambda: saved(with_alpha("RGB"), "WEBP", lossless=True, exact=True),
    "RGBA tiff": lambda: saved(with_alpha("RGB"), "TIFF"),
    "LA png": lambda: saved(with_alpha("L"), "PNG"),
    "PA tiff": lambda: saved(rgb("P").convert("PA"), "TIFF"),
    "CMYK jpeg": lambda: saved(rgb("CMYK"), "JPEG"),
    "CMYK tiff": lambda: saved(rgb("CMYK"), "TIFF"),
    "YCbCr jpeg": lambda: saved(rgb("YCbCr"), "JPEG"),
    "LAB tiff": lambda: saved(Image.frombytes("LAB", (31, 24), COLOURS.tobytes()), "TIFF"),
    "turned jpeg": lambda: saved(rgb(), "JPEG", exif=turned()),
    "turned png": lambda: saved(rgb(), "PNG", exif=turned()),
    "turned P png": lambda: saved(rgb("P"), "PNG", exif=turned(), transparency=3),
    "turned webp": lambda: saved(rgb(), "WEBP", exif=turned()),
    "gif": lambda: saved(rgb(), "GIF"),
    "animated gif": lambda: saved(rgb(), "GIF", duration=10, **frames()),
    "animated webp": lambda: saved(rgb(), "WEBP", lossless=True, duration=10, **frames()),
    "animated png": lambda: saved(rgb(), "PNG", duration=10, **frames()),
    "pages of a tiff": lambda: saved(rgb(), "TIFF", **frames()),
    "jpeg 2000": lambda: saved(rgb(), "JPEG2000"),
    "ico": lambda: saved(rgb(), "ICO", sizes=[(16, 16), (24, 24)]),
    "ppm": lambda: saved(rgb(), "PPM"),
}
WIDE: dict[str, Callable[[], bytes]] = {
    "I;16 png": lambda: saved(Image.fromarray(DEEP), "PNG"),
    "I;16 tiff": lambda: saved(Image.fromarray(DEEP), "TIFF"),
    "I;16B tiff": lambda: saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
    "turned I;16 png": lambda: saved(Image.fromarray(DEEP), "PNG", exif=turned()),
    "pages of an I;16 tiff": lambda: saved(
        Image.fromarray(DEEP), "TIFF", save_all=True, append_images=[Image.fromarray(DEEP)]
    ),
    "pgm of 16 bits": lambda: b"P5 31 24 65535\n" + DEEP.astype(">u2").tobytes(),
    "uint16 array": lambda: cell_of(DEEP),
}
NO_RANGE: dict[str, Callable[[], bytes]] = {
    "I tiff": lambda: saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    "F tiff": lambda: saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
    "int32 array": lambda: cell_of(DEEP.astype(np.int32)),
    "uint32 array": lambda: cell_of(DEEP.astype(np.uint32)),
    "int16 array": lambda: cell_of(GREY.astype(np.int16)),
    "float32 array": lambda: cell_of((GREY / 255).astype(np.float32)),
    "float64 array": lambda: cell_of(GREY / 255),
}


def cell_of(array: np.ndarray) -> bytes:
    """What `datasets` makes of an array in an Image column."""
    column = Dataset.from_dict({"image": [array]}, features=Features({"image": datasets.Image()}))
    return column.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]


def cell_of_image(image: Image.Image) -> bytes:
    """What `datasets` makes of a PIL image in an Image column."""
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a"])})
    column = Dataset.from_dict({"image": [image], "label": [0]}, features=features)
    return column.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]


OBJECTS: dict[str, Callable[[], Image.Image]] = {
    "RGB": rgb,
    "L": lambda: rgb("L"),
    "1": lambda: rgb("1"),
    "P": lambda: rgb("P"),
    "RGBA": lambda: with_alpha("RGB"),
    "LA": lambda: with_alpha("L"),
    "CMYK": lambda: rgb("CMYK"),
    "I;16": lambda: Image.fromarray(DEEP),
}
OPENED = ["turned png", "RGB jpeg", "turned jpeg", "animated gif", "CMYK tiff", "P png with one tRNS", "I;16 png"]
"""Files of which an image in a column, opened by its path, remembers the path."""
FILES["uint8 array"] = lambda: cell_of(COLOURS)
FILES["grey uint8 array"] = lambda: cell_of(GREY)
FILES["bool array"] = lambda: cell_of(GREY > 99)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CDLForImageClassification:
    student = CDLForImageClassification.from_backbone(str(make_backbone(tmp_path_factory.mktemp("backbone"))))
    student.begin_task(["a", "b"])
    return student


def stream_of(content: bytes, path: str | None = None, **config: Any) -> Any:
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    cells = [{"bytes": None if path else content, "path": path}] * 2
    table = Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)
    return TaskStream(StreamConfig(classes_per_task=2, **config), PROCESSOR, dataset={"train": table, "test": table})


@pytest.mark.parametrize("name", [*FILES, *WIDE])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of transformers' own loader
def test_training_and_pipeline_see_the_same_pixels(name: str, model: Any, tmp_path: Path) -> None:
    content = {**FILES, **WIDE}[name]()
    file = tmp_path / "image"
    file.write_bytes(content)
    classify: Any = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    views = [stream_of(content), stream_of(b"", str(file))]
    seen = [view[0].test[0]["pixel_values"] for view in views]
    assert torch.equal(*seen) and seen[0].std() > 0.1
    with Image.open(file) as opened, Image.open(file) as loaded:
        loaded.load()
        for given in (str(file), opened, loaded):
            assert torch.equal(classify.preprocess(given)["pixel_values"][0], seen[0]), given
    stock = ImageClassificationPipeline(model=model, image_processor=PROCESSOR)
    own = torch.equal(stock.preprocess(Image.open(io.BytesIO(content)))["pixel_values"][0], seen[0])
    assert own == (name in FILES), "what transformers reads right stays as it was; what it clips does not"
    refused = "16 bits a channel.*model: classifier.*8 bits"
    if name in FILES:
        assert views[0].check_images(plain=True) == []
    else:
        assert views[0].check_images() == []
        with pytest.raises(ImageError, match=refused):
            views[1].check_images(plain=True)
    for view in views:  # what the trainer of a plain classifier requests
        with nullcontext() if name in FILES else pytest.raises(ImageError, match=refused):
            view[0].train.check_8_bits()


@pytest.mark.parametrize("name", [*OBJECTS, *OPENED])
def test_images_of_pillow_in_a_column_are_what_the_pipeline_sees(name: str, model: Any, tmp_path: Path) -> None:
    """Created in memory or opened from a file, as users put them into a Dataset."""
    classify: Any = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    with ExitStack() as opened:
        if name in OPENED:
            (tmp_path / "image").write_bytes({**FILES, **WIDE}[name]())
            images = [opened.enter_context(Image.open(tmp_path / "image")) for _ in range(3)]
        else:
            images = [OBJECTS[name]() for _ in range(3)]
        want = classify.preprocess(images.pop())["pixel_values"][0]
        table = Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
    assert want.std() > 0.1
    stream = TaskStream(StreamConfig(classes_per_task=2), PROCESSOR, dataset={"train": table, "test": table})
    assert stream.check_images() == []
    for number in (0, 1):
        assert torch.equal(stream[0].test[number]["pixel_values"], want)  # type: ignore[call-overload]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_pillow_without_a_range_are_refused(mode: str, model: Any) -> None:
    image = Image.fromarray(DEEP.astype(np.int32 if mode == "I" else np.float32))
    classify: Any = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    for look in (lambda: stream_of(cell_of_image(image)).check_images(), lambda: classify(image)):
        with pytest.raises(ImageError, match=rf"holds .* numbers \(mode {mode}\).*no defined black and white"):
            look()


@pytest.mark.parametrize("name", WIDE)
def test_of_sixteen_bits_the_upper_eight_are_left(name: str) -> None:
    grey = (DEEP >> 8).astype(np.uint8)
    want = np.rot90(grey, -1) if "turned" in name else grey
    assert np.array_equal(np.asarray(decode(WIDE[name]())), np.stack([want] * 3, axis=-1))


@pytest.mark.parametrize("name", ["animated gif", "animated webp", "animated png", "pages of a tiff"])
def test_the_first_frame_counts(name: str) -> None:
    first = np.asarray(decode(FILES[name]())).astype(int)
    assert abs(first - COLOURS).mean() < 20  # a GIF's palette has 256 colours


def test_transparent_pixels_have_their_colours() -> None:
    image = rgb("P")
    palette, numbers = np.array(image.getpalette()).reshape(-1, 3), np.asarray(image)
    for name in ("P png", "P png with tRNS bytes", "P png with one tRNS", "PA tiff"):
        assert np.array_equal(np.asarray(decode(FILES[name]())), palette[numbers]), name
    assert np.array_equal(np.asarray(decode(FILES["RGBA png"]())), COLOURS)


@pytest.mark.parametrize("name", NO_RANGE)
def test_numbers_without_a_range_are_refused_by_training_and_pipeline(name: str, model: Any, tmp_path: Path) -> None:
    file = tmp_path / "numbers.tiff"
    file.write_bytes(NO_RANGE[name]())
    classify: Any = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    way_out = r"numbers\.tiff: holds .* numbers \(mode [IF]\).*uint8 or uint16"
    with pytest.raises(ImageError, match=way_out):
        stream_of(b"", str(file)).check_images()
    with pytest.raises(ImageError, match=way_out):
        classify(str(file))
    with Image.open(file) as image, pytest.raises(ImageError, match="no defined black and white"):
        classify(image)


def test_a_mode_that_pillow_does_not_convert_is_named() -> None:
    with pytest.raises(ImageError, match="x.tiff: has the colour mode La, .*save it as RGB"):
        decode(with_alpha("L").convert("La"), "x.tiff")


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_twelve_bits_in_sixteen_are_said_of_every_kind(channels: int, bits: int) -> None:
    """Grey, grey with alpha, RGB, RGBA; a fully opaque alpha channel does not hide it."""
    values = np.random.default_rng(channels).integers(0, 2**bits, (24, 31, channels), dtype=np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in values.byteswap()))
    split = stream_of(png_file(31, 24, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], lines))[0].train
    flaw = split.examine(0).flaw
    assert ("almost black" in flaw) if bits == 12 and flaw else flaw is None and bits == 16
    refused = split.examine(0, plain=True).problem
    assert (refused is None) == (channels > 1), "Pillow itself keeps the upper eight of several channels"


def test_a_dark_image_of_eight_bits_is_no_fault_of_its_bits() -> None:
    dark = Image.fromarray((COLOURS // 16).astype(np.uint8))
    assert stream_of(saved(dark, "PNG"))[0].train.examine(0).flaw is None


# ---- the pipeline


def test_arrays_and_text_in_the_pipeline(model: Any, tmp_path: Path) -> None:
    import base64

    classify: Any = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    want = classify.preprocess(Image.fromarray(DEEP))["pixel_values"]
    assert torch.equal(classify.preprocess(DEEP)["pixel_values"], want)
    text = base64.b64encode(WIDE["I;16 png"]()).decode()
    for given in (text, f"data:image/png;base64,{text}"):
        assert torch.equal(classify.preprocess(given)["pixel_values"], want)
    stock = ImageClassificationPipeline(model=model, image_processor=PROCESSOR)
    pixels = [p.preprocess(COLOURS)["pixel_values"] for p in (classify, stock)]
    assert torch.equal(*pixels)
    for given in (COLOURS.transpose(2, 0, 1), torch.tensor(COLOURS)):
        assert torch.equal(classify.preprocess(given)["pixel_values"], pixels[0])
    for wrong, message in (
        (np.zeros((5, 5, 3), np.uint16), r"type uint16: scale its channels"),
        (np.zeros((5, 5)), "floating-point numbers"),
        (np.zeros((5, 5, 3)), r"type float64: scale its channels to 0 ... 255, as uint8"),
        (np.zeros((5, 5, 3), np.float32), r"type float32: scale its channels"),
        (np.zeros((5, 5, 3), bool), r"type bool: scale its channels"),
        (torch.zeros(3, 5, 5), r"type torch.float32: scale its channels"),
        (np.zeros((5, 5), complex), "type complex128: its numbers are of no image; scale them"),
        (np.zeros((5, 5), np.float16), "type float16: its numbers are of no image"),
        (np.zeros((5, 5), object), "type object: its numbers are of no image"),
        (np.zeros((3, 40, 3), np.uint8), r"\(3, 40, 3\).*may have its channels first or last; give a PIL image"),
        (np.zeros((5, 5, 4), np.uint8), r"\(5, 5, 4\).*must have three channels; give a PIL image"),
        (str(tmp_path / "gone.png"), r"gone.png: no such file, and no URL"),
        ("data:image/png;base64,AAAA", "cannot be read as an image"),
        (str(tmp_path), "is a folder"),
    ):
        with pytest.raises(ImageError, match=message):
            classify(wrong)


def test_models_of_others_keep_transformers_own_decoding(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    classify: Any = pipeline(
        "image-classification", model=ViTForImageClassification(config), image_processor=PROCESSOR
    )
    assert isinstance(classify, CDLImageClassificationPipeline)
    stock = ImageClassificationPipeline(model=ViTForImageClassification(config), image_processor=PROCESSOR)
    for name in ("I;16 png", "RGB png with tRNS", "turned jpeg"):
        file = tmp_path / "image"
        file.write_bytes({**FILES, **WIDE}[name]())
        with Image.open(file) as image:
            pixels = [p.preprocess(image)["pixel_values"] for p in (classify, stock)]
        assert torch.equal(*pixels), name
    with pytest.raises(ValueError, match="Incorrect image source"):
        classify("nothing.png")


@pytest.mark.slow
def test_the_pipeline_is_ours_if_it_is_imported_later_and_nothing_is_said(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    code = """
import sys
import hf_cdl
from transformers import pipeline
print(type(pipeline("image-classification", model=sys.argv[1], device="cpu")).__name__)
"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "CDLImageClassificationPipeline\n", done.stderr
    assert "Overwriting" not in done.stderr and "egister" not in done.stderr


def test_a_pipeline_that_somebody_registered_stays(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    from transformers.pipelines import PIPELINE_REGISTRY

    class Mine(ImageClassificationPipeline):
        pass

    tasks = PIPELINE_REGISTRY.supported_tasks
    monkeypatch.setitem(tasks, "image-classification", {**tasks["image-classification"], "impl": Mine})
    type(model.config)(**model.config.to_dict())
    assert tasks["image-classification"]["impl"] is Mine


# ---- what may be opened, and how large it may be


def black_png(width: int, height: int) -> bytes:
    """A one-bit PNG, written without ever holding its pixels in memory."""
    press = zlib.compressobj(9)
    line = b"\0" * (width // 8 + 2)
    return png_file(width, height, 1, 0, b"".join([*(press.compress(line) for _ in range(height)), press.flush()]))


def gif_of(width: int, height: int) -> bytes:
    small = bytearray(saved(rgb("P"), "GIF"))
    small[6:10] = struct.pack("<HH", width, height)
    return bytes(small)


BOMBS = {
    "png": lambda: black_png(30000, 30000),
    "gif": lambda: gif_of(65000, 65000),
    "bmp": lambda: saved(rgb(), "BMP")[:18] + struct.pack("<ii", 40000, 40000) + saved(rgb(), "BMP")[26:],
    "ppm": lambda: b"P6 50000 50000 255\n",
    "tga": lambda: saved(rgb(), "TGA")[:12] + struct.pack("<HH", 60000, 60000) + saved(rgb(), "TGA")[16:],
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_unpacked(kind: str, tmp_path: Path, model: Any) -> None:
    file = tmp_path / f"bomb.{kind}"
    file.write_bytes(BOMBS[kind]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=rf"bomb\.{kind}: has .* pixels, more than the 100,000,000.*data\.max_pixels"):
        decode(str(file))
    with pytest.raises(ImageError, match="more than the 100,000,000"):
        stream_of(b"", str(file)).check_images()
    classify: Any = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    with pytest.raises(ImageError, match="more than the 100,000,000"):
        classify(str(file))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_the_limit_is_the_callers_and_no_switch_of_the_process(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    assert Image.MAX_IMAGE_PIXELS == 89478485, "as Pillow sets it"
    content = FILES["RGB jpeg"]()  # of 744 pixels
    with pytest.raises(ImageError, match="31 x 24 = 744 pixels, more than the 743"):
        stream_of(content, max_pixels=743)[0].train[(0, 0)]
    for pillows in (400, 300):  # beyond it Pillow warns, beyond its double it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode(content).size == stream_of(content, max_pixels=744)[0].test.image(0).size == (31, 24)
    assert Image.MAX_IMAGE_PIXELS == 300 and StreamConfig().max_pixels == MAX_PIXELS
    classify: Any = pipeline("image-classification", model=model, image_processor=PROCESSOR)
    classify.max_pixels = 700
    with pytest.raises(ImageError, match="more than the 700"):
        classify(rgb())


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    kinds = {"pipe": "a named pipe", "link": "a named pipe", "zero": "a device", "folder": "a folder"}
    for name, kind in kinds.items():
        path = str(tmp_path / f"{name}.png")
        for given in (path, Path(path), {"bytes": None, "path": path}):
            with pytest.raises(ImageError, match=f"{name}.png: is {kind}, but only regular files"):
                decode(given)
        stream = stream_of(b"", path)
        assert stream.fingerprint == stream_of(b"", str(tmp_path / "missing.png")).fingerprint
        with pytest.raises(ImageError, match=kind):
            stream.check_images()
    with pytest.raises(ImageError, match="is a int; allowed"):
        decode(0)  # not the file with that descriptor


def test_no_other_program_is_started() -> None:
    postscript = saved(rgb(), "EPS")
    with pytest.raises(ImageError, match="of the format EPS, a program that would be run; save it as PNG"):
        decode(postscript)


def test_names_are_readable_in_messages(tmp_path: Path) -> None:
    for name, shown in ((b"caf\xe9.png", r"caf\xe9.png"), (b"a\nb\x1b[31m.png", r"a\nb\x1b[31m.png")):
        file = os.path.join(os.fsencode(tmp_path), name)
        Path(os.fsdecode(file)).write_bytes(b"nothing")
        with pytest.raises(ImageError) as raised:
            decode(os.fsdecode(file))
        assert shown in str(raised.value) and str(raised.value).isprintable()


# ---- whole runs, and the demo


def write_sixteen_bits(folder: Path) -> Path:
    """Four classes of stripes in four directions, as a microscope writes them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    for name, phase in {"rows": y, "columns": x, "rising": x + y, "falling": x - y}.items():
        for split, count in (("train", 12), ("test", 8)):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                waves = 20000 + 15000 * np.sin(phase * 0.8 + rng.uniform(0, 6)) + rng.normal(0, 2000, (16, 16))
                Image.fromarray(waves.clip(0, 65535).astype(np.uint16)).save(folder / split / name / f"{k}.png")
    return folder


@pytest.mark.slow
def test_the_pipeline_is_as_good_on_sixteen_bits_as_the_run_recorded(tmp_path: Path) -> None:
    student = {"backbone": str(make_backbone(tmp_path / "backbone", 64)), "head": {"type": "ridge"}}
    images = write_sixteen_bits(tmp_path / "images")
    Image.new("RGB", (9, 9), (7, 7, 7)).save(images / "train/columns/flat.png")
    images.joinpath("notes").mkdir()
    data = {"path": str(images), "classes_per_task": 2, "crop_scale": [0.9, 1.0]}
    recipe = {"name": "deep", "data": data, "student": {**student, "prompt": {"type": "none"}}, "baselines": []}
    code, output = train(write_recipe(tmp_path / "r.yaml", recipe), "--output_dir", tmp_path / "run")
    assert code == 0, output
    assert "note: training images that show nothing once decoded: 1\n- split 'train', row 12: " in output
    assert "flat.png: is of one colour, (7, 7, 7)\n" in output and "not read are the folders notes" in output
    recorded = json.loads((tmp_path / "run/results.json").read_text())["roles"]["student"]["metrics"]
    classify: Any = pipeline("image-classification", model=str(tmp_path / "run/student"), device="cpu")
    files = sorted((tmp_path / "images/test").rglob("*.png"))
    hits = [classify(str(file), top_k=1)[0]["label"] == file.parent.name for file in files]
    assert 100 * np.mean(hits) == pytest.approx(recorded["average_accuracy"]) and np.mean(hits) > 0.5


@pytest.mark.slow
def test_a_plain_classifier_is_not_trained_on_sixteen_bits(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    PROCESSOR.save_pretrained(tmp_path / "vit")
    data = {"path": str(write_sixteen_bits(tmp_path / "images")), "classes_per_task": 4}
    student = {"model": "classifier", "backbone": str(tmp_path / "vit")}
    file = write_recipe(tmp_path / "r.yaml", {"name": "plain", "data": data, "student": student, "baselines": []})
    code, output = train(file, "--output_dir", tmp_path / "run")
    assert code == 2 and "80 images cannot be used" in output and "Traceback" not in output, output
    assert "0.png: has 16 bits a channel" in output and "save it with 8 bits" in output


HANDED_ON = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import gradio as gr
from app import build
from gradio.data_classes import ImageData
from states import Results
results = Results("x", [["a"], ["b"]], [[50.0], [50.0, 60.0]])
page = build(SimpleNamespace(tasks=[1, 2], where="x", reject=None, results=lambda task: results), gr)
(component,) = [block for block in page.blocks.values() if isinstance(block, gr.Image)]
print(component.preprocess(ImageData(path=sys.argv[2], orig_name="deep.png")))
"""


@pytest.mark.slow
def test_the_demo_hands_on_the_file_as_it_is(tmp_path: Path) -> None:
    """Gradio would convert it to RGB and clip it."""
    if find_spec("gradio") is None:
        pytest.skip("the demo needs the extra `demo`")
    file = tmp_path / "deep.png"
    file.write_bytes(WIDE["I;16 png"]())
    command = [sys.executable, "-c", HANDED_ON, str(ROOT / "hf_cdl/commands/space"), str(file)]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{file}\n", done.stderr


# ---- thin images, and zero for white ----


def test_a_thin_image_is_refused_before_it_is_resized(model: Any, tmp_path: Path) -> None:
    """With its name, in the image check, the evaluation view and the pipeline: it would become 16 x 32,000."""
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.875)
    files = [*((64, 48),) * 7, (2000, 1)]
    for number, size in enumerate(files):
        place = tmp_path / "data" / ("train", "test")[number % 2] / f"class {number // 2 % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 50).save(place / f"{number}.png")
    stream = TaskStream(StreamConfig(path=str(tmp_path / "data"), classes_per_task=2, max_pixels=500_000), processor)
    with pytest.raises(ImageError, match=r"1 image cannot be used:\n- .*7\.png: has 2000 x 1 pixels, so the image"):
        stream.check_images()
    with pytest.raises(ImageError, match=r"7\.png: has 2000 x 1 pixels"):
        stream[0].test[len(stream[0].test) - 1]
    classify: Any = pipeline("image-classification", model=model, image_processor=processor)
    classify.max_pixels = 500_000
    for image in (str(next(tmp_path.rglob("7.png"))), np.zeros((1, 2000, 3), np.uint8), Image.new("RGB", (1, 2000))):
        with pytest.raises(ImageError, match="2000 pixels|2000 x 1 pixels"):
            classify(image)
    assert classify(np.zeros((20, 20, 3), np.uint8))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_zero_is_white_is_turned(bits: int) -> None:
    """Written by hand: Pillow writes zero as black."""
    for photometric, expected in ((0, 255 - 200), (1, 200)):
        data = bytes([200]) * 64 if bits == 8 else struct.pack("<H", 200 << 8) * 64
        tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 128), (277, 1), (278, 8)]
        tags.append((279, len(data)))
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        file = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
        assert decode(file.ljust(128, b"\0") + data).getpixel((3, 3)) == (expected,) * 3
