"""hf-cdl verify: runs that are complete, in progress, continued from elsewhere, or whose data changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers import class_means, little_room, picture

from hf_cdl.commands import add, card, verify
from hf_cdl.commands.train import main as train_main
from hf_cdl.compare import collect
from hf_cdl.runs.ledger import read_ledger


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 6 classes, and a run of four of them."""
    folder = tmp_path_factory.mktemp("source")
    file = str(class_means(folder))
    assert train_main([file, "--output_dir", str(folder / "run"), "--data.max_classes", "4"]) == 0
    return folder


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(source / "run", tmp_path / "run"))


def change(folder: Path, **fields: Any) -> None:
    """Set fields of the newest entry."""
    ledger = json.loads((folder / "run.json").read_text())
    ledger["entries"]["student"][-1] |= fields
    ledger["finished"] = False
    (folder / "run.json").write_text(json.dumps(ledger))


def test_a_run_is_as_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(run)]) == 0
    assert [line.split(", ")[-1] for line in capsys.readouterr().out.splitlines()] == ["as recorded"] * 2


def test_a_run_with_foreign_images_is_as_recorded(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What beside the labelled images was measured is no part of what is compared."""
    (tmp_path / "other").mkdir()
    for number in range(3):
        picture(9, number).save(tmp_path / "other" / f"{number}.png")
    known = ("--student.head", "{type: ridge, known: 0.95}", "--data.foreign", str(tmp_path / "other"))
    words = (str(source / "tiny.yaml"), "--output_dir", str(tmp_path / "run"), "--data.max_classes", "4", *known)
    assert train_main([*words]) == 0
    capsys.readouterr()
    assert verify.main([str(tmp_path / "run")]) == 0
    assert [line.split(", ")[-1] for line in capsys.readouterr().out.splitlines()] == ["as recorded"] * 2


def test_what_the_run_has_not_measured_is_no_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run was stopped after the end of a phase."""
    change(run, row=[], correct=[], counts=[])
    assert verify.main([str(run)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("right, not measured yet by the run")


def test_other_answers_may_be_of_other_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run, correct=[0, 0])
    assert verify.main([str(run)]) == 1
    said = capsys.readouterr().out
    assert "right, NOT as recorded\nThe data may have changed" in said


def test_a_run_that_went_on_from_elsewhere(source: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    """The first task's checkpoint is not here; the second one's was measured on images that are elsewhere."""
    known = ("--data.known_train", "ignore", "--train.use_cpu", "true")
    assert add.main([str(run), str(source / "data"), "--output_dir", str(tmp_path / "out"), *known]) == 0
    capsys.readouterr()
    assert verify.main([str(tmp_path / "out")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Learnt elsewhere: the first 2 tasks")
    assert [(line.split(":")[0][-7:], line.split("right, ")[1]) for line in lines] == [
        ("task-02", "learnt and recorded elsewhere, maybe with other images"),
        ("task-03", "as recorded"),
    ]


def test_images_of_new_classes_alone(source: Path, run: Path, tmp_path: Path, capsys: Any) -> None:
    """There are no images to measure the inherited checkpoint on."""
    for split, first in (("train", 0), ("test", 100)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / "new" / split / name).mkdir(parents=True)
            for number in range(3):
                picture(10 + label, first + number).save(tmp_path / "new" / split / name / f"{number}.png")
    words = [str(run), str(tmp_path / "new"), "--output_dir", str(tmp_path / "out"), "--train.use_cpu", "true"]
    assert add.main(words) == 0
    capsys.readouterr()
    assert verify.main([str(tmp_path / "out")]) == 0
    assert "task-02: 0 of 0 right, no images of its tasks are in these data" in capsys.readouterr().out


def test_a_run_is_taken_away_only_if_nobody_else_is_in_it(run: Path, tmp_path: Path) -> None:
    """Two hf-cdl add at once: the late one leaves the other's run alone."""
    out = tmp_path / "runs" / "out"
    undo = add.create_run(out, str(run), None, None)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"], "no lock stays"
    other = FileLock(out / ".lock")
    with other.acquire(timeout=0):
        undo()
        assert read_ledger(out)["entries"]["student"]
    undo()
    assert not out.parent.exists()
    undo()  # it is gone already


def test_a_folder_in_which_another_process_begins_a_run(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".out.lock"):
        assert add.main([str(run), "data", "--output_dir", str(tmp_path / "runs" / "out")]) == 2
    assert "Another process is starting a run in" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "out").exists()


def test_a_card_on_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The old card stays."""
    monkeypatch.setattr("hf_cdl.runs.pictures.plotting_available", lambda: False)
    (run / "student" / "README.md").write_text("mine")
    with little_room(1_000):
        assert card.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert f"Could not write {run / 'student' / 'README.md'}: " in error and "Make room" in error
    assert (run / "student" / "README.md").read_text() == "mine"
    assert not [*(run / "student").glob(".*")]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": {"student": {"training_flops": "x"}}}', "1"])
def test_damaged_flops_are_counted_again(content: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "flops.json"
    assert collect.read_flops(file) == {} and not capsys.readouterr().out
    file.write_text(content)
    assert collect.read_flops(file) == {} and "counted again" in capsys.readouterr().out
    known = {"a": {"student": {"training_flops": 3.0}}, "b": {}}
    file.write_text(json.dumps(known))
    assert collect.read_flops(file) == known and not capsys.readouterr().out
