"""A run's checkpoints share the files of what has not changed, and are the same models as if they did not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_backbone, picture
from safetensors import safe_open
from tiny_families import TINY, stored_backbone
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
    set_seed,
)

from hf_cdl import CDLForImageClassification
from hf_cdl.hub import read_folder
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.runs import shards
from hf_cdl.runs.changes import ChangingRun
from hf_cdl.runs.files import RunError
from hf_cdl.runs.repair import examine
from hf_cdl.runs.run import Run
from hf_cdl.runs.shards import save_checkpoint
from hf_cdl.types import Task, TaskResult

CODA: dict[str, Any] = {"prompt": {"type": "coda", "components": 3, "length": 4, "layers": [0, 1]}}
MODELS: dict[str, dict[str, Any]] = {
    "coda": {**CODA, "kd_prompt": {}},
    "apt": {"prompt": {"type": "apt"}, "head": {"type": "cosine"}},
    "dualprompt": {
        "prompt": {"type": "dualprompt", "general_layers": [0], "expert_layers": [1], "reserved_tasks": 3},
        "head": {"type": "weight_normalised"},
    },
    "l2p": {"prompt": {"type": "l2p", "layers": [0]}},
    "ridge": {"head": {"type": "ridge", "standardise": "first_task"}},
    "ncm": {"head": {"type": "ncm"}},
    "small": {**CODA, "save_backbone": False},
    "with code": {**CODA, "save_code": True},
    "trained backbone": {"train_backbone": True},
}
WORTH = 3000


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone") / "vit")


@pytest.fixture
def little_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is settled in the tiny models here gets files of its own, as in models a thousand times larger."""
    monkeypatch.setattr(shards, "WORTH", WORTH)
    monkeypatch.setattr(shards, "SMALL", 10 * WORTH)


def new(backbone: Path, name: str = "coda") -> CDLForImageClassification:
    set_seed(0)
    return CDLForImageClassification.from_backbone(backbone, **MODELS[name])


def learn(model: Any, number: int) -> None:
    """Change what a task changes, without its cost."""
    torch.manual_seed(number)
    model.begin_task(names_of(number))
    if model.fitted:
        pixels = torch.randn(8, 3, 16, 16)
        with torch.no_grad():
            found = model.eval()(pixel_values=pixels)
            model.measure(found)
            model.accumulate(found, torch.arange(8) % 2 + 2 * number)
    else:
        with torch.no_grad():
            for value in (parameter for parameter in model.parameters() if parameter.requires_grad):
                value += 0.01 * torch.randn_like(value)
    model.end_task()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).logits


def weights(folder: Path) -> dict[str, set[str]]:
    """File -> names of the weights in it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found[file.name] = {*opened.keys()}
    return found


def linked(folder: Path, other: Path) -> list[str]:
    """Files of a folder that are those of another one, by whatever name."""
    theirs = {path.stat().st_ino for path in other.rglob("*") if path.is_file()}
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_ino in theirs)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def size(folder: Path) -> int:
    found = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(found.values())


# ---- the layout of one checkpoint ----


@pytest.mark.usefixtures("little_worth")
@pytest.mark.parametrize("name", MODELS)
def test_in_files_or_in_one_it_is_the_same_model(name: str, backbone: Path, tmp_path: Path) -> None:
    """To the bit, loaded by hf_cdl and by transformers, after every task; and so is what another one learns on it."""
    model, processor, before = new(backbone, name), AutoImageProcessor.from_pretrained(backbone), tmp_path / "none"
    for number in range(3):
        learn(model, number)
        whole, folder = tmp_path / f"whole-{number}", tmp_path / f"task-{number}"
        model.save_pretrained(whole)
        save_checkpoint(model, processor, folder, before)
        files = weights(folder)
        assert sum(map(len, files.values())) == len(set().union(*files.values())), "no weight twice"
        assert set().union(*files.values()) == weights(whole)["model.safetensors"]
        assert (folder / "model.safetensors.index.json").exists() == (len(files) > 1)
        assert (folder / "config.json").read_bytes() == (whole / "config.json").read_bytes()
        loaded = CDLForImageClassification.from_pretrained(folder)
        expected = CDLForImageClassification.from_pretrained(whole)
        for key, value in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(folder)), logits(model))
        before = folder
    assert (len(weights(before)) > 1) == (name not in ("trained backbone",))
    if name == "coda":
        found = pipeline("image-classification", model=str(before), top_k=6)
        assert {answer["label"] for answer in found(picture(0, 0))} == {f"class {i}" for i in range(6)}


@pytest.mark.usefixtures("little_worth")
@pytest.mark.parametrize("kind", TINY)
def test_the_weights_have_the_names_that_transformers_gives_them(kind: str, tmp_path: Path) -> None:
    """Some families have others in memory."""
    set_seed(0)
    model = CDLForImageClassification.from_backbone(stored_backbone(tmp_path / "backbone", kind), **CODA)
    learn(model, 0)
    model.save_pretrained(tmp_path / "whole")
    save_checkpoint(model, None, tmp_path / "1", tmp_path / "none")
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "1")
    learn(loaded, 1)
    save_checkpoint(loaded, None, tmp_path / "2", tmp_path / "1")
    files = weights(tmp_path / "1")
    assert len(files) == 2 and set().union(*files.values()) == weights(tmp_path / "whole")["model.safetensors"]
    assert "model-00001-of-00002.safetensors" in {*linked(tmp_path / "1", tmp_path / "2")}, "the backbone's"
    found = CDLForImageClassification.from_pretrained(tmp_path / "2").state_dict()
    assert all(torch.equal(found[name], value) for name, value in loaded.state_dict().items())


@pytest.mark.usefixtures("little_worth")
def test_a_checkpoint_goes_on_from_one_file_or_several(backbone: Path, tmp_path: Path) -> None:
    """The files depend on the checkpoint before and the weights, not on the process: a resumed run has the same."""
    model = new(backbone)
    learn(model, 0)
    save_checkpoint(model, None, tmp_path / "1", tmp_path / "none")
    model.save_pretrained(tmp_path / "old")
    again = CDLForImageClassification.from_pretrained(tmp_path / "1")
    for each in (model, again):
        learn(each, 1)
    save_checkpoint(model, None, tmp_path / "2", tmp_path / "1")
    save_checkpoint(again, None, tmp_path / "again", tmp_path / "1")
    save_checkpoint(again, None, tmp_path / "from one file", tmp_path / "old")
    assert contents(tmp_path / "2") == contents(tmp_path / "again")
    assert linked(tmp_path / "2", tmp_path / "1") == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
    ]
    assert not linked(tmp_path / "from one file", tmp_path / "old")
    found = CDLForImageClassification.from_pretrained(tmp_path / "from one file")
    assert torch.equal(logits(found), logits(model))
    learn(again, 2)
    save_checkpoint(again, None, tmp_path / "3", tmp_path / "from one file")
    assert len(linked(tmp_path / "3", tmp_path / "from one file")) >= 2


def test_little_that_is_settled_stays_in_one_file(backbone: Path, tmp_path: Path) -> None:
    model = new(backbone)
    for number in range(2):
        learn(model, number)
        save_checkpoint(model, None, tmp_path / str(number), tmp_path / str(number - 1))
        assert {*weights(tmp_path / str(number))} == {"model.safetensors"}


@pytest.mark.usefixtures("little_worth")
def test_what_a_user_saves_is_one_file(backbone: Path, tmp_path: Path) -> None:
    model = new(backbone)
    learn(model, 0)
    model.save_pretrained(tmp_path)
    assert {*weights(tmp_path)} == {"model.safetensors"}


@pytest.mark.usefixtures("little_worth")
def test_a_model_that_does_not_say_how_it_stores_its_weights_is_one_file(tmp_path: Path) -> None:
    tiny = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16)
    save_checkpoint(ImageClassifier(ViTForImageClassification(tiny)), None, tmp_path / "a", tmp_path / "none")
    assert {*weights(tmp_path / "a")} == {"model.safetensors"}


@pytest.mark.usefixtures("little_worth")
def test_a_weight_that_changed_by_a_bit_is_written(backbone: Path, tmp_path: Path) -> None:
    """Whatever the method says of it: a frozen weight that changed, one that is 0 and -0, one behind a NaN."""
    model = new(backbone)
    learn(model, 0)
    value: Any = model.backbone.get_parameter("layernorm.bias")
    value.data.zero_()
    save_checkpoint(model, None, tmp_path / "1", tmp_path / "none")
    learn(model, 1)
    value.data.neg_()  # -0.0, which equals 0.0
    save_checkpoint(model, None, tmp_path / "2", tmp_path / "1")
    found = CDLForImageClassification.from_pretrained(tmp_path / "2")
    assert found.backbone.get_parameter("layernorm.bias").signbit().all()
    assert len(linked(tmp_path / "2", tmp_path / "1")) == 1  # of the first task's prompts


@pytest.mark.usefixtures("little_worth")
def test_a_damaged_file_is_not_handed_on(backbone: Path, tmp_path: Path) -> None:
    model = new(backbone)
    learn(model, 0)
    save_checkpoint(model, None, tmp_path / "1", tmp_path / "none")
    learn(model, 1)
    file = tmp_path / "1" / sorted(weights(tmp_path / "1"))[0]
    content = bytearray(file.read_bytes())
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-100], b"", None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        save_checkpoint(model, None, tmp_path / "2", tmp_path / "1")
        assert torch.equal(logits(CDLForImageClassification.from_pretrained(tmp_path / "2")), logits(model))


@pytest.mark.usefixtures("little_worth")
def test_a_link_is_not_shared(backbone: Path, tmp_path: Path) -> None:
    """It may stand for any file of the machine, which somebody else writes."""
    model = new(backbone)
    learn(model, 0)
    save_checkpoint(model, None, tmp_path / "1", tmp_path / "none")
    for name in weights(tmp_path / "1"):
        (tmp_path / "else").mkdir(exist_ok=True)
        shutil.move(tmp_path / "1" / name, tmp_path / "else" / name)
        (tmp_path / "1" / name).symlink_to(tmp_path / "else" / name)
    save_checkpoint(model, None, tmp_path / "2", tmp_path / "1")
    assert len(weights(tmp_path / "2")) > 1 and not linked(tmp_path / "2", tmp_path / "else")
    assert not any(path.is_symlink() for path in (tmp_path / "2").iterdir())


@pytest.mark.usefixtures("little_worth")
def test_files_stay_few(backbone: Path, tmp_path: Path) -> None:
    """Of 25 tasks: two tens in a file each, five of one, the backbone and the rest; and closed ones never change."""
    model = new(backbone)
    for number in range(25):
        learn(model, number)
        save_checkpoint(model, None, tmp_path / str(number), tmp_path / str(number - 1))
        assert len(weights(tmp_path / str(number))) <= 13
    assert len(weights(tmp_path / "24")) == 9
    assert len(linked(tmp_path / "24", tmp_path / "23")) == 7
    assert torch.equal(logits(CDLForImageClassification.from_pretrained(tmp_path / "24")), logits(model))


@pytest.mark.usefixtures("little_worth")
def test_a_class_that_is_removed_changes_its_task_alone(backbone: Path, tmp_path: Path) -> None:
    model = new(backbone)
    for number in range(3):
        learn(model, number)
        save_checkpoint(model, None, tmp_path / str(number), tmp_path / str(number - 1))
    model.remove("class 0")
    save_checkpoint(model, None, tmp_path / "removed", tmp_path / "2")
    assert len(linked(tmp_path / "removed", tmp_path / "2")) >= 3, "backbone, and the other tasks' blocks"
    assert torch.equal(logits(CDLForImageClassification.from_pretrained(tmp_path / "removed")), logits(model))


@pytest.mark.usefixtures("little_worth")
def test_a_small_checkpoint_on_one_in_several_files(backbone: Path, tmp_path: Path) -> None:
    model = new(backbone, "ridge")
    learn(model, 0)
    save_checkpoint(model, AutoImageProcessor.from_pretrained(backbone), tmp_path / "1", tmp_path / "none")
    assert len(weights(tmp_path / "1")) > 1
    set_seed(0)
    small = CDLForImageClassification.from_backbone(tmp_path / "1", save_backbone=False, **CODA)
    learn(small, 5)
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(logits(CDLForImageClassification.from_pretrained(tmp_path / "small")), logits(small))


@pytest.mark.usefixtures("little_worth")
@pytest.mark.parametrize("what", ["a file", "the index"])
def test_a_checkpoint_that_lacks_a_file_is_refused_by_name(what: str, backbone: Path, tmp_path: Path) -> None:
    model = new(backbone)
    learn(model, 0)
    save_checkpoint(model, None, tmp_path / "1", tmp_path / "none")
    first = sorted(weights(tmp_path / "1"))[0]
    (tmp_path / "1" / ("model.safetensors.index.json" if what == "the index" else first)).unlink()
    with pytest.raises(ValueError, match=str(tmp_path / "1")) as error:
        CDLForImageClassification.from_pretrained(tmp_path / "1")
    assert (first if what == "a file" else "model.safetensors") in str(error.value)


# ---- a run of them ----


def names_of(index: int) -> tuple[str, str]:
    return f"class {2 * index}", f"class {2 * index + 1}"


def task(index: int) -> Task:
    nothing: Any = []
    return Task(index, names_of(index), 2 * index, nothing, None, nothing)


def learnt(folder: Path, backbone: Path, count: int, after: Callable[[int], Any] = lambda number: None) -> Any:
    """A run whose student has learnt some tasks, and the student."""
    run = Run(folder, {"name": "x"}, say=lambda said: None)
    run.bind("abc", [list(task(index).class_names) for index in range(count)])
    processor, model = AutoImageProcessor.from_pretrained(backbone), new(backbone)
    for index in range(count):
        learn(model, index)
        before = folder / "student" / f"task-{index:02d}"
        if run.result("student", task(index)) is None:
            result = TaskResult("student", index)
            run.save_task(result, task(index), partial(save_checkpoint, model, processor, before=before), [])
            result.row, result.correct, result.counts = [50.0] * (index + 1), [1] * (index + 1), [2] * (index + 1)
            run.save_result(result)
            after(index)
    return run, model


def check(folder: Path, backbone: Path, count: int) -> None:
    """Every checkpoint is what its task learnt, the ledger knows every file, and ROLE/ is a copy of the newest."""
    model = new(backbone)
    for index in range(count):
        learn(model, index)
        found = CDLForImageClassification.from_pretrained(folder / "student" / f"task-{index + 1:02d}")
        assert torch.equal(logits(found), logits(model))
    files = json.loads((folder / "run.json").read_text())["files"]
    for path, (length, time, digest) in files.items():
        found = (folder / path).stat()
        assert (length, digest) == (found.st_size, hashlib.sha256((folder / path).read_bytes()).hexdigest()), path
        assert time == found.st_mtime_ns, path
    newest = folder / "student" / f"task-{count:02d}"
    copy = {name: digest for name, digest in contents(folder / "student").items() if not name.startswith("task-")}
    assert copy == contents(newest)
    assert all(f"student/{newest.name}/{name}" in files for name in copy)
    stored = [path for path in (folder / "student").iterdir() if path.is_file()]
    tasks = {path.stat().st_ino for path in folder.glob("student/task-*/*")}
    assert not tasks & {path.stat().st_ino for path in stored}, "the copy shares nothing with what it restores"


def test_the_folder_of_twelve_tasks(tmp_path: Path) -> None:
    """As large as three checkpoints and a MB a task; without shared files it would be thirteen checkpoints."""
    large = make_backbone(tmp_path / "large", hidden=128, depth=8)
    run, _ = learnt(tmp_path / "run", large, 12)
    newest = size(tmp_path / "run" / "student" / "task-12")
    assert newest > 4e6, "not so small that the MB a task decide"
    assert size(tmp_path / "run") < 2.1 * newest + 12 * 2**20 / 4
    check(tmp_path / "run", large, 12)
    run.close()


@pytest.mark.usefixtures("little_worth")
def test_a_run_shares_what_it_can(backbone: Path, tmp_path: Path) -> None:
    run, _ = learnt(tmp_path / "run", backbone, 12)
    check(tmp_path / "run", backbone, 12)
    assert "preprocessor_config.json" in linked(*(tmp_path / "run" / "student" / f"task-{n}" for n in (12, 11)))
    run.close()
    assert not examine(tmp_path / "run", json.loads((tmp_path / "run" / "run.json").read_text())).said


@pytest.mark.usefixtures("little_worth")
def test_where_there_are_no_links_files_are_copied(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    learnt(tmp_path / "linked", backbone, 4)[0].close()
    monkeypatch.setattr(os, "link", no)
    run, _ = learnt(tmp_path / "run", backbone, 4)
    check(tmp_path / "run", backbone, 4)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "run").rglob("*") if path.is_file())
    ours, theirs = (
        {n: d for n, d in contents(tmp_path / f).items() if "run.json" not in n} for f in ("run", "linked")
    )
    assert ours == theirs
    run.close()


@pytest.mark.usefixtures("little_worth")
def test_what_has_not_changed_is_neither_written_nor_read_again(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither hashed for the ledger nor copied to ROLE/."""
    read: list[str] = []
    for module, name in (("sharing", "fingerprint"), ("sharing", "copy_whole")):
        real = getattr(__import__(f"hf_cdl.runs.{module}", fromlist=[name]), name)
        monkeypatch.setattr(
            f"hf_cdl.runs.{module}.{name}",
            lambda file, *more, real=real: (read.append(file.name), real(file, *more))[1],
        )
    run, _ = learnt(tmp_path / "run", backbone, 3)
    read.clear()
    shared = linked(*(tmp_path / "run" / "student" / f"task-0{number}" for number in (3, 2)))
    run.close()
    shutil.rmtree(tmp_path / "run")
    learnt(tmp_path / "run", backbone, 3, lambda index: read.clear() if index == 1 else None)[0].close()
    assert len(shared) >= 3 and read and not {*read} & {*shared}


@pytest.mark.usefixtures("little_worth")
def test_damage_in_a_shared_file_is_found_in_all_that_share_it(backbone: Path, tmp_path: Path) -> None:
    """Of the same size and time it is found by the newest, which is read; all are restored, and share it again."""
    run, _ = learnt(tmp_path / "run", backbone, 3)
    run.close()
    folders = [tmp_path / "run" / "student" / f"task-0{number}" for number in (1, 2, 3)]
    file = folders[2] / sorted(weights(folders[2]))[0]
    assert file.stat().st_nlink == 3
    found, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    said: list[str] = []
    run = Run(tmp_path / "run", {"name": "x"}, say=said.append)
    run.close()
    first = [folder / sorted(weights(folder))[0] for folder in folders]
    assert sorted(line.split(" has ")[0] for line in said) == sorted(map(str, first))
    assert all("has another content than was written; it is restored from" in line for line in said)
    assert len({path.stat().st_ino for path in first}) == 1
    check(tmp_path / "run", backbone, 3)


@pytest.mark.usefixtures("little_worth")
def test_a_lost_file_of_an_earlier_task_comes_back_from_whatever_has_its_content(
    backbone: Path, tmp_path: Path
) -> None:
    learnt(tmp_path / "run", backbone, 3)[0].close()
    folder = tmp_path / "run" / "student" / "task-01"
    names = sorted(weights(folder))
    (folder / names[0]).unlink()
    Run(tmp_path / "run", {"name": "x"}, say=lambda said: None).close()
    check(tmp_path / "run", backbone, 3)
    (folder / names[-1]).unlink()  # what this task alone has
    with pytest.raises(RunError, match=f"student/task-01/{names[-1]} is missing"):
        Run(tmp_path / "run", {"name": "x"}, say=lambda said: None)


@pytest.mark.usefixtures("little_worth")
def test_weights_of_another_layout_in_the_copy_go(backbone: Path, tmp_path: Path) -> None:
    """transformers would load model.safetensors rather than the files that an index names."""
    learnt(tmp_path / "run", backbone, 2)[0].close()
    role = tmp_path / "run" / "student"
    CDLForImageClassification.from_pretrained(role / "task-01").save_pretrained(role)
    (role / "notes.txt").write_text("mine")
    said: list[str] = []
    Run(tmp_path / "run", {"name": "x"}, say=said.append).close()
    assert len(said) == 1 and "model.safetensors is of another one" in said[0] and "it is made so" in said[0]
    assert (role / "notes.txt").read_text() == "mine"
    (role / "notes.txt").unlink()
    check(tmp_path / "run", backbone, 2)


@pytest.mark.usefixtures("little_worth")
def test_a_run_of_the_old_layout_goes_on(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "plan", lambda *args: [])
        learnt(tmp_path / "old", backbone, 2)[0].close()
    assert {*weights(tmp_path / "old" / "student")} == {"model.safetensors"}
    ledger = json.loads((tmp_path / "old" / "run.json").read_text())
    ledger["class_names"].append([*names_of(2)])
    (tmp_path / "old" / "run.json").write_text(json.dumps(ledger))
    run, _ = learnt(tmp_path / "old", backbone, 3)
    run.close()
    assert len(weights(tmp_path / "old" / "student")) > 1
    check(tmp_path / "old", backbone, 3)


@pytest.mark.usefixtures("little_worth")
def test_a_change_leaves_the_other_folders_alone(backbone: Path, tmp_path: Path) -> None:
    run, model = learnt(tmp_path / "run", backbone, 3)
    run.finish()
    before = {name: contents(tmp_path / "run" / "student" / name) for name in ("task-01", "task-02", "task-03")}
    changing = ChangingRun(tmp_path / "run", say=lambda said: None)
    place = tmp_path / "run" / "student"
    with changing.changing():
        change = model.rename("class 1", "one")
        stored = {"kind": "rename", "said": str(change), "images": {}, "choices": {}, "class_names": model.tasks}
        processor = AutoImageProcessor.from_pretrained(backbone)
        changing.save_change(stored, partial(save_checkpoint, model, processor, before=place / "task-03"))
    with changing.changing():
        changing.undo(lambda number, folder: None)
    assert {name: contents(place / name) for name in before} == before
    assert {*weights(place / "task-05")} <= {*linked(place / "task-05", place / "task-03")}
    assert contents(place / "task-05") == before["task-03"]
    assert not examine(tmp_path / "run", changing.ledger).said


@pytest.mark.usefixtures("little_worth")
def test_an_origin_in_several_files_is_taken_over(backbone: Path, tmp_path: Path) -> None:
    learnt(tmp_path / "run", backbone, 2)[0].close()
    origin = read_folder(tmp_path / "run", "student")
    origin.copy(tmp_path / "taken")
    assert origin.same(tmp_path / "taken") and not linked(tmp_path / "taken", tmp_path / "run")
    (tmp_path / "taken" / sorted(weights(tmp_path / "taken"))[0]).unlink()
    assert not origin.same(tmp_path / "taken")
    (tmp_path / "run" / "student" / "task-02" / sorted(weights(tmp_path / "run" / "student" / "task-02"))[0]).unlink()
    with pytest.raises(RunError, match="which is not beside it"):
        origin.copy(tmp_path / "again")


def lasting(folder: Path) -> dict[str, str]:
    """The files of a run but for its ledger and lock, which have times in them."""
    return {name: digest for name, digest in contents(folder).items() if name not in ("run.json", ".lock")}


@pytest.mark.slow
@pytest.mark.usefixtures("little_worth")
@pytest.mark.parametrize("call", ["replace", "link", "fsync", "unlink"])
def test_a_stop_before_any_call_leaves_a_whole_run(
    call: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kill: nothing is tidied up. Then the run goes on, to the same end."""
    for name, count in (("start", 2), ("whole", 3)):
        learnt(tmp_path / name, backbone, count)[0].close()
    ledger = json.loads((tmp_path / "start" / "run.json").read_text())
    (tmp_path / "start" / "run.json").write_text(
        json.dumps(ledger | {"class_names": [[*names_of(index)] for index in range(3)]})
    )
    real, folder, known = getattr(os, call), tmp_path / "run", set[int]()
    for number in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["cp", "-a", tmp_path / "start", folder], check=True)  # with its links
        left = [number]

        def counted(*args: Any, left: list[int] = left, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, counted)
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            with contextlib.suppress(KeyboardInterrupt):
                learnt(folder, backbone, 3)
        Run(folder, {"name": "x"}, say=lambda said: None)._lock.release(force=True)
        newest = len(json.loads((folder / "run.json").read_text())["entries"]["student"])
        known.add(newest)
        copy = {name: digest for name, digest in contents(folder / "student").items() if "task-" not in name}
        assert copy == contents(folder / "student" / f"task-{newest:02d}")
        run, _ = learnt(folder, backbone, 3)
        run._lock.release(force=True)
        assert lasting(folder) == lasting(tmp_path / "whole")
        if left[0] > 0:
            break
    assert known == {2, 3}
