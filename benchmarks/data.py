"""Images per second that a trainer's loaders prepare, by the number of workers.

python benchmarks/data.py [--workers 0 2 4 8 16] [--images 2000] [--batch 64]

Generated JPEGs of 500 x 375 pixels in a folder, 224 pixels for ViT-B/16's image processor, as CDLTrainer loads them:
for training (random crops and flips, two epochs of which the second counts) and for evaluation. Only loading: no model
runs. Prints the best wall-clock rate of the repeats, and the speed-up over loading without workers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars
from PIL import Image
from small import model_of, trainer_of, vit
from timing import machine
from transformers import ViTImageProcessor
from transformers.utils import logging

from hf_cdl import StreamConfig, TaskStream

DISTINCT, CLASSES = 200, 10


def make_images(folder: Path, count: int) -> None:
    """Write images by class, one after another; after DISTINCT of them the contents repeat."""
    draw = np.random.default_rng(0)
    files: list[bytes] = []
    for number in range(count):
        file = (
            folder
            / ("test" if number // CLASSES % 4 == 0 else "train")
            / f"class {number % CLASSES}"
            / f"{number:06d}.jpg"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        if len(files) < DISTINCT:
            coarse = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
            files.append(file.read_bytes())
        else:
            file.write_bytes(files[number % DISTINCT])


def rate(loader: Iterable[Any], epochs: int) -> float:
    """Images a second of the last of several passes over a loader."""
    seconds, count = 0.0, 0
    for _ in range(epochs):
        start, count = time.perf_counter(), 0
        for batch in loader:
            count += len(batch["pixel_values"])
        seconds = time.perf_counter() - start
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = [number for number in (0, 2, 4, 8, 16) if number <= max(2, cores)]
    parser.add_argument("--workers", type=int, nargs="+", default=workers)
    parser.add_argument("--images", type=int, default=2000, help="a quarter of them for evaluation")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    print("| loader | workers | images/s | times as fast as the first |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as work:
        make_images(Path(work) / "data", asked.images)
        config = StreamConfig(path=str(Path(work) / "data"), classes_per_task=None)
        task = TaskStream(config, ViTImageProcessor(), seed=0)[0]
        found: dict[tuple[str, int], float] = {}
        for _ in range(asked.repeats):
            for number in asked.workers:
                more = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4} if number else {}
                more |= {"per_device_train_batch_size": asked.batch, "per_device_eval_batch_size": asked.batch}
                model = model_of(vit(image_size=224, patch_size=16))
                trainer = trainer_of(model, Path(work), dataloader_num_workers=number, **more)
                model.begin_task(task.class_names)
                trainer.seen.append(task)
                trainer.train_dataset = trainer._trained_on(task)
                training = trainer.get_train_dataloader()
                for name, loader, epochs in (("training", training, 2), ("evaluation", trainer._loader(task.test), 2)):
                    found[name, number] = max(found.get((name, number), 0.0), rate(loader, epochs))
    for name in ("training", "evaluation"):
        first = found[name, asked.workers[0]]
        for number in asked.workers:
            print(f"| {name} | {number} | {found[name, number]:,.0f} | {found[name, number] / first:.1f} |")
    print(f"\n{asked.images} images, best of {asked.repeats}; {cores} cores; {machine()}.")


if __name__ == "__main__":
    main()
