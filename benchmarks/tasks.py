"""What a task costs as a stream grows: CPU seconds and bytes of each task, from the first to the hundredth.

python benchmarks/tasks.py [--tasks 100] [--classes 2] [--head linear|ridge] [--components 1] [--epochs 1]

A student with CODA prompts (components in each task: by default the published pool of 100, divided among 100 tasks)
and a linear head, or one without prompts whose head is fitted, learns tasks of generated images with a small random
ViT and is measured on all classes so far after each. `begin` is what comes before the first step (new prompts, a new
head), `learn` the rest of the phase with its checkpoint, `measure` the evaluation with its ledger; evaluation reads
more images with every task, so `measure an image` is shown too. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, StreamConfig, TaskStream
from hf_cdl.runs.run import Run
from hf_cdl.training.memory import gc_frozen

SIDE, TRAIN, TEST = 32, 8, 4
SMALL: Any = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"prompt": {"type": "coda", "components": 1, "length": 8, "layers": [0, 1, 2, 3]}},
    "ridge": {"head": {"type": "ridge", "standardise": "first_task", "strength": "auto", "scale": "auto"}},
}


def table(classes: int, count: int, first: int) -> Dataset:
    """Noise in a colour of its class, `count` images of each, as PNG."""
    cells, labels = [], []
    for label in range(classes):
        colour = np.random.default_rng(label).integers(40, 216, 3)
        for number in range(first, first + count):
            noise = np.random.default_rng((label, number)).integers(-40, 40, (SIDE, SIDE, 3))
            stream = io.BytesIO()
            Image.fromarray((colour + noise).astype(np.uint8)).save(stream, "PNG")
            cells.append({"bytes": stream.getvalue(), "path": None})
            labels.append(label)
    names = ClassLabel(names=[f"class {label}" for label in range(classes)])
    features = Features({"image": ImageFeature(), "label": names})
    return Dataset.from_dict({"image": cells, "label": labels}, features=features)


def trainer(work: Path, head: str, tasks: int, classes: int, epochs: int) -> tuple[CDLTrainer, TaskStream]:
    """A student that has learnt nothing, with its run, and the stream."""
    torch.manual_seed(0)
    backbone = work / "backbone"
    ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **SMALL), add_pooling_layer=False).save_pretrained(backbone)
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    data: Any = {"train": table(tasks * classes, TRAIN, 0), "test": table(tasks * classes, TEST, TRAIN)}
    stream = TaskStream(StreamConfig(classes_per_task=classes), processor, dataset=data)
    model = CDLForImageClassification.from_backbone(backbone, **MODELS[head])
    run = Run(work / "run", {"name": "tasks"}, say=lambda _: None)
    run.bind(stream.fingerprint, [list(task.class_names) for task in stream], stream.images)
    arguments = CDLTrainingArguments(
        str(work / "out"),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    return CDLTrainer(model, arguments, run=run, processing_class=processor, num_tasks=tasks), stream


def size(folder: Path) -> int:
    """Bytes on the disk; a file with several names counts once."""
    found = {(stat.st_dev, stat.st_ino): stat.st_size for stat in (path.stat() for path in folder.rglob("*"))}
    return sum(found.values())


def measured(work: Path, head: str, tasks: int, classes: int, epochs: int) -> list[dict[str, float]]:
    """One row for each task."""
    student, stream = trainer(work, head, tasks, classes, epochs)
    begun: list[float] = []
    begin = student._begin_task

    def noted(task: Any) -> None:
        begin(task)
        begun.append(time.process_time())

    student._begin_task = noted  # type: ignore[method-assign]
    rows = []
    with gc_frozen():  # as hf-cdl train and CDLTrainer.train
        for task in stream:
            start = time.process_time()
            student.learn(task)
            learnt = time.process_time()
            result = student.evaluate_seen()
            done = time.process_time()
            rows.append({"task": task.index + 1, "begin": begun[-1] - start, "learn": learnt - begun[-1]})
            rows[-1] |= {"measure": done - learnt, "images": sum(result.counts), "bytes": size(work / "run")}
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    newest = work / "run" / "student" / stream[len(stream) - 1].name
    rows[-1]["checkpoint"] = size(newest)
    return rows


def shown(rows: list[dict[str, float]]) -> str:
    """A table of some tasks, each the minimum of itself and its two neighbours."""
    lines = ["| task | begin, s | learn, s | measure, s | ms an image | run, MB |", "|---:|---:|---:|---:|---:|---:|"]
    last = len(rows)
    found = {}
    for number in sorted({2, *(n for n in (5, 10, 20, 50) if n < last), last}):
        near = rows[max(1, number - 2) : number + 1]
        best = {name: min(row[name] for row in near) for name in ("begin", "learn", "measure")}
        found[number] = best
        each = 1000 * min(row["measure"] / row["images"] for row in near)
        text = " | ".join(f"{best[name]:.3f}" for name in ("begin", "learn", "measure"))
        lines.append(f"| {number} | {text} | {each:.2f} | {rows[number - 1]['bytes'] / 1e6:.1f} |")
    own = {number: best["begin"] + best["learn"] for number, best in found.items()}
    lines.append(f"\nbegin and learn, task {last} to task 2: {own[last] / own[2]:.2f}")
    lines.append(f"the run's folder to its newest checkpoint: {rows[-1]['bytes'] / rows[-1]['checkpoint']:.1f}")
    lines.append(f"median of learn over all tasks: {statistics.median(row['learn'] for row in rows):.3f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--classes", type=int, default=2, help="in each task")
    parser.add_argument("--head", choices=[*MODELS], default="linear")
    parser.add_argument("--components", type=int, default=1, help="of CODA-Prompt, in each task")
    parser.add_argument("--epochs", type=int, default=1, help="one training step each, for the linear head")
    asked = parser.parse_args()
    MODELS["linear"]["prompt"]["components"] = asked.components
    with tempfile.TemporaryDirectory() as work:
        rows = measured(Path(work), asked.head, asked.tasks, asked.classes, asked.epochs)
    print(shown(rows))
    print(
        f"{asked.head} head, {asked.classes} classes a task, {TRAIN} training images each, epochs: {asked.epochs}; "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
