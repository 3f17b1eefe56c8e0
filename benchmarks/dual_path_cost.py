"""What DFPT-KD and DFPT-KD+ cost: time and memory of a student's training step, relative to KD.

python benchmarks/dual_path_cost.py [--pairs PAIR ...] [--repeats 3] [--steps 5]     (from the root of the repository)

Every measurement is a separate process that uses the recipe and CDLTrainer: it trains the student on the first task,
with an untrained teacher and a learning rate of 0, which costs the same. The terms take turns (KD, DFPT-KD, DFPT-KD+,
KD, ...), and ratios are taken between neighbours, so that other load on the machine affects all of them alike. Nothing
is downloaded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from datasets import ClassLabel, Dataset, Features, disable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image
from transformers import TrainerCallback
from transformers.utils import logging

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.recipe import load_recipe
from hf_cdl.recipe.build import build_models, build_objective, build_processors

disable_progress_bars()
logging.disable_progress_bar()

PLAIN = "{type: none}"
VIT = "recipes/quickstart.yaml"
PAIRS: dict[str, list[str]] = {  # name -> recipe; DATA becomes the folder of generated images
    "vit-stream": [VIT],
    "vit-offline": [
        *(VIT, "--data.classes_per_task", "50", "--baselines", "[]"),
        *("--teacher.model", "classifier", "--teacher.prompt", PLAIN),
        *("--student.model", "classifier", "--student.prompt", PLAIN),
    ],
    "resnet-offline": ["recipes/offline_kd/cifar100_resnet56_resnet20.yaml", "--data.path", "DATA"],
}
TERMS = {
    "KD": "[{type: kd}]",
    "DFPT-KD": "[{type: dual_path}]",
    "DFPT-KD+": "[{type: dual_path, copy_from: all}]",
}
CLASSES, SIZE = 100, 32  # of the generated images


class Cost(NamedTuple):
    """Cost of a student's training step: seconds, from batch to updated weights, and peak bytes (see Watch)."""

    seconds: float
    memory: int


class Watch(TrainerCallback):
    """Measures the seconds of every step and the peak memory in bytes.

    On a GPU: wall-clock time, and the memory of all tensors. On a CPU: process time, which other load does not affect,
    and the growth of the process during training.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started, self.before, self.earlier = 0.0, 0, 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before, self.earlier = psutil.Process().memory_info().rss, _peak()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self.started)

    def memory(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if _peak() == self.earlier:
            raise RuntimeError("The process held more before training than in it: its peak says nothing.")
        return _peak() - self.before


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(words: list[str], steps: int) -> Cost:
    """The median over `steps` steps of a recipe's student, after one warm-up step."""
    with tempfile.TemporaryDirectory() as work:
        recipe = load_recipe(words, "unused.yaml")
        processors = build_processors(recipe)
        models: Any = build_models(recipe, processors)
        task = TaskStream(recipe.data, processors, seed=recipe.seed)[0]
        models["teacher"].begin_task(task.class_names)
        section = {**recipe.training_args("student"), "max_steps": 1 + steps, "disable_tqdm": True}
        section.pop("num_train_epochs", None)
        args = CDLTrainingArguments(work, **section)
        trainer = CDLTrainer(models["student"], args, build_objective(recipe, "student", models), models["teacher"])
        watch = Watch()
        trainer.add_callback(watch)
        trainer.learn(task)
    return Cost(statistics.median(watch.seconds[1:]), watch.memory())


def make_data(folder: Path) -> None:
    """Write noise images, four per class."""
    draw = np.random.default_rng(0)
    labels = [label for label in range(CLASSES) for _ in range(4)]
    images = [Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in labels]
    features = Features({"image": ImageFeature(), "label": ClassLabel(CLASSES)})
    table = Dataset.from_dict({"image": images, "label": labels}, features=features)
    for split in ("train", "test"):
        table.to_parquet(str(folder / f"{split}.parquet"))


def row(pair: str, term: str, costs: list[Cost], kd: list[Cost]) -> str:
    """A line of the table: medians over the repeats, and the range of the ratios."""
    seconds = statistics.median(cost.seconds for cost in costs)
    memory = statistics.median(cost.memory for cost in costs)
    cells = [pair, term, f"{1000 * seconds:,.0f}", _ratio([cost.seconds for cost in costs], [c.seconds for c in kd])]
    cells += [f"{memory / 2**20:,.0f}", _ratio([cost.memory for cost in costs], [c.memory for c in kd])]
    return f"| {' | '.join(cells)} |"


def _ratio(values: list[float], others: list[float]) -> str:
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=[*PAIRS], help="all, if none is named")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each pair and term")
    parser.add_argument("--steps", type=int, default=5, help="steps in each, of which the median counts")
    asked = parser.parse_args()
    fresh = multiprocessing.get_context("forkserver")  # forks have imported this file and done nothing else
    print("| pair | term | ms a step | to KD | peak MiB | to KD |", "|---|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as data:
        make_data(Path(data))
        for pair in asked.pairs:
            found: dict[str, list[Cost]] = {term: [] for term in TERMS}
            words = [data if word == "DATA" else word for word in PAIRS[pair]]
            words += ["--train.learning_rate", "0", "--train.lr_steps", "[]", "--train.dataloader_drop_last", "true"]
            for _ in range(asked.repeats):
                for term, section in TERMS.items():
                    with ProcessPoolExecutor(1, mp_context=fresh) as process:
                        cost = process.submit(measure, [*words, "--distill", section], asked.steps).result()
                    found[term].append(cost)
                    print(pair, term, cost, file=sys.stderr, flush=True)
            print(*(row(pair, term, costs, found["KD"]) for term, costs in found.items()), sep="\n", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{asked.repeats} processes of {asked.steps} steps; torch {torch.__version__} on {device}; seed 0.")


if __name__ == "__main__":
    main()
