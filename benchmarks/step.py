"""What a training step of teacher and student costs, by prompt method and precision, against a naive implementation.

python benchmarks/step.py [--prompts coda ...] [--roles student] [--ways float32 ...] [--query student] [--size vit]

CDLTrainer takes every step, from batch to updated weights; naive is the same trainer with what is often written: two
query passes, a backbone that is not frozen, all hidden states kept and a graph of the teacher. `query kept`: another
role of the run has computed it; `views`: the view of an earlier epoch, whose outputs are in memory; `cached`: outputs
of an earlier run, read from a folder. `compiled` compiles both backbones (torch.compile); it takes a minute and runs
only if named. --size vit: ViT-B/16 teaches ViT-S/16 at 224 pixels (the default on a GPU), small: two tiny ViTs. Random
weights, generated images, KDP (KD token and prompts). All ways are in memory at once, 1 to 2 GB each with --size vit:
with less memory, name some with --ways. Milliseconds: the least; memory: the most that tensors hold in a step beyond
what they hold before it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small import pair_of, task_of, trainer_of, vit
from timing import CARD, UNIT, Stepper, in_turn, machine, precision, ratio
from transformers import ViTConfig
from transformers.utils import logging

from hf_cdl import CDLTrainer
from hf_cdl.distill import Objective
from hf_cdl.prompts import PROMPTS
from hf_cdl.types import CDLOutput

LARGE: dict[str, dict[str, Any]] = {
    "teacher": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "student": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
}
WAYS: dict[str, dict[str, Any]] = {
    "naive": {},
    "float32": {},
    "query kept": {},
    "views": {},
    "cached": {},
    "frozen_bf16": {"frozen_bf16": True},
    "frozen_bf16, query kept": {"frozen_bf16": True},
    "tf32": {"tf32": True},
    "bfloat16": {"bf16": True},
    "bfloat16, query kept": {"bf16": True},
    "bfloat16, views": {"bf16": True},
    "bfloat16, cached": {"bf16": True},
    "compiled": {},
    "compiled, bfloat16": {"bf16": True},
}
KDP = [{"type": "kdp"}]
USUAL = precision()


class NaiveTrainer(CDLTrainer):
    """Computes everything where it is needed, and keeps what autograd would keep."""

    def _begin_task(self, task: Any) -> None:
        super()._begin_task(task)
        self.model.backbone.requires_grad_(True)
        if self.teacher.model is not None:
            self.teacher.model.requires_grad_(True)

    def _student_and_teacher(self, model: Any, batch: dict[str, Any], task_id: int | None) -> Any:
        pixels, teacher = batch["pixel_values"], None
        if self.teacher.teaches_terms:
            with self.accelerator.autocast():
                found = self.teacher.model(pixel_values=pixels, task_id=task_id, output_hidden_states=True)
            teacher = CDLOutput(**{**found, "logits": found.logits.detach()})
        return model(pixel_values=pixels, task_id=task_id, output_hidden_states=True), teacher


class QueryKept(CDLTrainer):
    """Runs the teacher in every step."""

    @property
    def _keeps_answers(self) -> bool:
        return False


PIXELS = {"small": 16, "vit": 224}
"""Side of an image of either size."""


def backbones(size: str) -> dict[str, ViTConfig]:
    if size == "small":
        return {"teacher": vit(48), "student": vit(32)}
    return {
        role: ViTConfig(num_hidden_layers=12, image_size=PIXELS[size], patch_size=16, **LARGE[role]) for role in LARGE
    }


def stepper(role: str, pair: Any, way: str, batch: int, folder: Path) -> Stepper:
    """A trainer of a role that waits for its first step, with a copy of `pair`: student, teacher and objective."""
    precision(*USUAL)
    student, teacher, objective = copy.deepcopy(pair)
    task = task_of(0, batch, student.config.backbone_config.image_size, classes=10)  # a batch, which comes again
    if role == "teacher":
        student, teacher, objective = teacher, None, Objective()
    else:
        teacher.begin_task(task.class_names)
    if way.startswith("compiled"):
        for model in (student, teacher):
            if model is not None:
                model.backbone.compile()
    train = {
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
        "num_train_epochs": 10_000,
        "use_cpu": not CARD,
        **WAYS[way],
    }
    kind = NaiveTrainer if way == "naive" else QueryKept if way.endswith("query kept") else CDLTrainer
    kept = {"cache": folder / role / way} if way.endswith(("kept", "views", "cached")) else {}
    task = replace(task, views=1 if way.endswith("views") else None)
    train |= {"per_device_train_batch_size": batch, "train_sampling_strategy": "sequential"}
    train |= {"logging_strategy": "no", "use_cpu": not CARD}
    return Stepper(trainer_of(student, folder, objective, teacher, role, kind=kind, kept=kept, **train), task)


def measure(prompt: str, role: str, pair: Any, asked: Any, folder: Path) -> None:
    """Print the rows of a prompt method and a role."""
    steppers: dict[str, Stepper] = {}
    for way in asked.ways:
        try:
            one = stepper(role, pair, way, asked.batch, folder)
            one.step()
            steppers[way] = one
        except Exception as error:
            line = (str(error).strip().splitlines() or ["no message"])[0]
            print(f"| {prompt} | {role} | {way} | {type(error).__name__}: {line[:160]} | | | |", flush=True)
    found = in_turn({way: one.step for way, one in steppers.items()}, asked.repeats)
    for one in steppers.values():
        one.stop()
    for way, costs in found.items():
        least, memory = min(cost.seconds for cost in costs), max(cost.memory for cost in costs)
        shown = f"{memory / 2**20:,.0f}"
        faster = [ratio(costs, found[other]) if other in found else "–" for other in asked.ways[:2]]
        print(f"| {prompt} | {role} | {way} | {1000 * least:,.1f} | {' | '.join(faster)} | {shown} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", nargs="+", default=[*PROMPTS], choices=[*PROMPTS])
    ways = [way for way in WAYS if CARD or way != "tf32"]
    quick = [way for way in ways if not way.startswith("compiled")]
    parser.add_argument(
        "--ways",
        nargs="+",
        default=quick,
        choices=ways,
        help="compared to the first two (default: uncompiled)",
    )
    parser.add_argument("--roles", nargs="+", default=["teacher", "student"], choices=["teacher", "student"])
    parser.add_argument("--size", choices=["small", "vit"], default="vit" if CARD else "small")
    parser.add_argument("--query", choices=["self", "student"], default="self", help="whom the teacher asks")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    faster = [f"times as fast as {way}" for way in asked.ways[:2]]
    print(f"| prompts | step | | {UNIT} | {' | '.join(faster)} | MiB |\n|---|---|---|{'---:|' * (2 + len(faster))}")
    with tempfile.TemporaryDirectory() as folder:
        for prompt in asked.prompts:
            configs = backbones(asked.size)
            pair: list[Any] = [*pair_of(configs["student"], configs["teacher"], prompt, KDP, asked.query == "student")]
            pair[:2] = [model.to("cuda" if CARD else "cpu") for model in pair[:2]]
            for role in asked.roles:
                measure(prompt, role, pair, asked, Path(folder))
    print(f"\n{asked.repeats} steps of {asked.batch} images each, in turn; {machine()}.")


if __name__ == "__main__":
    main()
