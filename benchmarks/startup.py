"""CPU seconds from the start of the process to the end of the first training step, beside a bare Trainer script.

python benchmarks/startup.py [--times 5]     (from the root of the repository)

Both train on the quickstart's images with its student's backbone: `hf-cdl train recipes/quickstart.yaml` up to its
first step, a teacher's, and a script that fine-tunes the backbone with transformers' own Trainer. They take turns.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile

import torch

OURS = """
import os, sys
from hf_cdl.commands.train import main
from hf_cdl.training.trainer import CDLTrainer
step = CDLTrainer.training_step
def first(self, *args, **kwargs):
    step(self, *args, **kwargs)
    os._exit(0)
CDLTrainer.training_step = first
main(["recipes/quickstart.yaml", "--output_dir", sys.argv[1] + "/run"])
raise SystemExit("no step was taken")
"""
BARE = """
import os, sys
from datasets import load_dataset
from transformers import AutoImageProcessor, Trainer, TrainingArguments, ViTForImageClassification
place, file, work = "recipes/quickstart/student", "recipes/quickstart/icons/train.parquet", sys.argv[1]
data = load_dataset("parquet", data_files=file, split="train", cache_dir=work)
processor = AutoImageProcessor.from_pretrained(place)
model = ViTForImageClassification.from_pretrained(place, num_labels=50)
def prepared(batch):
    pixels = processor(images=[image.convert("RGB") for image in batch["image"]], return_tensors="pt")
    return {"pixel_values": pixels["pixel_values"], "labels": batch["label"]}
class First(Trainer):
    def training_step(self, *args, **kwargs):
        super().training_step(*args, **kwargs)
        os._exit(0)
arguments = TrainingArguments(work, per_device_train_batch_size=32, remove_unused_columns=False, report_to="none")
First(model, arguments, train_dataset=data.with_transform(prepared)).train()
raise SystemExit("no step was taken")
"""


def seconds(code: str) -> float:
    """CPU seconds of a process of its own, with its threads and children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as work:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, work], **quiet)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    seconds(BARE)  # files come into memory
    pairs = [(seconds(BARE), seconds(OURS)) for _ in range(times)]
    print("| | CPU seconds, least | median |", "|---|---:|---:|", sep="\n")
    for name, found in zip(("Trainer script", "hf-cdl train"), zip(*pairs, strict=True), strict=True):
        print(f"| {name} | {min(found):.2f} | {statistics.median(found):.2f} |")
    ratios = [ours / bare for bare, ours in pairs]
    print(f"\nhf-cdl train to the script: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"{times} pairs; torch {torch.__version__}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
