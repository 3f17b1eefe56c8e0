"""Bad images, backbones and fields of `hf-cdl train IMAGES`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import picture

from bad_inputs.parts import Parts
from bad_inputs.runner import WAY, Command, Row, command, rows


def images(
    name: str, *words: Any, says: tuple[str, ...], way: str = WAY, make: Callable[[], Any] = lambda: None
) -> Row:
    """A command line; photos/ and recipe.yaml are valid, as is `student`, the backbone if none is given."""

    def act(parts: Parts) -> Command:
        parts.put_recipe()
        shutil.copytree(parts.photos, "photos")
        make()
        given = () if "--backbone" in words or words[0].endswith(".yaml") else ("--backbone", "./student")
        return command("train", *words, *given)

    return Row(name, act, says, way)


def a_run() -> None:
    Path("old").mkdir()
    Path("old/run.json").write_text("{}")


def one_class(folder: Path) -> None:
    (folder / "ant").mkdir(parents=True)
    for number in range(4):
        picture(0, number).save(folder / "ant" / f"{number}.png")


IMAGES = [
    images("a folder that is not there", "./gone", says=("./gone",), way="a folder that exists"),
    images("a folder below one that is not there", "gone/a/b", says=("gone/a/b",), way="a folder that exists"),
    images("a name that is too long", "a" * 5000, says=("no images at",), way="a folder that exists"),
    images("a name that nothing has", "gone", says=("'gone'",), way="local copy"),
    images("an empty folder", "empty", says=("empty", "none"), way="allowed", make=lambda: Path("empty").mkdir()),
    images("one image", "photos/train/ant/0.png", says=("0.png", "is a file"), way="the folder of the images"),
    images("an archive", "a.zip", says=("a.zip", "is a file"), make=lambda: Path("a.zip").write_bytes(b"PK")),
    images("a run", "old", says=("old is a run",), way="old/recipe.yaml", make=a_run),
    images("a recipe without its .yaml", "recipe", says=("recipe.yaml",), way="did you mean"),
    images("a recipe that is not there", "gone.yaml", says=("gone.yaml", "No such file")),
    images("a folder called like a recipe", "x.yaml", says=("x.yaml",), way="YAML file", make=Path("x.yaml").mkdir),
    images("a recipe behind it", "photos", "recipe.yaml", says=("recipe.yaml",), way="--field"),
    images("a run among class folders", "photos/train", "--output_dir", "photos/train/run", says=("output_dir",)),
    images("a run in a folder of test images", "photos", "--output_dir", "photos/test/run", says=("output_dir",)),
    images("a cache among class folders", "photos/train", "--cache", "photos/test/../train", says=("cache",)),
    images("images of one class", "one", says=("one class",), way="linear_head", make=lambda: one_class(Path("one"))),
]


BACKBONES = [
    images("a backbone that is not there", "photos", "--backbone", "./gone", says=("student", "./gone")),
    images("a number as backbone", "photos", "--backbone", 3, says=("--backbone", "3")),
    images("no backbone", "photos", "--backbone", "null", says=("--backbone", "None")),
    images("a backbone without value", "photos", "--backbone", "--seed", 1, says=("--backbone", "no value")),
    images("a backbone twice", "photos", "--backbone", "x", "--student.backbone", "y", says=("student.backbone",)),
    images(
        "a backbone beside a recipe", "recipe.yaml", "--backbone", "student", says=("--backbone",), way="--student"
    ),
    images("images as backbone", "photos", "--backbone", "./photos", says=("student", "./photos")),
    images("a teacher that is not there", "photos", "--teacher", "./gone", says=("teacher", "./gone")),
    images(
        "a teacher that is a section", "photos", "--teacher", "{backbone: x}", says=("--teacher",), way="--teacher.F"
    ),
    images("a teacher that is true", "photos", "--teacher", "true", says=("--teacher", "True"), way="backbone"),
    images("images as teacher", "photos", "--teacher", "./photos", says=("teacher", "./photos")),
    images("a teacher twice", "photos", "--teacher", "x", "--teacher.backbone", "y", says=("teacher.backbone",)),
    images(
        "a field of no teacher", "photos", "--teacher.lora.r", 4, says=("teacher.lora.r",), way="--teacher BACKBONE"
    ),
    images("a field of a null teacher", "photos", "--teacher", "null", "--teacher.revision", "x", says=("revision",)),
]

FIELDS = [
    images("other data", "photos", "--data.path", "data", says=("data.path", "images")),
    images("an unknown field", "photos", "--sead", 3, says=("sead",), way="did you mean 'seed'"),
    images("more classes a task than there are", "photos", "--data.classes_per_task", 9, says=("only 3 classes",)),
    images("all to test", "photos", "--data.test_fraction", 1.0, says=("test_fraction",)),
    images("prompts beside ridge", "photos", "--student.prompt", "{type: coda}", says=("student.head.type",)),
]

ROWS = rows("images", IMAGES, BACKBONES, FIELDS)
