"""Commands that the program prints, executed as printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import (
    MODULE,
    ROOT,
    TRAIN,
    class_means,
    interrupt_when,
    make_data,
    make_recipe,
    picture,
    script,
    write_recipe,
)
from helpers import train as train_process
from hub_server import TOKEN, HubServer, environment
from huggingface_hub import CommitOperationAdd, HfApi
from packaging.requirements import Requirement
from test_classifier import write as write_classifiers
from test_stopping import STOPPED
from test_train import assert_same_run
from transformers import ViTImageProcessor

from hf_cdl import StreamConfig, TaskStream
from hf_cdl.commands import stopping, train
from hf_cdl.training.arguments.checks import OPTIMIZERS
from hf_cdl.training.trackers import TRACKERS

PRINTING = [*(ROOT / "hf_cdl").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]


@pytest.mark.slow
def test_what_is_to_be_installed_can_be() -> None:
    """Every requirement is named correctly, and every extra is one of ours: all of them are installed here."""
    source = "".join(file.read_text() for file in PRINTING)
    lines = re.findall(r"pip install ((?:-\w+ )*)[\"']?([^\s\"'`.,;)]+)", source)
    assert {options.strip() for options, _ in lines} == {"", "-U"} and len(lines) == source.count("pip install ")
    found = {name for _, name in lines}
    assert {"hf-cdl", "hf-cdl[report]", "hf-cdl[demo]", "hf_cdl[report]", "scikit-learn", "peft"} <= found
    placeholders = {name for name in found if "{" in name}
    assert placeholders == {"{name}", "{kind"}, "the trackers, and the optimizers' packages"
    optional = {*TRACKERS, *(kind.package for kind in OPTIMIZERS.values() if kind.package is not None)}
    assert optional == {"tensorboard", "trackio", "wandb", "bitsandbytes"}, "as PyPI has them"
    found -= {"resvg-py"}  # which draws the emoji anew
    found = found - placeholders | {name for name in optional if find_spec(name)}
    assert all(Requirement(name) for name in found | optional)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *found]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "does not provide the extra" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("path", "here", "shown"),
    [
        ("{bin}:/usr/bin", "{bin}/../../other", "python"),
        ("/usr/bin:{bin}", "{bin}/../../other", "{python}"),  # another environment's comes first
        ("/nowhere", "{bin}/../../other", "{python}"),
        ("/nowhere", "{bin}/../..", ".venv/bin/python"),
    ],
)
def test_python_is_the_one_that_the_shell_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, here: str, shown: str
) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "python").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", path.format(bin=folder).replace("/usr/bin", str(other)))
    monkeypatch.chdir(os.path.normpath(here.format(bin=folder)))
    assert stopping.python() == shown.format(python=folder / "python")


def ordinary(folder: Path) -> dict[str, Any]:
    return make_recipe(folder, baselines=[])


def small(folder: Path) -> dict[str, Any]:
    """A small checkpoint names its backbone as the recipe does: relative to the folder it was trained in."""
    recipe = make_recipe(folder, save_backbone=False, baselines=[])
    for role in ("teacher", "student"):
        recipe[role]["backbone"] = role
    return recipe


def classifier(folder: Path) -> dict[str, Any]:
    return yaml.safe_load(write_classifiers(folder).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("make", [ordinary, small, classifier])
def test_the_student_is_used_as_it_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make: Callable[[Path], dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path / "recipe.yaml", make(tmp_path))
    picture(0, 0).save("IMAGE.png")
    folder = """it's a "run" of $HOME \\ n"""
    assert (
        train.main([str(file), "--output_dir", folder, "--train.num_train_epochs", "1", "--train.lr_steps", "[]"]) == 0
    )
    line = re.split(r"Try the [a-z ]+ on an image:\n", capfd.readouterr().out)[1].splitlines()[0].strip()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "'label': 'class " in done.stdout, (line, done.stdout + done.stderr)


# ---- commands that push, resume and download ----


def execute(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell, with this environment's programs first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(line, shell=True, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_push_that_fails_says_the_command_that_pushes(tmp_path: Path) -> None:
    """The push command itself, with the options it was called with; without a Hub, and with a slow one."""
    folder = "it's a run"
    words = (class_means(tmp_path), "--data.max_classes", 4, "--output_dir", folder)
    code, output = train_process(*words, cwd=tmp_path)
    assert code == 0, output
    with HubServer(tmp_path / "gone") as gone:
        pass
    words = (folder, "--hub_model_id", "me/mine", "--hub_private_repo", "false")
    code, output = script("push", *words, env=environment(gone, tmp_path / "home"), cwd=tmp_path)
    assert code == 4 and "NOT PUSHED: the student." in output, output
    line = output.split("Push it later with:\n")[1].splitlines()[0].strip()
    with HubServer(tmp_path / "hub", stall_seconds=3) as hub:
        done = execute(line, tmp_path, **environment(hub, tmp_path / "home"))
        assert done.returncode == 0, (line, done.stdout + done.stderr)
        assert [*hub.repository("me/mine").refs("tags")] == ["task-01", "task-02"]
        assert not hub.repository("me/mine").private, "its options are among the words"
        hub.faults = [("commit", "stall")]
        words = (folder, "--hub_model_id", "me/slow")
        code, output = script("push", *words, env=environment(hub, tmp_path / "home"), cwd=tmp_path)
        found = re.search(r"Waiting for the Hub\. Ctrl-C ends the waiting; later: (.*)", output)
        assert found is not None, output
        done = execute(found[1], tmp_path, **environment(hub, tmp_path / "home"))
        assert done.returncode == 0, (found[1], done.stdout + done.stderr)
        assert [*hub.repository("me/slow").refs("tags")] == ["task-01", "task-02"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "program"), [(signal.SIGINT, (TRAIN,)), (signal.SIGTERM, (TRAIN,)), (signal.SIGTERM, MODULE)]
)
def test_a_run_that_was_stopped_goes_on_by_what_it_says(
    number: signal.Signals, program: tuple[Any, ...], tmp_path: Path
) -> None:
    """Started from a shell only: the result equals that of an uninterrupted run."""
    recipe = make_recipe(tmp_path, baselines=[])
    recipe["train"]["num_train_epochs"] = 6
    file, cut = write_recipe(tmp_path / "it's a recipe.yaml", recipe), tmp_path / "it's cut"
    state = cut / "work" / "student-task-02"
    arrived = lambda: any(state.glob("checkpoint-*"))  # noqa: E731
    code, said = interrupt_when(
        arrived, file.name, "--output_dir", cut.name, cwd=tmp_path, kill=number, program=program
    )
    assert code == 128 + number and not (cut / "results.json").exists(), said
    line = said.split(STOPPED)[1].splitlines()[0].strip()
    done = execute(line, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, (line, done.stdout + done.stderr)
    code, said = train_process(file, "--output_dir", tmp_path / "whole")
    assert code == 0, said
    assert_same_run(cut, tmp_path / "whole")


@pytest.mark.slow
def test_a_data_set_is_downloaded_as_it_is_said(tmp_path: Path) -> None:
    """Without a network, the command is printed; with one, it makes a folder that a stream can read."""
    data = make_data(tmp_path / "data")
    words = ("--data.path", "me/photos", "--output_dir", tmp_path / "run")
    code, said = train_process(class_means(tmp_path / "more"), *words)
    assert code == 2 and not (tmp_path / "run").exists(), said
    found = re.search(r"run `(hf download [^`]*)`", said)
    assert found is not None and "FOLDER" in found[1], said
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(hub.url, token=TOKEN)
        api.create_repo("me/photos", repo_type="dataset")
        files = {f"data/{file.stem}-00000-of-00001.parquet": file.read_bytes() for file in data.iterdir()}
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit("me/photos", operations, commit_message="photos", repo_type="dataset")
        line = found[1].replace("FOLDER", "here")
        done = execute(line, tmp_path, **environment(hub, tmp_path / "home"))
        assert done.returncode == 0, (line, done.stdout + done.stderr)
    streams = [
        TaskStream(StreamConfig(path=str(path), classes_per_task=2), ViTImageProcessor())
        for path in (data, tmp_path / "here")
    ]
    assert len(streams[0]) == 3 and streams[0].fingerprint == streams[1].fingerprint
