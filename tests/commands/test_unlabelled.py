"""Runs with unlabelled images: what they learn from them, resumed after a kill, measured, gone on with elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import interrupt_when, make_backbone, make_data, picture, script, train, write_recipe
from safetensors.torch import load_file

from hf_cdl.commands import card, verify
from hf_cdl.commands.costs import measure, read_tasks
from hf_cdl.commands.train import main as train_main
from hf_cdl.recipe import load_recipe

SESSION = {"head": {"type": "ridge"}, "first_session": {"type": "linear"}, "prompt": {"type": "vpt", "length": 2}}
PROMPT = {"type": "l2p", "pool_size": 4, "length": 2, "top_k": 2, "layers": [0, 1]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 4 classes, two backbones, and unlabelled images of two of the classes and of one in no task."""
    folder = tmp_path_factory.mktemp("source")
    make_data(folder / "data", classes=4, train=6, test=3)
    make_backbone(folder / "teacher", 48, 2, 1)
    make_backbone(folder / "student", 32, 2, 2)
    for name, label in (("class a", 0), ("class c", 2), ("other", 9)):
        (folder / "more" / name).mkdir(parents=True)
        for number in range(3):
            picture(label, 700 + number).save(folder / "more" / name / f"{number}.png")
    return folder


def write(source: Path, name: str, distill: list[dict[str, Any]], data: dict[str, Any], **student: Any) -> Path:
    plain = {"backbone": str(source / "student"), "prompt": PROMPT}
    teacher = {"backbone": str(source / "teacher"), "prompt": PROMPT if not student else {"type": "none"}}
    recipe = {
        "name": name,
        "data": {"path": str(source / "data"), "classes_per_task": 2, **data},
        "teacher": teacher,
        "student": {**plain, **student},
        "distill": distill,
        "ce_weight": 0.5,
        "baselines": [],
        "train": {"num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True},
    }
    return write_recipe(source / f"{name}.yaml", recipe)


def main(*words: Any) -> int:
    return train_main([str(word) for word in words])


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


KD = [{"type": "kd", "threshold": 0.6}, {"type": "pseudo_labels", "threshold": 0.6}]


def write_taught(source: Path) -> Path:
    return write(source, "taught", KD, {"unlabelled": str(source / "more"), "unlabelled_ratio": 2})


@pytest.fixture(scope="module")
def finished(source: Path) -> Path:
    """A run with kd, a threshold and pseudo-labels."""
    assert main(write_taught(source), "--output_dir", source / "taught") == 0
    return source / "taught"


@pytest.mark.slow
def test_the_student_learns_from_them_and_the_teacher_does_not(
    source: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without them, which takes over the teacher of the one with them, differs in the student alone."""
    file = write(source, "plain", [{"type": "kd"}], {})
    assert main(file, "--output_dir", source / "plain", "--teacher_from", finished) == 0
    for task in ("task-01", "task-02"):
        assert same(state(finished / "teacher" / task), state(source / "plain" / "teacher" / task))
        assert not same(state(finished / "student" / task), state(source / "plain" / "student" / task))
    log = json.loads((finished / "logs" / "student-task-02.json").read_text())
    assert {"loss/ce", "loss/kd", "loss/pseudo_labels"} <= {*log[0]}
    found = json.loads((finished / "results.json").read_text())
    assert found["unlabelled"] == {"images": 9, "terms": ["kd", "pseudo_labels"]} and "+" in found["stream"]
    capsys.readouterr()
    assert card.main([str(finished)]) == 0
    said = (finished / "student" / "README.md").read_text()
    assert "Unlabelled images: 9 of `more`, from which the student learnt in every session" in said
    assert "(`kd`, `pseudo_labels`)" in said


def test_it_is_measured_again_without_them_and_not_gone_on_with_others(
    source: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, more = Path(shutil.copytree(finished, tmp_path / "run")), source / "more"
    more.rename(source / "away")
    try:
        assert verify.main([str(run)]) == 0
        assert "as recorded" in capsys.readouterr().out
    finally:
        (source / "away").rename(more)
    words = (source / "taught.yaml", "--output_dir", run)
    assert main(*words) == 0 and "This run is finished" in capsys.readouterr().out
    picture(9, 800).save(more / "other" / "9.png")
    try:
        assert main(*words) == 2
        assert "unlabelled images: 9 -> 10" in capsys.readouterr().err
        shutil.copy(more / "other" / "9.png", more / "other" / "0.png")
        (more / "other" / "9.png").unlink()
        assert main(*words) == 2
        assert "as many images, but other ones" in capsys.readouterr().err
    finally:
        picture(9, 700).save(more / "other" / "0.png")
    assert main(*words) == 0


@pytest.mark.slow
def test_in_a_first_session_they_are_learnt_from_once(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Similarity teaches the features of the first task; the head is fitted to the images of all tasks as ever."""
    terms, runs = [{"type": "similarity"}], {}
    for name, data in (("with", {"unlabelled": str(source / "more")}), ("without", {})):
        file = write(source, name, terms, data, **SESSION)
        assert main(file, "--output_dir", source / name) == 0
        runs[name] = [state(source / name / "student" / task) for task in ("task-01", "task-02")]
        said = "9 unlabelled images" in (printed := capsys.readouterr().out)
        assert said == (name == "with") and ("in the first session alone" in printed) == said
    prompts = [key for key in runs["with"][0] if "pool" in key]
    assert prompts and not any(torch.equal(runs["with"][0][key], runs["without"][0][key]) for key in prompts)
    assert all(torch.equal(runs["with"][0][key], runs["with"][1][key]) for key in prompts), "fixed from then on"


def test_a_plan_counts_their_passes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image with two unlabelled ones beside it: three times a step's work, and queries nobody asked for."""
    costs = []
    for name, data in (("one", {}), ("three", {"unlabelled": str(source / "more"), "unlabelled_ratio": 2})):
        recipe = load_recipe([str(write(source, name, [{"type": "fitnets"}], data))], "")
        costs.append(measure(recipe, read_tasks(recipe))[1]["student"])
    query = costs[0].inference_flops / 2
    assert costs[1].training_flops == pytest.approx(3 * (costs[0].training_flops + query), rel=0.02)
    assert main(source / "three.yaml", "--plan") == 0
    assert "counted with the 2 unlabelled beside it" in capsys.readouterr().out


def test_a_plan_counts_the_features_that_later_sessions_hold(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two tasks of as many images the second trains on one and two images, whose features it computes twice."""
    more = {"unlabelled": str(source / "more"), "unlabelled_ratio": 2}
    costs = {}
    for keep_on in ("task", "unlabelled", "both"):
        later = {"keep": 1.0, "keep_on": keep_on, "anchors": "both"}
        beside = more if keep_on != "task" else {"unlabelled": more["unlabelled"]}  # none, so no ratio
        file = write(source, f"plan-{keep_on}", [], beside, **SESSION, later_sessions=later)
        recipe = load_recipe([str(file), "--teacher", "null", "--ce_weight", "1"], "")
        costs[keep_on] = measure(recipe, read_tasks(recipe))[1]["student"]
    inference, least = costs["task"].inference_flops, costs["task"].training_flops
    step = least - inference / 2  # in the second task alone, features of the image are held
    assert costs["unlabelled"].training_flops == pytest.approx(2 * step + 2 * inference / 2, rel=0.02)
    assert costs["both"].training_flops == pytest.approx(2 * step + 3 * inference / 2, rel=0.02)
    assert costs["both"].kept == pytest.approx(3 * costs["task"].kept, rel=0.1)
    assert main(source / "plan-both.yaml", "--teacher", "null", "--ce_weight", "1", "--plan") == 0
    assert "counted with the 2 unlabelled beside it" in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_whose_features_are_held_on_them_goes_on_after_a_kill(source: Path, tmp_path: Path) -> None:
    """Killed within an epoch of its second task; both roles end as without a kill, and it is said what read what."""
    later = {"keep": 0.5, "keep_on": "both", "anchors": "unlabelled"}
    terms, data = [{"type": "similarity"}], {"unlabelled": str(source / "more")}
    file = write(source, "held", terms, data, **SESSION, later_sessions={"keep": 0.1, "keep_on": "unlabelled"})
    teacher = {**SESSION, "backbone": str(source / "teacher"), "later_sessions": later}
    words = (file, "--teacher", json.dumps(teacher), "--train.save_strategy", "steps", "--train.save_steps", 2)
    code, output = train(*words, "--output_dir", tmp_path / "whole")
    assert code == 0, output
    assert "the teacher's features of them are held in later sessions; by them the teacher sees" in output
    assert "the student's features of them are held" in output and "learns from them by similarity" in output
    work = tmp_path / "cut" / "work" / "teacher-task-02"
    interrupt_when(lambda: (work / "checkpoint-4").exists(), *words, "--output_dir", tmp_path / "cut")
    assert not (tmp_path / "cut" / "teacher" / "task-02").exists()
    assert train(*words, "--output_dir", tmp_path / "cut")[0] == 0
    for role in ("teacher", "student"):
        for done in ("task-01", "task-02"):
            assert same(state(tmp_path / "cut" / role / done), state(tmp_path / "whole" / role / done)), (role, done)
    assert card.main([str(tmp_path / "whole")]) == 0
    said = (tmp_path / "whole" / "student" / "README.md").read_text()
    assert "the teacher's features of them are held in later sessions" in said


@pytest.mark.slow
@pytest.mark.parametrize("task", ["task-01", "task-02"])
def test_a_kill_in_the_middle_of_an_epoch_changes_nothing(
    source: Path, finished: Path, task: str, tmp_path: Path
) -> None:
    """Stored after every second step, three a epoch, so that it resumes within an epoch; bit by bit the same."""
    stored = "{save_strategy: steps, save_steps: 2}"
    command = (source / "taught.yaml", "--student.train", stored, "--teacher_from", finished, "--output_dir")
    assert train(*command, tmp_path / "whole")[0] == 0
    work = tmp_path / "cut" / "work" / f"student-{task}"
    interrupt_when(lambda: (work / "checkpoint-4").exists(), *command, tmp_path / "cut")
    assert not (tmp_path / "cut" / "student" / task).exists()
    code, output = train(*command, tmp_path / "cut")
    assert code == 0, output
    for done in ("task-01", "task-02"):
        assert same(state(tmp_path / "cut" / "student" / done), state(tmp_path / "whole" / "student" / done))
        assert same(state(tmp_path / "whole" / "student" / done), state(finished / "student" / done))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(source: Path, tmp_path: Path) -> None:
    """Plain SGD: Adam would make noise of what is 0 but for rounding."""
    common, one, two = (
        (write_taught(source), "--train.optim", "sgd", "--output_dir"),
        tmp_path / "one",
        tmp_path / "two",
    )
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29547")
    assert main(*common, one) == 0
    code, output = train(*common, two, "--train.per_device_train_batch_size", 2, launcher=launcher)
    assert code == 0, output
    for task in ("task-01", "task-02"):
        ours, theirs = state(one / "student" / task), state(two / "student" / task)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_hold_what_one_does(source: Path, tmp_path: Path) -> None:
    later = {"keep": 0.5, "keep_on": "both", "anchors": "both"}
    session = {**SESSION, "head": {"type": "ridge", "strength": 10.0, "standardise": "first_task"}}
    file = write(source, "pair", [], {"unlabelled": str(source / "more")}, **session, later_sessions=later)
    common = (file, "--teacher", "null", "--ce_weight", 1, "--train.optim", "sgd", "--output_dir")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29553")
    assert main(*common, tmp_path / "one") == 0
    two = tmp_path / "two"
    code, output = train(*common, two, "--train.per_device_train_batch_size", 2, launcher=launcher)
    assert code == 0, output
    ours, theirs = state(tmp_path / "one" / "student" / "task-02"), state(two / "student" / "task-02")
    prompts = [name for name in ours if "pool" in name]
    assert prompts
    for name in prompts:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_a_further_task_has_them_too(source: Path, finished: Path, tmp_path: Path) -> None:
    """The folder is the user's to name: a recipe from elsewhere decides nothing about this machine's files."""
    data, env = make_data(tmp_path / "next", classes=6, train=6, test=2), {"HF_HUB_OFFLINE": "1"}
    for name in ("train", "test"):  # two new classes alone
        table = Dataset.from_parquet(str(data / f"{name}.parquet"))
        table.filter(lambda row: row["label"] > 3).to_parquet(str(data / f"{name}.parquet"))
    words = ("add", finished / "student", data, "--data.known_train", "ignore", "--output_dir", tmp_path / "added")
    code, output = script(*words, env=env, cwd=tmp_path)
    assert code == 2 and "more of its author does not exist (data.unlabelled)" in output, output
    code, output = script(*words, "--data.unlabelled", source / "more", env=env, cwd=tmp_path)
    assert code == 0, output
    assert "data.unlabelled (a folder; name yours by --data.unlabelled FOLDER)" in output
    assert "9 unlabelled images" in output
    ledger = json.loads((tmp_path / "added" / "run.json").read_text())
    assert ledger["unlabelled"]["images"] == 9 and len(ledger["entries"]["student"]) == 3
