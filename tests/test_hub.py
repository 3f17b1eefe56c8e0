"""Runs on the Hub: what arrives there is the run, whatever happens on the way, and nobody else's files are touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TRAIN
from hub_server import HubServer
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hf_cdl.hub import Pusher

STUDENT, TEACHER = "me/tiny", "me/tiny-teacher"
TOKEN = "hf_write"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", stall_seconds=0.3) as server:
        yield server


def environment(hub: HubServer, home: Path, **given: str) -> dict[str, str]:
    address = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**address, "HF_HOME": str(home), "HF_CDL_PUSH_DELAY": "0.01", **given}


def script(name: str, *arguments: Any, env: dict[str, str]) -> tuple[int, str]:
    command = [sys.executable, "-W", "error::UserWarning", str(TRAIN.with_name(name)), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


# ---- a run's folder, without training ----


def save_task(folder: Path, role: str, number: int, results: dict[str, Any]) -> None:
    """What a finished task leaves behind."""
    checkpoint = folder / role / f"task-{number:02d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps({"role": role, "tasks": number}))
    save_file({"w": torch.full((500,), float(number))}, checkpoint / "model.safetensors")
    entry = results["roles"].setdefault(role, {"accuracy_matrix": [], "counts": [], "metrics": {"forgetting": 0.0}})
    entry["accuracy_matrix"].append([50.0 + number + i for i in range(number)])
    entry["counts"].append(10)


def new_results(count: int) -> dict[str, Any]:
    names = [[f"class {task}{letter}" for letter in "ab"] for task in range(count)]
    return {"name": "tiny", "seed": 0, "stream": "abc", "recipe": {}, "class_names": names, "roles": {}}


def saved_run(folder: Path, count: int = 3, of: int = 3) -> dict[str, Any]:
    results = new_results(of)
    for number in range(1, count + 1):
        save_task(folder, "student", number, results)
    return results


class Said(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self)


def pusher(hub: HubServer, folder: Path, said: Said, **options: Any) -> Pusher:
    api = HfApi(hub.url, token=options.pop("token", TOKEN))
    options = {"repositories": {"student": STUDENT}, "say": said, "delay": 0.01, **options}
    return Pusher(folder, api=api, **options)


def titles(hub: HubServer, repo: str = STUDENT) -> list[str]:
    return [commit["title"] for commit in reversed(hub.repository(repo).history())]


def assert_whole(hub: HubServer, folder: Path, count: int, repo: str = STUDENT, role: str = "student") -> None:
    """One commit and one tag for each of the tasks, with the very files of the run, and main the newest of them."""
    repository = hub.repository(repo)
    tags = repository.refs("tags")
    assert list(tags) == [f"task-{number:02d}" for number in range(1, count + 1)]
    assert len(repository.history()) == count + 1, titles(hub, repo)
    for tag in tags:
        files = {path.name: path.read_bytes() for path in (folder / role / tag).iterdir()}
        assert set(repository.files(tag)) == {*files, ".gitattributes", "README.md", "results.json"}
        assert {name: repository.read(tag, name) for name in files} == files
    if tags:
        assert repository.refs("heads")["main"] == tags[f"task-{count:02d}"]


def test_every_task_is_pushed_with_its_own_state(hub: HubServer, tmp_path: Path) -> None:
    folder, said, results = tmp_path / "run", Said(), new_results(3)
    push = pusher(hub, folder, said)
    push.check(results)
    for number in (1, 2, 3):
        save_task(folder, "student", number, results)
        push.push(results)
    assert push.finish(results)
    assert_whole(hub, folder, 3)
    assert hub.repository(STUDENT).private
    assert titles(hub)[1:] == [
        "Task 1 of 3: classes class 0a, class 0b; average accuracy 51.0 %",
        "Task 2 of 3: classes class 1a, class 1b; average accuracy 52.5 %",
        "Task 3 of 3: classes class 2a, class 2b; average accuracy 54.0 %",
    ]
    for number in (1, 2, 3):
        there = json.loads(hub.repository(STUDENT).read(f"task-{number:02d}", "results.json"))
        assert there["roles"]["student"]["accuracy_matrix"] == results["roles"]["student"]["accuracy_matrix"][:number]
        assert there["finished"] == (number == 3) and there["roles"]["student"]["counts"] == [10] * number
        assert there["roles"]["student"]["metrics"] == {"forgetting": [0.0, 0.0, 0.0][0] if number < 2 else -1.0}
    assert said == [f"Pushed the student: {hub.url}/{STUDENT} (3 tasks, task-01 to task-03)"]


def test_what_is_there_is_not_pushed_again(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = saved_run(folder, 2)
    assert pusher(hub, folder, Said()).finish(results)
    hub.requests.clear()
    assert pusher(hub, folder, Said()).finish(results)
    assert {"commit", "tag", "upload", "preupload"}.isdisjoint(name for name, _ in hub.requests)
    save_task(folder, "student", 3, results)
    assert pusher(hub, folder, Said()).finish(results)
    assert_whole(hub, folder, 3)


@pytest.mark.parametrize("where", ["create", "refs", "preupload", "commit", "tag", "tree", "validate_yaml", "whoami"])
@pytest.mark.parametrize("kind", ["503", "429", "409", "cut", "lost", "stall"])
def test_a_fault_is_outlived(hub: HubServer, tmp_path: Path, where: str, kind: str) -> None:
    """Without a second commit, even if the first one's answer was lost."""
    folder, said = tmp_path / "run", Said()
    results = saved_run(folder, 1)
    if where == "preupload" and kind in ("503", "cut", "lost", "stall", "429"):
        pytest.skip("huggingface_hub tries again by itself, after seconds")
    hub.retry_after = 0
    hub.faults = [(where, kind)]
    assert pusher(hub, folder, said).finish(results), said.text
    assert hub.faults == []
    assert_whole(hub, folder, 1)
