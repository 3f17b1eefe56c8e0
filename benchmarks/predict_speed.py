"""How much hf-cdl predict loses to reading images, against the bare model, and whether its memory grows.

python benchmarks/predict_speed.py [--images 5000] [--blocks 5] [--block 1000]     (from the root of the repository)

A ViT-S of 224 x 224 pixels with random weights answers for generated JPEGs of 400 x 300 pixels. The bare model is its
forward passes over a batch that is already prepared. Both take turns, block by block, each in a process of its own,
and ratios are taken between neighbours, so that other load on the machine affects both alike; seconds are those from
the first image to the last row, without loading the model. Core time, which other load affects less, is that of a
block minus that of one image, so it excludes loading too. Memory is that of the command over all images at once, with
its workers, sampled throughout. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

DISTINCT, BATCH, CLASSES = 500, 32, 100
SMALL: Any = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
BARE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import predict_speed; predict_speed.bare()"


class Block(NamedTuple):
    """Images per second, and seconds of all cores, with those of starting."""

    rate: float
    core_seconds: float


def make_images(folder: Path, count: int) -> None:
    """Write noise images; after DISTINCT of them the files are the same."""
    folder.mkdir()
    draw, made = np.random.default_rng(0), list[Path]()
    for number in range(count):
        file = folder / f"{number:06d}.jpg"
        if len(made) < DISTINCT:
            coarse = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            coarse.resize((400, 300), Image.Resampling.BICUBIC).save(file, quality=90)
            made.append(file)
        else:
            os.link(made[number % DISTINCT], file)


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    names = {number: f"class {number}" for number in range(CLASSES)}
    ViTForImageClassification(ViTConfig(**SMALL, id2label=names)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def bare() -> None:
    """Print images per second of forward passes alone: `python -c ... MODEL COUNT`."""
    place, count = sys.argv[1], int(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageClassification.from_pretrained(place).eval().to(device)
    pixels, start = torch.randn(BATCH, 3, 224, 224, device=device), time.perf_counter()
    with torch.inference_mode():
        for first in range(0, count, BATCH):
            model(pixel_values=pixels[: count - first]).logits.float().cpu()
    print(f"({count / (time.perf_counter() - start):.3f} images/s)")


def run(words: list[str], watch: Any = None) -> Block:
    """Run a process that prints its images per second; `watch(process)` is called while it runs."""
    before = os.times()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    watching = threading.Thread(target=watch or (lambda _: None), args=(process,))
    watching.start()
    said, _ = process.communicate()
    watching.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {said}")
    after, found = os.times(), re.search(r"\(([\d,.]+) images/s\)", said)
    cores = after.children_user + after.children_system - before.children_user - before.children_system
    return Block(float(found[1].replace(",", "")) if found else 0.0, cores)


def memory(process: subprocess.Popen[str], samples: list[int]) -> None:
    """Sample the bytes that a process and its workers hold alone, until it ends."""
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            samples.append(sum(one.memory_full_info().uss for one in family))
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=5000, help="for the memory, at once; 0: not measured")
    parser.add_argument("--blocks", type=int, default=5, help="of the bare model and of predict, in turns")
    parser.add_argument("--block", type=int, default=1000, help="images in each")
    asked = parser.parse_args()
    pairs, samples, whole = list[tuple[Block, Block]](), list[int](), None
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        for name, count in (("one", 1), ("block", asked.block), ("images", asked.images)):
            make_images(place / name, count)
        make_model(place / "model")
        bare_words = ["-c", BARE, str(place / "model")]
        predict = ["-m", "hf_cdl", "predict", str(place / "model")]
        starts = run([*bare_words, "1"]), run([*predict, str(place / "one")])
        for number in range(asked.blocks):
            words = [*predict, str(place / "block"), "--out", str(place / f"{number}.csv")]
            pairs.append((run([*bare_words, str(asked.block)]), run(words)))
            print(*pairs[-1], file=sys.stderr, flush=True)
        if asked.images:
            words = [*predict, str(place / "images"), "--out", str(place / "all.csv")]
            whole = run(words, lambda process: memory(process, samples))
    ratios = [predicted.rate / alone.rate for alone, predicted in pairs]
    print("| | images/s | ms of cores an image |", "|---|---|---|", sep="\n")
    cores = []
    for name, start, blocks in zip(("bare model", "hf-cdl predict"), starts, zip(*pairs, strict=True), strict=True):
        rate = statistics.median(block.rate for block in blocks)
        cores.append(statistics.median(b.core_seconds - start.core_seconds for b in blocks) / (asked.block - 1))
        print(f"| {name} | {rate:.1f} | {1000 * cores[-1]:.1f} |")
    wall = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"\npredict to bare: {wall}, by the time of cores {cores[0] / cores[1]:.2f}")
    if whole is not None:
        fifths = [max(samples[i * len(samples) // 5 : (i + 1) * len(samples) // 5]) / 2**20 for i in range(5)]
        print(
            f"{asked.images:,} images at once: {whole.rate:.1f} images/s; memory, at most, in each fifth of the time:"
        )
        print(", ".join(f"{size:,.0f} MiB" for size in fifths))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{asked.blocks} blocks of {asked.block:,}; torch {torch.__version__} on {device}; seed 0.")


if __name__ == "__main__":
    main()
