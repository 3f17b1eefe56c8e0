"""Continuing from the Hub: a new task learnt from the two repositories equals what the run would have learnt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import make_recipe, picture, script, train, write_recipe
from hub_server import HubServer, environment
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hf_cdl.hub import HubError, read_origin

pytestmark = pytest.mark.slow
STUDENT, TEACHER = "me/tiny", "me/tiny-teacher"
PUSH = ("--push_to_hub", "true", "--push_teacher", "true")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones, data of 6 classes, a run of all three tasks, and one of the first two that is pushed to `hub`."""
    folder = tmp_path_factory.mktemp("source")
    recipe = make_recipe(folder, baselines=[])
    file = write_recipe(folder / "tiny.yaml", recipe)
    code, output = train(file, "--output_dir", folder / "whole")
    assert code == 0, output
    with HubServer(folder / "hub") as hub:
        env = environment(hub, folder / "home")
        code, output = train(file, "--data.max_classes", 4, "--output_dir", folder / "two", *PUSH, env=env)
        assert code == 0, output
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path) -> Iterator[HubServer]:
    """A separate Hub for each test, with the two pushed repositories."""
    shutil.copytree(source / "hub", tmp_path / "hub")
    with HubServer(tmp_path / "hub", stall_seconds=0.3) as server:
        yield server


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def add_task(hub: HubServer, empty: Path, data: Any, *words: Any, student: str = STUDENT) -> tuple[int, str]:
    env = environment(hub, empty.parent / "home")
    return script("add", student, data, *words, env=env, cwd=empty)


def class_folders(folder: Path, train: dict[str, int], test: dict[str, int], count: int = 6) -> Path:
    """Images of classes, name -> colour, in class folders."""
    for split, classes, first in (("train", train, 0), ("test", test, 10_000)):
        for name, label in classes.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture(label, first + number).save(folder / split / name / f"{number}.png")
    return folder


def state(folder: Path) -> dict[str, Any]:
    return {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}


def test_it_is_what_the_run_itself_would_have_learnt(source: Path, hub: HubServer, empty: Path) -> None:
    """With the same data, the third task learnt from the repositories is bit-identical to an uninterrupted run's."""
    before = {repo: hub.repository(repo).refs("tags") for repo in (STUDENT, TEACHER)}
    moved = empty.parent / "moved"
    shutil.copytree(source / "data", moved)
    code, output = add_task(hub, empty, moved, "--data.known_train", "ignore", *PUSH)
    assert code == 0, output
    folder = empty / "runs" / "tiny-moved"
    whole, results = (json.loads((run / "results.json").read_text()) for run in (source / "whole", folder))
    assert results["class_names"] == whole["class_names"]
    for role, repo in (("teacher", TEACHER), ("student", STUDENT)):
        assert state(folder / role / "task-03") == state(source / "whole" / role / "task-03")
        for key in ("accuracy_matrix", "correct", "counts", "metrics"):
            assert results["roles"][role][key] == whole["roles"][role][key]
        tags = hub.repository(repo).refs("tags")
        assert {name: tags[name] for name in before[repo]} == before[repo] and set(tags) - set(before[repo]) == {
            "task-03"
        }
        assert hub.repository(repo).refs("heads")["main"] == tags["task-03"]
        assert results["origin"]["roles"][role] == {
            "repository": repo,
            "commit": before[repo]["task-02"],
            "tags": before[repo],
        }
    student = results["roles"]["student"]["accuracy_matrix"]
    was, now = sum(student[1]) / 2, sum(student[2][:2]) / 2
    assert "student: accuracy (%) on earlier tasks, before and after task 3\n" in output
    assert output.splitlines()[-1].split() == ["mean", f"{was:.1f}", f"{now:.1f}", f"{now - was:.1f}"]

    code, output = add_task(hub, empty, moved, "--data.known_train", "ignore", *PUSH)  # once more: all is done
    assert code == 0 and "This run is finished." in output, output
    assert len(hub.repository(STUDENT).history()) == 4


def test_a_stranger_loads_the_new_tag(hub: HubServer, empty: Path, tmp_path: Path) -> None:
    """Only new classes, from class folders: nothing unmeasured appears as a number, and the tag can be loaded."""
    data = class_folders(tmp_path / "photos", {"ant": 20, "bee": 21}, {"ant": 20, "bee": 21})
    code, output = add_task(hub, empty, data, *PUSH, "--train.num_train_epochs", 3)
    assert code == 0, output
    assert "student" in output and "% (on 1 of 3 tasks)" in output
    assert "There are no test images of earlier tasks in the data: what was forgotten is not known." in output
    results = json.loads((empty / "runs" / "tiny-photos" / "results.json").read_text())
    entry = results["roles"]["student"]
    assert entry["accuracy_matrix"][2][:2] == [None, None] and entry["accuracy_matrix"][2][2] >= 0
    assert entry["counts"] == [6, 6, 12] and entry["metrics"]["forgetting"] is None
    assert "NaN" not in (empty / "runs" / "tiny-photos" / "results.json").read_text()
    card = hub.repository(STUDENT).read("main", "README.md").decode()
    assert "nan" not in card.lower() and "accuracy on task 3 after task 3 of 3" in card
    assert "Tasks 1 to 2 were learnt in an earlier run" in card
    env = {**os.environ, **environment(hub, tmp_path / "fresh")}
    call = "import hf_cdl, sys, json; from transformers import pipeline; " + (
        "print(json.dumps([pipeline('image-classification', model='me/tiny', revision=r)(sys.argv[1], top_k=9) "
        "for r in ('task-02', 'task-03')]))"
    )
    image = data / "test" / "bee" / "0.png"
    done = subprocess.run(
        [sys.executable, "-c", call, str(image)], env=env, capture_output=True, text=True, check=True
    )
    old, new = json.loads(done.stdout.splitlines()[-1])
    assert {guess["label"] for guess in new} - {guess["label"] for guess in old} == {"ant", "bee"}


def test_killed_and_going_on(source: Path, hub: HubServer, empty: Path) -> None:
    """Killed during download, training and push: the same command finishes as if nothing had happened."""
    words = ("--data.known_train", "ignore", "--train.num_train_epochs", "2", *PUSH)
    command = [sys.executable, "-m", "hf_cdl", "add", STUDENT, str(source / "data"), *words]
    folder = empty / "runs" / "tiny-data"
    env = {**os.environ, **environment(hub, empty.parent / "home", OMP_NUM_THREADS="1")}
    hub.stall_seconds = 120
    for faults, arrived in (
        ([("resolve", "stall")], lambda: hub.faults == []),
        ([], lambda: any(folder.glob("work/student-task-03/checkpoint-*"))),
        ([("commit", "stall")], lambda: hub.faults == []),
    ):
        hub.faults = list(faults)
        process = subprocess.Popen(command, cwd=empty, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not arrived():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, output = add_task(hub, empty, source / "data", *words)
    assert code == 0, output
    assert state(folder / "student" / "task-03") == state(source / "whole" / "student" / "task-03")
    assert [len(hub.repository(repo).history()) for repo in (STUDENT, TEACHER)] == [4, 4]
    assert not list(folder.parent.glob(".*"))


def test_refused_before_training(source: Path, hub: HubServer, empty: Path, tmp_path: Path) -> None:
    code, output = add_task(hub, empty, source / "data", *PUSH)
    assert code == 2 and "class a (task 1), class b (task 1), class c (task 2)" in output, output
    assert "--data.known_train ignore" in output and "Traceback" not in output
    code, output = add_task(hub, empty, source / "data", "--student.prompt.length", 6)
    assert code == 2 and "student.prompt: the models are as they were published." in output, output
    code, output = add_task(hub, empty, source / "data", student="me/nothing")
    assert code == 2 and "me/nothing: no such repository, or this token may not see it." in output, output
    code, output = add_task(hub, empty, source / "data", "--teacher", STUDENT, "--output_dir", "other")
    assert code == 2 and "me/tiny at task-02 is not a teacher of 2 tasks" in output, output
    assert hub.repository(STUDENT).refs("tags").keys() == {"task-01", "task-02"}
    assert not list(empty.glob("runs/*/*/task-03"))
    # a run can continue from an earlier state, but not into a repository with later ones
    words = ("--data.known_train", "ignore", "--revision", "task-01", "--output_dir", "early")
    code, output = add_task(hub, empty, source / "data", *words, *PUSH)
    assert code == 2 and "holds the tag task-02, which this run has not come to" in output, output


def test_one_new_class_is_refused_and_the_same_command_learns_two(hub: HubServer, empty: Path, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "photos", {"ant": 20}, {"ant": 20})
    words = ("--train.num_train_epochs", 1)
    for more in ((), PUSH):
        code, output = add_task(hub, empty, data, *words, *more)
        assert code == 2 and "teacher cannot learn task 3, which has one class ('ant')" in output, output
        assert "Traceback" not in output and "Checking images" not in output
    assert hub.repository(STUDENT).refs("tags").keys() == {"task-01", "task-02"}
    class_folders(data, {"bee": 21}, {"bee": 21})
    code, output = add_task(hub, empty, data, *words)
    assert code == 0, output
    results = json.loads((empty / "runs" / "tiny-photos" / "results.json").read_text())
    assert results["class_names"][2] == ["ant", "bee"]


def test_into_repositories_of_ones_own(source: Path, hub: HubServer, empty: Path) -> None:
    """The inherited state is pushed first, so that the new repository is complete; the old ones do not change."""
    before = {repo: hub.repository(repo).history() for repo in (STUDENT, TEACHER)}
    words = ("--data.known_train", "ignore", "--train.num_train_epochs", 1, "--hub_model_id", "me/mine")
    code, output = add_task(hub, empty, source / "data", *words, *PUSH)
    assert code == 0, output
    for repo in ("me/mine", "me/mine-teacher"):
        assert list(hub.repository(repo).refs("tags")) == ["task-02", "task-03"]
    assert {repo: hub.repository(repo).history() for repo in before} == before


def test_a_head_of_class_means_goes_on_without_a_teacher(source: Path, tmp_path: Path, empty: Path) -> None:
    """A small checkpoint whose backbone is in another place here: the user can name it."""
    recipe = yaml.safe_load((source / "tiny.yaml").read_text())
    recipe["student"] = {"backbone": str(tmp_path / "there"), "head": {"type": "ncm"}}
    shutil.copytree(source / "student", tmp_path / "there")
    recipe.update(teacher=None, distill=[], ce_weight=1.0, save_backbone=False)
    file = write_recipe(tmp_path / "ncm.yaml", recipe)
    with HubServer(tmp_path / "hub") as hub:
        words = ("--data.max_classes", 4, "--output_dir", tmp_path / "two", "--push_to_hub", "true")
        code, output = train(file, *words, env=environment(hub, tmp_path / "home"))
        assert code == 0 and f"'{tmp_path / 'there'}' is a folder of this machine" in output, output
    code, output = train(file, "--output_dir", tmp_path / "whole")
    assert code == 0, output
    shutil.move(tmp_path / "there", empty / "here")
    with HubServer(tmp_path / "hub") as hub:
        words = ("--data.known_train", "ignore", "--output_dir", "runs/tiny-data")
        code, output = add_task(hub, empty, source / "data", *words)
        assert code == 2 and "(in a recipe: the section's backbone)" in output, output
        code, output = add_task(hub, empty, source / "data", *words, "--student.backbone", "here")
        assert code == 0, output
    added, whole = (run / "student" / "task-03" for run in (empty / "runs" / "tiny-data", tmp_path / "whole"))
    assert state(added) == state(whole)


@pytest.mark.parametrize("failing", ["list_repo_refs", "list_repo_tree", "hf_hub_download"])
def test_without_a_network_there_is_no_traceback(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    api, nowhere = HfApi(hub.url, token="hf_write"), HfApi("http://127.0.0.1:9")
    monkeypatch.setattr(api, failing, getattr(nowhere, failing))
    with pytest.raises(HubError, match=rf"{STUDENT} cannot be read now \(\w+\)\. Try again, with a network"):
        read_origin(api, STUDENT, "student")


def test_origins_that_cannot_be(hub: HubServer) -> None:
    api = HfApi(hub.url, token="hf_write")
    assert read_origin(api, STUDENT, "student").tasks == 2
    with pytest.raises(HubError, match=r"has no tag task-07 to continue from; its tags: task-01, task-02\."):
        read_origin(api, STUDENT, "student", "task-07")
    api.create_repo("me/empty")
    with pytest.raises(HubError, match=r"no tag task-NN to continue from; its tags: none\."):
        read_origin(api, "me/empty", "student")
