"""Commands that change a student, ended hard before any call that writes a name: nothing is lost, none is made twice.

The process ends as by SIGKILL before the n-th call of os.replace, os.fsync and others, for every n.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import little_room, make_backbone, picture, run_script, write_recipe
from safetensors.torch import load_file

from hf_cdl.commands import main as commands
from hf_cdl.runs import shards
from hf_cdl.runs.ledger import read_ledger, revisions
from hf_cdl.runs.repair import examine

NAMES = ("ant", "bee", "cat", "dog")
CALLS = ("replace", "link", "fsync", "mkdir", "unlink", "rmdir")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of four classes that has been changed once, more images, corrections, and its checkpoint alone.

    Its frozen backbone, a hundredth of what would be worth a file of its own, has one.
    """
    folder, worth = tmp_path_factory.mktemp("ready"), pytest.MonkeyPatch()
    worth.setattr(shards, "WORTH", 10_000)
    for kind, name in enumerate((*NAMES, "emu")):
        for split, numbers in (
            (("new", range(3)),) if name == "emu" else (("train", range(4)), ("test", range(50, 52)))
        ):
            place = folder / ("new" if split == "new" else f"data/{split}") / name
            place.mkdir(parents=True)
            for number in numbers:
                picture(kind, number).save(place / f"{number}.png")
    (folder / "c.csv").write_text("image,label\ndata/train/ant/0.png,bee\ndata/train/cat/1.png,bee\n")
    recipe = {
        "name": "small",
        "data": {"path": str(folder / "data"), "classes_per_task": 2},
        "student": {"backbone": str(make_backbone(folder / "backbone")), "head": {"type": "ridge", "strength": 1.0}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    write_recipe(folder / "small.yaml", recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert run_script("train", [str(folder / "small.yaml"), "--output_dir", str(folder / "run")], patch) == 0
        assert run_script("rename", [str(folder / "run"), "dog", "hound"], patch) == 0
    shutil.copytree(folder / "run" / "student" / "task-02", folder / "alone")
    yield folder
    worth.undo()


WORDS: dict[str, list[str]] = {
    "add": ["add", "run", "new"],
    "correct": ["correct", "run", "c.csv"],
    "remove": ["remove", "run", "ant", "--images", "data/train"],
    "rename": ["rename", "run", "ant", "emmet"],
    "merge": ["merge", "run", "ant", "bee", "--as", "insect"],
    "undo": ["undo", "run"],
    "elsewhere": ["rename", "alone", "ant", "emmet", "--output_dir", "taken"],
}


def run(folder: Path, words: list[str], calls: int | None = None) -> int:
    """Run a command in a forked process, which ends hard before its n-th call; returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            left = [calls]

            def counted(real: Any) -> Any:
                def call(*given: Any, **more: Any) -> Any:
                    if left[0] == 0:
                        os._exit(137)
                    left[0] = None if left[0] is None else left[0] - 1
                    return real(*given, **more)

                return call

            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            os.environ["ACCELERATE_USE_CPU"] = "true"
            sys.argv = ["hf-cdl", *words]
            commands.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def states(run: Path) -> dict[str, dict[str, str]]:
    """The files of every revision of the student."""
    return {path.name: contents(path) for path in sorted((run / "student").glob("task-*"))}


def student(folder: Path) -> Any:
    """Weights, and classes."""
    files = [*folder.glob("model*.safetensors")]
    assert len(files) > 1, "in files that the revisions share"
    weights = {name: value.tolist() for file in files for name, value in load_file(file).items()}
    return weights, json.loads((folder / "config.json").read_text())["tasks"]


def newest(run: Path) -> Any:
    """The newest student by the ledger, and the name of its revision."""
    name = f"task-{revisions(read_ledger(run), 'student'):02d}"
    return name, *student(run / "student" / name)


@pytest.fixture
def place(ready: Path, tmp_path: Path) -> Iterator[Path]:
    for path in ready.iterdir():
        if path.name not in ("run", "alone"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ready / "alone", tmp_path / "alone")
    yield tmp_path
    shutil.rmtree(tmp_path)  # hundreds of checkpoints


def again(ready: Path, place: Path) -> None:
    """Begin anew."""
    for name in ("run", "taken"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(ready / "run", place / "run")


def check(ready: Path, place: Path, verb: str, calls: int, wanted: Any) -> bool:
    """End a command before a call, and do it again; returns whether it had ended by itself before that call."""
    words = WORDS[verb]
    again(ready, place)
    changing = place / ("taken" if verb == "elsewhere" else "run")
    before, old = states(place / "run"), newest(place / "run")
    code = run(place, words, calls)
    if code == 0:
        return True
    assert code == 137
    if not (changing / "run.json").exists():
        assert verb == "elsewhere"
        assert run(place, words) == 0
        assert newest(changing) == wanted
        return False
    assert not examine(changing, read_ledger(changing)).lost
    found = newest(changing)
    stored = found == wanted
    assert stored or verb == "elsewhere" or found == old
    assert {name: files for name, files in states(place / "run").items() if name in before} == before
    if not (stored and verb == "undo"):
        code = run(place, words)
        assert code == (2 if stored and verb not in ("add", "correct") else 0), "none is made twice"
    if not (stored and verb == "undo"):
        assert newest(changing) == wanted
        assert student(changing / "student") == wanted[1:], "its copy is made whole"
    assert run(place, ["undo", str(changing)]) == (2 if verb == "undo" else 0)
    if verb not in ("undo", "elsewhere"):
        assert newest(place / "run")[1:] == old[1:]
    assert {name: files for name, files in states(place / "run").items() if name in before} == before
    return False


def outcome(ready: Path, place: Path, verb: str) -> Any:
    """The newest student after a command that nothing ends."""
    again(ready, place)
    assert run(place, WORDS[verb]) == 0
    return newest(place / ("taken" if verb == "elsewhere" else "run"))


def test_a_change_that_is_killed_is_made_or_not_made(ready: Path, place: Path) -> None:
    wanted = outcome(ready, place, "correct")
    for calls in (0, 8, 16, 24):
        assert not check(ready, place, "correct", calls, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("verb", WORDS)
def test_a_change_that_is_killed_anywhere_is_made_or_not_made(ready: Path, place: Path, verb: str) -> None:
    wanted, calls = outcome(ready, place, verb), 0
    while not check(ready, place, verb, calls, wanted):
        calls += 1
    assert calls > 15


@pytest.mark.parametrize("size", [1, 2_000, 8_000])
def test_a_full_disk_changes_nothing(
    ready: Path, place: Path, size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again(ready, place)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = contents(place / "run")
    capsys.readouterr()
    with little_room(size):
        assert run_script("rename", [str(place / "run"), "ant", "emmet"], monkeypatch) == 2
    assert "error: Could not save the student as task-04 in" in capsys.readouterr().err
    assert contents(place / "run") == before
    assert run_script("rename", [str(place / "run"), "ant", "emmet"], monkeypatch) == 0
