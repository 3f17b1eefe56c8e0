"""Trackers: logs outlive the run's work folder, in one run per role whose steps continue across tasks."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import make_recipe, train, write_recipe
from test_contract import arguments, model_of, stream
from transformers import TrainerCallback, set_seed

from hf_cdl import CDLTrainer
from hf_cdl.runs.files import RunError
from hf_cdl.runs.run import Run
from hf_cdl.training.arguments import CDLTrainingArguments
from hf_cdl.training.trackers import TensorBoard, Tracking, _in_netrc

EPOCHS, STEPS = 2, (6, 4)
"""Two tasks of three and two batches."""


def trainer_of(folder: Path, run: Run | None = None, **fields: Any) -> CDLTrainer:
    set_seed(0)
    return CDLTrainer(model_of("coda"), arguments(folder, num_train_epochs=EPOCHS, **fields), run=run)


def scalars(folder: Path, name: str = "train/loss/loss") -> list[tuple[int, float]]:
    """Steps and values of a curve as TensorBoard reads it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keep trackers offline and in the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_LOG_MODEL", raising=False)
    return tmp_path


def report(name: str) -> dict[str, Any]:
    pytest.importorskip(name)
    return {"report_to": name}


@pytest.mark.parametrize("stored", [True, False], ids=["a run", "no run"])
def test_tensorboard_has_one_curve_over_all_tasks(stored: bool, tracked: Path) -> None:
    fields = report("tensorboard")
    run = Run(tracked / "run", {}) if stored else None
    trainer, plain = trainer_of(tracked / "work", run, **fields), trainer_of(tracked / "plain")
    for task in stream():
        trainer.learn(task)
        trainer.evaluate_seen()
        plain.learn(task)
    for name, value in plain.model.state_dict().items():
        assert value.equal(trainer.model.state_dict()[name]), "a tracker changed what was learnt"
    curve = scalars(tracked / ("run/logs/trackers" if stored else "work/trackers") / "student")
    assert [step for step, _ in curve] == list(range(1, 1 + sum(STEPS)))
    want = [line["loss/loss"] for line in plain.state.log_history if "loss/loss" in line]
    assert [value for _, value in curve][STEPS[0] :] == pytest.approx(want)
    assert not (tracked / "work" / "runs").exists(), "where transformers' own callback would write"


def test_a_run_that_was_killed_goes_on_with_its_curve(tracked: Path) -> None:
    """Steps after the last stored state are repeated but shown once; earlier tasks are looked up."""

    class Killed(Exception):
        pass

    class Killer(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise Killed

    fields = report("tensorboard")
    first, second = stream()
    run = Run(tracked / "run", {})
    cut = trainer_of(tracked / "work", run, **fields)
    cut.learn(first)
    cut.evaluate_seen()
    cut.add_callback(Killer())
    with pytest.raises(Killed):
        cut.learn(second)
    [tracking] = [callback for callback in cut.callback_handler.callbacks if isinstance(callback, Tracking)]
    assert tracking.tracker is None, "a tracker stayed open behind its phase"
    model = type(cut.model).from_pretrained(run.checkpoint("student"))
    resumed = CDLTrainer(model, arguments(tracked / "work", num_train_epochs=EPOCHS, **fields), run=run)
    for task in (first, second):
        resumed.learn(task)
        resumed.evaluate_seen()
    curve = scalars(tracked / "run/logs/trackers/student")
    assert [step for step, _ in curve] == list(range(1, 1 + sum(STEPS)))


def test_trackio_has_one_run_per_role(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = report("trackio")
    import trackio.utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (trackio.utils, __import__("trackio.sqlite_storage", fromlist=["x"])):
        monkeypatch.setattr(module, "TRACKIO_DIR", tracked / "trackio")
    run = Run(tracked / "run", {"name": "pair"})
    trainer = trainer_of(tracked / "work", run, **fields, project="cdl-test", run_name=None)
    for task in stream():
        trainer.learn(task)
        trainer.evaluate_seen()
    [name] = SQLiteStorage.get_runs("cdl-test")
    assert name == f"pair-student-{(run.folder / 'logs/trackers/student/id').read_text()}"
    lines = [line for line in SQLiteStorage.get_logs("cdl-test", name) if "train/loss/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 1 + sum(STEPS)))


@pytest.mark.slow
def test_wandb_has_one_run_per_role_offline(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase writes a part, which `wandb sync` joins by their id: steps continue."""
    fields = report("wandb")
    from hf_cdl.training.trackers import WandB

    steps: dict[str, list[int]] = {}
    log = WandB.log
    monkeypatch.setattr(
        WandB, "log", lambda self, *rest: (steps.setdefault(self.run.id, []).append(rest[1]), log(self, *rest))
    )
    run = Run(tracked / "run", {"name": "pair"})
    student = trainer_of(tracked / "work", run, **fields, run_name="mine")
    set_seed(0)
    teacher = CDLTrainer(
        model_of("coda"), arguments(tracked / "work", num_train_epochs=1, **fields), role="t", run=run
    )
    teacher.learn(next(stream()))
    for task in stream():
        student.learn(task)
        student.evaluate_seen()
    keys = {role: (run.folder / f"logs/trackers/{role}/id").read_text() for role in ("student", "t")}
    assert sorted({*steps[keys["student"]]}) == list(range(1, 1 + sum(STEPS)))
    assert sorted({*steps[keys["t"]]}) == [1, 2, 3]
    for role, parts in (("student", 2), ("t", 1)):
        folders = [*(run.folder / "logs/trackers" / role / "wandb").glob(f"offline-run-*-{keys[role]}")]
        assert len(folders) == parts
        deadline = time.monotonic() + 20  # another process writes the files
        while not all(b"loss/loss" in file.read_bytes() for folder in folders for file in folder.glob("*.wandb")):
            assert time.monotonic() < deadline
            time.sleep(0.05)


class Ends(TrainerCallback):
    """Ends the training after its first logged step."""

    def __init__(self, error: BaseException):
        self.error = error

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        raise self.error


def test_a_first_phase_that_is_stopped_leaves_nothing_behind(tracked: Path) -> None:
    """So that the same command finds its own folder."""
    run = Run(tracked / "runs" / "mine", {})
    run.bind("0" * 16, [["a"], ["b"]])
    trainer = trainer_of(tracked / "work", run, **report("tensorboard"))
    trainer.add_callback(Ends(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.learn(next(stream()))
    assert [*(run.folder / "logs/trackers/student").glob("events*")]
    run.close()
    assert not (tracked / "runs").exists()


def damaged(name: str, folder: Path) -> None:
    place = folder / "logs/trackers/student"
    if name == "logs is a file":
        (folder / "logs").write_text("x")
    elif name == "the role is a file":
        place.parent.mkdir(parents=True)
        place.write_text("x")
    else:
        place.mkdir(parents=True)
        contents = {"bytes": b"\xff\xfe", "empty": b"", "a path": b"../../x"}
        (place / "id").mkdir() if name == "a folder" else (place / "id").write_bytes(contents[name])


@pytest.mark.parametrize("name", ["logs is a file", "the role is a file", "a folder", "bytes", "empty", "a path"])
def test_damaged_files_of_a_tracker_are_named(name: str, tracked: Path) -> None:
    run = Run(tracked / "run", {})
    damaged(name, run.folder)
    with pytest.raises(RunError, match=r"logs/trackers/student.*(remove it|remove what is in the way)"):
        trainer_of(tracked / "work", run, **report("tensorboard")).learn(next(stream()))


@pytest.mark.parametrize("what", ["start", "log", "end"])
def test_a_tracker_that_fails_is_named(what: str, tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    fields = report("tensorboard")
    monkeypatch.setattr(TensorBoard, {"start": "__init__", "log": "log", "end": "close"}[what], fail)
    with pytest.raises(RunError, match=rf"tensorboard \(report_to\) could not {what} in .*No space left"):
        trainer_of(tracked / "work", Run(tracked / "run", {}), **fields).learn(next(stream()))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "nobody is logged in .* `wandb login` .* WANDB_MODE=offline"),
        ({"WANDB_MODE": "online"}, "nobody is logged in"),
        ({"WANDB_MODE": "ofline"}, "WANDB_MODE 'ofline' in the environment; allowed: online, offline"),
        ({"WANDB_MODE": "offline"}, None),
        ({"WANDB_API_KEY": "0" * 40}, None),
        ({"RANK": "1"}, None),  # it does not report
    ],
)
def test_wandb_without_a_login_is_refused_before_anything_is_loaded(
    environment: dict[str, str], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = report("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_LOG_MODEL", "NETRC", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    __import__("wandb").teardown()  # forget the environment it read in other tests
    problems = [what for name, what in CDLTrainingArguments.problems(fields) if name == "report_to"]
    if said is None:
        assert not problems
    else:
        assert len(problems) == 1 and re.search(said, problems[0])


def test_a_login_that_wandb_has_stored_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logins").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    (tmp_path / "logins").chmod(0o600)
    for file, found in (("logins", True), ("gone", False)):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NETRC", str(tmp_path / file))
        assert _in_netrc("https://api.wandb.ai") == found and not _in_netrc("https://example.com")


@pytest.mark.slow
def test_a_whole_run_leaves_the_curves_of_every_role(tmp_path: Path) -> None:
    """By the command: at the end work/ is gone, but the tracker's files are not."""
    pytest.importorskip("tensorboard")
    recipe = make_recipe(tmp_path)
    recipe["train"] |= {"num_train_epochs": 1, "report_to": "tensorboard", "logging_steps": 1}
    code, output = train(write_recipe(tmp_path / "recipe.yaml", recipe), "--output_dir", tmp_path / "run")
    assert code == 0, output
    assert not (tmp_path / "run/work").exists()
    for role in ("teacher", "student"):
        curve = scalars(tmp_path / "run/logs/trackers" / role)
        assert [step for step, _ in curve] == list(range(1, 7))  # three tasks of two batches
    assert sorted(os.listdir(tmp_path / "run/logs/trackers")) == ["student", "teacher"]
