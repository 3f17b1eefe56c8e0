"""hf-cdl train IMAGES: the recommended recipe for a user's images, with an explanation of what it chose and why."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_cdl import TaskStream
from hf_cdl.counted import counted
from hf_cdl.escape import visible
from hf_cdl.places import HUB_ID
from hf_cdl.recipe import BASELINES, Recipe, RecipeError, build_recipe, load_plugins
from hf_cdl.recipe.files import fields_given, override, read_yaml

ALONE, TAUGHT = (Path(__file__).parent / "recommended" / f"{name}.yaml" for name in ("alone", "taught"))
_LONGEST = 96
"""Characters of a name on the Hub."""
_FIELDS = {"backbone": "student.backbone", "teacher": "teacher.backbone"}
"""The command's own options, and what they set."""


def names_images(words: Sequence[str]) -> bool:
    """Whether a command line begins with images: with anything but a recipe's file or a field."""
    first = words[0] if words else ""
    return bool(first) and not first.startswith("-") and Path(first).suffix.lower() not in (".yaml", ".yml")


def recommended(words: Sequence[str]) -> Recipe:
    """Build the recipe of `IMAGES [--backbone B] [--teacher B] [--any.field value ...]`.

    Raises RecipeError if there are no images by that name, or if something is wrong with the fields.
    """
    images, given = words[0], fields_given(words[1:])
    check_images(images)
    short = {name: _backbone(name, value) for name, value in given if name in _FIELDS}
    fields = [(name, value) for name, value in given if name not in _FIELDS]
    teacher = short.get("teacher")
    _check_fields([name for name, _ in fields], short)
    content = read_yaml(ALONE if teacher is None else TAUGHT)
    content["name"] = Path(images).expanduser().resolve().name if os.path.isdir(images) else images.split("/")[-1]
    content["data"]["path"] = images
    override(content, [(_FIELDS[name], value) for name, value in short.items() if value is not None] + fields)
    load_plugins(content.get("plugins", []))
    return build_recipe(content)


def check_images(images: str) -> None:
    """Raise RecipeError for what can be neither a folder nor a data set on the Hub."""
    shown = visible(images)[:200]
    if os.path.isfile(images):
        raise RecipeError(
            f"{shown} is a file. Give the folder of the images, with one folder per class (FOLDER/CLASS/*.jpg), a "
            "data set on the Hub, or a recipe, whose name ends in .yaml."
        )
    if os.path.isfile(os.path.join(images, "run.json")):
        raise RecipeError(f"{shown} is a run, not a folder of images. To resume it, give its {shown}/recipe.yaml.")
    if os.path.exists(images):
        return
    if os.path.exists(f"{images}.yaml"):
        raise RecipeError(f"There are no images at {shown}, but a recipe {shown}.yaml; did you mean that one?")
    if not HUB_ID.fullmatch(images) or len(images) > _LONGEST:
        raise RecipeError(
            f"There are no images at {shown}: no such folder, and no data set on the Hub of this name (OWNER/NAME). "
            "Give a folder that exists, or a recipe, whose name ends in .yaml."
        )


def _backbone(name: str, value: Any) -> str | None:
    """Return the value of --backbone or --teacher (null: none). Raises RecipeError for anything but a name."""
    if isinstance(value, str) or (name == "teacher" and value is None):
        return value
    raise RecipeError(
        f"--{name} is {visible(repr(value))[:200]}, but takes the name of a backbone: a Hub id, as "
        "facebook/dinov2-base, or a folder. Its other fields: "
        f"--{'teacher' if name == 'teacher' else 'student'}.FIELD VALUE."
    )


def _check_fields(names: Sequence[str], short: Mapping[str, str | None]) -> None:
    """Raise RecipeError for fields that a short option has set already, and for a teacher's without a teacher."""
    taken = {_FIELDS[name]: f"--{name}" for name in short} | {"data.path": "the first word, the images,"}
    if twice := [name for name in names if name in taken]:
        raise RecipeError(f"--{twice[0]} is set by {taken[twice[0]]} already; leave one of them out.")
    if short.get("teacher") is None and (lonely := [name for name in names if name.startswith("teacher.")]):
        raise RecipeError(f"--{visible(lonely[0])} is of a teacher, but there is none; name one: --teacher BACKBONE.")


# ---- in words ----


def explained(recipe: Recipe, stream: TaskStream) -> Iterator[str]:
    """Explain, line by line, what the recommended recipe chooses for these images, and why."""
    split, tasks, student, teacher = stream.config.eval_split, len(stream), recipe.student, recipe.teacher
    train, test = (sum(stream.images.get(part, [])) for part in ("train", split))
    first: Any = stream[0]
    held = split == "test" and first.test.name == first.train.name
    share = f"{100 * (stream.config.test_fraction or 0):g} % of each class: there is no test split"
    cut = "one task" if tasks == 1 else f"{counted(tasks, 'task')}, one after the other"
    yield f"images: {counted(len(stream.class_names), 'class')} in {cut}; {counted(train, 'image')} to learn from"
    yield f"test: {counted(test, 'image')}, {share if held else f'those of the {split} split'}"
    yield f"student: {visible(student.backbone)}"
    if student.head == BASELINES["ridge_head"]:
        yield "  with a ridge head: fitted in one pass over the images, which also choose its strength and scale"
        yield "  it can tell images of none of its classes, if asked: pipeline(..., reject=True)"
        yield "  why: ridge heads were 20 to 47 points ahead of prompted students in the study (docs/evidence.md)"
    if teacher is not None and student.first_session is not None:
        yield f"teacher: {visible(teacher.backbone)}"
        yield f"  learns the {'images' if tasks == 1 else 'first task'} by adapters (LoRA), then teaches the student's"
        yield "  why: 12.3 points more in the study's DINOv2 pair, none in its small pair; the table tells of yours"
    epochs = counted(math.ceil(recipe.train.get("num_train_epochs", 0)), "epoch")
    epochs = f"{epochs}; without: --baselines '[nearest_class_mean]'"
    told = {"linear_head": f"linear head ({epochs})"}
    if beside := [told.get(name, name.replace("_", " ")) for name in recipe.baselines]:
        yield f"beside it: {', '.join(beside)}"
    yield f"recipe: {visible(recipe.folder / 'recipe.yaml')}, written with the first task"
