"""How images are checked before training: all decoded, or headers and a sample, or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from hf_cdl.data import ImageError, StreamConfig, TaskStream, image_check, threads
from hf_cdl.data.headers import read_header
from hf_cdl.data.task_split import TaskSplit

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})
KINDS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp"}


def encoded(kind: str, number: int = 0, size: tuple[int, int] = (24, 16), mode: Any = np.uint8) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(noise if mode is np.uint8 else noise[..., 0].astype(mode) << 8)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is decoded."""
    found: list[str] = []
    examine = TaskSplit.examine

    def count(split: TaskSplit, index: int, plain: bool = False) -> Any:
        found.append(split.place(index))
        return examine(split, index, plain)

    monkeypatch.setattr(TaskSplit, "examine", count)
    return found


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images are many, in blocks of two."""
    monkeypatch.setattr(image_check, "_IMAGES", 10)
    monkeypatch.setattr(image_check, "_PIXELS", 10)
    monkeypatch.setattr(threads, "_BLOCK", 2)


def photos(folder: Path, train: int = 20, kind: str = "PNG") -> Path:
    """Two classes of `train` images each, and two to test."""
    for split, count, first in (("train", train, 0), ("test", 2, 1000)):
        for name in "ab":
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(first, first + count):
                (place / f"{number:03d}.{KINDS[kind]}").write_bytes(encoded(kind, number))
    return folder


def stream(path: Path, **fields: Any) -> TaskStream:
    return TaskStream(StreamConfig(path=str(path), classes_per_task=1, **fields), PROCESSOR)


def test_a_small_stream_is_decoded_whole(tmp_path: Path, decoded: list[str]) -> None:
    made = stream(photos(tmp_path))
    assert made.check_images() == [] and len({*decoded}) == len(decoded) == 44


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("kind", KINDS)
def test_of_many_images_headers_are_read_and_the_same_ones_decoded(
    kind: str, tmp_path: Path, decoded: list[str]
) -> None:
    made = stream(photos(tmp_path, kind=kind))
    (note,) = made.check_images()
    assert note.startswith("the headers of all 44 images were read, and 10 images decoded whole"), note
    first = sorted(decoded)
    decoded.clear()
    made.check_images()
    assert sorted(decoded) == first and len(first) == 10
    decoded.clear()
    assert stream(tmp_path, check="all").check_images() == [] and len(decoded) == 44
    decoded.clear()
    (note,) = stream(tmp_path, check="none").check_images()
    assert "none of the 44 images is checked" in note and not decoded


@pytest.mark.usefixtures("many")
def test_as_many_are_decoded_as_their_pixels_allow(tmp_path: Path, decoded: list[str], monkeypatch: Any) -> None:
    """24 x 16 pixels each."""
    made = stream(photos(tmp_path))
    for pixels, count in ((0, 10), (15 * 384 - 1, 14), (15 * 384, 15), (44 * 384 - 1, 43), (44 * 384, 44)):
        monkeypatch.setattr(image_check, "_PIXELS", pixels)
        decoded.clear()
        assert bool(made.check_images()) is (count < 44) and len(decoded) == count


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


BROKEN: dict[str, Callable[[str], bytes]] = {
    "cut off": lambda kind: cut(encoded(kind)),
    "empty": lambda kind: b"",
    "a text": lambda kind: b"not a picture\n",
    "too large": lambda kind: encoded(kind, size=(400, 300)),
}


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_header_shows_is_found_in_every_image(kind: str, how: str, tmp_path: Path) -> None:
    """In the words of decoding; among 44 images each of the two has a chance of 10 in 44 to be drawn."""
    made = stream(photos(tmp_path, kind=kind), max_pixels=100_000)
    wrong = [tmp_path / "train" / "a" / f"{number:03d}.{KINDS[kind]}" for number in range(1, 20, 2)]
    content = BROKEN[how](kind)
    for file in wrong:
        file.write_bytes(content)
    with pytest.raises(ImageError) as raised:
        made.check_images()
    said = str(raised.value)
    assert said.startswith("10 images cannot be used:\n") and all(str(file) in said for file in wrong), said
    with pytest.raises(ImageError, match=re.escape(said)):
        stream(tmp_path, check="all", max_pixels=100_000).check_images()


@pytest.mark.usefixtures("many")
def test_other_formats_and_ends_are_decoded(tmp_path: Path, decoded: list[str]) -> None:
    """A BMP does not say where it ends; a JPEG with bytes behind it may be whole, and is."""
    photos(tmp_path)
    for number in range(20):
        (tmp_path / "train" / "a" / f"{number:03d}.png").write_bytes(encoded("BMP", number))
        (tmp_path / "train" / "b" / f"{number:03d}.png").write_bytes(encoded("JPEG", number) + b"behind")
    stream(tmp_path).check_images()
    assert len(decoded) >= 40


@pytest.mark.usefixtures("many")
def test_images_in_a_table_are_checked_as_those_in_files_are(tmp_path: Path, decoded: list[str]) -> None:
    """Those of another order of rows too, and a path in a cell; the row is named."""
    cells: list[Any] = [{"bytes": encoded("PNG", number), "path": None} for number in range(40)]
    cells[33] = {"bytes": cut(encoded("PNG", 33)), "path": None}
    labels = [number % 2 for number in range(40)]
    table = Dataset.from_dict({"image": cells, "label": labels}).cast_column("image", ImageFeature())
    for data, row in ((table, 33), (table.select(range(39, -1, -1)), 6)):
        made = TaskStream(StreamConfig(classes_per_task=1, test_fraction=0.2), PROCESSOR, dataset=data)
        with pytest.raises(ImageError, match=f"1 image cannot be used:\n- split 'train', row {row}: "):
            made.check_images()
    for split in ("train", "test"):
        table.select(range(33)).to_parquet(str(tmp_path / f"{split}.parquet"))
    decoded.clear()
    (note,) = stream(tmp_path).check_images()
    assert "66 images were read, and 10 images" in note and len(decoded) == 10
    read = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train", cache_dir=str(tmp_path))
    assert TaskStream(StreamConfig(classes_per_task=1, test_fraction=0.5), PROCESSOR, dataset=read).check_images()


@pytest.mark.usefixtures("many")
def test_unlabelled_and_foreign_images_are_checked_too(tmp_path: Path) -> None:
    path = photos(tmp_path / "data")
    for field in ("unlabelled", "foreign"):
        place = tmp_path / field
        place.mkdir()
        for number in range(20):
            (place / f"{number}.png").write_bytes(encoded("PNG", 500 + number))
        (place / "7.png").write_bytes(cut(encoded("PNG", 507)))
        with pytest.raises(ImageError, match=rf"1 image cannot be used:\n- split '{field}', row \d+: .*7\.png"):
            stream(path, **{field: str(place)}).check_images()


@pytest.mark.usefixtures("many")
def test_of_a_class_whose_sample_is_blank_every_image_is_decoded(tmp_path: Path, decoded: list[str]) -> None:
    """One that shows something saves the class; without one it is refused as ever."""
    photos(tmp_path)
    flat = io.BytesIO()
    Image.new("RGB", (24, 16), (9, 9, 9)).save(flat, "PNG")
    files = sorted((tmp_path / "train" / "a").iterdir())
    for file in files:
        file.write_bytes(flat.getvalue())
    with pytest.raises(ImageError, match="All training images of the classes a are of one colour"):
        stream(tmp_path).check_images()
    whole = [file for file in files if not any(str(file) in place for place in decoded[:10])][0]
    whole.write_bytes(encoded("PNG"))
    decoded.clear()
    first, blank = stream(tmp_path).check_images()
    assert len(decoded) > 20 and "training images that show nothing once decoded: 19" in blank and "headers" in first


@pytest.mark.usefixtures("many")
def test_16_bits_are_refused_for_a_plain_checkpoint_by_the_header(tmp_path: Path) -> None:
    made = stream(photos(tmp_path))
    for number in range(20):
        (tmp_path / "train" / "b" / f"{number:03d}.png").write_bytes(encoded("PNG", number, mode=np.uint16))
    assert len(made.check_images()) == 1
    with pytest.raises(ImageError, match=r"20 images cannot be used(.|\n)*has 16 bits a channel"):
        made.check_images(plain=True)


def test_a_header_reads_a_part_of_the_file_alone() -> None:
    class Counted(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1) -> bytes:
            content = super().read(size)
            self.count += len(content)
            return content

    for kind in ("JPEG", "PNG"):
        file = Counted(encoded(kind, size=(600, 400)))
        found = read_header(file)
        assert found is not None and found.size == (600, 400) and not found.wide
        assert file.count < 2500 < len(file.getvalue()) / 10


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bad_image_met_later_names_itself_also_in_a_worker(workers: int, tmp_path: Path) -> None:
    """In one line, without the worker's traceback, and the stream knows which image it is."""
    made = stream(photos(tmp_path), check="none")
    bad = tmp_path / "train" / "b" / "003.png"
    bad.write_bytes(cut(bad.read_bytes()))
    made.check_images()
    loader = DataLoader(made[1].train, 4, num_workers=workers)  # type: ignore[arg-type]
    with pytest.raises(ImageError) as raised:
        list(loader)
    said = str(raised.value)
    assert said.startswith(f"split 'train', row 23: {bad}: cannot be read as an image") and "\n" not in said, said
    assert made.found(raised.value) == ("train", 23, bad.stat().st_size)
    assert made.found(ImageError("split 'unlabelled', row 3: gone.png")) is None
    before, size = made.fingerprint, bad.stat().st_size
    bad.write_bytes(encoded("PNG", 3))
    mended = stream(tmp_path)
    assert mended.fingerprint != before and mended.fingerprint_before(("train", 23, size)) == before
    assert torch.is_tensor(mended[1].train[3]["pixel_values"])


def test_only_known_ways_of_checking() -> None:
    with pytest.raises(ValueError, match="check is 'some', but must be headers, all or none"):
        StreamConfig(check="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 5, 31, 32, 33, 64, 1000, 5000])
def test_threads_give_everything_in_order(count: int) -> None:
    assert [*threads.in_threads(lambda item: 2 * item, range(count), "Doubling")] == [2 * i for i in range(count)]
    assert [*threads.in_threads(str, np.arange(count), "Naming")] == [str(i) for i in range(count)]
