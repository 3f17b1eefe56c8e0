"""What it costs to open a stream of very many images, and to check them before training.

python benchmarks/opening.py [--rows 1300000] [--photos 40000]

Opening: a table on disk (what save_to_disk writes) of tiny PNGs, and class folders with a file for each row (hard
links of a few), of 1000 classes in ten tasks. Checking: JPEGs of 500 x 375 pixels in class folders, by `data.check`.
Each is measured in a process of its own, after its imports: CPU time of all threads, and peak memory, including
imports and the files' mapped pages.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, disable_progress_bars
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_cdl import StreamConfig, TaskStream

CLASSES, DISTINCT, TEST = 1000, 20, 26
"""Classes, different images, and training images for each test image, as in ImageNet."""
LINKS = 50_000
"""Most links of a file: file systems have a limit."""


def image(number: int, kind: str, size: tuple[int, int]) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def make_table(folder: Path, rows: int) -> None:
    """Save tables of so many rows to train and of some to test, whose images are a few tiny ones."""
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=[f"n{i:08d}" for i in range(CLASSES)])})
    few = pa.array([image(number, "PNG", (2, 2)) for number in range(DISTINCT)], pa.binary())
    tables = {}
    for split, count in (("train", rows), ("test", max(CLASSES, rows // TEST))):
        content = few.take(pa.array(np.arange(count) % DISTINCT))
        images = pa.StructArray.from_arrays([content, pa.nulls(count, pa.string())], ["bytes", "path"])
        labels = pa.array(np.arange(count) * 7919 % CLASSES)  # no two neighbours of a class
        table = pa.table({"image": images, "label": labels}).cast(features.arrow_schema)
        table = pa.Table.from_batches(table.to_batches(max_chunksize=1000))
        tables[split] = Dataset(table, DatasetInfo(features=features))
    DatasetDict(tables).save_to_disk(str(folder))


def make_folders(folder: Path, files: int, kind: str = "PNG", size: tuple[int, int] = (2, 2)) -> None:
    """Make class folders with so many files to train and some to test, hard links of a few."""
    few, count = folder.with_name(f"{folder.name} files"), 0
    few.mkdir(parents=True)
    for split, share in (("train", files // CLASSES), ("test", max(1, files // CLASSES // TEST))):
        for number in range(CLASSES):
            place = folder / split / f"n{number:08d}"
            place.mkdir(parents=True)
            for index in range(share):
                file = few / f"{count % DISTINCT}-{count // (DISTINCT * LINKS)}"
                if not file.exists():
                    file.write_bytes(image(count, kind, size))
                os.link(file, f"{place}/n{number:08d}_{index}.{kind.lower()}")
                count += 1


def peak() -> float:
    """The most MB that this process held; getrusage would count what its parent held when it was started."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def measure(path: str, check: str) -> dict[str, Any]:
    """CPU seconds of opening and checking, and peak memory in MB, in this process."""
    before, start = peak(), time.process_time()
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    stream = TaskStream(StreamConfig(path=path, classes_per_task=CLASSES // 10, check=check), processor)  # type: ignore[arg-type]
    found = {"fingerprint": stream.fingerprint, "images": sum(map(sum, stream.images.values()))}
    opened = time.process_time()
    found |= {"imported_mb": before, "opened_mb": peak(), "open_seconds": opened - start}
    found["notes"] = stream.check_images()
    return {**found, "check_seconds": time.process_time() - opened, "mb": peak()}


def in_child(path: Path, check: str = "none") -> dict[str, Any]:
    words = [sys.executable, __file__, "--measure", str(path), "--check", check]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--photos", type=int, default=40_000)
    parser.add_argument("--measure", help="a folder, in this process")
    parser.add_argument("--check", default="none")
    asked = parser.parse_args()
    disable_progress_bars()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.check)))
        return
    with tempfile.TemporaryDirectory() as work:
        print("| opened | images | CPU s | MB after imports | MB in all |\n|---|---:|---:|---:|---:|")
        for name, make in (("a table", make_table), ("class folders", make_folders)):
            make(place := Path(work) / name, asked.rows)
            found = in_child(place)
            memory = f"{found['imported_mb']:,.0f} | {found['opened_mb']:,.0f}"
            print(f"| {name} | {found['images']:,} | {found['open_seconds']:.1f} | {memory} |", flush=True)
        print("\n| `data.check` | images | CPU s | µs an image |\n|---|---:|---:|---:|")
        make_folders(place := Path(work) / "photos", asked.photos, "JPEG", (500, 375))
        for check in ("none", "headers", "all"):
            found = in_child(place, check)
            each = 1e6 * found["check_seconds"] / found["images"]
            print(f"| {check} | {found['images']:,} | {found['check_seconds']:.1f} | {each:,.0f} |", flush=True)
            print(*found["notes"], sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
