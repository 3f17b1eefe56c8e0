"""Small models, images and tasks, made here: what checks and benchmarks of this folder train without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.distill import TERMS, Objective
from hf_cdl.prompts import PROMPTS
from hf_cdl.runs.run import Run
from hf_cdl.types import Task

CLASSES = 3
"""Classes of a task."""
PROMPT: dict[str, dict[str, Any]] = {  # fields small enough for a backbone of three layers; else the defaults
    "coda": {"components": 3, "length": 4, "layers": (0, 2), "orthogonality": 0.1},
    "dualprompt": {"general_length": 4, "general_layers": (0,), "expert_length": 4, "expert_layers": (1, 2)},
    "apt": {"layers": (0, 2)},
    "vpt": {"length": 2, "layers": (0, 2)},
    "l2p": {"pool_size": 6, "length": 4, "top_k": 2, "layers": (0, 2)},
}


class Images(torch.utils.data.Dataset):
    """Noise about a mean for each class, numbered from `first`; all views of an image are equal."""

    def __init__(self, count: int, first: int = 0, size: int = 16, classes: int = CLASSES):
        self.labels = [first + number % classes for number in range(count)]
        draw = torch.Generator().manual_seed(count + first)
        self.images = torch.randn(count, 3, size, size, generator=draw)
        self.images += 0.3 * torch.tensor(self.labels)[:, None, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key if isinstance(key, int) else key[0]
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def task_of(index: int, images: int = 16, size: int = 16, classes: int = CLASSES) -> Task:
    first = index * classes
    names = tuple(f"class {first + number}" for number in range(classes))
    train, test = (Images(count, first, size, classes) for count in (images, images // 2))
    return Task(index, names, first, train, None, test)


def picture(number: int) -> Image.Image:
    """Noise, of one of three levels."""
    draw = np.random.default_rng(number)
    return Image.fromarray((draw.integers(0, 99, (20, 24, 3)) + 50 * (number % 3)).astype(np.uint8))


def vit(width: int = 32, **fields: Any) -> ViTConfig:
    small: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 2 * width}
    return ViTConfig(hidden_size=width, **{**small, "image_size": 16, "patch_size": 4, **fields})


def model_of(backbone: ViTConfig, **fields: Any) -> CDLForImageClassification:
    """A model of CDLConfig's `fields` without tasks; the same seed whatever the method."""
    set_seed(1)
    if "prompt" in fields:
        kind = fields["prompt"]["type"]
        fields["prompt"] = (
            {**PROMPT.get(kind, {}), **fields["prompt"]} if backbone.num_hidden_layers < 5 else fields["prompt"]
        )
    return CDLForImageClassification(CDLConfig(backbone_config=backbone, **fields))


def query_of(prompt: str, query: str) -> str:
    """`query`; for prompts that read no query, the default."""
    pool = PROMPTS.get(prompt)
    return query if pool is not None and pool.needs_query else "two_pass"


def pair_of(
    student: ViTConfig,
    teacher: ViTConfig,
    prompt: str,
    distill: list[dict[str, Any]],
    shares: bool = False,
    **fields: Any,
) -> tuple[Any, Any, Objective]:
    """A student, its teacher (None if no term needs one), which asks itself unless it `shares`, and its objective."""
    own = {"prompt": {"type": prompt}} if prompt != "none" else {}
    parts: dict[str, Any] = {}
    for section in distill:
        parts |= TERMS[section["type"]].student_parts
    taught, maps = any(TERMS[section["type"]].needs_teacher for section in distill), "mapping" in parts
    shared = {"query_config": student} if (maps or shares) and PROMPTS[prompt].needs_query else {}
    teaching = model_of(teacher, **own, **shared) if taught else None
    if maps and teaching is not None:
        parts = {"mapping": {"components": 3, "length": 4}, "teacher_pool": teaching.pool_config}
    learner = model_of(student, **own, **parts, **fields)
    if teaching is not None and teaching.query_backbone is not None:
        teaching.query_backbone.load_state_dict(learner.backbone.state_dict())
    terms = []
    for section in distill:
        kind = TERMS[section["type"]]
        config = kind.config_class(**{key: value for key, value in section.items() if key != "type"})
        terms.append((section["type"], kind(config, learner.shape, (teaching or learner).shape)))
    weight = 0.5 if terms else 1.0
    return learner, teaching, Objective(weight, terms)


def trainer_of(
    model: Any,
    folder: Path,
    objective: Objective | None = None,
    teacher: Any = None,
    role: str = "student",
    run: Run | None = None,
    kind: type[CDLTrainer] = CDLTrainer,
    kept: dict[str, Any] | None = None,
    **train: Any,
) -> CDLTrainer:
    """A trainer with plain SGD, since Adam amplifies differences in rounding; `kept`: its cache, if it has one."""
    defaults = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": 8, "num_train_epochs": 2}
    if "max_steps" in train:
        del defaults["num_train_epochs"]
    args = CDLTrainingArguments(str(folder), disable_tqdm=True, report_to="none", **{**defaults, **train})
    return kind(model, args, objective, teacher, role=role, run=run, **(kept or {}))
