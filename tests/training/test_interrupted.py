"""A task that was interrupted, or that a model has learnt before, never counts as learnt by this trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_contract import arguments, model_of, stream, vit
from transformers import TrainerCallback

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.distill import TERMS, Objective
from hf_cdl.runs.files import RunError
from hf_cdl.runs.run import Run
from hf_cdl.runs.settings import check_settings
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


# ---- going on with other settings ----


def begun_in(folder: Path, interrupted: bool) -> Run:
    """A run with one finished task, or with a stored state of it; opened again."""
    run = bound(folder)
    trainer = trainer_of(folder, run=run, callbacks=[CtrlC(0, 2)] if interrupted else None)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert any((run.folder / "work").glob("student-task-01/checkpoint-*"))
    else:
        trainer.learn(TASKS[0])
        trainer.evaluate_seen()
    run.close()
    return bound(folder)


def going_on(folder: Path, run: Run, objective: Objective | None = None, teacher: Any = None, **fields: Any) -> Any:
    start = run.checkpoint("student")
    model = model_of("coda") if start is None else CDLForImageClassification.from_pretrained(str(start))
    steps = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
    args = arguments(folder / "work", **{**steps, **fields})
    return CDLTrainer(model, args, objective, teacher, run=run, train_dataset=TASKS)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


OTHER: dict[str, dict[str, Any]] = {
    "learning_rate: 0.01 -> 0.02": {"learning_rate": 0.02},
    "per_device_train_batch_size: 8 -> 4": {"per_device_train_batch_size": 4},
    "num_train_epochs: 1 -> 2": {"num_train_epochs": 2},
    "max_steps: -1 -> 5": {"num_train_epochs": 20, "max_steps": 5},
    "arguments.seed: 42 -> 7": {"seed": 7},
    "data_seed: 0 -> 3": {"data_seed": 3},
    "lr_scheduler_type: 'constant' -> 'cosine'": {"lr_scheduler_type": "cosine"},
    "optim: 'adamw_torch": {"optim": "sgd"},
    "weight_decay: 0.0 -> 0.1": {"weight_decay": 0.1},
    "max_grad_norm: 0.0 -> 1.0": {"max_grad_norm": 1.0},
    "gradient_accumulation_steps: 1 -> 2": {"gradient_accumulation_steps": 2},
    "bf16: False -> True": {"bf16": True},
    "frozen_bf16: False -> True": {"frozen_bf16": True},
    "train_sampling_strategy: 'random' -> 'sequential'": {"train_sampling_strategy": "sequential"},
    "objective.ce_weight: 1.0 -> 0.5": {"objective": Objective(0.5)},
}


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [False, True], ids=["a task learnt", "a state stored"])
def test_a_run_does_not_go_on_with_other_settings(interrupted: bool, tmp_path: Path) -> None:
    run = begun_in(tmp_path, interrupted)
    before = files_of(run.folder)
    for line, fields in OTHER.items():
        trainer = going_on(tmp_path, run, **fields)
        for act in (trainer.train, lambda trainer=trainer: trainer.learn(TASKS[0])):
            with pytest.raises(RunError, match="learnt with other settings; nothing was touched") as caught:
                act()
            assert re.search(rf"{re.escape(line)}(?![\d.])", str(caught.value)), caught.value
    assert files_of(run.folder) == before
    shown: dict[str, Any] = {
        "logging_steps": 3,
        "save_steps": 2,
        "per_device_eval_batch_size": 4,
        "dataloader_num_workers": 1,
    }
    resumed = going_on(tmp_path, run, **shown)
    resumed.train()
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    for name, value in whole.model.state_dict().items():
        assert value.equal(resumed.model.state_dict()[name]), name


def test_a_run_does_not_go_on_with_another_teacher_term_or_model(tmp_path: Path) -> None:
    run = begun_in(tmp_path, interrupted=True)
    config = TERMS["kd"].config_class()
    taught = going_on(
        tmp_path, run, Objective(1.0, [("kd", TERMS["kd"](config, model_of("coda").shape, model_of("coda").shape))]),
        model_of("coda"),
    )  # fmt: skip
    with pytest.raises(RunError, match=r"objective\.terms\.kd: None -> [^\n]*\n  teacher: None -> "):
        taught.learn(TASKS[0])
    alone = going_on(tmp_path, run)
    alone.model.config.prompt = {**alone.model.config.prompt, "orthogonality": 0.5}
    with pytest.raises(RunError, match=r"model\.prompt\.orthogonality: 0\.1 -> 0\.5"):
        alone.learn(TASKS[0])


def test_a_field_that_an_older_version_did_not_store_is_no_difference(tmp_path: Path) -> None:
    stored = {"objective": {"ce_weight": 1.0, "terms": {"kd": {"class": "KD", "weight": 0.5}}}}
    ledger = {"entries": {"student": [{}]}, "settings": {"student": stored}}
    newer = {"class": "KD", "weight": 0.5, "threshold": 0.0}
    check_settings(tmp_path, ledger, "student", {"objective": {"ce_weight": 1.0, "terms": {"kd": newer}}})
    for terms in ({"kd": newer, "dkd": {"class": "DKD"}}, {"kd": {**newer, "weight": 0.4}}, {}):
        with pytest.raises(RunError, match=r"objective\.terms"):
            check_settings(tmp_path, ledger, "student", {"objective": {"ce_weight": 1.0, "terms": terms}})


def test_what_matters_only_where_accuracy_steers_may_change_where_it_does_not(tmp_path: Path) -> None:
    run = begun_in(tmp_path, interrupted=False)
    going_on(tmp_path, run, eval_strategy="epoch").learn(TASKS[0])
    with pytest.raises(RunError, match="early_stopping_patience: None -> 2"):
        going_on(tmp_path, run, eval_strategy="epoch", early_stopping_patience=2).learn(TASKS[0])


def test_other_settings_are_fine_where_nothing_was_learnt_or_no_one_said_with_which(tmp_path: Path) -> None:
    run = bound(tmp_path)
    trainer = trainer_of(tmp_path, run=run, callbacks=[Broken()])
    with pytest.raises(ZeroDivisionError):
        trainer.learn(TASKS[0])  # before anything was stored
    run.close()
    run = bound(tmp_path)
    going_on(tmp_path, run, learning_rate=0.02).learn(TASKS[0])
    assert run.ledger.pop("settings")["student"]["arguments"]["learning_rate"] == 0.02
    going_on(tmp_path, run, learning_rate=0.03).learn(TASKS[0])  # an older version wrote the run


class Broken(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        raise ZeroDivisionError


def test_measuring_asks_for_no_settings(tmp_path: Path) -> None:
    run = begun_in(tmp_path, interrupted=False)
    trainer = going_on(tmp_path, run, learning_rate=0.5)
    assert trainer.evaluate(TASKS[0].test)["eval_accuracy"] >= 0
