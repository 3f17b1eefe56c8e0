"""hf-cdl train IMAGES as a user runs it: real runs on small folders, what is said, stored and repeated; no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, make_backbone, make_data, picture, script
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from hf_cdl.commands.images import ALONE, TAUGHT, names_images, recommended
from hf_cdl.recipe import BASELINES, RecipeError, load_recipe
from hf_cdl.recipe.files import read_yaml

STUDENT, TEACHER = (ROOT / "recipes" / "quickstart" / role for role in ("student", "teacher"))


def make_photos(folder: Path, classes: int = 12, images: int = 8, split: str = ".") -> Path:
    """FOLDER/SPLIT/CLASS/NUMBER.png with images of 48 x 48 pixels."""
    for label in range(classes):
        place = folder / split / f"class {chr(97 + label)}"
        place.mkdir(parents=True)
        for number in range(images):
            picture(label, number + 100 * (split == "test"), 48).save(place / f"{number}.png")
    return folder


def train(*words: Any, cwd: Path) -> str:
    code, said = script("train", *words, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, cwd=cwd)
    assert code == 0 and "Traceback" not in said and "Warning" not in said, said
    return said


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which `hf-cdl train photos` ran on 12 class folders, and what it said."""
    place = tmp_path_factory.mktemp("first")
    make_photos(place / "photos")
    return place, train("photos", "--backbone", STUDENT, cwd=place)


def test_it_says_what_it_chose_and_how_the_student_did(first: tuple[Path, str]) -> None:
    place, said = first
    lines, found = said.splitlines(), results(place / "runs" / "photos")
    assert lines[:8] == [
        "images: 12 classes in one task; 72 images to learn from",
        "test: 24 images, 20 % of each class: there is no test split",
        f"student: {STUDENT}",
        "  with a ridge head: fitted in one pass over the images, which also choose its strength and scale",
        "  it can tell images of none of its classes, if asked: pipeline(..., reject=True)",
        "  why: ridge heads were 20 to 47 points ahead of prompted students in the study (docs/evidence.md)",
        "beside it: nearest class mean, linear head (20 epochs; without: --baselines '[nearest_class_mean]')",
        "recipe: runs/photos/recipe.yaml, written with the first task",
    ]
    assert "the student's head chose: strength " in said
    assert "asked for `unknown`, the student still answers " in said
    assert {"kept", "unlearnt_passing_expected"} == {*found["roles"]["student"]["known"][0]}
    assert [*found["roles"]] == ["student", "nearest_class_mean", "linear_head"]
    assert found["verdict"] in said.replace("\n", " ") and found["verdict"].startswith("Use the ")
    assert (
        found["roles"]["student"]["counts"] == [24] and found["roles"]["student"]["metrics"]["average_accuracy"] > 50
    )
    assert found["recipe"]["student"]["head"].items() >= BASELINES["ridge_head"].items()
    assert found["recipe"]["student"]["patch_mean"] is True
    assert len(found["class_names"]) == 1 and found["recipe"]["data"]["path"] == "photos"


def test_a_plan_of_it(first: tuple[Path, str]) -> None:
    place, _ = first
    code, said = script("plan", "photos", "--backbone", STUDENT, env={"HF_HUB_OFFLINE": "1"}, cwd=place)
    assert code == 0 and "photos: 1 task, 12 classes\n72 training images (counted in the data)" in said, said


def test_the_student_serves(first: tuple[Path, str]) -> None:
    place, _ = first
    classify = pipeline("image-classification", model=str(place / "runs" / "photos" / "student"))
    assert classify(str(place / "photos" / "class c" / "0.png"))[0]["label"] in {f"class {c}" for c in "abcdefghijkl"}


def test_the_student_says_unknown_when_asked(first: tuple[Path, str]) -> None:
    place, _ = first
    files = [str(file) for file in sorted((place / "photos").rglob("*.png"))]
    student = str(place / "runs" / "photos" / "student")
    rejects: Any = {"reject": 0.9}
    plain, asked = (pipeline("image-classification", model=student, **more) for more in ({}, rejects))
    answers = [(one[0]["label"], other[0]["label"]) for one, other in zip(plain(files), asked(files), strict=True)]
    kept = [one == other for one, other in answers]
    assert 0.75 <= sum(kept) / len(kept) < 1 and {"unknown"} == {b for a, b in answers if a != b}
    noise = torch.randint(0, 256, (48, 48, 3), generator=torch.Generator().manual_seed(0)).numpy().astype("uint8")
    assert asked(Image.fromarray(noise))[0]["label"] == "unknown"


def test_the_same_command_again_is_finished_and_another_choice_is_refused(first: tuple[Path, str]) -> None:
    place, _ = first
    assert train("photos", "--backbone", STUDENT, cwd=place).startswith("This run is finished.")
    code, said = script("train", "photos", "--backbone", STUDENT, "--seed", 1, env={}, cwd=place)
    assert code == 2 and "seed: 0 -> 1" in said


@pytest.mark.slow
def test_the_stored_recipe_finds_the_run_and_repeats_it(first: tuple[Path, str]) -> None:
    place, _ = first
    assert train("runs/photos/recipe.yaml", cwd=place).startswith("This run is finished.")
    train("runs/photos/recipe.yaml", "--output_dir", "again", cwd=place)
    ours, theirs = (load_file(place / folder / "student" / "model.safetensors") for folder in ("runs/photos", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (place / "again" / "recipe.yaml").read_text() == (place / "runs" / "photos" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_test_split_is_used_and_classes_come_in_tasks(tmp_path: Path) -> None:
    for split, images in (("train", 4), ("test", 3)):
        make_photos(tmp_path / "photos", 4, images, split)
    (tmp_path / "foreign").mkdir()
    for number in range(5):
        picture(11, number, 48).rotate(45).save(tmp_path / "foreign" / f"{number}.png")
    words = ("photos", "--backbone", STUDENT, "--data.classes_per_task", 2, "--train.num_train_epochs", 1)
    said = train(*words, "--name", "mine", "--data.foreign", "foreign", cwd=tmp_path)
    told = results(tmp_path / "runs" / "mine")["roles"]["student"]["known"]
    assert {"unlearnt_auroc", "foreign_passing"} <= {*told[0]} and "unlearnt_auroc" not in told[1]
    assert "% of the foreign ones, and " in said and "of those of classes not learnt yet" in said
    assert "images: 4 classes in 2 tasks, one after the other; 16 images to learn from" in said
    assert (
        "held out" not in said
        and "test: 12 images, those of the test split" in said
        and "recipe: runs/mine/recipe.yaml" in said
    )
    assert results(tmp_path / "runs" / "mine")["roles"]["student"]["counts"] == [6, 6]


@pytest.mark.slow
def test_parquet_files_and_a_teacher(tmp_path: Path) -> None:
    """The teacher's session and the student's are on the first task alone; the table shows ridge without one, too."""
    make_data(tmp_path / "tables", classes=4, train=6, test=3)
    for role, width in (("small", 32), ("large", 48)):
        make_backbone(tmp_path / role, width)
    words = ("tables", "--backbone", "./small", "--teacher", "./large", "--data.classes_per_task", 2)
    words += ("--train.logging_steps", 1)
    epochs = [word for part in ("", "teacher.", "student.") for word in (f"--{part}train.num_train_epochs", 1)]
    said = train(*words, *epochs, cwd=tmp_path)
    assert "teacher: ./large\n  learns the first task by adapters (LoRA), then teaches the student's" in said
    found = results(tmp_path / "runs" / "tables")
    assert [*found["roles"]] == ["teacher", "student", "nearest_class_mean", "linear_head", "ridge_head"]
    logs = [json.loads((tmp_path / f"runs/tables/logs/student-task-0{n}.json").read_text()) for n in (1, 2)]
    assert any("loss/similarity" in line for line in logs[0]) and not any("loss" in line for line in logs[1])


@pytest.mark.parametrize("words", [[], ["--teacher", "null"]], ids=["none", "null"])
def test_without_a_teacher_the_student_is_fitted_alone(words: list[str], tmp_path: Path) -> None:
    recipe = recommended([str(tmp_path), *words])
    assert recipe.teacher is None and recipe.student.backbone == "facebook/dinov2-small"
    assert recipe.name == tmp_path.name and recipe.data.path == str(tmp_path)


# ---- the packaged recipes ----


def test_the_recommended_student_is_the_baseline_of_that_name() -> None:
    alone, taught = read_yaml(ALONE), read_yaml(TAUGHT)
    for section in (alone["student"], taught["student"], taught["teacher"]):
        assert section["head"] == BASELINES["ridge_head"]
    assert {**taught["student"], "backbone": taught["teacher"]["backbone"]} == taught["teacher"]
    assert "ridge_head" in taught["baselines"] and set(alone["baselines"]) < set(taught["baselines"])


def test_the_session_is_the_one_that_the_study_measured() -> None:
    ours, measured = read_yaml(TAUGHT), load_recipe([], ROOT / "recipes" / "dinov2_session.yaml")
    for role, theirs in (("teacher", measured.teacher), ("student", measured.student)):
        assert theirs is not None and ours[role]["first_session"] == theirs.first_session
        assert ours[role]["lora"]["r"] == (theirs.lora or {})["r"]
        trained = {
            "per_device_train_batch_size": measured.train["per_device_train_batch_size"],
            **(theirs.train or {}),
        }
        assert ours[role]["train"] == trained
    assert ours["ce_weight"] == measured.ce_weight
    assert [term["type"] for term in ours["distill"]] == [term["type"] for term in measured.distill]
    assert tuple(ours["data"]["crop_scale"]) == measured.data.crop_scale


@pytest.mark.parametrize(
    ("words", "images"),
    [
        (["photos"], True),
        (["photos/"], True),
        (["OWNER/data.v2"], True),
        (["cifar100", "--seed", "1"], True),
        (["a.yaml"], False),
        (["a.YML", "b.yaml"], False),
        (["--seed", "1"], False),
        (["-"], False),
        ([""], False),
        ([], False),
    ],
)
def test_what_is_taken_for_images(words: list[str], images: bool) -> None:
    assert names_images(words) == images


@pytest.mark.parametrize(("images", "name"), [("OWNER/flowers", "flowers"), ("cifar100", "cifar100"), (".", "here")])
def test_a_run_is_called_after_its_images(
    images: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = recommended([images])
    assert (recipe.name, recipe.data.path, recipe.folder) == (name, images, Path("runs") / name)


def test_the_student_s_backbone_may_be_named_as_in_a_recipe(tmp_path: Path) -> None:
    assert recommended([str(tmp_path), "--student.backbone", "a/b"]).student.backbone == "a/b"
    with pytest.raises(RecipeError, match="--student.backbone is set by --backbone already"):
        recommended([str(tmp_path), "--backbone", "c/d", "--student.backbone", "a/b"])
