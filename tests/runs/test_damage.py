"""Damage to a run's files at some point: the run finishes as if nothing had happened, or is refused with a message."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import enable_progress_bars
from helpers import make_data, make_recipe, picture, thinned, write_recipe
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from hf_cdl import CDLTrainer
from hf_cdl.commands import add, console
from hf_cdl.commands import train as train_recipe
from hf_cdl.runs.files import fingerprint
from hf_cdl.training.task_trainer import TaskTrainer
from hf_cdl.types import Task

STATE = "work/student-task-02/checkpoint-1"
ROLES = ("teacher", "student")
FEW: dict[str, Any] = {"classes": 4, "train": 4, "test": 2}


# ---- three folders to be damaged ----


def put_back(folder: Path, snapshot: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(snapshot, folder)  # including modification times


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The recipe, its run's folder, snapshots of that folder at three points, and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("points")
    recipe = make_recipe(folder, name="damaged", baselines=[])
    recipe["data"] = {"path": str(make_data(folder / "few", **FEW)), "classes_per_task": 2}
    recipe["distill"] = [{"type": "kdp", "weight": 0.5}, {"type": "fitnets"}]  # a term that has its own layers
    found = {"recipe": write_recipe(folder / "recipe.yaml", recipe), "run": folder / "run", "data": folder / "few"}
    verbosity = hf_logging.get_verbosity()
    console.quiet()
    drawn = pytest.MonkeyPatch()
    drawn.setattr("hf_cdl.runs.pictures.save_plots", draw)  # plots do not matter here and take a second
    learn, save = CDLTrainer.learn, TaskTrainer._save_checkpoint

    def stop_between(self: CDLTrainer, task: Task) -> None:
        if (self.role, task.index) == ("teacher", 1):
            raise KeyboardInterrupt
        learn(self, task)

    def stop_within(self: TaskTrainer, model: Any, trial: Any) -> None:
        save(self, model, trial)
        if (self.role, self.seen[-1].index) == ("student", 1):
            raise KeyboardInterrupt

    for name, owner, method, replacement in (
        ("between", CDLTrainer, "learn", stop_between),
        ("within", TaskTrainer, "_save_checkpoint", stop_within),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, method, replacement)
            assert call(found) == 130
        shutil.copytree(found["run"], found.setdefault(name, folder / name))
    assert (found["within"] / STATE).is_dir(), "it came too late"
    assert call(found) == 0
    shutil.copytree(found["run"], found.setdefault("finished", folder / "finished"))
    yield found
    drawn.undo()
    hf_logging.set_verbosity(verbosity)
    hf_logging.enable_progress_bar()
    enable_progress_bars()


def draw(results: Any, folder: Path) -> list[Path]:
    (folder / "accuracy_matrix.png").write_bytes(b"a picture")
    return [folder / "accuracy_matrix.png"]


def call(points: dict[str, Path], *more: Any) -> int:
    words = [points["recipe"], "--output_dir", points["run"], *more]
    return train_recipe.main([str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


def same_end(folder: Path, other: Path) -> None:
    """The same weights, accuracies and files."""
    found, wanted = (
        {str(file.relative_to(at)): load_file(file) for file in at.rglob("model.safetensors")}
        for at in (folder, other)
    )
    assert found.keys() == wanted.keys()
    for file, tensors in wanted.items():
        assert found[file].keys() == tensors.keys()
        assert all(torch.equal(found[file][name], value) for name, value in tensors.items()), file
    measured = ("accuracy_matrix", "correct", "counts")
    ours, theirs = (json.loads((at / "results.json").read_text())["roles"] for at in (folder, other))
    assert [[ours[role][key] for key in measured] for role in ROLES] == [
        [theirs[role][key] for key in measured] for role in ROLES
    ]
    assert {name for name in contents(folder) if "partial" in name} == set()


# ---- every file, in every way ----


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def garbage(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


WAYS: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "truncated": truncate,
    "garbage": garbage,
    "zeros": zeros,
    "empty": empty,
    "a directory": directory,
}
OF_ITS_TASK = ("config.json", "model.safetensors")
CHECKPOINT = (*OF_ITS_TASK, "preprocessor_config.json")
IN_STATE = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "phase.json")
SAME, REFUSED = "the same end", "refused"

FILES: dict[tuple[str, str], str] = {
    **{("within", f"{STATE}/{name}"): SAME for name in IN_STATE},
    **{("within", f"student/task-01/{name}"): SAME for name in CHECKPOINT},  # restored from student/
    **{("between", f"teacher/{name}"): SAME for name in CHECKPOINT},
    **{("within", f"teacher/task-01/{name}"): REFUSED for name in OF_ITS_TASK},  # teacher/ already has task-02
    ("within", "teacher/task-01/preprocessor_config.json"): SAME,  # that of task-02 is the same
    **{("finished", f"student/task-02/{name}"): SAME for name in CHECKPOINT},
    **{("finished", f"student/{name}"): SAME for name in CHECKPOINT},
    **{("finished", f"student/task-01/{name}"): REFUSED for name in OF_ITS_TASK},
    ("finished", "student/task-01/preprocessor_config.json"): SAME,
    ("between", "work/scaffold/student-task-01.safetensors"): REFUSED,
    ("within", "work/scaffold/student-task-01.safetensors"): REFUSED,
    ("within", "logs/student-task-01.json"): SAME,
    ("finished", "logs/teacher-task-02.json"): SAME,
    ("finished", "results.json"): SAME,
    ("finished", "accuracy_matrix.png"): SAME,
    ("finished", "report.html"): SAME,
    ("between", "run.json"): REFUSED,
    ("within", "run.json"): REFUSED,
    ("finished", "run.json"): REFUSED,
}


def cases() -> Iterator[Any]:
    """Every file, damaged in alternating ways, each third in the fast tier; one file of each kind in all ways."""
    for number, (point, file) in enumerate(FILES):
        for order, way in enumerate(WAYS):
            if order == number % len(WAYS):
                marks = pytest.mark.slow if number % 3 else ()
                yield pytest.param(point, file, way, id=f"{point}, {file}, {way}", marks=marks)
            elif file.startswith(("work/", "run.json", "results.json")) or file.endswith("model.safetensors"):
                yield pytest.param(point, file, way, id=f"{point}, {file}, {way}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("point", "file", "way"), [*cases()])
def test_a_damaged_file(
    point: str, file: str, way: str, points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, log = points["run"], file.startswith("logs/")
    put_back(folder, points[point])
    WAYS[way](folder / file)
    if FILES[point, file] == REFUSED:
        assert Path(file).name in refused(points, capfd)
        return
    said = goes_on(points, capfd)
    assert Path(file).name in said or STATE in said, "it is said"
    assert log == ("this loss curve is lost, nothing else is" in said)
    if point == "finished":
        first = goes_on(points, capfd).splitlines()[0]
        assert first.startswith(str(folder / file) if log else "This run is finished."), "it was mended for good"


@pytest.mark.parametrize(
    ("point", "gone", "outcome"),
    [
        ("within", "student/task-01", SAME),
        ("within", "work/student-task-02", SAME),
        ("within", "logs", SAME),
        ("within", "student", REFUSED),
        ("between", "work", REFUSED),
        ("finished", "student/task-02", SAME),
        ("finished", "teacher/task-01", REFUSED),
    ],
)
def test_a_folder_that_is_gone(
    point: str, gone: str, outcome: str, points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    put_back(points["run"], points[point])
    shutil.rmtree(points["run"] / gone)
    if outcome == SAME:
        goes_on(points, capfd)
    else:
        assert gone in refused(points, capfd)


def test_a_folder_with_something_in_it_in_a_file_s_place_stays(
    points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for file in ("student/config.json", "results.json"):
        put_back(points["run"], points["finished"])
        directory(points["run"] / file)
        (points["run"] / file / "notes.txt").write_text("mine")
        before = contents(points["run"])
        code, said = call(points), capfd.readouterr().err
        assert code == 2 and f"error: Could not write {points['run'] / file}: " in said and "fix the folder" in said
        assert contents(points["run"]) == before


def goes_on(points: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> str:
    """The output of a run that ends like the uninterrupted one."""
    capfd.readouterr()
    code = call(points)
    said = capfd.readouterr()
    assert code == 0 and "Traceback" not in said.out + said.err, said.out + said.err
    same_end(points["run"], points["finished"])
    return said.out


def refused(points: dict[str, Path], capfd: pytest.CaptureFixture[str], *more: Any) -> str:
    """The output of a refused run, which changes no file."""
    before = contents(points["run"])
    capfd.readouterr()
    assert call(points, *more) == 2
    said = capfd.readouterr()
    assert not said.out and said.err.startswith("error: ") and len(said.err.splitlines()) <= 6, said.out + said.err
    assert "--output_dir" in said.err or "Delete that folder" in said.err
    assert contents(points["run"]) == before
    return said.err


# ---- a complete state that belongs to something else ----


def reseal(state: Path, **of: Any) -> None:
    """Make the seal match the files again, with changed facts about the state."""
    content = json.loads((state / "phase.json").read_text())
    content["of"] |= of
    content["files"] = {name: fingerprint(state / name) for name in content["files"]}
    (state / "phase.json").write_text(json.dumps(content))


def other_names(state: Path) -> None:
    tensors = load_file(state / "trained.safetensors")
    tensors["another"] = tensors.pop(sorted(tensors)[0])
    save_file(tensors, state / "trained.safetensors")
    reseal(state)


def other_shapes(state: Path) -> None:
    tensors = {name: value[..., :1].clone() for name, value in load_file(state / "trained.safetensors").items()}
    save_file(tensors, state / "trained.safetensors")
    reseal(state)


def of_an_older_version(state: Path) -> None:
    (state / "phase.json").write_text(json.dumps({"seconds": 3.0}))


def without_its_optimizer(state: Path) -> None:
    """Remove the optimizer, as with transformers' save_only_model."""
    content = json.loads((state / "phase.json").read_text())
    del content["files"]["optimizer.pt"]
    (state / "optimizer.pt").unlink()
    (state / "phase.json").write_text(json.dumps(content))


def outside(state: Path) -> None:
    content = json.loads((state / "phase.json").read_text())
    content["files"]["../../../run.json"] = fingerprint(state.parents[2] / "run.json")
    (state / "phase.json").write_text(json.dumps(content))


def a_file_in_its_place(state: Path) -> None:
    shutil.rmtree(state)
    state.write_text("")


STATES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two processes": (lambda s: reseal(s, processes=2), "it was stored with processes 2, now it is 1"),
    "another device": (lambda s: reseal(s, device="8 cuda"), "it was stored with device 8 cuda, now it is 1 cpu"),
    "another role": (lambda s: reseal(s, role="teacher"), "it was stored with role teacher, now it is student"),
    "another task": (lambda s: reseal(s, task="task-01"), "it was stored with task task-01, now it is task-02"),
    "another recipe": (lambda s: reseal(s, recipe="0" * 16), "it was stored with recipe 0000000000000000, now"),
    "other data": (lambda s: reseal(s, stream="0" * 16), "it was stored with stream 0000000000000000, now"),
    "another torch": (lambda s: reseal(s, torch="1.0"), "it was stored with torch 1.0, now it is"),
    "other names": (other_names, "trained.safetensors does not fit the model: another is"),
    "other shapes": (other_shapes, "trained.safetensors does not fit the model: "),
    "an older version": (of_an_older_version, "phase.json has no 'files'; it is not whole, or an older hf_cdl wrote"),
    "no optimizer": (without_its_optimizer, "optimizer.pt is not in it"),
    "a path that leads outside": (outside, "phase.json names '../../../run.json', which is not in it"),
    "a file in its place": (a_file_in_its_place, "it is not a folder"),
}


@pytest.mark.parametrize("name", thinned(STATES, 3))
def test_a_state_that_does_not_fit_is_discarded_with_a_sentence(
    name: str, points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    change, why = STATES[name]
    put_back(points["run"], points["within"])
    change(points["run"] / STATE)
    said = goes_on(points, capfd)
    assert f"The stored state {points['run'] / STATE} is discarded: {why}" in said
    assert "task 2/2 · student: the phase starts again from the last finished task." in said


def test_the_state_before_a_damaged_one_is_taken(points: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    put_back(points["run"], points["within"])
    later = (points["run"] / STATE).with_name("checkpoint-10")  # by number, 10 comes last
    shutil.copytree(points["run"] / STATE, later)
    truncate(later / "optimizer.pt")
    said = goes_on(points, capfd)
    assert f"The stored state {later} is discarded: optimizer.pt has " in said
    assert f"task 2/2 · student: {points['run'] / STATE} is taken." in said


class Footprint:
    """Code that runs when a pickle is loaded carelessly."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Footprint.path),)

    path: Path


def test_a_stored_state_runs_no_code(
    points: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Footprint.path = tmp_path / "footprint"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        put_back(points["run"], points["within"])
        torch.save(Footprint(), points["run"] / STATE / name)
        reseal(points["run"] / STATE)
        capfd.readouterr()
        code, said = call(points), capfd.readouterr()
        assert code == 2 and "Traceback" not in said.err and len(said.err.splitlines()) <= 6, said.err
        assert (
            f"The stored state {points['run'] / STATE} cannot be loaded (UnpicklingError: a file holds more"
            in said.err
        )
        assert "Delete that folder: the same command then starts its phase again" in said.err
        assert not Footprint.path.exists()
    shutil.rmtree(points["run"] / STATE)
    goes_on(points, capfd)


# ---- what is on disk when a name appears ----


class Disk:
    """Checks every rename in a folder: what gets a name, and what a ledger names, must be on disk by then."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.clock, self.renamed = folder, 0, list[str]()
        self.synced: dict[int, tuple[int, int]] = {}  # inode of a file -> its size and modification time at the sync
        self.dirty: dict[int, int] = {}  # inode of a folder -> when a name in it changed, and when it was synced
        self.clean: dict[int, int] = {}
        for name in ("fsync", "replace", "mkdir"):
            patch.setattr(os, name, getattr(self, name), raising=True)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def fsync(self, descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        real(descriptor)
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self.clean[found.st_ino] = self.tick()
        else:
            self.synced[found.st_ino] = found.st_size, found.st_mtime_ns

    def mkdir(self, path: Any, mode: int = 0o777, real: Callable[..., None] = os.mkdir, **more: Any) -> None:
        real(path, mode, **more)
        self.changed(Path(path).parent)

    def replace(self, source: Any, target: Any, real: Callable[..., None] = os.replace) -> None:
        source, target = Path(source), Path(target)
        if self.folder in (target, *target.parents):
            self.renamed.append(target.relative_to(self.folder).as_posix())
            for path in [source, *source.rglob("*")]:
                self.must_be_on_disk(path)
            if target.name == "run.json":
                for name in json.loads(source.read_text())["files"]:
                    self.must_be_on_disk(self.folder / name)
                    for above in (self.folder / name).parents:
                        if self.folder.parent in (above, *above.parents):
                            self.must_be_on_disk(above)
        real(source, target)
        self.changed(source.parent)
        self.changed(target.parent)

    def changed(self, folder: Path) -> None:
        self.dirty[folder.stat().st_ino] = self.tick()

    def must_be_on_disk(self, path: Path) -> None:
        found = path.stat()
        if path.is_dir():
            assert self.clean.get(found.st_ino, 0) > self.dirty.get(found.st_ino, 0), f"names in {path}"
        else:
            assert self.synced.get(found.st_ino) == (found.st_size, found.st_mtime_ns), path


def test_what_has_a_name_is_on_the_disk(points: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut, everything a ledger names exists: files, and the folder entries that name them."""
    shutil.rmtree(points["run"], ignore_errors=True)
    disk = Disk(points["run"], monkeypatch)
    assert call(points) == 0
    for role in ROLES:
        for task in ("task-01", "task-02"):
            ends = [f"work/{role}-{task}/checkpoint-{step}" for step in (1, 2)]
            ends += [f"work/{role}-{task}/partial/checkpoint-{step}/phase.json" for step in (1, 2)]
            ends += [f"{role}/{task}", f"logs/{role}-{task}.json"]
            assert {*ends} <= {*disk.renamed}
        assert f"{role}/model.safetensors" in disk.renamed
    assert "work/scaffold/student-task-01.safetensors" in disk.renamed and "results.json" in disk.renamed


def test_what_is_taken_over_from_another_run_is_on_the_disk(
    points: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder appears once everything in it is on disk: models, their copies, ledger and recipe."""
    folder = tmp_path / "new" / "runs" / "mine"
    disk = Disk(folder, monkeypatch)
    add.create_run(folder, str(points["finished"]), None, None)
    assert "." in disk.renamed, "it was looked at when it got its name"
    for path in (folder, *folder.rglob("*")):
        disk.must_be_on_disk(path)
    for above in (folder.parent, tmp_path / "new", tmp_path):
        disk.must_be_on_disk(above)
    ledger = json.loads((folder / "run.json").read_text())
    assert {f"{role}/task-02/model.safetensors" for role in ROLES} <= ledger["files"].keys()


# ---- a finished run ----


def change_data(points: dict[str, Path], **data: Any) -> None:
    shutil.rmtree(points["data"])
    make_data(points["data"], **data)


@pytest.fixture
def few(points: dict[str, Path]) -> Iterator[None]:
    put_back(points["run"], points["finished"])
    yield
    shutil.rmtree(points["data"], ignore_errors=True)
    make_data(points["data"], **FEW)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"classes": 5}, "new class 'class e'"),
        ({"classes": 3}, "class 'class d' is gone"),
        ({"train": 5}, "train images of 'class a': 4 -> 5, train images of 'class b': 4 -> 5, "),
        ({"test": 1}, "test images of 'class a': 2 -> 1, test images of 'class b'"),
        ({"label_column": "class"}, ""),
    ],
)
def test_a_finished_run_of_changed_data(
    data: dict[str, Any], named: str, points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    change_data(points, **{**FEW, **data})
    if named:
        said = refused(points, capfd)
        assert "The data changed since" in said and named in said and "hf-cdl add" in said
    else:  # the same images and classes: the same data
        assert goes_on(points, capfd).startswith("This run is finished.")


@pytest.mark.usefixtures("few")
def test_a_finished_run_of_data_that_make_no_stream_now(
    points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    (points["data"] / "test.parquet").unlink()
    assert "The data changed since" in refused(points, capfd)


@pytest.mark.usefixtures("few")
def test_a_finished_run_without_its_data_is_finished(
    points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(points["data"])
    first, second, *_ = goes_on(points, capfd).splitlines()
    assert first.startswith("The data of this run could not be checked; its results stand. The folder ")
    assert second.startswith("This run is finished.")


def test_a_finished_run_of_class_folders_that_changed(
    points: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A new class folder is reported, so is a new image; without the data folder the results are still valid."""

    def put(split: str, label: int, count: int) -> None:
        (folder := tmp_path / "photos" / split / f"kind {label}").mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(label, number + 100 * (split == "test")).save(folder / f"{number}.png")

    for split, count in (("train", 3), ("test", 1)):
        for label in range(4):
            put(split, label, count)
    recipe = {
        "name": "folders",
        "data": {"path": str(tmp_path / "photos"), "classes_per_task": 2},
        "student": {"backbone": str(points["recipe"].parent / "student"), "head": {"type": "ncm"}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    found = {"recipe": write_recipe(tmp_path / "recipe.yaml", recipe), "run": tmp_path / "run"}
    assert call(found) == 0 and call(found) == 0
    assert capfd.readouterr().out.count("This run is finished.") == 1
    put("train", 4, 3)
    said = refused(found, capfd)
    assert "The data changed since" in said and "Classes without test images: kind 4" in said
    put("test", 4, 1)
    said = refused(found, capfd)
    assert "The data changed since" in said and "new class 'kind 4'" in said and "hf-cdl add" in said
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "photos" / split / "kind 4")
    put("train", 0, 4)
    assert "train images of 'kind 0': 3 -> 4" in refused(found, capfd)
    (tmp_path / "photos" / "train" / "kind 0" / "3.png").unlink()
    shutil.rmtree(tmp_path / "photos" / "train" / "kind 3")
    assert "kind 3" in refused(found, capfd)
    shutil.rmtree(tmp_path / "photos")
    before = contents(tmp_path / "run")
    assert call(found) == 0
    first, second, *_ = capfd.readouterr().out.splitlines()
    assert first.startswith("The data of this run could not be checked; its results stand. The folder ")
    assert second.startswith("This run is finished.") and contents(tmp_path / "run") == before


def test_a_finished_run_whose_backbones_are_gone_is_finished(
    points: dict[str, Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    put_back(points["run"], points["finished"])
    for role in ROLES:
        shutil.move(points["recipe"].parent / role, tmp_path / role)
    try:
        assert goes_on(points, capfd).startswith("This run is finished.")
    finally:
        for role in ROLES:
            shutil.move(tmp_path / role, points["recipe"].parent / role)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the files opened from now on, including those that safetensors opens."""
    names: list[str] = []

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(str(file))
            return real(file, *args, **kwargs)

        return call

    for place in ("builtins.open", "io.open", "hf_cdl.runs.repair.safe_open"):
        owner, name = place.rsplit(".", 1)
        monkeypatch.setattr(place, noting(getattr(importlib.import_module(owner), name)))
    return names


def test_a_finished_run_is_found_whole_by_reading_what_it_publishes(
    points: dict[str, Path], opened: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """For older checkpoints, sizes and modification times suffice; if a time differs, the content decides."""
    put_back(points["run"], points["finished"])
    opened.clear()
    assert call(points) == 0
    read = [Path(name).relative_to(points["run"]).as_posix() for name in opened if name.startswith(str(points["run"]))]
    published = {f"{role}/{part}model.safetensors" for role in ROLES for part in ("", "task-02/")}
    assert {name for name in read if name.endswith((".safetensors", ".png"))} == published
    for file, more in (("student/task-01", 0), ("student/task-02", 0), ("student", 0), ("student", 1)):
        weights = points["run"] / file / "model.safetensors"
        put_back(points["run"], points["finished"])
        content = bytearray(weights.read_bytes())
        content[-1] ^= more
        weights.write_bytes(content)  # of the same size
        opened.clear()
        capfd.readouterr()
        assert call(points) == 0
        assert str(weights) in opened
        said = capfd.readouterr().out
        assert ("has another content than was written" in said) == bool(more)
    same_end(points["run"], points["finished"])


def older(folder: Path) -> None:
    """The ledger as written by versions without fingerprints."""
    ledger = json.loads((folder / "run.json").read_text())
    for key in ("format", "files", "images"):
        del ledger[key]
    (folder / "run.json").write_text(json.dumps(ledger))


@pytest.mark.parametrize(
    ("file", "way", "outcome"),
    [
        (None, None, SAME),
        ("student/model.safetensors", "truncated", SAME),
        ("student/config.json", "deleted", SAME),
        ("student/task-02/model.safetensors", "truncated", SAME),
        ("student/task-02/preprocessor_config.json", "deleted", SAME),
        ("student/task-01/model.safetensors", "truncated", REFUSED),
        ("teacher/task-01/config.json", "garbage", REFUSED),
        ("results.json", "truncated", SAME),
    ],
)
def test_a_finished_run_of_an_older_version(
    file: str | None, way: str, outcome: str, points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    put_back(points["run"], points["finished"])
    older(points["run"])
    if file is not None:
        WAYS[way](points["run"] / file)
    if outcome == REFUSED:
        assert str(file) in refused(points, capfd)
    else:
        assert (Path(file).name if file else "This run is finished") in goes_on(points, capfd)


def test_a_run_of_an_older_version_goes_on_from_its_last_task(
    points: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    put_back(points["run"], points["between"])
    older(points["run"])
    goes_on(points, capfd)
    put_back(points["run"], points["between"])
    older(points["run"])
    truncate(points["run"] / "student" / "task-01" / "model.safetensors")  # student/ may have another task
    assert "student/task-01/model.safetensors cannot be read" in refused(points, capfd)


def test_a_teacher_is_not_taken_from_damaged_files(
    points: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in ("teacher/task-02/model.safetensors", "logs/teacher-task-01.json"):
        source = tmp_path / "source"
        put_back(source, points["finished"])
        zeros(source / file)
        shutil.rmtree(points["run"], ignore_errors=True)
        code = call(points, "--teacher_from", source)
        said = capfd.readouterr()
        assert code == 2 and file in said.err and "Run its own command again" in said.err, said.err
