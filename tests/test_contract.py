"""The contract of all prompt methods and distillation terms: iterates both registries and a contributor's method."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dummy_prompt import Dummy
from helpers import python
from pairwise import pairwise, tiered
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import ViTConfig, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.distill import TERMS, Objective
from hf_cdl.prompts import PROMPTS, PromptPool
from hf_cdl.types import CDLOutput, ModelShape, Task, Tokens

# Fields that make a method small enough for a three-layer backbone; a new method adds its row here.
SMALL: dict[str, dict[str, Any]] = {
    "coda": {"components": 3, "length": 4, "layers": (0, 2), "orthogonality": 0.1},
    "dualprompt": {"general_length": 4, "general_layers": (0,), "expert_length": 4, "expert_layers": (1, 2)},
    "apt": {"layers": (0, 2)},
    "vpt": {"length": 2, "layers": (0, 2)},
    "l2p": {"pool_size": 6, "length": 4, "top_k": 2, "layers": (0, 2)},
    "dummy": {},
}
METHODS = [*PROMPTS, "dummy"]
QUERIES = ["student", "self", "one_pass"]
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
    if not PROMPTS[method].needs_query:  # no query can be chosen where nothing reads one
        query_width, fields = None, {**fields, "query": "two_pass"}
    query = None if query_width is None else vit(query_width)
    prompt = {"type": method, **SMALL[method]}
    return CDLForImageClassification(
        CDLConfig(backbone_config=vit(width), query_config=query, prompt=prompt, **fields)
    )


MAPPING = {"components": 3, "length": 4}


def variant_of(method: str, variant: str) -> CDLForImageClassification:
    """A student with KD prompts or with mapped prompts of a wider teacher, two-pass or one-pass; two tasks."""
    parts, query = variant.split(", ")
    fields: dict[str, Any] = {"kd_prompt": {"length": 4, "alpha": 0.3}}
    if parts == "mapping":
        fields = {"mapping": MAPPING, "teacher_pool": model_of(method, width=48, query_width=32).pool_config}
    model = model_of(method, query=query, **fields)
    for names in CLASSES:
        model.begin_task(names)
    return model


PARTS, PASSES = ("kd_prompt", "mapping"), ("two_pass", "one_pass")
VARIANTS = [f"{parts}, {query}" for parts in PARTS for query in PASSES]
PRODUCT = [*itertools.product(METHODS, PARTS, PASSES)]
EXPORTED = [(m, *way) for m, way in zip(METHODS, itertools.cycle(itertools.product(PARTS, PASSES)), strict=False)]


def pair_of(method: str, term: str, query: str) -> tuple[CDLForImageClassification, CDLForImageClassification]:
    """A teacher and a narrower student without tasks, with what the term asks for; a mapping shares the query."""
    parts: dict[str, Any] = TERMS[term].student_parts
    shared = query == "student" or "mapping" in parts
    source = {"query": "one_pass" if query == "one_pass" else "two_pass"}
    teacher = model_of(method, width=48, query_width=32 if shared else None, **({} if shared else source))
    if "mapping" in parts:
        parts = {"mapping": MAPPING, "teacher_pool": teacher.pool_config}
    student = model_of(method, width=32, **source, **parts)
    if teacher.query_backbone is not None:
        teacher.query_backbone.load_state_dict(student.backbone.state_dict())
    return teacher, student


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
        if isinstance(prefix, Tokens):
            assert prefix.tokens.shape[0] in (1, 5) and prefix.tokens.shape[1:] == (pool.num_tokens, 32)
        elif prefix is not None:
            assert pool.num_tokens == 0
            assert prefix.key.shape == prefix.value.shape
            assert prefix.key.shape[0] in (1, 5) and prefix.key.shape[2] == 32
            assert prefix.where in ("prepend", "append", "add_to_cls")
        assert loss is None or (loss.ndim == 0 and loss >= 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_prompts_change_the_output_and_gradients_reach_only_what_is_new_or_shared(
    method: str, variant: str
) -> None:
    model = variant_of(method, variant)
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
        if name.startswith("mapping.teacher_pool"):
            assert not new, f"{name}: the copy of the teacher's pool is frozen"
        elif "blocks" in part:
            assert new == (int(part[part.index("blocks") + 1]) == 1), f"{name}: only the newest block trains"
        assert not (new and part[0] == "backbone")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_sample_s_logits_do_not_depend_on_its_batch(method: str, variant: str) -> None:
    model = variant_of(method, variant).eval()
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
from helpers import python
from hf_cdl.prompts import PROMPTS, PromptPool
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


@pytest.mark.parametrize(
    "rows",
    [pytest.param(pairwise(PRODUCT), id="every pair"), pytest.param(PRODUCT, id="all", marks=pytest.mark.slow)],
)
def test_two_tasks_saved_and_loaded_in_a_fresh_process_give_the_same_logits(
    rows: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    want = {}
    models = {", ".join(row): variant_of(row[0], f"{row[1]}, {row[2]}") for row in rows}
    models.update({f"{method}, teacher": pair_of(method, "kd", "student")[0] for method in METHODS})
    for name, model in models.items():
        for names in CLASSES[len(model.config.tasks) :]:
            model.begin_task(names)
        model.end_task()
        model.eval().save_pretrained(tmp_path / name)
        save_file({"images": images()}, tmp_path / name / "images.safetensors")
        with torch.no_grad():
            want[name] = model(images()).logits
    if rows == PRODUCT:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PYTHONPATH": str(Path(__file__).parent),
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run([sys.executable, "-c", LOADER, str(tmp_path)], check=True, env=environment)
    else:  # forked, so that nothing is imported again
        python(LOADER, tmp_path)
    for name, logits in want.items():
        assert torch.equal(load_file(tmp_path / name / "logits.safetensors")["logits"], logits), name


@pytest.mark.parametrize("method", METHODS)
def test_passes_of_a_backbone_that_a_prediction_costs(method: str) -> None:
    """Two with a query pass, one with a one-pass query or a pool that asks for none."""
    for query, want in (("two_pass", 1 + PROMPTS[method].needs_query), ("one_pass", 1)):
        model = variant_of(method, f"kd_prompt, {query}").eval()
        calls: list[int] = []
        model.backbone.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(images())
        assert len(calls) == want, query


def test_a_one_pass_query_is_the_cls_token_that_enters_the_layer() -> None:
    """Layer 0 has the same prompt for every image, later layers do not; the query trains nothing."""
    model = variant_of("coda", "kd_prompt, one_pass")
    seen: dict[int, torch.Tensor] = {}
    pool: Any = model.pool
    ask = pool.forward
    pool.forward = lambda layer, query, task_id: (seen.__setitem__(layer, query), ask(layer, query, task_id))[1]
    states = model(images(), output_hidden_states=True).hidden_states
    assert sorted(seen) == [0, 1, 2]
    for layer, query in seen.items():
        assert torch.equal(query, states[layer][:, 0]) and not query.requires_grad
        assert torch.equal(query[0], query[1]) == (layer == 0)


def test_one_pass_survives_gradient_checkpointing() -> None:
    model = variant_of("coda", "kd_prompt, one_pass").train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        output = model(images(), task_id=1)
        model.zero_grad()
        (output.logits.square().sum() + output.kd_logits.square().sum() + output.prompt_loss).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("method", "parts", "query"),
    [  # the fast tier has every method once, and every pair of a part and a query
        pytest.param(*row, marks=() if row in EXPORTED else pytest.mark.slow) for row in PRODUCT
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch.export warns about its own internals
def test_export_gives_the_same_logits_for_any_batch_size(method: str, parts: str, query: str) -> None:
    model = variant_of(method, f"{parts}, {query}").eval()
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
    if "max_steps" in extra:
        del defaults["num_train_epochs"]
    return CDLTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **{**defaults, **extra})


def combinations() -> list[tuple[str, str, str]]:
    """Every method, term and query source; OS-Prompt++ only where a one-pass query meets keys."""
    everything = [(method, term, query) for method in METHODS for term in TERMS for query in QUERIES]
    keyed = [method for method in PROMPTS if PROMPTS[method].similarity is not PromptPool.similarity]
    return [
        (method, term, query)
        for method, term, query in everything
        if not TERMS[term].needs_query or (query == "one_pass" and method in keyed)
    ]


def test_the_fast_tier_holds_every_pair_of_a_method_a_term_and_a_query() -> None:
    rows = combinations()
    chosen = pairwise(rows)
    for (i, one), (j, two) in itertools.combinations(enumerate((METHODS, [*TERMS], QUERIES)), 2):
        for pair in itertools.product(one, two):
            occurs, held = (any((row[i], row[j]) == pair for row in some) for some in (rows, chosen))
            assert occurs == held, pair
    assert len(chosen) < len(rows) / 2


@pytest.mark.parametrize(("method", "term", "query"), tiered(combinations()))
def test_a_pair_learns_two_tasks(method: str, term: str, query: str, tmp_path: Path) -> None:
    kind = TERMS[term]
    beside = {"unlabelled": Pictures(range(5)), "unlabelled_ratio": 2} if kind.needs_unlabelled else {}
    teacher_model, student_model = pair_of(method, term, query)
    teacher = CDLTrainer(teacher_model, arguments(tmp_path / "t", num_train_epochs=2), role="teacher")
    objective = Objective(0.5, [(term, kind(kind.config_class(), student_model.shape, teacher_model.shape))])
    asked = teacher_model if objective.needs_teacher else None
    student = CDLTrainer(student_model, arguments(tmp_path / "s"), objective=objective, teacher=asked)
    for task in (replace(task, **beside) for task in stream()):
        teacher.learn(task)
        taught = {name: value.clone() for name, value in teacher_model.state_dict().items()}
        student_model.begin_task(task.class_names)
        before = {name: value.clone() for name, value in student_model.state_dict().items()}
        moving = set(trainable(student_model))
        student.learn(task)
        log = [line["loss/loss"] for line in student.state.log_history if "loss/loss" in line]
        assert sum(log[-3:]) < sum(log[:3]), f"the loss does not fall: {log}"
        buffers = {name for name, _ in student_model.named_buffers()}  # APT's merged prompts
        for name, value in student_model.state_dict().items():
            if name.startswith("mapping.teacher_pool."):
                assert torch.equal(value, taught[name.replace("mapping.teacher_pool", "pool")]), name
            elif name not in buffers or f"blocks.{task.index}." not in name:
                assert torch.equal(value, before[name]) == (name not in moving), name
        assert all(torch.equal(value, taught[name]) for name, value in teacher_model.state_dict().items())
        assert {f"loss/{term}", "loss/ce"} <= set(student.state.log_history[0])
    result = student.evaluate_seen()
    assert result.counts == [24, 16] and len(result.row) == 2


def value(term: Any, student: CDLOutput, teacher: CDLOutput | None, labels: torch.Tensor) -> torch.Tensor:
    """A term's loss, unweighted, over all classes."""
    return Objective(0.0, [("it", term)])(student, teacher, labels, slice(0, student.logits.shape[1]))["it"]


@pytest.mark.parametrize("term", TERMS)
def test_a_term_needs_the_teacher_and_pulls_the_student_to_it(term: str) -> None:
    """One step down the gradient of the term, on logits and hidden states, lowers it; no gradient on the teacher."""
    kind = TERMS[term]
    set_seed(3)
    all_count: Any = {"threshold": 0.0} if kind.needs_unlabelled else {}
    instance = kind(kind.config_class(**all_count), ModelShape(8, 3), ModelShape(12, 5))
    assert kind.needs_hidden_states == any(instance.needs.values())
    teacher = CDLOutput(logits=torch.randn(6, 4), hidden_states=tuple(torch.randn(6, 17, 12) for _ in range(6)))
    teacher.path_logits = torch.randn(6, 4)
    teacher.features = torch.randn(6, 12)
    labels = torch.randint(0, 4, (2 if kind.needs_unlabelled else 6,))
    leaves = [torch.randn(6, 4), *(torch.randn(6, 17, 8) for _ in range(4))]
    reference = torch.randn(6, 4)

    def student(values: list[torch.Tensor]) -> CDLOutput:
        matched: Any = {"similarities": ((values[0], reference),)}
        return CDLOutput(
            logits=values[0], kd_logits=values[0], features=values[0], hidden_states=tuple(values[1:]), **matched
        )

    for leaf in leaves:
        leaf.requires_grad_()
    loss = value(instance, student(leaves), teacher, labels)
    assert loss.ndim == 0 and loss > 0
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    asked = {-1 - number for number in instance.needs.get("student", ())}
    assert [g is not None for g in gradients[1:]] == [3 - n in asked for n in range(4)]
    moved = [leaf if g is None else leaf - 0.1 * g for leaf, g in zip(leaves, gradients, strict=True)]
    assert value(instance, student(moved), teacher, labels) < loss
    if not kind.needs_teacher:
        assert value(instance, student(leaves), None, labels) == loss
        return
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
