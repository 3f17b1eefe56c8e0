"""The ledger of a run: stored files stay complete despite interruptions, and a folder belongs to one recipe."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_cdl.runs import files
from hf_cdl.runs.files import RunError, lines
from hf_cdl.runs.ledger import _Entry
from hf_cdl.runs.metrics import continual_metrics
from hf_cdl.runs.run import Run
from hf_cdl.types import Task, TaskResult

RECIPE = {"name": "x", "seed": 3, "train": {"learning_rate": 0.1}, "layers": (0, 1)}
NAMES = [["a", "b"], ["c"]]


def task(index: int) -> Task:
    split: Any = []
    return Task(index, tuple(NAMES[index]), 2 * index, split, None, split)


def writer(value: float, size: int = 100) -> Callable[[Path], None]:
    """A function that writes a checkpoint of two files."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"value": value}))
        save_file({"w": torch.full((size,), value)}, folder / "model.safetensors")

    return write


def open_run(folder: Path, recipe: dict[str, Any] | None = None, stream: str = "abc", **options: Any) -> Run:
    run = Run(folder, recipe or RECIPE, **options)
    run.bind(stream, NAMES)
    return run


def learn(run: Run, index: int, role: str = "student", value: float = 1.0) -> TaskResult:
    result = TaskResult(role, index, train_seconds=2.0, images_per_second=5.0, peak_memory_bytes=7)
    run.save_task(result, task(index), writer(value), [{"loss": 1.0}])
    result.row = [90.0, 80.0][: index + 1]
    result.correct, result.counts = [9, 4][: index + 1], [10, 5][: index + 1]
    run.save_result(result)
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stored(folder: Path) -> float:
    """The value in a checkpoint, after checking that its two files agree."""
    value = json.loads((folder / "config.json").read_text())["value"]
    assert load_file(folder / "model.safetensors")["w"].tolist() == [value] * 100
    return value


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: write() fails as on a full disk (Python ignores SIGXFSZ)."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- a run from start to end ----


def test_a_whole_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    run = open_run(folder)
    assert not run.finished and run.started
    assert run.checkpoint("student") is None and run.result("student", task(0)) is None
    learn(run, 0, value=1.0)
    work = run.work_folder("student", task(1))
    (work / "checkpoint-1").mkdir(parents=True)
    learn(run, 1, value=2.0)
    assert not work.exists(), "the state of a finished phase is dropped"
    assert run.checkpoint("student") == folder / "student" / "task-02"
    run.set_labels({"student": "the student"})
    assert "the student" in run.finish()

    assert [stored(folder / "student" / name) for name in ("task-01", "task-02", ".")] == [1.0, 2.0, 2.0]
    assert json.loads((folder / "logs" / "student-task-02.json").read_text()) == [{"loss": 1.0}]
    assert not (folder / "work").exists()
    results = json.loads((folder / "results.json").read_text())
    student = results["roles"]["student"]
    assert student["label"] == "the student"
    assert student["accuracy_matrix"] == [[90.0], [90.0, 80.0]]
    assert (student["correct"], student["counts"]) == ([[9], [9, 4]], [10, 5])
    assert student["metrics"] == continual_metrics([[90.0], [90.0, 80.0]], [10, 5])
    assert (student["train_seconds"], student["peak_memory_bytes"]) == ([2.0, 2.0], [7, 7])
    assert (results["name"], results["seed"], results["finished"], results["stream"]) == ("x", 3, True, "abc")
    assert results["class_names"] == NAMES and results["recipe"]["layers"] == [0, 1]
    assert results["versions"]["torch"] == torch.__version__


def test_a_finished_run_says_so_and_is_left_alone(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    learn(run, 0)
    learn(run, 1)
    run.finish()
    before = contents(tmp_path)
    first, second = Run(tmp_path, RECIPE), Run(tmp_path, RECIPE)  # needs no lock
    assert first.finished and second.finished
    assert contents(tmp_path) == before
    with pytest.raises(RunError, match="different recipe"):
        Run(tmp_path, {**RECIPE, "seed": 4})
    assert contents(tmp_path) == before


def test_a_run_goes_on_where_it_was_left(tmp_path: Path) -> None:
    learnt = learn(open_run(tmp_path), 0, value=1.0)
    run = open_run(tmp_path)
    assert run.result("student", task(0)) == learnt
    assert run.result("student", task(1)) is None
    assert run.checkpoint("student") == tmp_path / "student" / "task-01"
    learn(run, 1, value=2.0)
    assert stored(tmp_path / "student") == 2.0


def test_a_process_that_does_not_write_follows_in_memory(tmp_path: Path) -> None:
    other = Run(tmp_path / "run", RECIPE, writer=False)
    other.bind("abc", NAMES)
    learnt = learn(other, 0)
    other.finish()
    assert other.result("student", task(0)) == learnt and other.finished
    assert not (tmp_path / "run").exists()


# ---- folders that are refused ----


def test_another_recipe_is_refused_with_the_differences(tmp_path: Path) -> None:
    learn(open_run(tmp_path), 0)
    before = contents(tmp_path)
    other = {"name": "x", "seed": 4, "train": {"learning_rate": 0.1, "bf16": True}, "layers": [0, 1]}
    with pytest.raises(RunError) as error:
        Run(tmp_path, other)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert "seed: 3 -> 4" in lines and "train.bf16: None -> True" in lines
    assert not any("learning_rate" in line or "layers" in line for line in lines)
    assert "--output_dir" in lines[-1]
    assert contents(tmp_path) == before


def test_as_long_as_nothing_was_learnt_the_recipe_may_change(tmp_path: Path) -> None:
    """A first attempt that failed leaves nothing that gets in the way of a second one."""
    open_run(tmp_path)
    run = open_run(tmp_path, {**RECIPE, "seed": 4}, stream="other data")
    checkpoint = run.work_folder("student", task(0)) / "checkpoint-3"
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["seed"] == 4
    checkpoint.mkdir(parents=True)
    with pytest.raises(RunError, match="seed: 4 -> 3"):
        Run(tmp_path, RECIPE)


def test_nothing_is_written_before_the_data_are_known(tmp_path: Path) -> None:
    Run(tmp_path / "run", RECIPE)
    assert not (tmp_path / "run" / "run.json").exists()
    assert not Run(tmp_path / "run", {"another": "recipe"}).started


def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(RunError, match="is not empty and holds no run.*Nothing in it was touched.*--output_dir"):
        Run(tmp_path, RECIPE)
    assert contents(tmp_path) == {"thesis.txt": b"important"}
    with pytest.raises(RunError, match="thesis.txt is a file; choose another folder with --output_dir"):
        Run(tmp_path / "thesis.txt", RECIPE)
    assert contents(tmp_path) == {"thesis.txt": b"important"}


@pytest.mark.parametrize("ledger", ["", '{"recipe": ', "{}", "[]", "null", '{"recipe": {}}', b"\xff\x00"])
def test_an_unreadable_ledger_is_refused_untouched(tmp_path: Path, ledger: str | bytes) -> None:
    learn(open_run(tmp_path), 0)
    (tmp_path / "run.json").write_bytes(ledger if isinstance(ledger, bytes) else ledger.encode())
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"run\.json is not a readable ledger.*restore run\.json, or choose another"):
        Run(tmp_path, RECIPE)
    assert contents(tmp_path) == before


def damaged_ledgers() -> dict[str, tuple[Callable[[Any], Any], str]]:
    def put(*path: Any, value: Any) -> Callable[[Any], Any]:
        def change(ledger: Any) -> None:
            for key in path[:-1]:
                ledger = ledger[key]
            ledger[path[-1]] = value

        return change

    def entry(**fields: Any) -> Callable[[Any], Any]:
        return lambda ledger: ledger["entries"]["student"][0].update(fields)

    first = ("entries", "student", 0)
    return {
        "finished without entries": (lambda x: x.update(entries={}, finished=True), "finished, but every role lacks"),
        "finished too early": (put("finished", value=True), "finished, but student lacks tasks"),
        "finished is a word": (put("finished", value="yes"), "finished: Input should be a valid boolean"),
        "no recipe": (lambda x: x.pop("recipe"), "recipe: Field required"),
        "recipe is a list": (put("recipe", value=[1]), "recipe: Input should be a valid dictionary"),
        "entries is a list": (put("entries", value=[]), "entries: Input should be a valid dictionary"),
        "entries of a number": (put("entries", "student", value=3), "entries.student: Input should be a valid list"),
        "an entry is null": (put(*first, value=None), "entries.student.0: Input should be a valid dictionary"),
        "out of order": (lambda x: x["entries"]["student"].append(x["entries"]["student"][0]), "student, task 0"),
        "of another role": (entry(role="teacher"), "entries.student.0 is of teacher, task 0"),
        "a role that leads outside": (lambda x: x["entries"].update({"../x": []}), "'../x' is not a role"),
        "too many entries": (put("class_names", value=[]), "entries: 1 of student, but the stream has 0 tasks"),
        "unknown field": (entry(colour="red"), "entries.student.0.colour: Extra inputs are not permitted"),
        "a long row": (entry(row=[90.0, 1.0]), "entries.student.0.row has 2 accuracies, but task 1 needs 1"),
        "a row of words": (entry(row=["90"]), "entries.student.0.row.0: Input should be a valid number"),
        "a row of more than all": (entry(row=[900.0]), "accuracies lie between 0 and 100"),
        "a row of no number": (entry(row=[float("nan")]), "accuracies lie between 0 and 100"),
        "other counts": (entry(counts=[]), "row, correct and counts are not of the same length"),
        "counts of parts": (entry(counts=[1.5]), "entries.student.0.counts.0: Input should be a valid integer"),
        "no stream": (put("stream", value=None), "entries of tasks, but no stream"),
        "a number as stream": (put("stream", value=7), "stream: Input should be a valid string"),
        "class names are a number": (put("class_names", value=5), "class_names: Input should be a valid list"),
        "a path that leads outside": (put("files", "../x", value=[1, 1, "0"]), "'../x' is not a path in the folder"),
        "an absolute path": (
            put("files", "/etc/passwd", value=[1, 1, "0"]),
            "'/etc/passwd' is not a path in the folder",
        ),
        "half a fingerprint": (put("files", "x", value=[1]), "files.x"),
        "a word as format": (put("format", value="new"), "format: 'new' is not the number of a format"),
        "format 0": (put("format", value=0), "format: 0 is not the number of a format"),
        "a newer format": (
            lambda x: x.update(format=2, versions={"hf-cdl": "9.9"}),
            r"was written by hf_cdl 9\.9, in format 2; this is hf_cdl .*, which reads up to format 1.*Update hf_cdl",
        ),
        "a newer format without a version": (
            lambda x: x.update(format=10, versions=None, entries="something new"),
            "was written by hf_cdl of unknown version, in format 10",
        ),
    }


@pytest.mark.parametrize("name", damaged_ledgers())
def test_a_ledger_that_no_run_writes_is_refused_untouched(tmp_path: Path, name: str) -> None:
    change, message = damaged_ledgers()[name]
    learn(open_run(tmp_path), 0)
    ledger = json.loads((tmp_path / "run.json").read_text())
    change(ledger)
    (tmp_path / "run.json").write_text(json.dumps(ledger))
    before = contents(tmp_path)
    for writer in (True, False):
        with pytest.raises(RunError, match=message) as raised:
            Run(tmp_path, RECIPE, writer=writer)
        said = str(raised.value)
        assert "--output_dir FOLDER" in said and len(said.splitlines()) <= 6 and "touched" in said
    assert contents(tmp_path) == before


def test_the_ledger_knows_all_fields_of_a_result() -> None:
    assert {*_Entry.__annotations__} == {f.name for f in dataclasses.fields(TaskResult)}


def test_many_differences_are_a_few_lines(tmp_path: Path) -> None:
    learn(open_run(tmp_path), 0)
    with pytest.raises(RunError, match="  and 5 more\n") as raised:
        Run(tmp_path, {**RECIPE, **{f"field {i}": i for i in range(8)}})
    assert len(str(raised.value).splitlines()) == 6


def test_changed_data_are_refused(tmp_path: Path) -> None:
    learn(open_run(tmp_path, stream="abc"), 0)
    before = contents(tmp_path)
    run = Run(tmp_path, RECIPE)
    with pytest.raises(RunError, match="The data changed since .* was started .stream abc, now def."):
        run.bind("def", NAMES)
    assert contents(tmp_path) == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    learn(open_run(tmp_path), 0)
    before = contents(tmp_path)
    code = f"import filelock; l = filelock.FileLock({str(tmp_path / '.lock')!r}); l.acquire(); print('held'); input()"
    other = subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="Another process is running in"):
            Run(tmp_path, RECIPE)
        assert contents(tmp_path) == before
    finally:
        other.kill()
        other.communicate()
    assert learn(Run(tmp_path, RECIPE), 1).task == 1, "a killed process leaves no lock"


# ---- interrupted saving ----


def cut_off(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    raise OSError(28, "No space left on device")


def ctrl_c(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    raise KeyboardInterrupt


def test_a_run_that_was_killed_while_its_first_ledger_was_written_starts(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.partial").write_text('{"recipe": {')
    learn(open_run(tmp_path), 0)
    assert Run(tmp_path, RECIPE).started and not list(tmp_path.rglob(".*.partial"))


@pytest.mark.parametrize(("write", "raised"), [(cut_off, RunError), (ctrl_c, KeyboardInterrupt)])
def test_an_interrupted_save_loses_nothing(tmp_path: Path, write: Any, raised: type[BaseException]) -> None:
    run = open_run(tmp_path)
    learn(run, 0, value=1.0)
    before = contents(tmp_path)
    with pytest.raises(raised):
        run.save_task(TaskResult("student", 1), task(1), write, [])
    assert {name: data for name, data in contents(tmp_path).items() if ".partial" not in name} == before
    again = open_run(tmp_path)
    assert again.result("student", task(1)) is None
    learn(again, 1, value=2.0)
    assert [stored(tmp_path / "student" / name) for name in ("task-01", "task-02", ".")] == [1.0, 2.0, 2.0]
    assert not [name for name in contents(tmp_path) if ".partial" in name]


@pytest.mark.parametrize("limit", [0, 300, 600])
def test_a_full_disk_loses_nothing(tmp_path: Path, limit: int) -> None:
    """At 0 bytes nothing can be written, at 300 the config but not the weights, at 600 all but the ledger."""
    run = open_run(tmp_path)
    learn(run, 0, value=1.0)
    before = contents(tmp_path)
    with full_disk(limit), pytest.raises(RunError, match="Everything stored before is whole. Make room"):
        run.save_task(TaskResult("student", 1), task(1), writer(2.0), [])
    with full_disk(limit), pytest.raises(RunError, match="run.json"):
        run.save_result(TaskResult("student", 0))
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
    again = open_run(tmp_path)
    assert again.result("student", task(1)) is None
    learn(again, 1, value=2.0)
    assert [stored(tmp_path / "student" / name) for name in ("task-01", "task-02", ".")] == [1.0, 2.0, 2.0]


def test_a_full_disk_at_the_very_end(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    learn(run, 0)
    learn(run, 1)
    with full_disk(10_000), pytest.raises(RunError, match="Could not draw the pictures"):
        run.finish()
    assert not run.finished and not (tmp_path / "results.json").exists()
    again = open_run(tmp_path)
    assert not again.finished
    again.finish()
    assert Run(tmp_path, RECIPE).finished and json.loads((tmp_path / "results.json").read_text())["finished"]
    assert not list(tmp_path.rglob(".*.partial"))


def test_a_half_published_checkpoint_is_repaired_when_the_run_is_opened(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    learn(run, 0, value=1.0)
    old = (tmp_path / "student" / "model.safetensors").read_bytes()
    learn(run, 1, value=2.0)
    (tmp_path / "student" / "model.safetensors").write_bytes(old)  # the config is already the new one
    (tmp_path / "student" / ".model.safetensors.partial").write_bytes(old[:10])
    Run(tmp_path, RECIPE)
    assert stored(tmp_path / "student") == 2.0


def test_a_ledger_has_a_line_for_each_entry_and_file_and_none_is_written_as_it_was_once() -> None:
    """Lines are kept by what they say: what changes in place is written anew."""
    entry: dict[str, Any] = {"row": [50.0], "class_accuracy": {"a \u00e9\n": 1}}
    content: dict[str, Any] = {"entries": {"student": [entry]}, "files": {"a": [1, 2, "x"]}, "recipe": {"seed": None}}
    known: dict[bytes, str] = {}
    first = lines(content, known)
    assert json.loads(first) == content
    written = {line.removesuffix(",") for line in first.splitlines()}
    assert '   {"row": [50.0], "class_accuracy": {"a \\u00e9\\n": 1}}' in written
    assert '  "a": [1, 2, "x"]' in written
    entry["row"][0] = 51.0
    entry["class_accuracy"]["a \u00e9\n"] = True
    content["files"]["a"][1] = 2.0
    content["files"]["b"] = [3, np.float64(0.5), "y"]  # as in a user's own log lines
    assert lines(content, known) == lines(content, {}) != first
    assert repr(json.loads(lines(content, known))) == repr(json.loads(json.dumps(content)))


def test_what_was_measured_once_is_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a task's share of a ledger does not grow with the number of tasks."""
    encoded: list[Any] = []
    dumps = json.dumps
    monkeypatch.setattr(files.json, "dumps", lambda content, **how: encoded.append(content) or dumps(content, **how))
    known: dict[bytes, str] = {}
    entries = [{"task": number, "row": [50.0] * (number + 1)} for number in range(30)]
    numbers = []
    for count in range(1, 31):
        encoded.clear()
        lines({"entries": {"student": entries[:count]}}, known)
        numbers.append(sum(isinstance(content, dict) for content in encoded))
    assert numbers == [1] * 30
