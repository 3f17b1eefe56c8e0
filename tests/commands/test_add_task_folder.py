"""Continuing from a local folder, or in Python: a new task without the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import class_means, make_backbone, make_recipe, make_table, write_recipe
from hub_server import TOKEN, HubServer
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, StreamConfig, TaskStream
from hf_cdl.commands import add
from hf_cdl.commands.train import main as train_main
from hf_cdl.hub import HubError, read_folder

KNOWN = [["class a", "class b"], ["class c", "class d"]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 6 classes, a run of all three tasks, and one of the first two, whose student has class means."""
    folder = tmp_path_factory.mktemp("source")
    file = str(class_means(folder))
    assert train_main([file, "--output_dir", str(folder / "whole")]) == 0
    assert train_main([file, "--output_dir", str(folder / "two"), "--data.max_classes", "4"]) == 0
    return folder


def state(folder: Path) -> dict[str, Any]:
    return {name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()}


def add_to(student: Path, source: Path, out: Path, *words: str) -> int:
    known = ("--data.known_train", "ignore", "--output_dir", str(out), "--train.use_cpu", "true")
    return add.main([str(student), str(source / "data"), *known, *words])


@pytest.mark.parametrize("where", ["run", "role", "state", "bare"])
def test_it_is_what_the_run_itself_would_have_learnt(source: Path, tmp_path: Path, where: str, capsys: Any) -> None:
    """From the folder of a run, its student or one state, or from a lone checkpoint: bit-identical results."""
    student = {
        "run": source / "two",
        "role": source / "two" / "student",
        "state": source / "two" / "student" / "task-02",
        "bare": tmp_path / "mine",
    }[where]
    if where == "bare":
        shutil.copytree(source / "two" / "student" / "task-02", student)
    before = {path: path.read_bytes() for path in (source / "two").rglob("*") if path.is_file()}
    assert add_to(student, source, tmp_path / "out") == 0
    assert state(tmp_path / "out" / "student" / "task-03") == state(source / "whole" / "student" / "task-03")
    results, whole = (json.loads((run / "results.json").read_text()) for run in (tmp_path / "out", source / "whole"))
    assert results["class_names"] == whole["class_names"]
    assert results["origin"] == {
        "tasks": 2,
        "roles": {"student": {"folder": "mine" if where == "bare" else "two", "tags": {}}},
    }
    matrix = results["roles"]["student"]["accuracy_matrix"]
    assert matrix[2] == whole["roles"]["student"]["accuracy_matrix"][2]
    assert matrix[:2] == ([[None], [None, None]] if where == "bare" else matrix[:2])
    assert "accuracy (%) on earlier tasks, before and after task 3" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before, "what it went on from stays"


def test_a_relative_folder_that_looks_like_a_repository_is_the_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in runs/flowers photos: the Hub is not asked for a repository of that name."""
    shutil.copytree(source / "two", tmp_path / "runs" / "flowers")
    shutil.copytree(source / "data", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)

    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(add, "HfApi", asked)
    words = ["runs/flowers", "photos", "--data.known_train", "ignore", "--train.use_cpu", "true"]
    assert add.main(words) == 2, "as a change of the student these have no effect"
    words += ["--output_dir", "runs/flowers-photos"]
    assert add.main(words) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"flowers", "flowers-photos"}
    added = tmp_path / "runs" / "flowers-photos"
    assert state(added / "student" / "task-03") == state(source / "whole" / "student" / "task-03")
    assert json.loads((added / "results.json").read_text())["origin"]["roles"]["student"]["folder"] == "flowers"
    before = {path: path.read_bytes() for path in added.rglob("*") if path.is_file()}
    assert add.main(words) == 0, "the same once more: it is finished"
    assert {path: path.read_bytes() for path in before} == before


def taught(folder: Path, head: dict[str, Any] | None) -> dict[str, Any]:
    """A recipe whose student learns from a teacher: by prompts and kdp, or with fitted heads."""
    recipe = make_recipe(folder, baselines=[])
    recipe["train"]["num_train_epochs"] = 1
    if head is not None:
        recipe["teacher"] = {"backbone": recipe["teacher"]["backbone"], "head": {"type": "ridge"}}
        recipe["student"] = {"backbone": recipe["student"]["backbone"], "head": head}
        del recipe["distill"], recipe["ce_weight"]
        recipe["train"] = {"use_cpu": True}
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", [{"type": "ridge", "strength": 10.0, "soft_targets": 0.5}, None], ids=["fitted", "trained"]
)
def test_a_run_with_a_teacher(head: dict[str, Any] | None, tmp_path: Path, capsys: Any) -> None:
    """Teacher and student continue together, from the run's folder or from the student's last state in it."""
    recipe = taught(tmp_path, head)
    file = str(write_recipe(tmp_path / "tiny.yaml", recipe))
    assert train_main([file, "--output_dir", str(tmp_path / "whole")]) == 0
    assert train_main([file, "--output_dir", str(tmp_path / "two"), "--data.max_classes", "4"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "two").rglob("*") if path.is_file()}
    places = (tmp_path / "two", tmp_path / "two" / "student" / "task-02") if head else (tmp_path / "two",)
    for number, student in enumerate(places):
        out = tmp_path / f"out {number}"
        assert add_to(student, tmp_path, out) == 0
        for role in ("teacher", "student"):
            assert state(out / role / "task-03") == state(tmp_path / "whole" / role / "task-03"), role
        ours, theirs = (json.loads((run / "results.json").read_text())["roles"] for run in (out, tmp_path / "whole"))
        for role in ("teacher", "student"):
            assert ours[role]["accuracy_matrix"] == theirs[role]["accuracy_matrix"]
    assert {path: path.read_bytes() for path in before} == before, "what it went on from stays"
    capsys.readouterr()
    shutil.rmtree(tmp_path / "two" / "teacher")
    assert add_to(tmp_path / "two", tmp_path, tmp_path / "other") == 2
    said = capsys.readouterr().err
    assert "The student had a teacher, which is needed for the next task" in said and said.count("\n") <= 6
    assert not (tmp_path / "other").exists()


def test_an_earlier_state(source: Path, tmp_path: Path) -> None:
    origin = read_folder(source / "whole", "student", "task-01")
    assert (origin.tasks, origin.folder.name) == (1, "task-01")
    assert add_to(source / "whole", source, tmp_path / "out", "--revision", "task-01") == 0
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["class_names"]
    assert tasks == [KNOWN[0], ["class c", "class d", "class e", "class f"]]


@pytest.mark.parametrize(
    ("where", "words", "said"),
    [
        ("data", (), "neither a run's folder (run.json or results.json) nor a checkpoint's"),
        ("two", ("--revision", "task-07"), "has no student/task-07; it has task-01, task-02"),
        ("two/student", ("--revision", "task-01"), "is one checkpoint, so --revision task-01 chooses nothing"),
        ("two", ("--teacher", "two"), "The student had no teacher"),
        ("backbone", (), "not a checkpoint of hf_cdl that knows classes"),
        ("nowhere/at/all", (), "is neither a folder here nor a repository"),
    ],
)
def test_folders_that_cannot_be_gone_on_from(
    source: Path, tmp_path: Path, where: str, words: tuple[str, ...], said: str, capsys: Any
) -> None:
    assert add_to(source / where if where != "nowhere/at/all" else Path(where), source, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") <= 6
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_was_taught_needs_its_run(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "two" / "student" / "task-02", tmp_path / "bare")
    file = tmp_path / "bare" / "config.json"
    for fields in (
        {"kd_prompt": {}},
        {"mapping": {}},
        {"head": {"type": "ridge", "strength": 10.0, "soft_targets": 0.5}},
    ):
        file.write_text(json.dumps({**json.loads(file.read_text()), "kd_prompt": None, "mapping": None, **fields}))
        with pytest.raises(HubError, match="was taught .*Put the results.json or run.json of its run beside it"):
            read_folder(tmp_path / "bare", "student")


def test_another_role_is_told_apart(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "two", tmp_path / "run")
    (tmp_path / "run" / "student").rename(tmp_path / "run" / "linear_head")
    with pytest.raises(HubError, match="is the linear_head of its run, but its student is needed"):
        read_folder(tmp_path / "run" / "linear_head", "student")


def test_in_python(source: Path, tmp_path: Path) -> None:
    """from_pretrained and known_classes: the stream continues after the known classes, as in the run itself."""
    checkpoint = source / "two" / "student"
    student = CDLForImageClassification.from_pretrained(checkpoint)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    data = StreamConfig(str(source / "data"), classes_per_task=2, known_classes=student.tasks, known_train="ignore")
    stream = TaskStream(data, processor)
    trainer = CDLTrainer(student, CDLTrainingArguments(str(tmp_path / "work"), use_cpu=True))
    for task in stream:
        trainer.learn(task)
    student.save_pretrained(tmp_path / "student")
    assert state(tmp_path / "student") == state(source / "whole" / "student" / "task-03")
    whole = json.loads((source / "whole" / "results.json").read_text())["roles"]["student"]["accuracy_matrix"]
    assert trainer.evaluate_seen().row == whole[2]


def test_in_python_a_trained_student_goes_on(tmp_path: Path) -> None:
    """The same with prompts: what was learnt stays bit-identical, and one new task begins."""
    backbone = str(make_backbone(tmp_path / "backbone"))
    prompt = {"type": "coda", "components": 3, "length": 4, "layers": [0, 1]}
    student = CDLForImageClassification.from_backbone(backbone, prompt=prompt)
    student.begin_task(["class a", "class b"])
    student.save_pretrained(tmp_path / "student")
    student = CDLForImageClassification.from_pretrained(tmp_path / "student")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    table = {"train": make_table([2, 3] * 4, 4), "test": make_table([0, 1, 2, 3], 4, 10_000)}
    stream = TaskStream(
        StreamConfig(known_classes=student.tasks, classes_per_task=[["class c", "class d"]]),
        AutoImageProcessor.from_pretrained(backbone),
        dataset=table,
    )
    arguments = CDLTrainingArguments(str(tmp_path / "work"), num_train_epochs=1, use_cpu=True, learning_rate=0.1)
    trainer = CDLTrainer(student, arguments)
    for task in stream:
        trainer.learn(task)
    after = student.state_dict()
    assert student.tasks == [["class a", "class b"], ["class c", "class d"]] and after.keys() > before.keys()
    assert all(after[name].equal(value) for name, value in before.items() if "head" in name)
    assert len(trainer.evaluate_seen().row) == 2


@pytest.mark.parametrize("where", ["a folder", "a repository with more in it"])
def test_what_comes_of_it_is_pushed(source: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder to the user's own repositories; from a repository to itself, though not all of it is inherited."""
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(hub.url, token=TOKEN)
        for module in ("hf_cdl.commands.add", "hf_cdl.hub.push"):
            monkeypatch.setattr(f"{module}.HfApi", lambda: api)
        student, words = str(source / "two"), ("--push_to_hub", "true", "--hub_model_id", "me/mine")
        if where != "a folder":
            student, words = "me/mine", words[:2]
            api.create_repo("me/mine")
            files = {file.name: file.read_bytes() for file in (source / "two" / "student" / "task-02").iterdir()}
            files |= {
                "results.json": (source / "two" / "results.json").read_bytes(),
                "evil.py": b"x",
                "notes.txt": b"x",
            }
            operations = [CommitOperationAdd(path, content) for path, content in files.items()]
            commit = api.create_commit("me/mine", operations, commit_message="x").oid
            api.create_tag("me/mine", tag="task-02", revision=commit)
        before = hub.repository("me/mine").refs("tags") if where != "a folder" else {}
        assert add_to(student, source, tmp_path / "out", *words) == 0  # type: ignore[arg-type]
        repository = hub.repository("me/mine")
        tags = repository.refs("tags")
        assert list(tags) == ["task-02", "task-03"] and repository.refs("heads")["main"] == tags["task-03"]
        assert {**tags, **before} == tags, "old tags stay"
        assert not {"evil.py", "notes.txt"} & set(repository.files("main"))
        card = repository.read("main", "README.md").decode()
        said = "`two`, a folder of the author's" if where == "a folder" else "](https://huggingface.co/me/mine/tree/"
        assert f"Tasks 1 to 2 were learnt in an earlier run: {said}" in card.replace("[me/mine", "")
        assert str(tmp_path) not in card and str(source) not in repository.read("main", "results.json").decode()
