"""A task that was interrupted, or that a model has learnt before, never counts as learnt by this trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_contract import arguments, model_of, stream, vit
from transformers import TrainerCallback

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.runs.files import RunError
from hf_cdl.runs.run import Run
from hf_cdl.types import TaskResult

TASKS = list(stream())
NAMES = [list(task.class_names) for task in TASKS]
NCM = {"type": "ncm"}


class CtrlC(TrainerCallback):
    """Interrupts the given step of the given task, once."""

    def __init__(self, task: int, step: int) -> None:
        self.wanted, self.task = (task, step), -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.task += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if (self.task, state.global_step) == self.wanted:
            raise KeyboardInterrupt


def trainer_of(folder: Path, model: Any = None, run: Run | None = None, **more: Any) -> CDLTrainer:
    """Steps are stored one by one, so that every interruption finds some."""
    steps = {} if run is None else {"save_strategy": "steps", "save_steps": 1}
    args = arguments(folder / "work", num_train_epochs=1, **steps)
    more = {"train_dataset": TASKS, **more}
    return CDLTrainer(model or model_of("coda"), args, run=run, **more)


def bound(folder: Path) -> Run:
    run = Run(folder / "run", {"name": "tiny"})
    run.bind("stream", NAMES)
    return run


def fitted() -> CDLForImageClassification:
    return CDLForImageClassification(CDLConfig(backbone_config=vit(32), head=NCM))


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("stored", [False, True], ids=["alone", "with a run"])
def test_an_interrupted_task_is_not_learnt_and_the_trainer_says_so(task: int, stored: bool, tmp_path: Path) -> None:
    run = bound(tmp_path) if stored else None
    trainer = trainer_of(tmp_path, run=run, callbacks=[CtrlC(task, 1)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.seen == TASKS[:task]
    for again in (trainer.train, lambda: trainer.learn(TASKS[task]), lambda: trainer.learn(TASKS[-1])):
        with pytest.raises(ValueError, match=f"task {task + 1} was interrupted.* new trainer with"):
            again()
    if run is not None:
        run.close()
        run = bound(tmp_path)
        start = run.checkpoint("student")
        model = None if start is None else CDLForImageClassification.from_pretrained(str(start))
        resumed = trainer_of(tmp_path, model, run)
        resumed.train()
        whole = trainer_of(tmp_path / "whole")
        whole.train()
        for name, value in whole.model.state_dict().items():
            assert value.equal(resumed.model.state_dict()[name]), name
        run.close()
        assert [entry["task"] for entry in bound(tmp_path).ledger["entries"]["student"]] == [0, 1]


@pytest.mark.parametrize("kind", ["trained", "fitted", "interrupted"])
def test_a_model_is_not_trained_on_a_task_twice(kind: str, tmp_path: Path) -> None:
    model = fitted() if kind == "fitted" else model_of("coda")
    if kind == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            trainer_of(tmp_path, model, callbacks=[CtrlC(0, 1)]).train()
    else:
        trainer_of(tmp_path, model, train_dataset=TASKS[:1]).train()
        model.save_pretrained(tmp_path / "saved")
        model = CDLForImageClassification.from_pretrained(str(tmp_path / "saved"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="trained on task 1 already.*known_classes=model.tasks"):
        trainer_of(tmp_path, model).train()
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
    with pytest.raises(ValueError, match="expected task 1, got task 2.*known_classes=model.tasks"):
        trainer_of(tmp_path, model, train_dataset=TASKS[1:]).train()


def test_a_task_that_was_only_begun_is_learnt(tmp_path: Path) -> None:
    model = model_of("coda")
    model.begin_task(NAMES[0])
    trainer = trainer_of(tmp_path, model)
    assert trainer.train().global_step == 5 and trainer.seen == TASKS


def test_a_result_out_of_its_place_is_not_stored(tmp_path: Path) -> None:
    run = bound(tmp_path)

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    with pytest.raises(RunError, match="holds 0 learnt tasks .* task 2 has no place"):
        run.save_task(TaskResult("student", 1), TASKS[1], write, [])
    with pytest.raises(RunError, match="task 1 has no place"):
        run.save_result(TaskResult("student", 0, row=[50.0], correct=[1], counts=[2]))

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_task(TaskResult("student", 0), TASKS[0], interrupted, [])
    assert run.result("student", TASKS[0]) is None
    run.save_task(TaskResult("student", 0), TASKS[0], write, [])
    run.save_result(TaskResult("student", 0, row=[50.0], correct=[1], counts=[2]))
    with pytest.raises(RunError, match="holds 1 learnt tasks .* task 1 has no place"):
        run.save_task(TaskResult("student", 0), TASKS[0], write, [])
    run.close()
    assert len(bound(tmp_path).ledger["entries"]["student"]) == 1
