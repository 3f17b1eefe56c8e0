"""Commands that change a trained student: a user's day, undo, kills, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, make_backbone, picture, run_script, write_recipe
from markup import state_html
from states import States
from transformers import AutoImageProcessor

from hf_cdl import CDLForImageClassification
from hf_cdl.commands import stopping
from hf_cdl.commands.run_images import images_of_run
from hf_cdl.data.images import decode
from hf_cdl.hub import read_folder
from hf_cdl.hub.card import model_card
from hf_cdl.runs import changes as runs_changes
from hf_cdl.runs.files import RunError
from hf_cdl.runs.results import checked_results

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
    return {name: found[:, index] for index, name in enumerate(sum(model.tasks, []))}


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_a_changed_student_is_measured_on_the_images_of_its_run_by_their_present_names(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rename, a merger and a removal, also seen from states before them, from an undone one, and by the exporter."""
    run, words = day / "run", ("--workers", "0", "--out")
    assert command("rename", run, "class a", "ant") == 0
    assert command("merge", run, "class g", "class h", "--as", "class a") == 0, "the name of a class that is no more"
    assert command("remove", run, "class l") == 0
    revisions = [word for number in (2, 3, 4, 5) for word in ("--revision", f"task-0{number}")]
    assert command("evaluate", run, *revisions, *words, day / "out") == 0
    found = json.loads((day / "out" / "evaluation.json").read_text())["revisions"]
    assert [found[name]["images"] for name in sorted(found)] == [24, 24, 24, 22]
    assert [found[name]["unknown_classes"] for name in sorted(found)] == [{}, {}, {}, {"class l (removed)": 2}]
    of_classes = {name: found[name]["class_images"] for name in found}
    assert of_classes["task-02"]["class a"] == 2 and of_classes["task-03"]["ant"] == 2
    assert of_classes["task-05"]["ant"] == 2 and of_classes["task-05"]["class a"] == 4
    names = sum(load(run / "student").tasks, [])
    images = images_of_run(run, names, 100)
    assert images is not None and np.bincount(images.labels)[names.index("class a")] == 4
    assert command("undo", run) == 0
    assert command("evaluate", run, *words, day / "back") == 0
    (back,) = json.loads((day / "back" / "evaluation.json").read_text())["revisions"].values()
    assert back["images"] == 24 and "class l" in back["class_images"]


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
        (("remove", run, "class e", "--images", day / "data"), "not a folder"),
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


# ---- images that were learnt before ----


def csv_of(file: Path, *rows: tuple[str, str, str]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "label", "was"), *rows])
    return file


def test_no_image_is_counted_twice(day: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of the run's own data and of earlier changes are left out, whatever happened to their class since."""
    run, new = day / "run", day / "new"
    put(new, "class m", range(3), 12)
    shutil.copy(new / "class m" / "0.png", new / "class m" / "copy.png")
    (new / "class a").mkdir()
    shutil.copy(day / "data" / "train" / "class a" / "0.png", new / "class a" / "again.png")

    def said(*words: Any) -> str:
        code = command(*words)
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    text = said("add", run, new)
    assert "note: 1 image is left out: learnt before, with the same label" in text
    assert "note: 1 image is left out: the same as another one of these" in text
    assert "3 images learnt: 1 new class ('class m')." in text
    assert "Nothing was changed" in said("add", run, new)
    said("rename", run, "class m", "moth")
    assert command("add", run, new) == 2
    assert "was learnt before, as moth and not 'class m'. Leave it out, or" in capsys.readouterr().err
    said("undo", run)
    assert "Nothing was changed" in said("add", run, new)
    said("undo", run)
    assert "3 images learnt" in said("add", run, new), "an undone change is none"
    said("remove", run, "class m", "--images", new)
    (new / "class m" / "copy.png").unlink()
    assert "3 images learnt" in said("add", run, new), "what was forgotten can be learnt again"
    shutil.rmtree(run / "learnt")
    assert "not all recognised: the list of task-07, task-08, task-09 is not in learnt/" in said("add", run, new)


def test_corrections_know_the_label_that_an_image_has(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run, train = day / "run", day / "data" / "train"
    file = csv_of(day / "c.csv", (f"{train}/class b/0.png", " class c ", "class b"))
    assert command("correct", run, file) == 0
    assert "1 label corrected: 1 from 'class b' to 'class c'." in capsys.readouterr().out
    assert command("correct", run, file) == 0
    out = capsys.readouterr().out
    assert "left out: corrected before" in out and "Nothing was changed" in out
    csv_of(file, (f"{train}/class b/1.png", "class c", "class d"))
    assert command("correct", run, file) == 2
    assert "1.png was learnt as class b, not as 'class d'. Say so in the column was." in capsys.readouterr().err
    assert command("remove", run, "class b", "--images", train) == 0
    out = capsys.readouterr().out
    assert "1 image is left out: counted in another class now" in out and "nothing of its images is left" in out
    csv_of(file, (f"{train}/class d/1.png", "clas d", "class d"))
    assert command("correct", run, file) == 0
    assert "1 new class ('clas d')" in capsys.readouterr().out


def test_data_that_changed_are_no_longer_known(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be known is said."""
    run, new = day / "run", day / "new"
    put(new, "class m", range(2), 12)
    ledger = json.loads((run / "run.json").read_text())
    ledger["stream"] = "0" * 16
    (run / "run.json").write_text(json.dumps(ledger))
    assert command("add", run, new) == 0
    assert "not all recognised: the data of its tasks have changed since" in capsys.readouterr().out


# ---- students from elsewhere ----


def test_a_checkpoint_is_taken_over_once_and_no_other_run_is_changed_for_it(
    day: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(day)
    shutil.copytree(day / "run" / "student" / "task-02", day / "mine")
    shutil.copytree(day / "run" / "student" / "task-01", day / "other" / "mine")
    assert command("rename", "mine", "class a", "ant") == 0
    assert command("rename", "mine", "class b", "bee") == 0
    assert "mine was copied before; continuing in runs/mine/, whose student has been changed since (task-03)" in (
        capsys.readouterr().out
    )
    run = day / "runs" / "mine"
    assert [*results(run)["class_names"][0]] == NAMES[:6], "as it was learnt"
    assert load(run / "student").tasks[0][:3] == ["ant", "bee", "class c"]
    before = (run / "run.json").read_bytes()
    assert command("rename", "other/mine", "class a", "ant") == 2
    assert "runs/mine is in use: its student has not been what other/mine is." in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before
    for verb in ("undo", "undo", "card"):
        assert command(verb, "runs/mine") == 0
    assert load(run / "student").tasks[0][:3] == NAMES[:3]
    assert command("undo", "runs/mine") == 2
    assert command("undo", "mine", "--output_dir", "new") == 2, "nothing was changed in it"
    assert not (day / "new").exists()
    assert command("rename", "mine", "class z", "x", "--output_dir", "new") == 2
    assert not (day / "new").exists(), "a first change that failed leaves nothing behind"


def test_an_earlier_state_goes_on_in_a_run_of_its_own(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run, early = day / "run", day / "run" / "student" / "task-01"
    assert command("rename", early, "class a", "ant") == 2
    assert "is an earlier state of the run" in capsys.readouterr().err
    assert command("rename", early, "class a", "ant", "--output_dir", run) == 2
    assert command("rename", early, "class a", "ant", "--output_dir", day / "new") == 0
    assert len(load(day / "new" / "student").tasks) == 1
    assert command("rename", run / "student" / "task-02", "class a", "ant") == 0, "that is the run itself"
    assert results(run)["changes"][0]["revision"] == 3


# ---- what else reads a run ----


def test_a_state_that_a_kill_left_is_none(day: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that the ledger does not know: neither gone on from nor shown, and replaced by the next change."""
    run = day / "run"
    assert command("rename", run, "class a", "ant") == 0
    shutil.copytree(run / "student" / "task-01", run / "student" / "task-04")
    assert read_folder(run, "student").revision == 3
    assert States(str(run / "student")).tasks == [1, 2, 3]
    assert command("rename", run, "class b", "bee") == 0
    assert load(run / "student" / "task-04").tasks[0][:2] == ["ant", "bee"]


def test_the_card_and_the_demo_know_the_changes(day: Path, command: Command) -> None:
    run = day / "run"
    assert command("remove", run, "class l") == 0
    assert command("rename", run, "class a", "<b>ant|") == 0
    assert command("card", run, "--repo_id", "me/day") == 0
    card = (run / "student" / "README.md").read_text()
    assert "It was changed since, and knows 11 classes now." in card
    assert "answered with one of the 11 classes" in card and '`revision="task-01"` to `"task-04"`' in card
    section = card.split("## Changes since training")[1].split("## Results")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `task-")]
    assert [row[:13] for row in rows] == ["| `task-03` |", "| `task-04` |"]
    assert "<b>" not in card and "Its 11 classes now: &lt;b&gt;ant\\|, class b" in section
    assert "class l" not in section.split("now:")[1]
    states = States(str(run / "student"))
    assert states.tasks == [1, 2, 3, 4] and states.results(2).change is None
    changed = states.results(4)
    assert changed.class_names[0][0] == "<b>ant|" and "is called" in (changed.change or "")
    page = state_html(changed)
    assert "Changed after its 2 tasks: 11 classes" in page and "<b>ant" not in page
    assert "Changes since training" not in model_card({**results(run), "changes": []}, "student")


def test_a_further_task_goes_on_from_what_the_student_is_now(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run of its own: with the present classes, whose accuracies nobody has measured."""
    run, photos = day / "run", day / "photos"
    assert command("rename", run, "class a", "ant") == 0
    assert command("remove", run, "class l") == 0
    put(photos / "train", "owl", range(4), 15)
    put(photos / "test", "owl", range(50, 52), 15)
    put(photos / "test", "ant", range(50, 52), 0)
    assert command("add", run, photos, "--output_dir", day / "further") == 0, capsys.readouterr().err
    found = results(day / "further")
    assert found["class_names"] == [["ant", *NAMES[1:6]], NAMES[6:11], ["owl"]]
    matrix = found["roles"]["student"]["accuracy_matrix"]
    assert matrix[:2] == [[None], [None, None]] and matrix[2][0] is not None and "changes" not in found
    for _ in range(2):
        assert command("undo", run) == 0
    assert command("add", run, photos, "--output_dir", day / "undone", "--data.known_classes", "[]") == 2
    (photos / "test" / "ant").rename(photos / "test" / "class a")
    assert command("add", run, photos, "--output_dir", day / "undone") == 0, capsys.readouterr().err
    before, after = results(run), results(day / "undone")
    assert after["class_names"] == [*before["class_names"], ["owl"]]
    measured = before["roles"]["student"]["accuracy_matrix"]
    assert after["roles"]["student"]["accuracy_matrix"][:2] == measured, "as it is what was measured"


# ---- stopping ----


@pytest.mark.parametrize("stored", [False, True])
def test_ctrl_c_says_whether_the_change_is_stored(
    stored: bool, day: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = day / "run", (day / "run" / "run.json").read_bytes()

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs_changes, "publish" if stored else "write_json", stop)
    monkeypatch.setattr(stopping._State, "said", False)
    monkeypatch.setattr(stopping._State, "stored", None)
    assert command("rename", run, "class a", "ant") == 130
    said = capsys.readouterr().out
    monkeypatch.undo()
    if stored:
        assert "Stopped. The change is stored as task-03 in" in said and "would make it once more" in said
        assert CDLForImageClassification.from_pretrained(run / "student" / "task-03").tasks[0][0] == "ant"
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        assert command("rename", run, "class b", "bee") == 0
        assert load(run / "student").tasks[0][:2] == ["ant", "bee"]
    else:
        assert "Stopped. The same command begins again" in said
        assert (run / "run.json").read_bytes() == before


def test_a_disk_that_is_full_once_the_change_is_stored(
    day: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs_changes, "publish", full)
        assert command("rename", day / "run", "class a", "ant") == 2
    assert "The change is stored as task-03, so do not make it again; but" in capsys.readouterr().err
    assert command("undo", day / "run") == 0
    assert load(day / "run" / "student").tasks[0][0] == "class a"


# ---- the guide ----


def test_the_commands_and_the_python_of_the_guide_change_a_student(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs" / "guides" / "change.md").read_text()
    [shell] = re.findall(r"<!-- change-commands -->\n```bash\n(.*?)```", guide, re.DOTALL)
    [python] = re.findall(r"```python\n([^`]*student\.add[^`]*)```", guide)
    monkeypatch.chdir(tmp_path)
    for kind, name in enumerate(("tulip", "daisy", "rose", "dog rose", "iris")):
        put(Path("images", "train"), name, range(4), kind)
        put(Path("images", "test"), name, range(50, 52), kind)
    put(Path("photos"), "aster", range(2), 20)
    put(Path("photos"), "rose", range(10, 12), 2)
    csv_of(Path("wrong.csv"), ("images/train/rose/0.png", "dog rose", "rose"))
    recipe = {
        "name": "images",
        "data": {"path": "images", "classes_per_task": None},
        "student": {"backbone": str(make_backbone(tmp_path / "backbone")), "head": {"type": "ridge"}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    assert command("train", write_recipe(Path("images.yaml"), recipe)) == 0
    lines = [shlex.split(line) for line in shell.splitlines()]
    assert [words[1] for words in lines] == ["add", "correct", "remove", "rename", "merge", "undo"]
    for program, *words in lines:
        assert program == "hf-cdl" and command(*words) == 0, capsys.readouterr().err
    assert load(Path("runs/images/student")).tasks == [["common daisy", "dog rose", "iris", "rose"], ["aster"]]
    exec(python, {})
    assert load(Path("changed")).tasks == [["common daisy", "dog rose", "rose"], ["aster"]]


# ---- what a stranger may have written ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"revision": 5},
        {"state": 4},
        {"state": 3},
        {"state": 1},
        {"said": "x" * 20_000},
        {"class_names": [["a"], ["a"]]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_changes_in_results_that_no_run_has_written_are_refused(
    day: Path, command: Command, wrong: dict[str, Any]
) -> None:
    run = day / "run"
    for verb, *words in (("rename", "class a", "ant"), ("undo",)):
        assert command(verb, run, *words) == 0
    content = results(run)
    assert checked_results(content, "results.json") is content
    content["changes"][0] |= wrong
    with pytest.raises(RunError, match="is not as hf_cdl writes it: .*changes"):
        checked_results(content, "results.json")


def test_a_change_that_says_much_can_be_read_again(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run, long = day / "run", "x" * 990
    for number, name in enumerate(NAMES[:8]):
        assert command("rename", run, name, f"{long} {number}") == 0
    names = [f"{long} {number}" for number in range(8)]
    assert command("merge", run, *names, "--as", long) == 0
    assert command("undo", run) == 0
    assert checked_results(results(run), "results.json")["changes"][-1]["kind"] == "undo"
    before = (run / "run.json").read_bytes()
    assert command("rename", run, "class k", "y" * 1001) == 2
    assert "A class name has 1,001 characters; at most 1,000" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before


def test_a_damaged_student_is_restored_before_it_is_changed(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = day / "run"
    file = run / "student" / "task-02" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert command("rename", run, "class a", "ant") == 0
    assert "it is restored from" in capsys.readouterr().out
    assert load(run / "student" / "task-02").tasks[0][0] == "class a"
    assert load(run / "student").tasks[0][0] == "ant"


def test_verify_tells_of_changed_states_whether_they_are_what_was_stored(
    day: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = day / "run"
    for name in ("ant", "emmet"):
        assert command("rename", run, "class a" if name == "ant" else "ant", name) == 0
    capsys.readouterr()
    assert command("verify", run) == 0
    out = capsys.readouterr().out
    assert out.count("a change, of which no accuracy is recorded; as stored") == 2 and "task-04" in out
    config = run / "student" / "task-03" / "config.json"
    config.write_text(config.read_text().replace("ant", "aunt"))
    assert command("verify", run) == 1
    assert "task-03: a change, of which no accuracy is recorded; NOT as stored: student/task-03/config.json has" in (
        capsys.readouterr().out
    )
