"""A frozen backbone's queries are computed once, and nothing changes by it."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_backbone, make_data
from transformers import AutoImageProcessor

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.data import StreamConfig
from hf_cdl.distill import TERMS, Objective
from hf_cdl.runs.run import Run
from hf_cdl.training import kept

PROMPT = {"type": "coda", "components": 2, "length": 4, "layers": [0, 1]}


def pair(place: Path, **fields: Any) -> tuple[CDLTrainer, CDLTrainer, TaskStream]:
    """A teacher that asks the student's backbone, its student, and three tasks."""
    student, teacher = make_backbone(place / "student"), make_backbone(place / "teacher", 48, 3, 1)
    config = StreamConfig(path=str(make_data(place / "data")), classes_per_task=2)
    stream = TaskStream(config, AutoImageProcessor.from_pretrained(student))
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 5, "learning_rate": 0.01, **fields}
    arguments = CDLTrainingArguments(str(place / "out"), report_to="none", disable_tqdm=True, use_cpu=True, **settings)
    torch.manual_seed(0)
    large = CDLForImageClassification.from_backbone(teacher, prompt=PROMPT, query_name=student)
    small = CDLForImageClassification.from_backbone(student, prompt=PROMPT)
    first = CDLTrainer(large, arguments, role="teacher")
    kind = TERMS["kd"]
    term = kind(kind.config_class(), small.shape, large.shape)
    return first, CDLTrainer(small, arguments, Objective(0.5, [("kd", term)]), large), stream


def passes(trainer: CDLTrainer) -> list[int]:
    """Sizes of the batches of which the model computes queries from now on."""
    seen: list[int] = []
    compute = trainer.model.compute_query

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return compute(pixels)

    trainer.model.compute_query = counted
    return seen


def learn(teacher: CDLTrainer, student: CDLTrainer, stream: TaskStream) -> list[Any]:
    """Everything that two tasks leave: weights and what was measured."""
    found: list[Any] = []
    for task in list(stream)[:2]:
        teacher.learn(task)
        student.learn(task)
        found += [trainer.answer(trainer.seen) for trainer in (teacher, student)]
    return [*found, *teacher.model.state_dict().values(), *student.model.state_dict().values()]


def equal(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_nothing_changes_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    known = learn(*pair(tmp_path / "kept", **fields))
    monkeypatch.setattr(kept.Kept, "reader", lambda self, *_: None)
    anew = learn(*pair(tmp_path / "anew", **fields))
    assert len(known) == len(anew)
    assert all(map(equal, known, anew)), "to the bit"


def test_the_student_computes_none_that_its_teacher_has_asked_for(tmp_path: Path) -> None:
    teacher, student, stream = pair(tmp_path)
    task, asked = stream[0], (passes(teacher), passes(student))
    teacher.learn(task)
    student.learn(task)
    assert sum(asked[0]) == 2 * len(task.train), "each view of two epochs once"
    assert not asked[1]
    for trainer in (teacher, student, student):
        trainer.answer(trainer.seen)
    assert sum(asked[0]) == 2 * len(task.train) + len(task.test)
    assert not asked[1]
    teacher.learn(stream[1])
    student.learn(stream[1])
    assert not asked[1], "views of the next task"
    before = sum(asked[0])
    student.answer(student.seen)
    assert sum(asked[0]) == before
    assert sum(asked[1]) == len(stream[1].test), "images that nobody asked about"


@pytest.mark.parametrize("head", ["linear", "cosine", "ncm"])
def test_a_model_without_prompts_needs_no_pass_where_its_backbone_was_asked(tmp_path: Path, head: str) -> None:
    place = tmp_path / "run"
    teacher, student, stream = pair(tmp_path)
    run = Run(place, {"name": "all"}, say=lambda _: None)
    run.bind(stream.fingerprint, [list(task.class_names) for task in stream])
    plain = CDLForImageClassification.from_backbone(tmp_path / "student", head={"type": head})
    alone = copy.deepcopy(plain)
    asking = CDLTrainer(student.model, student.args, student.objective, teacher.model, run=run)
    trainer = CDLTrainer(plain, student.args, role="plain", run=run)
    again = CDLTrainer(alone, student.args, role="plain")
    teacher.learn(stream[0])
    asking.learn(stream[0])
    passes: list[int] = []
    plain.backbone.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    trainer.learn(stream[0])
    again.learn(stream[0])
    assert sum(passes) == (len(stream[0].train) if plain.fitted else 0), "what is fitted reads un-augmented images"
    asking.answer(asking.seen)
    passes.clear()
    assert trainer.answer(trainer.seen) == again.answer(again.seen)
    assert not passes
    assert all(map(torch.equal, plain.state_dict().values(), alone.state_dict().values())), "to the bit"


def test_other_batches_are_computed_anew(tmp_path: Path) -> None:
    teacher, _, stream = pair(tmp_path)
    student = pair(tmp_path / "other", per_device_train_batch_size=8)[1]
    learner = CDLTrainer(student.model, student.args, student.objective, teacher.model)
    asked = passes(learner)
    teacher.learn(stream[0])
    learner.learn(stream[0])
    assert sum(asked) == 2 * len(stream[0].train)


def test_changed_weights_are_asked_again(tmp_path: Path) -> None:
    _, student, stream = pair(tmp_path)
    student = CDLTrainer(student.model, student.args)
    student.learn(stream[0])
    before, asked = student.answer(student.seen), passes(student)
    assert student.answer(student.seen) == before
    assert not asked
    with torch.no_grad():
        for parameter in student.model.backbone.parameters():
            parameter.data.mul_(1.5)
    student.answer(student.seen)
    assert sum(asked) == len(stream[0].test)


def test_nothing_is_kept_of_a_query_that_learns(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "vit")
    model = CDLForImageClassification.from_backbone(backbone, prompt=PROMPT, train_backbone=True)
    trainer = CDLTrainer(model, CDLTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True))
    assert trainer._own_query is None


def test_models_are_freed(tmp_path: Path) -> None:
    teacher, student, stream = pair(tmp_path)
    teacher.learn(stream[0])
    gone = [weakref.ref(trainer.model) for trainer in (teacher, student)]
    del teacher, student
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 5 * 32 * 4)
    teacher, student, stream = pair(tmp_path)
    asked = passes(student)
    teacher.learn(stream[0])
    student.learn(stream[0])
    assert sum(asked) == 2 * len(stream[0].train) - 5, "all but one batch"
