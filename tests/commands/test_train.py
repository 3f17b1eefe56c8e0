"""recipes/train.py as a user runs it: real processes, real files, kills, bad input, the variants of a recipe."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Features, Value, load_dataset
from datasets import Image as ImageFeature
from helpers import (
    ROOT,
    TRAIN,
    interrupt_when,
    make_backbone,
    make_data,
    make_recipe,
    make_table,
    picture,
    png,
    start,
    thinned,
    train,
    write_recipe,
)
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTImageProcessor,
    pipeline,
)

from hf_cdl.commands import train as train_recipe
from hf_cdl.commands import verify
from hf_cdl.runs.metrics import continual_metrics
from hf_cdl.runs.verdict import verdict

ROLES = ("teacher", "student", "nearest_class_mean")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 3 tasks that takes seconds, with its data and backbones next to it."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = make_recipe(folder)
    recipe["train"]["num_train_epochs"] = 8
    return write_recipe(folder / "recipe.yaml", recipe)


@pytest.fixture(scope="module")
def finished(tiny: Path) -> tuple[Path, str]:
    """An uninterrupted run: its folder and its output."""
    folder = tiny.parent / "finished"
    code, output = train(tiny, "--output_dir", folder)
    assert code == 0, output
    return folder, output


@pytest.fixture
def run(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the script's main() in this process, one epoch per task; returns its exit code and output."""

    def call(*arguments: Any, out: str = "out", file: Path = tiny) -> tuple[int, str]:
        words = [file, "--train.num_train_epochs", 1, "--output_dir", tmp_path / out, *arguments]
        code = train_recipe.main([str(word) for word in words])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return call


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def measured(folder: Path) -> dict[str, Any]:
    """What must not depend on how often a run was interrupted."""
    return {
        role: {key: entry[key] for key in ("accuracy_matrix", "correct", "counts", "metrics")}
        for role, entry in results(folder)["roles"].items()
    }


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("model.safetensors"))}


def assert_same_run(folder: Path, other: Path) -> None:
    assert measured(folder) == measured(other)
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for file in ours:
        assert ours[file].keys() == theirs[file].keys()
        for name in ours[file]:
            assert torch.equal(ours[file][name], theirs[file][name]), (file, name)


def losses(folder: Path, role: str, task: int) -> list[dict[str, float]]:
    lines = json.loads((folder / "logs" / f"{role}-task-{task:02d}.json").read_text())
    return [{key: line[key] for key in line if key.startswith("loss")} for line in lines if "loss" in line]


# ---- a complete run ----


def test_a_whole_run_leaves_what_was_promised(finished: tuple[Path, str]) -> None:
    folder, output = finished
    for role in ROLES:
        for part in ("", "task-01", "task-02", "task-03"):
            files = {file.name for file in (folder / role / part).iterdir() if file.is_file()}
            assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}, (role, part)
        assert (folder / role / "model.safetensors").read_bytes() == (
            folder / role / "task-03" / "model.safetensors"
        ).read_bytes()
    for picture_file in ("accuracy_matrix.png", "accuracy_curve.png"):
        assert (folder / picture_file).read_bytes().startswith(b"\x89PNG")
    assert not (folder / "work").exists()
    assert not list(folder.rglob("*.partial"))


def test_what_a_run_says(finished: tuple[Path, str]) -> None:
    folder, output = finished
    shown = output.splitlines()
    stream = results(folder)["stream"]
    what = "tiny: teacher, student and 1 baseline will learn 6 classes in 3 tasks; this may take "
    assert shown[0].startswith(f"{what}less than a minute (cpu, "), shown[0]
    assert len(stream) == 16 and shown[1] == f"stream {stream} -> {folder}/"
    assert [line.split(":")[0] for line in shown[2:5]] == ["task 1/3", "task 2/3", "task 3/3"]
    assert any(line.startswith("student (coda + kdp)") for line in shown)
    best = verdict(results(folder))
    assert best is not None and best.said in output.replace("\n", " ")
    assert shown[-3] == f"Try the {best.role.replace('_', ' ')} on an image:" and f"{folder}/{best.role}" in shown[-2]
    assert shown[-1] == f"All of it on a page: {folder}/report.html"
    last = " ".join(shown[shown.index("") :][-12:-4]).rstrip()
    assert last.endswith(best.said), "the table's last line is the recommendation"
    assert "Warning" not in output and "Traceback" not in output and "[transformers]" not in output, output
    assert max(map(len, shown[1:-2])) <= 119


def test_results(finished: tuple[Path, str]) -> None:
    content = results(finished[0])
    assert set(content["roles"]) == set(ROLES)
    for entry in content["roles"].values():
        matrix = entry["accuracy_matrix"]
        assert [len(row) for row in matrix] == [1, 2, 3]
        assert entry["counts"] == [6, 6, 6]
        assert matrix == [[100 * right / 6 for right in row] for row in entry["correct"]]
        assert entry["metrics"] == continual_metrics(matrix, entry["counts"])
        for name in ("train_seconds", "eval_seconds", "images_per_second", "peak_memory_bytes"):
            assert len(entry[name]) == 3 and min(entry[name]) > 0, name
    for used in content["roles"]["student"]["kept"]:
        assert min(used["held_bytes"], used["found_bytes"]) > 0, "the teacher's queries of the same images"
        assert used["read_bytes"] == used["written_bytes"] == 0, "without a cache"
    assert (content["name"], content["seed"], content["finished"]) == ("tiny", 0, True)
    assert content["versions"]["transformers"] == version("transformers")
    assert content["class_names"] == [["class a", "class b"], ["class c", "class d"], ["class e", "class f"]]
    assert content["recipe"]["student"]["kd_prompt"] == {}
    assert content["recipe"]["train"]["num_train_epochs"] == 8


def test_something_was_learnt_and_logged(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for role, names in (("teacher", {"ce"}), ("student", {"ce", "kdp"})):
        assert results(folder)["roles"][role]["accuracy_matrix"][0][0] > 80  # 2 classes that differ in colour
        for number in (1, 2, 3):
            lines = losses(folder, role, number)
            assert set(lines[0]) == {"loss", "loss/loss", *(f"loss/{name}" for name in names)}
    assert losses(folder, "nearest_class_mean", 1) == []


def test_the_same_command_again_returns_at_once(tiny: Path, finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    code, output = train(tiny, "--output_dir", folder)
    first, *rest = output.splitlines()
    assert code == 0
    assert first == f"This run is finished. Its results are in {folder}/ (results.json, pictures, checkpoints)."
    assert rest == finished[1].splitlines()[-3:] and rest[0].startswith("Try the ")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.slow
def test_a_run_finds_what_another_one_kept(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    said, baselines = [], "[nearest_class_mean, linear_head, ridge_head]"
    for out, cache in (("plain", "null"), ("first", tmp_path / "cache"), ("second", tmp_path / "cache")):
        code, output = run("--cache", cache, "--baselines", baselines, out=out)
        assert code == 0, output
        said.append(re.findall(r"^cache: ([\d.]+) MiB read from (.*), ([\d.]+) MiB written$", output, re.M))
        assert_same_run(tmp_path / "plain", tmp_path / out)
    assert not said[0]
    [(_, _, written)], [(read, folder, again)] = said[1:]
    assert float(written) > 0 and float(read) > 0 and float(again) == 0
    assert folder == str(tmp_path / "cache")
    (tmp_path / "file").touch()
    code, output = run("--cache", tmp_path / "file", out="other")
    assert code == 2 and "is a file; name a folder for it" in output


def test_a_run_by_the_cdl_protocol(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, output = run("--protocol", "cdl")
    assert code == 0 and re.search(r"learnt +best ", output), "the authors' forgetting comes first"
    for entry in results(tmp_path / "out")["roles"].values():
        assert entry["counts"] == [6, 6, 6]  # full batches are for training only: every test image is counted
        assert list(entry["metrics"])[:2] == ["average_accuracy", "official_forgetting"]
    image = picture(1, 1)
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    for role in ROLES:  # the pipeline sees what the models were trained on
        processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / role)
        assert torch.allclose(processor(images=image, return_tensors="pt")["pixel_values"][0], raw, atol=1e-6)


def test_a_teacher_of_other_pixels_is_not_taken_over(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert run("--baselines", "[]", out="first")[0] == 0
    code, output = run("--baselines", "[]", "--normalise", "false", "--teacher_from", tmp_path / "first")
    assert code == 2 and "normalise: True -> False" in output


def test_tasks_smaller_than_a_batch_are_refused_if_only_full_batches_count(
    run: Callable[..., tuple[int, str]],
) -> None:
    code, output = run("--protocol", "cdl", "--train.per_device_train_batch_size", 17)
    assert code == 2
    assert "A task has 16 training images, fewer than a batch of 17" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.classes_per_task", 1], "teacher cannot learn task 1, which has one class ('class a')"),
        (["--data.classes_per_task", "[2, 3, 1]"], "teacher cannot learn task 3, which has one class ('class f')"),
        (["--data.classes_per_task", "[1, 5]", "--teacher", "null", "--distill", "[]"], "student cannot learn task 1"),
        (
            [
                *("--data.classes_per_task", 5, "--teacher", "null", "--distill", "[]", "--student.head.type", "ncm"),
                *("--student.prompt", "{type: none}", "--baselines", "[linear_head]", "--ce_weight", 1),
            ],
            "linear head cannot learn task 2, which has one class ('class f')",
        ),
        (
            [
                *("--data.classes_per_task", "[1, 3, 2]", "--teacher", "null", "--distill", "[]"),
                *("--student.head.type", "ridge", "--student.first_session", "{type: cosine}"),
            ],
            "student cannot learn task 1, which has one class ('class a')",
        ),
    ],
)
def test_a_task_of_one_class_is_refused_before_anything_is_learnt(
    words: list[Any], said: str, run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image is decoded and nothing left that would block a corrected recipe; a plan refuses it, too."""
    with monkeypatch.context() as context:
        context.setattr(train_recipe.TaskStream, "check_images", lambda stream: pytest.fail("images were decoded"))
        for more in ((), ("--plan",)):
            code, output = run(*words, *more)
            assert code == 2 and said in output and "Traceback" not in output, output
            error = output[output.index("error: ") :]
            assert "at least two classes" in error and len(error.splitlines()) <= 6
    if len(words) == 2:
        code, output = run("--data.classes_per_task", "[3, 3]", "--baselines", "[]")
        assert code == 0, output


_FRESH = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
import hf_cdl
folder, data = Path(sys.argv[1]), Path(sys.argv[2])
from hf_cdl import StreamConfig, TaskStream
rows = {}
for checkpoint in sorted(folder.glob("*/task-*")):
    model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    stream = TaskStream(StreamConfig(path=str(data), classes_per_task=2), processor)
    row = []
    for task in list(stream)[: len(model.config.tasks)]:
        right = 0
        for i in range(len(task.test)):
            sample = task.test[i]
            with torch.no_grad():
                right += int(model(pixel_values=sample["pixel_values"][None]).logits.argmax()) == sample["labels"]
        row.append(100 * right / len(task.test))
    rows[f"{checkpoint.parent.name}/{checkpoint.name}"] = row
classify = pipeline("image-classification", model=str(folder / "student"))
print(json.dumps({"rows": rows, "said": classify(str(folder.parent / "some.png"), top_k=6)}))
"""


@pytest.mark.slow
def test_checkpoints_in_a_fresh_process_repeat_their_rows(tiny: Path, finished: tuple[Path, str]) -> None:
    """Image by image, so that batching cannot matter either; and the command printed at the end works."""
    folder, _ = finished
    (folder.parent / "some.png").write_bytes(png(picture(0, 0)))
    command = [sys.executable, "-W", "error::UserWarning", "-c", _FRESH, str(folder), str(tiny.parent / "data")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_offline())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    stored = {
        f"{role}/task-{i + 1:02d}": row
        for role, entry in results(folder)["roles"].items()
        for i, row in enumerate(entry["accuracy_matrix"])
    }
    assert found["rows"] == stored and len(stored) == 9
    assert {answer["label"] for answer in found["said"]} == {f"class {letter}" for letter in "abcdef"}


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_the_student_holds_nothing_of_the_teacher(tiny: Path, finished: tuple[Path, str]) -> None:
    folder, _ = finished
    student = load_file(folder / "student" / "model.safetensors")
    teacher = load_file(folder / "teacher" / "model.safetensors")
    backbone = load_file(tiny.parent / "teacher" / "model.safetensors")
    assert not [name for name in student if "teacher" in name or "scaffold" in name or "query" in name.split(".")[0]]
    assert {name.split(".")[0] for name in student} == {"backbone", "pool", "head", "kd_prompt", "kd_head"}
    shared = {name for name, value in teacher.items() if name.startswith("query_backbone.")}
    assert shared, "the teacher carries the query backbone, which is the student's"
    theirs = [value for name, value in teacher.items() if name not in shared] + list(backbone.values())
    constants = (torch.zeros, torch.ones)  # fresh norms and biases look alike everywhere
    for name, value in student.items():
        if not any(torch.equal(value, constant(value.shape)) for constant in constants):
            assert not any(value.shape == other.shape and torch.equal(value, other) for other in theirs), name
    assert not any(48 in value.shape for value in student.values()), "48 is the teacher's width"


# ---- interruptions ----


def stored_epoch(folder: Path, role: str, task: int) -> Callable[[], bool]:
    return lambda: bool(list(folder.glob(f"work/{role}-task-{task:02d}/checkpoint-*")))


def saving_checkpoint(folder: Path, role: str, task: int) -> Callable[[], bool]:
    return (folder / role / f".task-{task:02d}.partial").exists


def entries(folder: Path) -> dict[str, int]:
    return {role: len(done) for role, done in json.loads((folder / "run.json").read_text())["entries"].items()}


def test_ctrl_c_stops_a_run_and_the_same_command_goes_on(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    command = (tiny, "--train.num_train_epochs", 2, "--output_dir", folder)
    code, output = interrupt_when(stored_epoch(folder, "student", 1), *command, kill=signal.SIGINT)
    assert code == 130 and "Traceback" not in output, output
    assert "Stopped. Nothing finished is lost; the same command resumes from there:" in output
    assert f"recipes/train.py {tiny} --train.num_train_epochs 2 --output_dir '{folder}'" in output
    before = entries(folder)
    code, output = train(*command)
    assert code == 0 and before["teacher"] == 1, output
    assert entries(folder) == dict.fromkeys(ROLES, 3) and not (folder / "work").exists()


@pytest.mark.slow
def test_interruptions_do_not_change_a_run(tiny: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL in a student's phase, then a full disk while saving, then Ctrl-C, then to the end."""
    folder = tmp_path / "a run"
    command = (tiny, "--output_dir", folder)

    code, _ = interrupt_when(stored_epoch(folder, "student", 2), *command)
    assert code == -signal.SIGKILL
    assert entries(folder) == {"teacher": 2, "student": 1, "nearest_class_mean": 1}
    assert list(folder.glob("work/student-task-02/checkpoint-*"))

    before = weights(folder)
    smallest = min((folder / role / "model.safetensors").stat().st_size for role in ("teacher", "student"))

    def fill_the_disk() -> None:  # no file may grow beyond this, as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest - 1, smallest - 1))

    code, output = train(*command, preexec_fn=fill_the_disk)
    assert code == 2, output
    assert "error: Could not s" in output and "Everything stored before is whole. Make room" in output
    assert "Traceback" not in output
    after = weights(folder)
    assert {file: before[file].keys() for file in before} == {file: after[file].keys() for file in before}
    assert all(torch.equal(before[f][name], after[f][name]) for f in before for name in before[f])
    assert entries(folder) == {"teacher": 2, "student": 1, "nearest_class_mean": 1}

    code, output = interrupt_when(stored_epoch(folder, "teacher", 3), *command, kill=signal.SIGINT)
    assert code == 130, output
    assert "Stopped. Nothing finished is lost; the same command resumes from there:" in output
    assert f"recipes/train.py {tiny} --output_dir '{folder}'" in output and "Traceback" not in output
    assert entries(folder) == {"teacher": 2, "student": 2, "nearest_class_mean": 2}

    code, output = train(*command)
    assert code == 0, output
    assert_same_run(folder, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arrived",
    [
        lambda folder: stored_epoch(folder, "teacher", 1),
        lambda folder: saving_checkpoint(folder, "teacher", 1),
        lambda folder: (folder / "teacher" / "task-01").exists,
        lambda folder: (folder / "student" / "task-01").exists,
        lambda folder: saving_checkpoint(folder, "student", 2),
        lambda folder: (folder / "student" / ".config.json.partial").exists,
        lambda folder: saving_checkpoint(folder, "nearest_class_mean", 2),
        lambda folder: (folder / "work" / "student-task-03" / "partial").exists,
        lambda folder: (folder / ".results.json.partial").exists,
    ],
)
def test_a_kill_at_a_point_does_not_change_a_run(
    tiny: Path, finished: tuple[Path, str], tmp_path: Path, arrived: Callable[[Path], Callable[[], bool]]
) -> None:
    folder = tmp_path / "run"
    with contextlib.suppress(AssertionError):  # a moment this short can be missed: then the run just ends
        interrupt_when(arrived(folder), tiny, "--output_dir", folder)
    code, output = train(tiny, "--output_dir", folder)
    assert code == 0, output
    assert_same_run(folder, finished[0])


@pytest.mark.slow
def test_a_kill_while_a_backbone_trains_does_not_change_a_run(tiny: Path, tmp_path: Path) -> None:
    command = (tiny, *VARIANTS["fine-tuning"][0], "--output_dir")
    assert train(*command, tmp_path / "whole")[0] == 0
    code, _ = interrupt_when(stored_epoch(tmp_path / "cut", "student", 2), *command, tmp_path / "cut")
    assert code == -signal.SIGKILL and list((tmp_path / "cut").glob("work/student-task-02/checkpoint-*"))
    assert train(*command, tmp_path / "cut")[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt mapping", "APT", "DFPT-KD+", "DFPT-KD with KDP"])
def test_a_kill_does_not_change_a_run_whose_models_keep_more_than_parameters(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    """Copies of the teacher's pool, merged prompts, and the teacher's second path with copies of its layers."""
    command = (tiny, *VARIANTS[name][0], "--output_dir")
    assert train(*command, tmp_path / "whole")[0] == 0
    code, _ = interrupt_when(stored_epoch(tmp_path / "cut", "student", 2), *command, tmp_path / "cut")
    assert code == -signal.SIGKILL and list((tmp_path / "cut").glob("work/student-task-02/checkpoint-*"))
    assert train(*command, tmp_path / "cut")[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_kills_at_any_moment_do_not_change_a_run(tiny: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, draw = tmp_path / "run", random.Random(0)
    for _ in range(40):
        process = start(tiny, "--output_dir", folder)
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=0.1)
        while process.poll() is None and not (folder / ".lock").exists():
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.5, 3))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        for checkpoint in folder.glob("*/task-*/model.safetensors"):
            load_file(checkpoint)
    code, output = train(tiny, "--output_dir", folder)
    assert code == 0, output
    assert_same_run(folder, finished[0])


# ---- NaN and infinite losses ----


def test_a_loss_that_is_no_number_stops_the_run(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, output = run("--teacher.train", "{learning_rate: 1e38, num_train_epochs: 3}")
    assert code == 3
    assert "error: Loss term ce is " in output and "at step 2 of task 1/3 · teacher" in output
    assert "Lower the learning rate" in output and "--output_dir FOLDER" in output and "Traceback" not in output
    assert not (tmp_path / "out" / "teacher").exists()
    code, output = run("--student.train.learning_rate", "1e38", "--student.train.num_train_epochs", "3", out="other")
    assert code == 3
    assert "task 1/3 · student" in output
    assert entries(tmp_path / "other") == {"teacher": 1}


# ---- bad input: one clear message, before any training ----


def refused(run: Callable[..., tuple[int, str]], tmp_path: Path, *arguments: Any) -> str:
    """The error message of a run that must not start; only the lock is left behind."""
    code, output = run(*arguments)
    assert code == 2, output
    assert "Traceback" not in output and "task 1" not in output
    out = tmp_path / "out"
    assert not out.exists() or {file.name for file in out.iterdir()} <= {".lock"}
    message = output[output.index("error: ") :].strip()
    assert len(message) < 1500, "one screen"
    return message


def test_a_wrong_recipe(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    message = refused(run, tmp_path, "--studnet.backbone", "x", "--train.epochs", 3)
    assert "unknown field 'studnet'; did you mean 'student'?" in message
    assert "unknown field 'train.epochs'" in message


def test_a_wrong_call_says_one_thing(tmp_path: Path) -> None:
    code, output = train("nowhere.yaml", cwd=tmp_path)
    assert code == 2
    assert output == "error: Cannot read the recipe nowhere.yaml: No such file or directory. Give a YAML file.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wrong_call_as_a_process_says_one_thing_on_stderr(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(TRAIN), "nowhere.yaml"], capture_output=True, text=True, cwd=tmp_path, env=_offline()
    )
    assert process.returncode == 2 and process.stdout == ""
    assert (
        process.stderr == "error: Cannot read the recipe nowhere.yaml: No such file or directory. Give a YAML file.\n"
    )
    assert not list(tmp_path.iterdir())


def save_data(folder: Path, table: Any, test: Any) -> Path:
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    test.to_parquet(str(folder / "test.parquet"))
    return folder


def test_data_that_cannot_be_used(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    def with_data(folder: Path, *more: Any) -> str:
        return refused(run, tmp_path, "--data.path", folder, *more)

    assert "does not exist" in with_data(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "cannot be read as a data set" in with_data(tmp_path / "empty")

    other = make_data(tmp_path / "other column", label_column="kind of thing")
    other_label = with_data(other, "--data.label_column", "nope")
    assert "'nope'" in other_label and "columns: image, kind of thing" in other_label and "label_column" in other_label
    code, output = run("--data.path", other, out="a fixed recipe is taken in the folder of the failed one")
    assert code == 0, output

    lacking = save_data(tmp_path / "a", make_table([0, 1, 2, 3] * 2, 4), make_table([0, 1, 2], 4))
    assert "lasses without test images: class d" in with_data(lacking)
    assert "classes_per_task is 5, but the data have only 4 classes" in with_data(
        lacking, "--data.classes_per_task", 5
    )

    unlabelled = save_data(tmp_path / "b", make_table([0, 1] * 2, 2), make_table([0, 1], 2).remove_columns("label"))
    assert "The test split has no label column 'label'" in with_data(unlabelled)


def test_images_that_cannot_be_used(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                (folder / split / name / f"{i}.png").write_bytes(png(picture(label, i)))
    broken, text = folder / "train" / "cat" / "1.png", folder / "test" / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    text.write_text("not an image")
    message = refused(run, tmp_path, "--data.path", folder)
    assert "2 images cannot be used" in message and str(broken) in message and str(text) in message

    paths = [str(folder / "train" / "cat" / name) for name in ("0.png", "gone.png", "2.png")]
    schema = Features({"image": ImageFeature(), "label": Value("string")}).arrow_schema
    cells = [{"bytes": None, "path": path} for path in paths]
    for split in ("train", "test"):
        table = pa.Table.from_pydict({"image": cells, "label": ["cat", "cat", "dog"]}, schema)
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    message = refused(run, tmp_path, "--data.path", folder)
    assert "2 images cannot be used" in message and "split 'train', row 1" in message and paths[1] in message


def foreign(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def damaged(folder: Path, file: str, size: int | None = None) -> Path:
    """A backbone without one of its files, or with only the first bytes of it."""
    target = make_backbone(folder) / file
    content = target.read_bytes()
    target.unlink()
    if size is not None:
        target.write_bytes(content[:size])
    return folder


BACKBONES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "resnet": (
        lambda f: foreign(f, ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))),
        "A backbone of type 'resnet' is not supported: prefixes would not reach its attention layers. Supported",
    ),
    "swin": (
        lambda f: foreign(f, SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[2]))),
        "A backbone of type 'swin' is not supported",
    ),
    "other resolution": (
        lambda f: ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(make_backbone(f)),
        "gives images of 24x24 pixels, but the backbone (vit) was trained on 16x16",
    ),
    "no folder": (lambda f: None, "There is no folder"),
    "empty folder": (lambda f: f.mkdir(), "has no config.json"),
    "no config": (lambda f: damaged(f, "config.json"), "has no config.json"),
    "half a config": (lambda f: damaged(f, "config.json", 40), "is not a valid JSON file"),
    "no processor": (lambda f: damaged(f, "preprocessor_config.json"), "has no usable preprocessor_config.json"),
    "half a processor": (lambda f: damaged(f, "preprocessor_config.json", 9), "is not a valid JSON file"),
    "no weights": (lambda f: damaged(f, "model.safetensors"), "Check that model.safetensors is there and whole"),
    "half the weights": (lambda f: damaged(f, "model.safetensors", 9000), "Check that model.safetensors is there"),
    "few weights": (lambda f: damaged(f, "model.safetensors", 5), "Check that model.safetensors is there and whole"),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_backbones_that_cannot_be_used(
    name: str, role: str, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    make, said = BACKBONES[name]
    make(tmp_path / "backbone")
    message = refused(run, tmp_path, f"--{role}.backbone", tmp_path / "backbone")
    assert said in message and str(tmp_path / "backbone") in message, message


def test_prompts_that_do_not_fit_the_backbone(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    message = refused(run, tmp_path, "--student.prompt.layers", "[0, 5]")
    assert "Prompt layers [0, 5] must be different numbers from 0 to 1" in message


def test_a_folder_that_holds_something_else(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("important")
    code, output = run()
    assert code == 2 and "is not empty and holds no run" in output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_folder_of_another_recipe(tiny: Path, finished: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    folder, _ = finished
    assert train_recipe.main([str(tiny), "--output_dir", str(folder), "--seed", "1"]) == 2
    assert "seed: 0 -> 1" in capfd.readouterr().err


def test_a_run_of_an_older_version_goes_on(
    tiny: Path, finished: tuple[Path, str], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Fields that recipes did not have then make no difference, unless they are set to non-default values."""
    folder = tmp_path / "older"
    shutil.copytree(finished[0], folder)
    ledger = json.loads((folder / "run.json").read_text())
    for section, name in (("", "normalise"), ("", "protocol"), ("student", "mapping"), ("data", "split_seed")):
        (ledger["recipe"][section] if section else ledger["recipe"]).pop(name)
    (folder / "run.json").write_text(json.dumps(ledger))
    command = ("--train.num_train_epochs", 8)
    code, output = run(*command, out="older")
    assert code == 0 and output.startswith("This run is finished."), output
    code, output = run(*command, "--normalise", "false", out="older")
    assert code == 2 and "normalise: True -> False" in output
    code, output = run(*command, "--teacher_from", folder, out="taken")
    assert code == 0, output


def test_changed_data_of_a_run_that_goes_on(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    nan = ("--data.path", data, "--student.train.learning_rate", "1e38", "--student.train.num_train_epochs", 3)
    assert run(*nan)[0] == 3
    make_data(data, train=7)
    code, output = run(*nan)
    assert code == 2 and "The data changed since" in output
    shutil.rmtree(data)
    make_data(data)
    assert run(*nan)[0] == 3


# ---- a teacher from another run ----


def test_a_teacher_can_be_taken_from_another_run(
    tiny: Path, finished: tuple[Path, str], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """The student is the same as in a separate run, interrupted or not; the teacher is not trained."""
    source, _ = finished
    before = {file: file.stat().st_mtime_ns for file in source.rglob("*") if file.is_file()}
    folder = tmp_path / "taken"
    command = (tiny, "--teacher_from", source, "--output_dir", folder)
    code, _ = interrupt_when(stored_epoch(folder, "student", 2), *command)
    assert code == -signal.SIGKILL
    code, output = train(*command)
    assert code == 0, output
    assert_same_run(folder, source)
    taken, trained = (results(at)["roles"]["teacher"] for at in (folder, source))
    del taken["cost"], trained["cost"]  # measured again in every run
    assert taken == trained, "seconds too: it was not trained"
    assert {file: file.stat().st_mtime_ns for file in source.rglob("*") if file.is_file()} == before
    assert verify.main([str(folder)]) == 0


def test_a_teacher_of_something_else_is_refused(
    tiny: Path, finished: tuple[Path, str], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    source, _ = finished
    taken = ("--teacher_from", source)
    for number, (change, said) in enumerate(
        [
            (("--teacher.prompt.components", 2), "teacher.prompt.components: 3 -> 2"),
            (("--seed", 1), "seed: 0 -> 1"),
            (("--data.class_order_seed", 1), "data.class_order_seed: None -> 1"),
            (("--train.num_train_epochs", 2), "train.num_train_epochs: 8.0 -> 2.0"),
            (("--student.backbone", make_backbone(tmp_path / "other", 32, 2, 9)), "student.backbone: "),
        ]
    ):
        words = ("--train.num_train_epochs", 8, *taken, *change)
        code, output = run(*words, out=f"out-{number}")
        assert code == 2 and "its teacher learns something else" in output and said in output, output
        assert not list((tmp_path / f"out-{number}").glob("*/task-01"))
    code, output = run("--train.num_train_epochs", 8, "--teacher_from", tmp_path / "nothing")
    assert code == 2 and "holds no readable run.json" in output
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    ledger = json.loads((source / "run.json").read_text())
    ledger |= {"entries": {"teacher": []}, "finished": False}
    (unfinished / "run.json").write_text(json.dumps(ledger))
    code, output = run("--train.num_train_epochs", 8, "--teacher_from", unfinished, out="waits")
    assert code == 2 and "has learnt 0 tasks so far, not yet task-01. Finish that run first" in output


# ---- variants of a recipe ----


LINEAR = ("--student.prompt", "{type: none}")
VARIANTS: dict[str, tuple[list[Any], set[str], list[int]]] = {
    "no teacher": (["--teacher", "null", "--distill", "[]"], {"student", "nearest_class_mean"}, [6, 6, 6]),
    "student with a linear head": ([*LINEAR, "--distill", "[{type: kd}]"], set(ROLES), [6, 6, 6]),
    "fine-tuning": (
        ["--teacher", "null", "--distill", "[]", *LINEAR, "--student.train_backbone", "true"],
        {"student", "nearest_class_mean"},
        [6, 6, 6],
    ),
    "DFPT-KD+": (["--distill", "[{type: dual_path, copy_from: all, head_init: teacher}]"], set(ROLES), [6, 6, 6]),
    "DFPT-KD with KDP": (
        ["--distill", "[{type: kdp, weight: 0.25}, {type: dual_path, beta_o: 0.0, beta_p: 0.25, warmup_steps: 3}]"],
        set(ROLES),
        [6, 6, 6],
    ),
    "one class per task": (
        [
            *("--data.classes_per_task", "1", "--teacher.prompt", "{type: none}", "--student.prompt", "{type: none}"),
            *("--teacher.head", "{type: ridge}", "--student.head", "{type: ridge, strength: 10.0, soft_targets: 0.5}"),
            *("--student.head.standardise", "first_task", "--distill", "[]", "--ce_weight", "1.0"),
        ],
        set(ROLES),
        [3] * 6,
    ),
    "unequal tasks, no baseline": (
        ["--data.classes_per_task", "[4, 2]", "--baselines", "[]"],
        {"teacher", "student"},
        [12, 6],
    ),
    "one task": (["--data.classes_per_task", "6"], set(ROLES), [18]),
    "one image per class": (
        ["--data.max_train_per_class", "1", "--data.max_eval_per_class", "1"],
        set(ROLES),
        [2, 2, 2],
    ),
    "prompt mapping": (["--distill", "[{type: prompt_mapping}]"], set(ROLES), [6] * 3),
    "APT": (
        [
            *("--teacher.prompt", "{type: apt}", "--student.prompt", "{type: apt}"),
            *("--teacher.head.type", "weight_normalised", "--student.head.type", "weight_normalised"),
        ],
        set(ROLES),
        [6] * 3,
    ),
    "fitted heads": (
        [
            *("--teacher.prompt", "{type: none}", "--teacher.head", "{type: ridge, features: 40}"),
            *("--student.head", "{type: ridge}", "--student.first_session", "{type: cosine}"),
            *("--distill", "[{type: kd, temperature: 0.1}, {type: label_smoothing}]"),
        ],
        set(ROLES),
        [6] * 3,
    ),
    "OS-Prompt++ alone": (
        ["--teacher", "null", "--student.query", "one_pass", "--distill", "[{type: os_prompt}]"],
        {"student", "nearest_class_mean"},
        [6] * 3,
    ),
    "the teacher's own query": (["--teacher.query", "self"], set(ROLES), [6] * 3),
    "authors' schedule": (["--train.epoch_cosine", "true"], set(ROLES), [6] * 3),
}


@pytest.mark.parametrize("name", thinned(VARIANTS, 4))
def test_variants(name: str, run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    arguments, roles, counts = VARIANTS[name]
    code, output = run(*arguments)
    assert code == 0, output
    found = results(tmp_path / "out")
    assert set(found["roles"]) == roles
    for entry in found["roles"].values():
        assert entry["counts"] == counts and len(entry["accuracy_matrix"]) == len(counts)
    AutoImageProcessor.from_pretrained(tmp_path / "out" / "student")
    if name == "fine-tuning":
        first, last = (weights(tmp_path / "out" / "student")[f"task-0{i}/model.safetensors"] for i in (1, 3))
        assert any(not torch.equal(first[key], last[key]) for key in first if key.startswith("backbone."))


def test_a_mapped_student_keeps_its_teacher_s_pool_and_nothing_else_of_it(
    tiny: Path, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Its outputs in the pipeline match its measurements, and depend on the teacher's prompts."""
    code, output = run(*VARIANTS["prompt mapping"][0])
    assert code == 0, output
    folder = tmp_path / "out"
    student, teacher = (load_file(folder / role / "model.safetensors") for role in ("student", "teacher"))
    copy = {name.removeprefix("mapping.teacher_"): value for name, value in student.items() if ".teacher_" in name}
    pool = {name: value for name, value in teacher.items() if name.startswith("pool.")}
    assert copy.keys() == pool.keys() and all(torch.equal(value, pool[name]) for name, value in copy.items())
    parts = {name.split(".")[0] for name in student}
    assert parts == {"backbone", "pool", "head", "mapping", "kd_head"}
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder / "student" / "task-03", moved)
    shutil.rmtree(folder / "teacher")
    classify = pipeline("image-classification", model=str(moved), device="cpu")
    table = load_dataset("parquet", data_files=str(tiny.parent / "data" / "test.parquet"), split="train")
    answers = [answer[0]["label"] for answer in classify(list(table["image"]), top_k=1)]
    names = table.features["label"].int2str(list(table["label"]))
    right = sum(answer == name for answer, name in zip(answers, names, strict=True))
    assert right == sum(results(folder)["roles"]["student"]["correct"][-1])
    model: Any = classify.model
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixels).logits
        for parameter in model.mapping.teacher_pool.parameters():
            parameter.neg_()
        assert not torch.allclose(model(pixels).logits, before, atol=1e-4)


def test_a_trained_backbone_goes_on_from_its_checkpoint(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Its weights are stored under other names than in memory, which loading must undo."""
    tuned = (*VARIANTS["fine-tuning"][0], "--train.num_train_epochs", 3, "--data.max_classes", 4)
    assert run(*tuned, out="whole")[0] == 0
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", folder, ignore=shutil.ignore_patterns("task-02", "results.json", "*.png"))
    ledger = json.loads((folder / "run.json").read_text())
    ledger["finished"] = False
    ledger["entries"] = {role: done[:1] for role, done in ledger["entries"].items()}
    (folder / "run.json").write_text(json.dumps(ledger))
    assert run(*tuned, out="cut")[0] == 0
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    common = ("--train.logging_steps", 1, "--train.num_train_epochs", 2)
    assert run(*common, "--train.per_device_train_batch_size", 8, out="one")[0] == 0
    halves = ("--train.per_device_train_batch_size", 4, "--train.gradient_accumulation_steps", 2)
    assert run(*common, *halves, out="two")[0] == 0
    for role in ("teacher", "student"):
        for task in (1, 2, 3):
            one, two = (losses(tmp_path / out, role, task) for out in ("one", "two"))
            assert len(one) == 4
            for ours, theirs in zip(one, two, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)


# ---- a teacher of another resolution and normalisation ----


@pytest.fixture(scope="module")
def views(tiny: Path) -> tuple[Any, ...]:
    """Options for a larger image size, another normalisation, and terms that compare patches."""
    colours = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    backbone = make_backbone(tiny.parent / "teacher of 24", 48, 3, seed=3, size=24, patch=4, **colours)
    terms = "[{type: kdp, weight: 0.5}, {type: fitnets}, {type: review_kd}]"
    return "--teacher.backbone", backbone, "--distill", terms, "--data.max_classes", 4


@pytest.mark.parametrize("query", ["student", "self"])
def test_teacher_and_student_of_different_views(
    query: str,
    views: tuple[Any, ...],
    tiny: Path,
    run: Callable[..., tuple[int, str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each checkpoint's outputs in the pipeline, with its own image processor, are those the run recorded."""
    code, output = run(*views, "--teacher.query", query, "--train.num_train_epochs", 4)
    assert code == 0, output
    found, folder = results(tmp_path / "out")["roles"], tmp_path / "out"
    assert set(found) == set(ROLES)
    sizes = {role: AutoImageProcessor.from_pretrained(folder / role).size["height"] for role in ROLES}
    assert sizes == {"teacher": 24, "student": 16, "nearest_class_mean": 16}
    view = json.loads((folder / "teacher" / "config.json").read_text())["query_view"]
    assert (view is None) == (query == "self") and (view is None or view["size"] == [16, 16])

    test: Any = load_dataset("parquet", data_files=str(tiny.parent / "data" / "test.parquet"), split="train")
    names = test.features["label"].names
    for role in ROLES:
        classify = pipeline("image-classification", model=str(folder / role), device="cpu")
        right = [0, 0]
        for row in test.filter(lambda row: row["label"] < 4):
            right[row["label"] // 2] += classify(row["image"], top_k=1)[0]["label"] == names[row["label"]]
        assert right == found[role]["correct"][-1], role
    assert found["teacher"]["accuracy_matrix"][0][0] > 80, "the teacher learnt something of its own pictures"

    capfd.readouterr()
    assert verify.main([str(folder)]) == 0
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 2 * len(ROLES) and all(line.endswith(", as recorded") for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("query", ["student", "self"])
def test_interruptions_do_not_change_a_run_of_two_views(
    query: str, views: tuple[Any, ...], tiny: Path, tmp_path: Path
) -> None:
    command = (tiny, *views, "--teacher.query", query, "--output_dir")
    assert train(*command, tmp_path / "whole")[0] == 0
    for role, kill in (("teacher", signal.SIGINT), ("student", signal.SIGKILL)):
        code, _ = interrupt_when(stored_epoch(tmp_path / "cut", role, 2), *command, tmp_path / "cut", kill=kill)
        assert code in (130, -signal.SIGKILL) and list((tmp_path / "cut").glob(f"work/{role}-task-02/checkpoint-*"))
    assert train(*command, tmp_path / "cut")[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


# ---- processes ----


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tiny: Path, tmp_path: Path) -> None:
    """With SGD: Adam divides by the gradient's size, so where that is 0 its step is rounding noise."""
    common = ("--train.logging_steps", 1, "--train.num_train_epochs", 2, "--train.optim", "sgd")
    terms = "[{type: kdp}, {type: review_kd}, {type: dual_path, copy_from: all}]"  # some with their own layers
    common += ("--distill", terms)
    one, two = tmp_path / "one", tmp_path / "two"
    code, output = train(tiny, "--output_dir", one, *common, "--train.per_device_train_batch_size", 8)
    assert code == 0, output
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541")
    halves = ("--train.per_device_train_batch_size", 4)
    code, output = train(tiny, "--output_dir", two, *common, *halves, launcher=launcher)
    assert code == 0, output
    assert output.count("task 3/3: average") == 1, "one process speaks"
    for role in ("teacher", "student"):
        for task in (1, 2, 3):
            for ours, theirs in zip(losses(one, role, task), losses(two, role, task), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
    assert measured(one) == measured(two)
