"""A student on the Hub that is changed on one machine after the other: every change is a tag, and none is moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import make_backbone, picture, script, train, write_recipe
from hub_server import HubServer, environment

STUDENT = "me/small"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four classes, pushed to `hub`, and images of another class."""
    folder = tmp_path_factory.mktemp("source")
    for kind, name in enumerate(("ant", "bee", "cat", "dog")):
        for split, numbers in (("train", range(4)), ("test", range(50, 52))):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for number in numbers:
                picture(kind, number).save(place / f"{number}.png")
    (folder / "new" / "emu").mkdir(parents=True)
    for number in range(3):
        picture(9, number).save(folder / "new" / "emu" / f"{number}.png")
    recipe = {
        "name": "small",
        "data": {"path": str(folder / "data"), "classes_per_task": 2},
        "student": {"backbone": str(make_backbone(folder / "backbone")), "head": {"type": "ridge"}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    file = write_recipe(folder / "small.yaml", recipe)
    with HubServer(folder / "hub") as hub:
        env = environment(hub, folder / "home")
        code, output = train(file, "--output_dir", folder / "run", "--push_to_hub", "true", env=env)
        assert code == 0, output
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path) -> Iterator[HubServer]:
    shutil.copytree(source / "hub", tmp_path / "hub")
    with HubServer(tmp_path / "hub", stall_seconds=0.3) as server:
        yield server


class Machine:
    """A working folder of its own."""

    def __init__(self, hub: HubServer, folder: Path):
        self.env = environment(hub, folder / "home", ACCELERATE_USE_CPU="true")
        self.folder = folder / "work"
        self.folder.mkdir(parents=True)

    def run(self, *words: Any, code: int = 0) -> str:
        found, output = script(*map(str, words), env=self.env, cwd=self.folder)
        assert found == code, output
        return output


def tags(hub: HubServer) -> dict[str, str]:
    return hub.repository(STUDENT).refs("tags")


def classes(hub: HubServer, tag: str) -> list[str]:
    config = json.loads(hub.repository(STUDENT).read(tags(hub)[tag], "config.json"))
    return [name for task in config["tasks"] for name in task]


@pytest.mark.slow
def test_changes_go_from_machine_to_machine(source: Path, hub: HubServer, tmp_path: Path) -> None:
    first, second, third = (Machine(hub, tmp_path / name) for name in ("first", "second", "third"))
    before = tags(hub)
    said = first.run("rename", STUDENT, "ant", "emmet", "--push_to_hub", "true")
    assert "is copied into runs/small/" in said and "2 tasks and 1 change, the newest task-03" in said
    assert classes(hub, "task-03") == ["emmet", "bee", "cat", "dog"]
    said = second.run("add", STUDENT, source / "new", "--push_to_hub", "true")
    assert "3 images learnt: 1 new class ('emu')" in said and "the newest task-04" in said
    assert {name: commit for name, commit in tags(hub).items() if name in before} == before
    card = hub.repository(STUDENT).read("main", "README.md").decode()
    assert "| `task-03` |" in card and "knows 5 classes now" in card
    said = first.run("rename", STUDENT, "bee", "wasp", code=2)
    assert "runs/small is in use: its student has not been what me/small" in said
    said = first.run("rename", "runs/small", "bee", "wasp", code=4)
    assert "NOT PUSHED: the student." in said and "The change is stored." in said
    third.run("undo", STUDENT, "--push_to_hub", "true")
    third.run("undo", STUDENT, "--push_to_hub", "true")
    assert classes(hub, "task-05") == ["emmet", "bee", "cat", "dog"], "put back from the tag"
    assert classes(hub, "task-06") == ["ant", "bee", "cat", "dog"]
    assert "There is no change to undo" in third.run("undo", STUDENT, code=2)
    results = json.loads(hub.repository(STUDENT).read("main", "results.json"))
    assert [change["kind"] for change in results["changes"]] == ["rename", "add", "undo", "undo"]
    weights = [hub.repository(STUDENT).read(tags(hub)[tag], "model.safetensors") for tag in ("task-02", "task-06")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_run_that_was_pushed_pushes_its_changes(source: Path, hub: HubServer, tmp_path: Path) -> None:
    """By its training or, as here, by hf-cdl push."""
    here = Machine(hub, tmp_path / "here")
    ledger = json.loads((Path(shutil.copytree(source / "run", here.folder / "run")) / "run.json").read_text())
    del ledger["hub"]
    (here.folder / "run" / "run.json").write_text(json.dumps(ledger))
    here.run("push", "run", "--hub_model_id", STUDENT)
    assert "the newest task-03" in here.run("rename", "run", "ant", "emmet")
    assert "Pushed" not in here.run("rename", "run", "bee", "wasp", "--push_to_hub", "false")
    assert "task-04" not in tags(hub)
    hub.faults = [("commit", "500")] * 30
    said = here.run("merge", "run", "cat", "dog", "--as", "pet", code=4)
    assert "NOT PUSHED" in said and "Push it later with" in said
    hub.faults = []
    assert "2 tasks and 3 changes, the newest task-05" in here.run("push", "run")
    assert classes(hub, "task-04") == ["emmet", "wasp", "cat", "dog"] and classes(hub, "task-05")[2:] == ["pet"]


@pytest.mark.slow
def test_a_stranger_s_recipe_with_plugins_is_not_taken_over(source: Path, hub: HubServer, tmp_path: Path) -> None:
    results = json.loads((source / "run" / "results.json").read_text())
    shutil.copytree(source / "run" / "student" / "task-02", tmp_path / "theirs" / "student" / "task-02")
    results["recipe"]["plugins"] = ["evil.py"]
    (tmp_path / "theirs" / "results.json").write_text(json.dumps(results))
    here = Machine(hub, tmp_path / "here")
    (here.folder / "evil.py").write_text("open('footprint', 'w')\n")
    said = here.run("rename", tmp_path / "theirs", "ant", "emmet", code=2)
    assert "runs Python files, which were not run" in said
    assert not (here.folder / "footprint").exists() and not (here.folder / "runs").exists()


@pytest.mark.slow
def test_a_student_on_the_hub_in_use(source: Path, hub: HubServer, tmp_path: Path) -> None:
    """Its revisions answer and are measured as those of the run that was pushed, also when it was changed since."""
    machine = Machine(hub, tmp_path / "machine")
    of_run = json.loads((source / "run" / "results.json").read_text())["roles"]["student"]
    said = machine.run("predict", STUDENT, source / "new", "--revision", "task-01", "--workers", 0, "--out", "a.jsonl")
    assert f"{STUDENT} at task-01: 3 images in " in said
    assert f"on the run's own test images (4): {of_run['confidence'][0]:.1f} %" in said
    rows = [json.loads(line) for line in (machine.folder / "a.jsonl").read_text().splitlines()]
    assert [row.keys() >= {"image", "label", "score", "label_2"} for row in rows] == [True] * 3
    assert {row["label"] for row in rows} <= {"ant", "bee"}
    revisions = ("--revision", "task-01", "--revision", "task-02")
    machine.run("evaluate", STUDENT, source / "data", *revisions, "--workers", 0, "--out", "out")
    found = json.loads((machine.folder / "out" / "evaluation.json").read_text())["revisions"]
    for name, task, images in (("task-01", 0, 4), ("task-02", 1, 8)):
        assert found[name]["images"] == images
        assert found[name]["class_accuracy"] == pytest.approx(of_run["class_accuracy"][task])
    machine.run("rename", STUDENT, "ant", "emmet", "--push_to_hub", "true")
    said = machine.run("predict", STUDENT, source / "data" / "test", "--workers", 0, "--out", "b.csv")
    assert f"{STUDENT}: 8 images in " in said and "emmet" in (machine.folder / "b.csv").read_text()
    assert "its run recorded none to compare it with" in said  # it was taken over, and measured nothing
