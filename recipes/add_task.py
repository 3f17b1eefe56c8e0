"""Learn one more task with a student and a teacher from the Hugging Face Hub; nothing but the two is needed.

python recipes/add_task.py OWNER/NAME DATA [--teacher OWNER/NAME-teacher] [--revision task-NN] [--any.field value ...]
DATA: images of the new classes, as `data.path` of a recipe: DATA/train/CLASS/*.png and DATA/test/CLASS/*.png. Test
images of known classes are used too: they tell what was forgotten. The teacher is by default OWNER/NAME-teacher, if
there was one. The run's folder is by default runs/NAME-DATA; the same command goes on where it stopped. With
--push_to_hub true (and --push_teacher true) the new task is pushed to the repositories it came from, or to those of
--hub_model_id.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import stopping

if __name__ == "__main__":
    stopping.listen()  # before imports that take seconds

import train as training
import yaml
from accelerate import PartialState
from huggingface_hub import HfApi

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.adopt import adopt
from hf_cdl.build import build_processors, load_model
from hf_cdl.hub import HubError, Origin, read_origin
from hf_cdl.recipe import Recipe, RecipeError, build_recipe, load_recipe
from hf_cdl.report import difference_lines
from hf_cdl.run import Run
from hf_cdl.storing import RunError

KEPT = ("crop_scale", "crop_ratio", "crop_padding", "flip", "eval_split", "split_seed")
"""What the new task's data have in common with those of the tasks before."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        usage="add_task.py OWNER/NAME DATA [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("student")
    parser.add_argument("data")
    parser.add_argument("--teacher")
    parser.add_argument("--revision")
    parser.add_argument("--output_dir", type=Path)
    options, fields = parser.parse_known_args(arguments)
    if arguments[:2] != [options.student, options.data]:
        parser.error("the student's repository and the folder of images come first")
    name = f"{options.student.split('/')[-1]}-{Path(options.data).name}"
    folder = options.output_dir or Path("runs", name)
    fields = ["--data.path", json.dumps(options.data), "--name", json.dumps(name), *fields]
    try:
        with PartialState().main_process_first():
            if not (folder / "run.json").exists():
                begin(folder, options.student, options.teacher, options.revision)
        words = [str(folder / "recipe.yaml"), "--output_dir", str(folder), *fields]
        recipe = checked(load_recipe(words, folder / "recipe.yaml"), folder)
    except (RecipeError, RunError, HubError) as error:
        training.say(f"error: {error}", file=sys.stderr)
        return 2
    code = training.main(words)
    if code in (0, 4):
        training.say(differences(recipe))
    return code


def begin(folder: Path, student: str, teacher: str | None, tag: str | None) -> None:
    """Make the run: the models, the ledger, and a recipe that goes on with theirs."""
    api = HfApi()
    first = read_origin(api, student, "student", tag)
    origins = {}
    stored = build_recipe(first.results["recipe"])
    if "classifier" in {stored.student.model, stored.teacher and stored.teacher.model}:
        raise HubError(f"{student} is of a run with a model: classifier, which learns one task alone.")
    if stored.teacher is not None:
        try:
            origins["teacher"] = read_origin(
                api, teacher or f"{student}-teacher", "teacher", f"task-{first.tasks:02d}"
            )
        except HubError as error:
            raise HubError(f"The student had a teacher, which is needed for the next task: {error}") from error
        check_pair(first, origins["teacher"])
    origins["student"] = first
    content = continued(stored, first)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    training.say(f"{student} knows {first.tasks} tasks (commit {first.commit[:8]}). Taking it over into {folder}/")
    adopt(
        folder,
        {"tasks": first.tasks, "roles": {role: origin.as_dict() for role, origin in origins.items()}},
        {role: origin.results for role, origin in origins.items()},
        lambda role, target: origins[role].download(target),
        text,
    )


def check_pair(student: Origin, teacher: Origin) -> None:
    """Raises HubError unless both learnt the same classes in the same tasks."""
    ours, theirs = (origin.results["class_names"][: origin.tasks] for origin in (student, teacher))
    if ours != theirs:
        raise HubError(
            f"{teacher.repository} learnt other classes than {student.repository}: {theirs[0][:3]} ... in place of "
            f"{ours[0][:3]} .... Name the teacher of this student with --teacher OWNER/NAME."
        )


def continued(stored: Recipe, origin: Origin) -> dict[str, Any]:
    """The recipe that goes on with a stored one: other data, behind the classes known, and no baselines."""
    content = stored.as_dict()
    known = origin.results["class_names"][: origin.tasks]
    data = {key: value for key, value in content["data"].items() if key in KEPT}
    return {
        **content,
        "data": {"classes_per_task": None, **data, "known_classes": known},
        "baselines": [],
        "teacher_from": None,
        "card": {"license": stored.card.license},  # all else in it was said of the old data
        "hub_model_id": origin.repository,
    }


def checked(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe itself. Raises RecipeError if its models are not those that were taken over."""
    taken = load_recipe([str(folder / "recipe.yaml"), "--data.path", "."], folder / "recipe.yaml")
    changed = []
    for role in ("student", "teacher"):
        ours, theirs = (getattr(r, role) and dataclasses.asdict(getattr(r, role)) for r in (recipe, taken))
        free = {"train"} if recipe.save_backbone else {"train", "backbone", "revision"}  # its fingerprint is checked
        for field in (ours or theirs or {}).keys() - free:
            if (ours or {}).get(field) != (theirs or {}).get(field):
                changed.append(f"{role}.{field}")
    if changed:
        raise RecipeError(
            f"{', '.join(sorted(changed))}: the models are as they were published. For the new task `data`, `train`, "
            "`ce_weight`, weights in `distill` and where to push may be set."
        )
    return recipe


def differences(recipe: Recipe) -> str:
    """The student's accuracy on earlier tasks before and after the new one, as far as test images were given."""
    run = Run(recipe.folder, recipe.as_dict(), writer=False)
    count, split = run.origin["tasks"], recipe.data.eval_split
    stream = TaskStream(recipe.data, build_processors(recipe, run.checkpoint), seed=recipe.seed)
    old = [task for task in stream if task.index < count and len(getattr(task, split))]
    if not old:
        return "There are no test images of earlier tasks in the data: what was forgotten is not known."
    model = load_model(recipe, recipe.student, recipe.folder / "student" / f"task-{count:02d}")
    arguments = CDLTrainingArguments(**{**recipe.training_args("student"), "output_dir": str(recipe.folder)})
    before = CDLTrainer(model, arguments, eval_split=split, num_tasks=len(stream))
    answers = before.answer(old)
    row = run.results()["roles"]["student"]["accuracy_matrix"][-1]
    shown = zip(old, answers["counts"], answers["row"], strict=True)
    lines = difference_lines([(task.index + 1, task.class_names, n, was, row[task.index]) for task, n, was in shown])
    return "\n".join([f"\nstudent: accuracy (%) on earlier tasks, before and after task {count + 1}", *lines])


if __name__ == "__main__":
    training.quiet()
    stopping.leave(main(sys.argv[1:]))
