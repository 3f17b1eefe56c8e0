"""Training steps on a GPU: attention kernels, waits for the GPU, and compiled graphs.

python benchmarks/gpu_probe.py {kernels,waits,graphs} [--size vit] [--prompts coda ...]

Everything is a student with KDP and its teacher in CDLTrainer; sizes as in step.py. A Markdown table each. On a CPU
`kernels` names the CPU's, and there are no `waits`. `graphs` traces them and generates no code.
"""

from __future__ import annotations

import argparse
import collections
import re
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from small import pair_of, task_of, trainer_of
from step import KDP, PIXELS, backbones
from timing import CARD, machine
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.utils import logging

from hf_cdl.prompts import PROMPTS

STEPS, FIRST = 20, 5
"""Steps in which waits are counted, after warm-up steps."""
ATTENTION = re.compile(r"_scaled_dot_product_\w+|(?:flash|fmha|sdpa)_\w+")


def trained(
    folder: Path, size: str, prompt: str, tasks: int, callback: Any, compiled: bool = False, **train: Any
) -> None:
    """Let a student learn tasks after a teacher that knows them; `callback` sees its steps."""
    configs = backbones(size)
    student, teacher, objective = pair_of(configs["student"], configs["teacher"], prompt, KDP)
    learning = [task_of(index, 64, PIXELS[size]) for index in range(tasks)]
    for task in learning:
        teacher.begin_task(task.class_names)
    if compiled:
        for model in (student, teacher):
            model.backbone.compile(backend="eager")  # the same graphs, in a second
    train = {"max_steps": FIRST, "use_cpu": not CARD, "per_device_train_batch_size": 16, **train}
    trainer = trainer_of(student, folder, objective, teacher, **train)
    trainer.add_callback(callback)
    for task in learning:
        trainer.learn(task)


class Profiled(TrainerCallback):
    """Profiles the last of a phase's steps."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CARD else [])]
        self.profiler = profile(activities=activities)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FIRST - 1:
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FIRST:
            self.profiler.stop()


def kernels(folder: Path, size: str, prompts: list[str]) -> None:
    """Operations and kernels of attention in one step, with how often."""
    print("| prompts | precision | attention in one student step |\n|---|---|---|")
    for prompt in prompts:
        for name, train in (("float32", {}), ("bfloat16", {"bf16": True})):
            seen = Profiled()
            trained(folder, size, prompt, 1, seen, **train)
            found: collections.Counter[str] = collections.Counter()
            for event in seen.profiler.events() or ():
                if match := ATTENTION.search(event.name):
                    found[match[0][:80]] += 1
            said = ", ".join(f"{key} × {count}" for key, count in sorted(found.items()))
            print(f"| {prompt} | {name} | {said} |", flush=True)


class Waits(TrainerCallback):
    """Records where the host waits for the GPU, in the steps that count."""

    def __init__(self) -> None:
        self.places: collections.Counter[str] = collections.Counter()
        self.counting = False

    def note(self, message: Any, category: Any, filename: str, lineno: int, *others: Any) -> None:
        if self.counting and "synchroniz" in str(message):
            stack = traceback.extract_stack()
            own = [frame for frame in stack if re.search(r"/(hf_cdl|transformers|accelerate)/", frame.filename)]
            self.places[" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in own[:-4:-1])] += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FIRST:
            torch.cuda.set_sync_debug_mode("warn")  # which warns once of itself
            self.counting = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FIRST + STEPS:
            self.counting = False
            torch.cuda.set_sync_debug_mode("default")


def waits(folder: Path, size: str, prompts: list[str]) -> None:
    """Waits for the GPU per step and where they come from: the innermost lines of ours and the libraries."""
    print("| prompts | waits a step | from |\n|---|---:|---|")
    for prompt in prompts if CARD else ():
        seen = Waits()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = seen.note
            trained(folder, size, prompt, 1, seen, max_steps=FIRST + STEPS + 1)
        print(f"| {prompt} | {seen.places.total() / STEPS:.2f} | |")
        for place, count in seen.places.most_common():
            print(f"| | {count / STEPS:.2f} | {place} |", flush=True)


class Graphs(TrainerCallback):
    """Notes how many graphs have been compiled at the end of every step."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.found.append([])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        from torch._dynamo.utils import counters

        self.found[-1].append(counters["stats"]["unique_graphs"])


def graphs(folder: Path, size: str, prompts: list[str]) -> None:
    """Graphs of both backbones that are compiled in the steps of three tasks."""
    from torch._dynamo.utils import counters

    print("| prompts | graphs after each step, task by task | breaks |\n|---|---|---|")
    for prompt in prompts:
        torch.compiler.reset()
        counters.clear()
        seen = Graphs()
        trained(folder, size, prompt, 3, seen, compiled=True)
        breaks = {str(reason).splitlines()[0][:80]: count for reason, count in counters["graph_break"].items()}
        print(f"| {prompt} | {'; '.join(str(one) for one in seen.found)} | {breaks or 'none'} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts = {"kernels": kernels, "waits": waits, "graphs": graphs}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--size", choices=["small", "vit"], default="vit" if CARD else "small")
    parser.add_argument("--prompts", nargs="+", default=[*PROMPTS], choices=[*PROMPTS])
    asked = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        parts[asked.part](Path(folder), asked.size, asked.prompts)
    print(f"\n{machine()}.")


if __name__ == "__main__":
    main()
