"""Runs on the Hub: what arrives is the run, whatever happens on the way, and other people's files are untouched."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.utils._http
import pytest
import torch
import yaml
from helpers import TRAIN, interrupt_when, make_recipe, python, script, train, write_recipe
from hub_server import TOKEN, Failure, HubServer, environment
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load, save_file

from hf_cdl.commands import push as push_recipe
from hf_cdl.hub import HubError, Pusher
from hf_cdl.recipe import RecipeError, build_recipe
from hf_cdl.runs.ledger import new_ledger
from hf_cdl.runs.pictures import plotting_available
from hf_cdl.runs.run import Run

STUDENT, TEACHER = "me/tiny", "me/tiny-teacher"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", stall_seconds=0.3) as server:
        yield server


# ---- a run's folder, without training ----


def save_task(folder: Path, role: str, number: int, results: dict[str, Any]) -> None:
    """Write what a finished task leaves behind."""
    checkpoint = folder / role / f"task-{number:02d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps({"role": role, "tasks": number}))
    save_file({"w": torch.full((500,), float(number))}, checkpoint / "model.safetensors")
    lists: dict[str, Any] = {name: [] for name in ("accuracy_matrix", "counts", "train_seconds", "peak_memory_bytes")}
    entry = results["roles"].setdefault(role, {**lists, "metrics": {"forgetting": 0.0}})
    learnt = {"accuracy_matrix": [50.0 + number + i for i in range(number)], "counts": 10}
    for name, value in {**learnt, "train_seconds": 1.0, "peak_memory_bytes": 2**20}.items():
        entry[name].append(value)


def new_results(count: int) -> dict[str, Any]:
    names = [[f"class {task}{letter}" for letter in "ab"] for task in range(count)]
    recipe = {"name": "tiny", "data": {"path": "data"}, "teacher": {"backbone": "t"}, "student": {"backbone": "s"}}
    about = {"name": "tiny", "seed": 0, "stream": "abc", "versions": {}, "recipe": build_recipe(recipe).as_dict()}
    return {**about, "class_names": names, "roles": {}}


def saved_run(folder: Path, count: int = 3, of: int = 3) -> dict[str, Any]:
    results = new_results(of)
    for number in range(1, count + 1):
        save_task(folder, "student", number, results)
    return results


def wait_until(arrived: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not arrived():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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
    """Check for one commit and one tag per task with exactly the run's files, and main at the newest."""
    repository = hub.repository(repo)
    tags = repository.refs("tags")
    assert list(tags) == [f"task-{number:02d}" for number in range(1, count + 1)]
    assert len(repository.history()) == count + 1, titles(hub, repo)
    for tag in tags:
        files = {path.name: path.read_bytes() for path in (folder / role / tag).iterdir()}
        documents = {"README.md", "results.json", *(["accuracy_matrix.png"] if plotting_available() else [])}
        assert set(repository.files(tag)) == {*files, ".gitattributes", *documents}
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
        assert there["roles"]["student"]["metrics"] == {"forgetting": 0.0 if number == 1 else -1.0}
    told = f"Pushed the student: {hub.url}/{STUDENT} (3 tasks, the newest task-03)"
    assert [text for text in said if not text.startswith("Waiting for the Hub")] == [told]  # the machine may be slow


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


def test_what_tasks_share_is_uploaded_once(hub: HubServer, tmp_path: Path) -> None:
    """Also by another name: the number of files is part of it."""
    folder, results = tmp_path / "run", new_results(3)
    for number, name in enumerate(("00001-of-00002", "00001-of-00002", "00001-of-00003"), start=1):
        save_task(folder, "student", number, results)
        checkpoint, shared = folder / "student" / f"task-{number:02d}", tmp_path / "shared.safetensors"
        (checkpoint / "model.safetensors").rename(checkpoint / "model-00002-of-00002.safetensors")
        if number == 1:
            save_file({"v": torch.arange(9000.0)}, shared)
        os.link(shared, checkpoint / f"model-{name}.safetensors")
        assert pusher(hub, folder, Said()).finish(results)
    assert_whole(hub, folder, 3)
    uploads = [name for name, _ in hub.requests].count("upload")
    assert uploads == 4, "the shared file, and one of each task alone"


PLACES = ("create", "refs", "preupload", "commit", "tag", "tree", "validate_yaml", "whoami")
FAULTS = ("503", "429", "409", "cut", "lost", "stall")


@pytest.mark.parametrize(
    ("where", "kind"),
    [  # the fast tier has every kind where a push can leave a second commit, and one kind at every other place
        pytest.param(where, kind, marks=() if where == "commit" or place % len(FAULTS) == fault else pytest.mark.slow)
        for place, where in enumerate(PLACES)
        for fault, kind in enumerate(FAULTS)
    ],
)
def test_a_fault_is_outlived(
    hub: HubServer, tmp_path: Path, where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a second commit, even if the first one's answer was lost."""
    hurry(monkeypatch)
    folder, said = tmp_path / "run", Said()
    results = saved_run(folder, 1)
    hub.retry_after = 0
    hub.faults = [(where, kind)]
    assert pusher(hub, folder, said).finish(results), said.text
    assert hub.faults == []
    assert_whole(hub, folder, 1)


def test_the_hub_is_waited_for_as_long_as_it_asks(hub: HubServer, tmp_path: Path) -> None:
    results, started = saved_run(tmp_path / "run", 1), time.monotonic()
    hub.faults = [("tag", "429")]
    assert pusher(hub, tmp_path / "run", Said()).finish(results)
    assert time.monotonic() - started > hub.retry_after == 1


def test_what_could_not_be_pushed_comes_with_the_next_task(hub: HubServer, tmp_path: Path) -> None:
    folder, said, results = tmp_path / "run", Said(), new_results(2)
    push = pusher(hub, folder, said)
    save_task(folder, "student", 1, results)
    hub.faults = [("commit", "403")]
    push.push(results)
    wait_until(lambda: push.problems != {})
    save_task(folder, "student", 2, results)
    push.push(results)
    assert "could not be pushed so far: me/tiny: the Hub answers 403 (injected 403)." in said.text
    assert push.finish(results)
    assert_whole(hub, folder, 2)


def test_a_push_that_fails_is_said_with_its_reason_and_command(hub: HubServer, tmp_path: Path) -> None:
    folder, said = tmp_path / "run", Said()
    results = saved_run(folder, 2)
    hub.faults = [("commit", "lost"), *[("commit", "507")] * 20]
    assert not pusher(hub, folder, said).finish(results)
    assert "NOT PUSHED: the student. me/tiny: the Hub answers 507 (injected 507)." in said.text
    assert f"The run itself is whole in {folder}/. Push it later with:" in said.text
    assert said.text.endswith(f"\n  python -m hf_cdl push {folder}")
    assert len(titles(hub)) == 2 and list(hub.repository(STUDENT).refs("tags")) == ["task-01"]
    hub.faults = []
    assert pusher(hub, folder, said).finish(results)
    assert_whole(hub, folder, 2)


def test_a_silent_hub_does_not_hold_the_end(hub: HubServer, tmp_path: Path) -> None:
    results, said = saved_run(tmp_path / "run", 1), Said()
    hub.stall_seconds = 5
    hub.faults = [("refs", "stall")] * 9
    assert not pusher(hub, tmp_path / "run", said, patience=0.1).finish(results)
    assert "Waiting for the Hub. Ctrl-C ends the waiting" in said[0]
    assert "NOT PUSHED: the student. The Hub took nothing for 0.1 s." in said.text


def test_a_hub_that_cannot_be_reached_does_not_stop_training(hub: HubServer, tmp_path: Path) -> None:
    folder, said = tmp_path / "run", Said()
    results = saved_run(folder, 1)
    with HubServer(tmp_path / "gone") as gone:
        pass
    push = pusher(gone, folder, said)
    push.check(results)
    assert "The Hub cannot be reached now (ConnectError" in said[0] and "The run continues" in said[0]
    push.push(results)
    assert not push.finish(results)
    assert "NOT PUSHED: the student. ConnectError" in said.text
    assert pusher(hub, folder, said).finish(results)
    assert_whole(hub, folder, 1)


@pytest.mark.slow
def test_two_pushes_at_once_make_no_second_commit(hub: HubServer, tmp_path: Path) -> None:
    results = saved_run(tmp_path / "run", 3)
    pushes = [pusher(hub, tmp_path / "run", Said()) for _ in range(3)]
    for push in pushes:
        push.push(results)
    assert [push.finish(results) for push in pushes] == [True] * 3
    assert_whole(hub, tmp_path / "run", 3)


# ---- what is refused before training ----


def refusal(hub: HubServer, folder: Path, results: dict[str, Any], **options: Any) -> str:
    """The error message before training; nothing on the Hub may change."""
    before = {file: file.read_bytes() for file in hub.root.rglob("*") if file.is_file()}
    with pytest.raises(HubError) as error:
        pusher(hub, folder, Said(), **options).check(results)
    assert {file: file.read_bytes() for file in hub.root.rglob("*") if file.is_file()} == before
    return str(error.value)


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_wrong", STUDENT, "the Hub answers 401 (Invalid credentials in Authorization header). Log in with"),
        ("hf_read", STUDENT, "the Hub answers 403 (You don't have the rights to write under the namespace 'me')."),
        ("hf_write", "someone/tiny", "The token must be allowed to write to someone/tiny."),
    ],
)
def test_a_token_without_the_right_is_refused(
    hub: HubServer, tmp_path: Path, token: str, repo: str, message: str
) -> None:
    said = refusal(hub, tmp_path / "run", new_results(2), token=token, repositories={"student": repo})
    assert message in said and token not in said


def test_a_token_is_not_repeated_even_if_the_hub_does(hub: HubServer, tmp_path: Path) -> None:
    hub.faults = [("whoami", "echo")]
    said = refusal(hub, tmp_path / "run", new_results(2))
    assert "the Hub answers 403 (Bearer ***)" in said and TOKEN not in said


def test_what_somebody_else_put_there_is_never_overwritten(hub: HubServer, tmp_path: Path) -> None:
    """A file, a model without tags, another run with tags, a run with more tasks."""
    api, empty = HfApi(hub.url, token=TOKEN), new_results(3)
    api.create_repo(STUDENT)
    api.create_commit(STUDENT, [CommitOperationAdd("thesis.txt", b"mine")], commit_message="Mine")
    said = refusal(hub, tmp_path / "run", empty)
    assert f"{STUDENT} on the Hub holds 2 files in main that are not this run's (.gitattributes, thesis.txt)." in said
    assert "Choose another repository with --hub_model_id NAME, or delete this one" in said

    ours, further, other = tmp_path / "ours", tmp_path / "further", tmp_path / "other"
    repositories = {"student": "me/two"}
    assert pusher(hub, further, Said(), repositories=repositories).finish(saved_run(further, 2))
    said = refusal(hub, tmp_path / "run", empty, repositories=repositories)
    assert "me/two on the Hub holds the tag task-01, which this run has not come to (task-01, task-02)" in said
    results = saved_run(ours, 1)
    said = refusal(hub, ours, results, repositories=repositories)
    assert "holds the tag task-02, which this run has not come to" in said
    results = saved_run(other, 2)
    (other / "student" / "task-02" / "config.json").write_text("{}")
    assert "the tag task-02 with another model" in refusal(hub, other, results, repositories=repositories)
    results = saved_run(further.with_name("again"), 2)
    pusher(hub, further.with_name("again"), Said(), repositories=repositories).check(
        results
    )  # the same, byte for byte
    api.create_commit("me/two", [CommitOperationAdd("note.txt", b"mine")], commit_message="Mine")
    assert "files in main that are not this run's" in refusal(hub, further, results, repositories=repositories)


def test_foreign_content_that_appears_during_a_run_is_not_overwritten(hub: HubServer, tmp_path: Path) -> None:
    folder, said = tmp_path / "run", Said()
    results = saved_run(folder, 1)
    assert pusher(hub, folder, Said()).finish(results)
    api = HfApi(hub.url, token=TOKEN)
    api.create_commit(STUDENT, [CommitOperationAdd("config.json", b"{}")], commit_message="Mine")
    save_task(folder, "student", 2, results)
    assert not pusher(hub, folder, said).finish(results)
    assert "NOT PUSHED: the student. me/tiny on the Hub holds" in said.text and titles(hub)[-1] == "Mine"


def test_a_card_that_was_edited_on_the_hub_stays(hub: HubServer, tmp_path: Path) -> None:
    folder, results = tmp_path / "run", saved_run(tmp_path / "run", 1)
    assert pusher(hub, folder, Said()).finish(results)
    api = HfApi(hub.url, token=TOKEN)
    api.create_commit(STUDENT, [CommitOperationAdd("README.md", b"---\ntags: [x]\n---\nMine")], commit_message="Mine")
    for number in (2, 3):
        save_task(folder, "student", number, results)
        assert pusher(hub, folder, Said()).finish(results)
    repository = hub.repository(STUDENT)
    assert [commit["title"][:6] for commit in repository.history()] == ["Task 3", "Task 2", "Mine", "Task 1", "initia"]
    assert b"Mine" in repository.read("task-03", "README.md") and b"Mine" not in repository.read(
        "task-01", "README.md"
    )


def test_files_that_are_gone_from_a_checkpoint_go_from_main(hub: HubServer, tmp_path: Path) -> None:
    folder, results = tmp_path / "run", saved_run(tmp_path / "run", 2)
    (folder / "student" / "task-01" / "model-00001-of-00002.safetensors").write_bytes(b"shard")
    assert pusher(hub, folder, Said()).finish(results)
    assert_whole(hub, folder, 2)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "data.pkl", "notes.txt", "more.json", "evil.py"])
def test_nothing_is_pushed_that_a_checkpoint_has_not(hub: HubServer, tmp_path: Path, name: str) -> None:
    results, said = saved_run(tmp_path / "run", 1), Said()
    (tmp_path / "run" / "student" / "task-01" / name).write_bytes(b"x")
    assert not pusher(hub, tmp_path / "run", said).finish(results)
    assert f"{name} is not pushed: hf_cdl wrote no such file" in said.text
    assert hub.repository(STUDENT).refs("tags") == {}


# ---- as processes ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_recipe(folder / "recipe.yaml", make_recipe(folder, baselines=[]))


PUSH = ("--push_to_hub", "true", "--push_teacher", "true")


@pytest.fixture(scope="module")
def pushed(tiny: Path) -> Iterator[tuple[Path, HubServer, str]]:
    """A run with pushed teacher and student: its folder, the Hub, and its output."""
    with HubServer(tiny.parent / "hub") as hub:
        folder = tiny.parent / "run"
        code, output = train(tiny, "--output_dir", folder, *PUSH, env=environment(hub, tiny.parent / "home"))
        assert code == 0, output
        yield folder, hub, output


_FRESH = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
import hf_cdl
from hf_cdl import StreamConfig, TaskStream
data, rows = json.loads(sys.argv[1]), {}
for word in sys.argv[2:]:
    repo, tag = word.split("@")
    model = AutoModelForImageClassification.from_pretrained(repo, revision=tag).eval()
    processor = AutoImageProcessor.from_pretrained(repo, revision=tag)
    row = []
    for task in list(TaskStream(StreamConfig(**data), processor))[: len(model.config.tasks)]:
        with torch.no_grad():
            samples = [task.test[i] for i in range(len(task.test))]
            logits = model(pixel_values=torch.stack([sample["pixel_values"] for sample in samples])).logits
        right = sum(int(a) == sample["labels"] for a, sample in zip(logits.argmax(-1), samples))
        row.append(100 * right / len(samples))
    rows[word] = row
print(json.dumps(rows))
"""


def assert_reproduced(
    folder: Path, hub: HubServer, repositories: dict[str, str], home: Path, cwd: Path | None = None
) -> None:
    """Check that a separate process with an empty cache can load every tag and repeat its accuracies."""
    results = json.loads((folder / "results.json").read_text())
    stored = {
        f"{repo}@task-{number:02d}": row
        for role, repo in repositories.items()
        for number, row in enumerate(results["roles"][role]["accuracy_matrix"], 1)
    }
    data = json.dumps(results["recipe"]["data"])
    said = python(_FRESH, data, *stored, env=environment(hub, home), cwd=cwd or ".")
    assert json.loads(said.splitlines()[-1]) == stored


def test_a_run_is_pushed_while_it_goes_on(pushed: tuple[Path, HubServer, str]) -> None:
    folder, hub, output = pushed
    assert_whole(hub, folder, 3)
    assert_whole(hub, folder, 3, TEACHER, "teacher")
    for role, repo in (("student", STUDENT), ("teacher", TEACHER)):
        assert f"Pushed the {role}: {hub.url}/{repo} (3 tasks, the newest task-03)\n" in output
    assert "Traceback" not in output and "Warning" not in output and "HTTP" not in output
    matrix = json.loads((folder / "results.json").read_text())["roles"]["student"]["accuracy_matrix"]
    for number, cost in enumerate(("In use: measured at the end", "In use: measured at the end", "Latency: "), 1):
        assert cost in hub.repository(STUDENT).read(f"task-{number:02d}", "README.md").decode()
    expected = f"Task 2 of 3: classes class c, class d; average accuracy {sum(matrix[1]) / 2:.1f} %"
    assert titles(hub)[2] == expected


def test_every_tag_repeats_its_accuracies_in_a_fresh_process(
    pushed: tuple[Path, HubServer, str], tmp_path: Path
) -> None:
    folder, hub, _ = pushed
    assert_reproduced(folder, hub, {"student": STUDENT, "teacher": TEACHER}, tmp_path / "home")


def test_the_token_is_nowhere(pushed: tuple[Path, HubServer, str]) -> None:
    folder, hub, output = pushed
    assert TOKEN not in output
    for file in [*folder.rglob("*"), *hub.root.rglob("*")]:
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_where_a_run_is_pushed_is_no_part_of_its_recipe(
    pushed: tuple[Path, HubServer, str], tiny: Path, hub: HubServer, tmp_path: Path
) -> None:
    """The same finished run is pushed elsewhere by the same command, then by hf-cdl push from its folder alone."""
    folder = shutil.copytree(pushed[0], tmp_path / "run")
    assert not any("hub" in key for key in json.loads((folder / "results.json").read_text())["recipe"])
    words = (
        "--output_dir",
        folder,
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "me/again",
        "--hub_private_repo",
        False,
    )
    code, output = train(tiny, *words, env=environment(hub, tmp_path / "home"))
    assert code == 0, output
    assert output.startswith("This run is finished.") and f"Pushed the student: {hub.url}/me/again (3 tasks" in output
    assert_whole(hub, folder, 3, "me/again")
    assert not hub.repository("me/again").private
    with HubServer(tmp_path / "another hub") as another:
        code, output = script("push", folder, env=environment(another, tmp_path / "home"))
        assert code == 0, output
        assert_whole(another, folder, 3, "me/again")
        assert not another.repository("me/again").private and len(list((another.root / "repos").glob("*/*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["upload", "commit", "tag"])
def test_a_push_that_is_killed_goes_on(
    pushed: tuple[Path, HubServer, str], hub: HubServer, tmp_path: Path, operation: str
) -> None:
    folder, env = pushed[0], environment(hub, tmp_path / "home")
    hub.stall_seconds, hub.faults = 120, [(operation, "stall")]
    process = subprocess.Popen([sys.executable, "-m", "hf_cdl", "push", str(folder)], env={**os.environ, **env})
    wait_until(lambda: hub.faults == [])
    process.kill()
    process.wait()
    assert hub.repository(STUDENT).refs("tags") == {}
    code, output = script("push", folder, env=env)
    assert code == 0, output
    assert_whole(hub, folder, 3)
    assert_whole(hub, folder, 3, TEACHER, "teacher")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        pytest.param("hf_wrong", "error: me/tiny: the Hub answers 401", marks=pytest.mark.slow),
        ("", "error: There is no token to push to me/tiny with. Log in with `hf auth login`, or set HF_TOKEN."),
        pytest.param("hf_read", "error: me/tiny: the Hub answers 403", marks=pytest.mark.slow),
    ],
)
def test_push_refuses_a_token_without_the_right(
    pushed: tuple[Path, HubServer, str], hub: HubServer, tmp_path: Path, token: str, message: str
) -> None:
    """Even for an existing repository, which a read token can see."""
    HfApi(hub.url, token=TOKEN).create_repo(STUDENT)
    env = environment(hub, tmp_path / "home", HF_TOKEN=token)
    code, output = script("push", pushed[0], "--hub_model_id", STUDENT, env=env)
    assert code == 2 and message in output and "Traceback" not in output, output
    assert not token or token not in output
    assert titles(hub) == ["initial commit"]


@pytest.mark.slow
def test_push_says_what_it_needs(tmp_path: Path, hub: HubServer) -> None:
    code, output = script("push", tmp_path, env=environment(hub, tmp_path / "home"))
    assert code == 2 and f"error: {tmp_path} holds no run" in output


@pytest.mark.slow
def test_train_refuses_foreign_content_before_training(tiny: Path, hub: HubServer, tmp_path: Path) -> None:
    api = HfApi(hub.url, token=TOKEN)
    api.create_repo(STUDENT)
    api.create_commit(STUDENT, [CommitOperationAdd("thesis.txt", b"mine")], commit_message="Mine")
    words = ("--output_dir", tmp_path / "run", "--push_to_hub", "true")
    code, output = train(tiny, *words, env=environment(hub, tmp_path / "home"))
    assert code == 2 and "error: me/tiny on the Hub holds 2 files" in output and "thesis.txt" in output, output
    assert "task 1/3" not in output and "Traceback" not in output


@pytest.mark.slow
def test_a_run_without_a_hub_is_whole_and_pushed_later(tiny: Path, hub: HubServer, tmp_path: Path) -> None:
    """Also a finished run that should go elsewhere; by the printed command, unchanged, from that folder."""
    folder, home = Path("it's a run"), tmp_path / "home"
    with HubServer(tmp_path / "gone") as gone:
        pass
    words = (tiny, "--output_dir", folder, "--push_to_hub", "true", "--hub_model_id")
    code, output = train(*words, STUDENT, env=environment(gone, home), cwd=tmp_path)
    assert code == 4, output
    assert "The Hub cannot be reached now (ConnectError" in output and "task 3/3" in output
    assert "NOT PUSHED: the student. ConnectError" in output and "Traceback" not in output
    for name in (STUDENT, "me/elsewhere"):
        code, output = train(*words, name, env=environment(gone, home), cwd=tmp_path)
        assert code == 4 and "This run is finished." in output, output
        line = output.split("Push it later with:\n")[1].splitlines()[0]
        options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, **environment(hub, home)}}
        done = subprocess.run(line, shell=True, capture_output=True, text=True, **options)
        assert done.returncode == 0, (line, done.stdout + done.stderr)
        assert_whole(hub, tmp_path / folder, 3, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push_teacher", "maybe"], "argument --push_teacher: it is 'maybe', but takes true or false"),
        (["--hub_private_repo", "0"], "argument --hub_private_repo: it is '0', but takes true or false"),
        (["--hub_private_repo", "[tru"], "argument --hub_private_repo: it is '[tru', but takes true or false"),
        (["--hub_model", "me/tiny"], "unrecognized arguments: --hub_model me/tiny"),
    ],
)
def test_push_takes_no_other_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        push_recipe.main([str(tmp_path), *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and len(said.splitlines()) <= 6


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        ("", "run.json is not a readable ledger (JSONDecodeError"),
        ("[]", "run.json is not a readable ledger (the file: "),
        ("null", "run.json is not a readable ledger (the file: "),
        ('{"recipe": 3}', "run.json is not a readable ledger (recipe: "),
        ('{"entries": {}}', "run.json is not a readable ledger (recipe: Field required)"),
        (json.dumps({**new_ledger({}), "hub": 3}), "run.json is not a readable ledger (hub: "),
        (json.dumps(new_ledger({})), "did not say where to push it; give --hub_model_id NAME"),
    ],
)
def test_push_says_what_is_wrong_with_a_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ledger: str, message: str
) -> None:
    (tmp_path / "run.json").write_text(ledger)
    assert push_recipe.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_push_has_nothing_to_push_before_a_task_is_finished(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = build_recipe(yaml.safe_load(tiny.read_text())).as_dict()
    Run(tmp_path / "run", recipe).bind("abc", [["a"], ["b"]])
    assert push_recipe.main([str(tmp_path / "run"), "--hub_model_id", "me/tiny"]) == 2
    assert "has not finished a task yet: there is nothing to push" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hub_model_id": "a name"}, "'hub_model_id' cannot name a repository on the Hub: Repo id must use"),
        ({"name": "a name"}, "'name' cannot name a repository on the Hub"),
        ({"push_teacher": True, "teacher": None, "distill": [], "ce_weight": 1.0}, "there is no teacher"),
        ({"hub_strategy": "sometimes"}, "'hub_strategy' is 'sometimes'"),
        ({"train": {"push_to_hub": True}}, "'train.push_to_hub': set 'push_to_hub' at the top level of the recipe"),
        ({"train": {"hub_token": "hf_secret"}}, "'train.hub_token' has no place in a recipe"),
    ],
)
def test_a_recipe_that_cannot_be_pushed_is_refused(tiny: Path, fields: dict[str, Any], message: str) -> None:
    content = {**yaml.safe_load(tiny.read_text()), "push_to_hub": True, **fields}
    with pytest.raises(RecipeError) as error:
        build_recipe(content)
    assert message in str(error.value) and "hf_secret" not in str(error.value)


# ---- slow ----


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["create", "preupload", "upload", "commit", "tag"])
def test_a_run_that_is_killed_while_it_pushes_goes_on(
    tiny: Path, hub: HubServer, tmp_path: Path, operation: str
) -> None:
    """The same command completes run and push; nothing is duplicated."""
    folder, env = tmp_path / "run", environment(hub, tmp_path / "home")
    hub.stall_seconds, hub.faults = 120, [(operation, "stall")]
    code, _ = interrupt_when(lambda: hub.faults == [], tiny, "--output_dir", folder, *PUSH, env=env)
    assert code == -signal.SIGKILL
    code, output = train(tiny, "--output_dir", folder, *PUSH, env=env)
    assert code == 0, output
    assert_whole(hub, folder, 3)
    assert_whole(hub, folder, 3, TEACHER, "teacher")


@pytest.mark.slow
def test_the_commands_of_the_guide(hub: HubServer, tmp_path: Path) -> None:
    """The quickstart with fewer epochs on the Hub; every tag gives back what was pushed."""
    (tmp_path / "recipes").symlink_to(TRAIN.parent)
    guide = (TRAIN.parent.parent / "docs" / "guides" / "hub.md").read_text()
    _, train_line = re.findall(r"<!-- share-commands -->\n<!--.*-->\n```bash\n(.*)\n(.*)\n```", guide)[0]
    [push_line] = re.findall(r"<!-- push-command -->\n<!--.*-->\n```bash\n(.*)\n```", guide)
    given = {**environment(hub, tmp_path / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in (f"{train_line} --train.num_train_epochs 2", push_line):
        command: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, **given}, "capture_output": True}
        done = subprocess.run(shlex.split(line), text=True, **command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Pushed the student: {hub.url}/me/quickstart (5 tasks, the newest task-05)" in done.stdout
    folder = tmp_path / "runs" / "quickstart"
    repositories = {"student": "me/quickstart", "teacher": "me/quickstart-teacher"}
    for role, repo in repositories.items():
        assert_whole(hub, folder, 5, repo, role)
    assert_reproduced(folder, hub, repositories, tmp_path / "fresh")

    before = hub.received
    small = "--save_backbone false --push_teacher false --hub_model_id small --output_dir runs/small --baselines []"
    words = f"{train_line} --train.num_train_epochs 2 --teacher_from runs/quickstart {small}"
    done = subprocess.run(shlex.split(words), text=True, **command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (hub.received - before) / 5 < 1e6, "bytes a task, of checkpoint, card and picture"
    assert_reproduced(tmp_path / "runs" / "small", hub, {"student": "me/small"}, tmp_path / "fresh-small", tmp_path)


@contextmanager
def watched(hub: HubServer) -> Iterator[None]:
    """Check continuously that main and every tag have all files of one task, complete."""
    done, wrong, seen = threading.Event(), [], 0

    def look() -> None:
        nonlocal seen
        while not done.is_set():
            with contextlib.suppress(Failure):  # it does not exist yet
                repository = hub.repository(STUDENT)
                for revision in ("main", *repository.refs("tags")):
                    commit = repository.commit(revision)["id"]  # main may move on while it is read
                    if set(repository.files(commit)) != {".gitattributes"}:
                        number = json.loads(repository.read(commit, "config.json"))["tasks"]
                        weights = load(repository.read(commit, "model.safetensors"))["w"]
                        rows = json.loads(repository.read(commit, "results.json"))["roles"]["student"]
                        if not (weights[0] == number == len(rows["accuracy_matrix"])):
                            wrong.append((revision, number))
                        seen += 1
            time.sleep(0.01)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    assert wrong == [] and seen > 0


def hurry(given: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub's own retries wait hundredths of the usual seconds."""
    given.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda wait: time.sleep(wait / 100)))


def push_until_killed(folder: Path, results: dict[str, Any], url: str) -> None:
    """Push as a training process does."""
    hurry(pytest.MonkeyPatch())
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    push = Pusher(folder, {"student": STUDENT}, say=print, api=HfApi(url, token=TOKEN), delay=0.01)
    push.push(results)
    push.finish(results)


@pytest.mark.slow
def test_random_faults_lose_nothing(
    tmp_path: Path, strike: int, forked: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks are pushed as they finish; whatever fails, main is complete, and a last push finishes the job.

    After every other task a process is killed at some request of its push.
    """
    hurry(monkeypatch)
    folder, said, results, draw = tmp_path / "run", Said(), new_results(3), random.Random(strike)
    options: dict[str, Any] = {"chaos": 0.1, "seed": strike, "stall_seconds": 0.1, "retry_after": 0}
    with HubServer(tmp_path / "hub", **options) as hub, watched(hub):
        push = pusher(hub, folder, said)
        try:
            push.check(results)
        except HubError as refused:  # a 401 or 403 at the start: nothing has begun
            assert any(status in str(refused) for status in ("401", "403"))
        for number in (1, 2, 3):
            save_task(folder, "student", number, results)
            if draw.random() < 0.5:
                kill_a_push(forked, hub, folder, results, after=draw.randint(1, 12))
            push.push(results)
        everything = push.finish(results)
        hub.chaos = 0.0
        if not everything:
            assert "NOT PUSHED: the student." in said.text
        assert pusher(hub, folder, Said()).finish(results)
        assert_whole(hub, folder, 3)


def kill_a_push(forked: ForkServerContext, hub: HubServer, folder: Path, results: dict[str, Any], after: int) -> None:
    """Start a process that pushes; kill it after so many requests to the Hub, or when it waits for seconds."""
    until, deadline = len(hub.requests) + after, time.monotonic() + 2
    process = forked.Process(target=push_until_killed, args=(folder, results, hub.url))
    process.start()
    while process.is_alive() and len(hub.requests) < until and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
