"""Commands that change a trained student: a user's day, undo, kills, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_backbone, picture, run_script, write_recipe
from transformers import AutoImageProcessor

from hf_cdl import CDLForImageClassification
from hf_cdl.data.images import decode

NAMES = [f"class {letter}" for letter in "abcdefghijkl"]
Command = Callable[..., int]


def put(folder: Path, name: str, numbers: range, kind: int) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(kind, number).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of twelve classes, 8 each, the recipe of a ridge head on them, and its finished run."""
    folder = tmp_path_factory.mktemp("trained")
    for kind, name in enumerate(NAMES):
        put(folder / "data" / "train", name, range(8), kind)
        put(folder / "data" / "test", name, range(1000, 1002), kind)
    recipe = {
        "name": "day",
        "data": {"path": str(folder / "data"), "classes_per_task": 6},
        "student": {"backbone": str(make_backbone(folder / "backbone")), "head": {"type": "ridge", "strength": 1.0}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    write_recipe(folder / "day.yaml", recipe)
    with pytest.MonkeyPatch.context() as patch:
        assert run_script("train", [str(folder / "day.yaml"), "--output_dir", str(folder / "run")], patch) == 0
    return folder


@pytest.fixture
def day(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "day")
    return tmp_path / "day"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield lambda verb, *words: run_script(verb, [*map(str, words)], monkeypatch)


def load(folder: Path) -> CDLForImageClassification:
    return CDLForImageClassification.from_pretrained(folder).eval()


def scores(folder: Path, images: list[Any]) -> dict[str, torch.Tensor]:
    """The student's logits for some images, by class name."""
    model, processor = load(folder), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        found = model(**processor([decode(image) for image in images], return_tensors="pt")).logits
    return {name: found[:, index] for index, name in model.config.id2label.items()}


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_a_user_s_day(day: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Add a class, add to a known one, correct, remove, rename, merge, undo: the final student is the joint one."""
    run, new = day / "run", day / "new"
    put(new, "class m", range(8), 12)
    put(new, "class a", range(8, 12), 0)
    assert command("add", run, new) == 0
    assert "12 images learnt: 1 new class ('class m'), more images of 'class a'." in capsys.readouterr().out
    with (day / "wrong.csv").open("w", newline="") as file:
        rows = [["image", "label"], ["data/train/class b/0.png", "class c"], ["data/train/class d/3.png", "class a"]]
        csv.writer(file).writerows(rows)
    steps = [
        (("correct", run, day / "wrong.csv"), "2 labels corrected: 1 from 'class b' to 'class c', 1 from 'class d'"),
        (("remove", run, "class e", "--images", day / "data"), "no folder"),
        (
            ("remove", run, "class e", "--images", day / "data" / "train"),
            "'class e' is removed: the model never answers",
        ),
        (("rename", run, "class f", "fox"), "'class f' is called 'fox' now."),
        (
            ("merge", run, "class g", "class h", "--as", "class gh"),
            "'class g', 'class h' are one class 'class gh' now.",
        ),
        (("merge", run, "class i", "class j", "--as", "fault"), "are one class 'fault' now."),
        (
            ("undo", run),
            "Undone: 'class i', 'class j' are one class 'fault' now. The student is that of task-07 again.",
        ),
    ]
    for words, line in steps:
        code = command(*words)
        out = capsys.readouterr()
        if words[1:3] == (run, "class e") and words[-1] == day / "data":
            assert code == 2
            assert "Several folders are called 'class e'" in out.err
            continue
        assert code == 0, out.err
        assert line in out.out
    # the same at once
    final: dict[Path, str] = {}
    for name in NAMES:
        for file in sorted((day / "data" / "train" / name).iterdir()):
            final[file] = {"class f": "fox", "class g": "class gh", "class h": "class gh"}.get(name, name)
    for file in sorted((new / "class m").iterdir()):
        final[file] = "class m"
    for file in sorted((new / "class a").iterdir()):
        final[file] = "class a"
    final[day / "data" / "train" / "class b" / "0.png"] = "class c"
    final[day / "data" / "train" / "class d" / "3.png"] = "class a"
    final = {file: name for file, name in final.items() if name != "class e"}
    joint = CDLForImageClassification.from_backbone(day / "backbone", head={"type": "ridge", "strength": 1.0})
    processor = AutoImageProcessor.from_pretrained(day / "backbone")
    joint.add([*final], [*final.values()], processor)
    joint.save_pretrained(day / "joint")
    processor.save_pretrained(day / "joint")
    tests = sorted((day / "data" / "test").rglob("*.png"))
    found, want = scores(run / "student", tests), scores(day / "joint", tests)
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert float((found[name] - value).abs().max()) <= 1e-6 * max(float(v.abs().max()) for v in want.values()), (
            name
        )
    changes = results(run)["changes"]
    assert [change["kind"] for change in changes] == ["add", "correct", "remove", "rename", "merge", "merge", "undo"]
    assert [change["revision"] for change in changes] == [3, 4, 5, 6, 7, 8, 9]
    assert sorted(path.name for path in (run / "student").glob("task-*")) == [f"task-{n:02d}" for n in range(1, 10)]
    capsys.readouterr()
    assert command("train", day / "day.yaml", "--output_dir", run) == 0
    assert "This run is finished" in capsys.readouterr().out
    assert command("verify", run) == 0
    assert command("card", run) == 0
