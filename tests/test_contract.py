"""What every prompt method and every distillation term must keep: iterates the two dicts and a newcomer's method."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dummy_prompt import Dummy
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import ViTConfig, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.distill import TERMS, Objective
from hf_cdl.prompts import PROMPTS
from hf_cdl.types import CDLOutput, ModelShape, Task

# Fields that make a method small enough for a three-layer backbone; a new method adds its row here.
SMALL: dict[str, dict[str, Any]] = {
    "coda": {"components": 3, "length": 4, "layers": (0, 2), "orthogonality": 0.1},
    "dualprompt": {"general_length": 4, "general_layers": (0,), "expert_length": 4, "expert_layers": (1, 2)},
    "l2p": {"pool_size": 6, "length": 4, "top_k": 2, "layers": (0, 2)},
    "dummy": {},
}
METHODS = [*PROMPTS, "dummy"]
CLASSES = (["cat", "dog", "owl"], ["bee", "ant"])


@pytest.fixture(autouse=True)
def newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMPTS, "dummy", Dummy)


def vit(width: int) -> ViTConfig:
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )


def model_of(method: str, width: int = 32, query_width: int | None = None, **fields: Any) -> CDLForImageClassification:
    set_seed(1)
    query = None if query_width is None else vit(query_width)
    prompt = {"type": method, **SMALL[method]}
    return CDLForImageClassification(
        CDLConfig(backbone_config=vit(width), query_config=query, prompt=prompt, **fields)
    )


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_prefixes_have_the_contract_s_shapes(method: str) -> None:
    model = model_of(method, width=32, query_width=16)
    for names in CLASSES:
        model.begin_task(names)
    pool: Any = model.pool
    query = torch.randn(5, 16)
    for layer in range(3):
        prefix, loss = pool(layer, query, 1)
        assert (prefix is None) == (layer not in pool.layers)
        if prefix is not None:
            assert prefix.key.shape == prefix.value.shape
            assert prefix.key.shape[0] in (1, 5) and prefix.key.shape[2] == 32
            assert prefix.where in ("prepend", "append", "add_to_cls")
        assert loss is None or (loss.ndim == 0 and loss >= 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_prompts_change_the_output_and_gradients_reach_only_what_is_new_or_shared(method: str) -> None:
    model = model_of(method, kd_prompt={"length": 4})
    for names in CLASSES:
        model.begin_task(names)
    bare = model._run(model.backbone, images()).last_hidden_state
    assert not torch.allclose(model.train()(images()).features, bare[:, 0], atol=1e-4)

    output = model(images(), task_id=1)
    (output.logits.square().sum() + output.kd_logits.square().sum() + (output.prompt_loss or 0)).backward()
    for name, parameter in model.named_parameters():
        new = parameter.requires_grad
        assert new == (parameter.grad is not None), name
        if new:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{name} gets no gradient"
        part = name.split(".")
        if "blocks" in part:
            assert new == (int(part[part.index("blocks") + 1]) == 1), f"{name}: only the newest block trains"
        assert not (new and part[0] == "backbone")


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_s_logits_do_not_depend_on_its_batch(method: str) -> None:
    model = model_of(method, kd_prompt={"length": 4}).eval()
    for names in CLASSES:
        model.begin_task(names)
    with torch.no_grad():
        whole = model(images()).logits
        alone = torch.cat([model(image[None]).logits for image in images()])
        turned = model(images().flip(0)).logits.flip(0)
    torch.testing.assert_close(alone, whole, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(turned, whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_growing_is_deterministic_and_leaves_earlier_blocks_alone(method: str) -> None:
    def grown() -> CDLForImageClassification:
        model = model_of(method)
        for number, names in enumerate(CLASSES):
            set_seed(number)
            model.begin_task(names)
        return model

    first, second = grown().state_dict(), grown().state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    model = model_of(method)
    set_seed(0)
    model.begin_task(CLASSES[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.begin_task(CLASSES[1])
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert len(after) > len(before)


LOADER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from dummy_prompt import Dummy
from hf_cdl.prompts import PROMPTS
PROMPTS["dummy"] = Dummy
from transformers import AutoModelForImageClassification
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(load_file(folder / "images.safetensors")["images"]).logits
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("backbone" in name for name in names), "loading must freeze the backbone"
    save_file({"logits": logits}, folder / "logits.safetensors")
"""


def test_two_tasks_saved_and_loaded_in_a_fresh_process_give_the_same_logits(tmp_path: Path) -> None:
    want = {}
    for method in METHODS:
        model = model_of(method, query_width=16, kd_prompt={"length": 4, "alpha": 0.3}).eval()
        for names in CLASSES:
            model.begin_task(names)
        model.save_pretrained(tmp_path / method)
        save_file({"images": images()}, tmp_path / method / "images.safetensors")
        with torch.no_grad():
            want[method] = model(images()).logits
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(__file__).parent),
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run([sys.executable, "-c", LOADER, str(tmp_path)], check=True, env=environment)
    for method in METHODS:
        assert torch.equal(load_file(tmp_path / method / "logits.safetensors")["logits"], want[method]), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")  # torch.export warns about its own internals
def test_export_gives_the_same_logits_for_any_batch_size(method: str) -> None:
    model = model_of(method, kd_prompt={"length": 4}).eval()
    for names in CLASSES:
        model.begin_task(names)
    model.requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes={"pixel_values": {0: batch}})
    torch.testing.assert_close(program.module()(images(5))["logits"], model(images(5)).logits, atol=1e-5, rtol=1e-5)


# ---- training ----


class Pictures(torch.utils.data.Dataset):
    """Noise with a class-dependent tint: learnable in a few steps. Any view of a sample is the same picture."""

    def __init__(self, classes: range):
        self.labels = [c for c in classes for _ in range(8)]
        noise = torch.randn(len(self.labels), 3, 16, 16, generator=torch.Generator().manual_seed(classes.start))
        tint = torch.randn(10, 3, 1, 1, generator=torch.Generator().manual_seed(7))
        self.images = noise * 0.3 + tint[self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key if isinstance(key, int) else key[0]
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def stream() -> Iterator[Task]:
    first = 0
    for index, names in enumerate(CLASSES):
        split = Pictures(range(first, first + len(names)))
        yield Task(index, tuple(names), first, split, None, split)
        first += len(names)


def arguments(folder: Path, **extra: Any) -> CDLTrainingArguments:
    defaults = {"num_train_epochs": 4, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 0.01}
    return CDLTrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **{**defaults, **extra}
    )


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_pair_learns_two_tasks(method: str, term: str, tmp_path: Path) -> None:
    kind = TERMS[term]
    teacher_model = model_of(method, width=48, query_width=32)
    parts: dict[str, Any] = kind.student_parts
    student_model = model_of(method, width=32, **parts)
    assert teacher_model.query_backbone is not None
    teacher_model.query_backbone.load_state_dict(student_model.backbone.state_dict())
    teacher = CDLTrainer(teacher_model, arguments(tmp_path / "t"), role="teacher")
    objective = Objective(0.5, [(term, kind(kind.config_class(), student_model.shape, teacher_model.shape))])
    student = CDLTrainer(student_model, arguments(tmp_path / "s"), objective=objective, teacher=teacher_model)
    for task in stream():
        teacher.learn(task)
        taught = {name: value.clone() for name, value in teacher_model.state_dict().items()}
        student_model.begin_task(task.class_names)
        before = {name: value.clone() for name, value in student_model.state_dict().items()}
        moving = set(trainable(student_model))
        student.learn(task)
        log = [line["loss/loss"] for line in student.state.log_history if "loss/loss" in line]
        assert sum(log[-3:]) < sum(log[:3]), f"the loss does not fall: {log}"
        for name, value in student_model.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in moving), name
        assert all(torch.equal(value, taught[name]) for name, value in teacher_model.state_dict().items())
        assert {f"loss/{term}", "loss/ce"} <= set(student.state.log_history[0])
    result = student.evaluate_seen()
    assert result.counts == [24, 16] and len(result.row) == 2


@pytest.mark.parametrize("term", TERMS)
def test_a_term_needs_the_teacher_and_pulls_the_student_to_it(term: str) -> None:
    """One step down the gradient of the term, on logits and hidden states, lowers it; no gradient on the teacher."""
    kind = TERMS[term]
    set_seed(3)
    instance = kind(kind.config_class(), ModelShape(8, 3), ModelShape(12, 5))
    teacher = CDLOutput(logits=torch.randn(6, 4), hidden_states=tuple(torch.randn(6, 17, 12) for _ in range(6)))
    labels = torch.randint(0, 4, (6,))
    leaves = [torch.randn(6, 4), *(torch.randn(6, 17, 8) for _ in range(4))]

    def student(values: list[torch.Tensor]) -> CDLOutput:
        return CDLOutput(logits=values[0], kd_logits=values[0], hidden_states=tuple(values[1:]))

    for leaf in leaves:
        leaf.requires_grad_()
    loss = instance(student(leaves), teacher, labels)
    assert loss.ndim == 0 and loss > 0
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    asked = {-1 - number for number in instance.needs.get("student", ())}
    assert [g is not None for g in gradients[1:]] == [3 - n in asked for n in range(4)]
    moved = [leaf if g is None else leaf - 0.1 * g for leaf, g in zip(leaves, gradients, strict=True)]
    assert instance(student(moved), teacher, labels) < loss
    with pytest.raises(ValueError, match="need a teacher"):
        Objective(0.5, [(term, instance)])(student(leaves), None, labels, slice(0, 4))


def test_masked_cross_entropy_sees_the_current_classes_only() -> None:
    logits = torch.randn(4, 10, requires_grad=True)
    labels = torch.tensor([3, 4, 5, 3])
    losses = Objective()(CDLOutput(logits=logits), None, labels, slice(3, 6))
    reference = logits.detach().clone()
    reference[:, :3] = -torch.inf
    torch.testing.assert_close(losses["loss"], F.cross_entropy(reference[:, :6], labels))
    losses["loss"].backward()
    assert logits.grad is not None
    assert logits.grad[:, :3].abs().sum() == 0 and logits.grad[:, 6:].abs().sum() == 0
