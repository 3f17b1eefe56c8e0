"""How long a run may take, in words and as a sum of passes worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hf_cdl.commands import duration


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (3, "less than a minute"),
        (50, "about 1 minute"),
        (125, "about 2 minutes"),
        (3500, "about 60 minutes"),
        (3 * 3600, "about 3 hours"),
        (24 * 3600 * 4, "about 4 days"),
    ],
)
def test_seconds_in_words(expected: float, said: str) -> None:
    assert duration.in_words(expected) == said


def trainer(role: str, trains: bool, teacher: Any = None, plain: bool = False, **more: Any) -> Any:
    given = {"num_train_epochs": 2.0, "max_steps": -1, "per_device_train_batch_size": 4, "world_size": 1}
    given |= {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "device": SimpleNamespace(type="cpu")}
    model = SimpleNamespace(trains=lambda task: trains, fitted=not trains, is_plain=plain)
    parts = {"model": model, "args": SimpleNamespace(**{**given, **more}), "teacher": SimpleNamespace(model=teacher)}
    return SimpleNamespace(role=role, eval_split="test", **parts)


TASKS = [
    SimpleNamespace(index=i, train=[None] * 10, test=[None] * 3, class_names=("a", "b"), name=f"task-{i}")
    for i in range(2)
]


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of the teacher takes 10 seconds an image, others one; reading takes 100."""
    monkeypatch.setattr(duration, "_pass", lambda trainer: 10.0 if trainer.role == "teacher" else 1.0)
    monkeypatch.setattr(duration, "_reading", lambda task: 100.0)


def test_passes_are_counted() -> None:
    """Two tasks of 10 images, two epochs: 40 images; measured on 3 images after the first and on 6 after the next."""
    teacher, student = trainer("teacher", True), trainer("student", True, teacher="one")
    assert duration.seconds(TASKS, [teacher]) == 40 * 3 * 10 + 9 * 10 + 40 * 100
    assert duration.seconds(TASKS, [student]) == 40 * (3 + 0) + 9 + 40 * 100, "its teacher is not timed"
    both = 40 * 3 * 10 + 9 * 10 + 40 * (3 + 10) + 9 + 40 * 100
    assert duration.seconds(TASKS, [teacher, student]) == both, "images are read once"
    fitted = trainer("ridge_head", False, plain=True)
    assert duration.seconds(TASKS, [fitted]) == (20 + 9) + 29 * 100
    assert duration.seconds(TASKS, [student, trainer("linear_head", True, plain=True)]) == 129 + 9 + 40 * 100
    assert duration.seconds(TASKS, [trainer("teacher", True, max_steps=1)]) == 8 * 3 * 10 + 9 * 10 + 9 * 100
    assert duration.seconds(TASKS, [trainer("teacher", True, shard_teacher=True)]) is None


def test_what_is_said_names_all_and_counts_baselines() -> None:
    roles = [trainer("teacher", True), trainer("student", True), trainer("linear_head", True, plain=True)]
    said = duration.announcement("mine\n", TASKS, roles)
    assert said.startswith(
        r"mine\n: teacher, student and 1 baseline will learn 4 classes in 2 tasks; this may take about "
    )
    assert duration.announcement("mine", TASKS, roles[1:2]).startswith("mine: student will learn 4 classes in 2 tasks")
