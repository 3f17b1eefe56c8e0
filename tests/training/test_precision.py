"""frozen_bf16: what no loss trains runs in bfloat16 while something is learnt, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_backbone, make_data
from pairwise import tiered
from test_contract import CLASSES, arguments, pair_of, stream
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.data import StreamConfig
from hf_cdl.distill import TERMS, Objective
from hf_cdl.heads import HEADS
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.training import arguments as room

pytestmark = pytest.mark.filterwarnings("ignore:frozen_bf16 is true, but this machine:UserWarning")
TAUGHT = ["kd", "kdp", "fitnets", "review_kd", "similarity", "dual_path", "prompt_mapping"]
ROWS = [(m, t, q) for m in ("coda", "dualprompt", "l2p") for t in TAUGHT for q in ("student", "self", "one_pass")]


def watched(model: Any) -> dict[str, set[Any]]:
    """In which precision the blocks of a model's backbone compute from now on, by what they are part of."""
    seen: dict[str, set[Any]] = {"query": set(), "pass": set()}
    compute, asked = model.compute_query, [False]

    def query(pixels: torch.Tensor) -> torch.Tensor:
        asked[0] = True
        try:
            return compute(pixels)
        finally:
            asked[0] = False

    def note(module: Any, given: Any, output: torch.Tensor) -> None:
        seen["query" if asked[0] else "pass"].add(output.dtype)

    model.compute_query = query
    for backbone in filter(None, (model.backbone, model.query_backbone)):
        first = next(module for module in backbone.modules() if isinstance(module, torch.nn.Linear))
        first.register_forward_hook(note)
    return seen


@pytest.mark.parametrize(("method", "term", "query"), tiered(ROWS))
def test_the_teacher_and_the_queries_are_in_bfloat16_and_the_student_is_not(
    method: str, term: str, query: str, tmp_path: Path
) -> None:
    teacher, student = pair_of(method, term, query)
    kind = TERMS[term]
    objective = Objective(0.5, [(term, kind(kind.config_class(), student.shape, teacher.shape))])
    args = arguments(tmp_path, num_train_epochs=1, frozen_bf16=True, eval_strategy="epoch")
    first = CDLTrainer(teacher, args, role="teacher")
    second = CDLTrainer(student, args, objective, teacher)
    task = next(stream())
    first.learn(task)
    of_teacher, of_student = watched(teacher), watched(student)
    measured: list[Any] = []
    second._measure_newest = lambda prefix: measured.append(1) or {f"{prefix}_accuracy": 0.0}  # evaluation is below
    second.learn(task)
    half, single = {torch.bfloat16}, {torch.float32}
    assert measured
    assert of_teacher["pass"] == half
    assert of_student["pass"] == single
    assert of_teacher["query"] | of_student["query"] <= half
    del second._measure_newest
    for seen in (*of_teacher.values(), *of_student.values()):
        seen.clear()
    if term != "dual_path":  # its path lives as long as its task is learnt
        second.evaluate()
    for trainer in (first, second):
        trainer.answer([task])
    assert of_teacher["pass"] | of_student["pass"] | of_teacher["query"] | of_student["query"] == single


def test_a_path_beside_a_teacher_of_convolutions_computes_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: Any = ResNetConfig(hidden_sizes=[8, 12, 16], depths=[1, 1, 1], embedding_size=8)
    config.num_labels = 3
    teacher, student = ResNetForImageClassification(config), pair_of("coda", "dual_path", "self")[1]
    kind = TERMS["dual_path"]
    term = kind(kind.config_class(), student.shape, student.shape)
    args = arguments(tmp_path, num_train_epochs=1, frozen_bf16=True)
    known = ImageClassifier(teacher)
    known.begin_task(CLASSES[0])
    trainer = CDLTrainer(student, args, Objective(0.5, [("dual_path", term)]), known)
    trainer.learn(next(stream()))
    assert all(parameter.dtype == torch.float32 for parameter in term.parameters())
    assert trainer.state.log_history[0]["loss/dual_path"] > 0


@pytest.mark.parametrize("head", [name for name, kind in HEADS.items() if kind.fitted])
def test_a_fitted_head_learns_from_features_in_bfloat16(head: str, tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "vit")
    config = StreamConfig(path=str(make_data(tmp_path / "data")), classes_per_task=3)
    tasks = TaskStream(config, AutoImageProcessor.from_pretrained(backbone))
    found = {}
    for half in (False, True):
        model = CDLForImageClassification.from_backbone(backbone, head={"type": head})
        args = CDLTrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, frozen_bf16=half)
        trainer, seen = CDLTrainer(model, args), watched(model)
        trainer.learn(tasks[0])
        assert seen["pass"] | seen["query"] == {torch.bfloat16 if half else torch.float32}
        found[half] = model(torch.stack([item["pixel_values"] for item in tasks[0].test])).logits  # type: ignore[attr-defined]
    assert not torch.equal(found[False], found[True])
    assert torch.allclose(found[False], found[True], atol=0.1 * found[False].abs().max().item())


def test_a_user_is_told_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "computes_bf16", lambda device: False)
    with pytest.warns(UserWarning, match="processor does not compute in bfloat16 .* slower, not faster"):
        CDLTrainingArguments("work", use_cpu=True, frozen_bf16=True)


def test_a_machine_that_computes_in_it_is_told_nothing(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    CDLTrainingArguments("work", use_cpu=True, frozen_bf16=True)
    assert not recwarn.list
