"""hf-cdl add: teach a student, and its teacher, one more task; both come from the Hugging Face Hub or a folder.

The student may come from a stranger: none of their code is run, and nothing pickled is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from huggingface_hub import HfApi

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.commands import train as training
from hf_cdl.commands.changing import Made, change
from hf_cdl.commands.console import say
from hf_cdl.commands.import_student import inherited
from hf_cdl.commands.known_images import to_add
from hf_cdl.commands.parsers import read
from hf_cdl.counted import counted
from hf_cdl.data.labelled import read_images
from hf_cdl.escape import visible
from hf_cdl.heads import HEADS
from hf_cdl.heads.base import FittedHead
from hf_cdl.hub import HubError, Origin, read_folder, read_origin
from hf_cdl.places import short_name
from hf_cdl.recipe import Recipe, RecipeError, load_plugins, load_recipe
from hf_cdl.recipe.build import build_processors, load_model
from hf_cdl.recipe.files import fields_given, read_yaml
from hf_cdl.runs.changes import ChangingRun
from hf_cdl.runs.continuation import continue_elsewhere
from hf_cdl.runs.files import RunError
from hf_cdl.runs.ledger import last_learnt, read_ledger, revision_name
from hf_cdl.runs.report import difference_lines
from hf_cdl.runs.run import Run


def main(arguments: list[str]) -> int:
    options, fields = read("add", arguments)
    if options.output_dir is None and is_fitted(options, fields):
        return learn(options, fields)
    undo = None
    try:
        name = f"{short_name(options.student)}-{Path(options.data).resolve().name}"
        folder = options.output_dir or Path("runs", name)
        fields = ["--data.path", json.dumps(options.data), "--name", json.dumps(name), *fields]
        with PartialState().main_process_first():
            plugins = dict(fields_given(fields)).get("plugins", [])
            load_plugins(plugins)
            if not (folder / "run.json").exists():
                undo = create_run(folder, options.student, options.teacher, options.revision, bool(plugins))
        refuse_plugins(folder)
        words = [str(folder / "recipe.yaml"), "--output_dir", str(folder), *fields]
        recipe = checked(load_recipe(words, folder / "recipe.yaml"), folder)
    except (OSError, ValueError, RunError, HubError) as error:
        say(f"error: {error}", file=sys.stderr)
        if undo is not None:
            undo()
        return 2
    code = training.main(words)
    if code == 2 and undo is not None and "bad_image" not in read_ledger(folder):
        undo()  # a failed first attempt leaves nothing behind
    if code in (0, 4):
        say(differences(recipe))
    return code


def is_fitted(options: Any, fields: list[str]) -> bool:
    """Whether the student exists and has a fitted head, which learns more images without a teacher."""
    try:
        load_plugins(dict(fields_given(fields)).get("plugins", []))
        section = find(options.student, "student", None).results["recipe"]["student"]
        head = HEADS[section["head"]["type"]]
    except (OSError, ValueError, KeyError, TypeError, RunError):  # the error is reported when it is read again
        return False
    return issubclass(head, FittedHead) and bool(head.class_sums) and not section["head"].get("soft_targets")


def learn(options: Any, fields: list[str]) -> int:
    """Add images of new and known classes to a fitted head, as a change of the student."""
    try:
        given = dict(fields_given(fields))
        given |= {name: value for name in ("teacher", "revision") if (value := getattr(options, name)) is not None}
        options.plugins, options.push_to_hub = given.pop("plugins", []), given.pop("push_to_hub", None)
        options.backbone = given.pop("student.backbone", None)
        if given:
            raise RecipeError(
                f"{', '.join(sorted(given))} would have no effect: the student's head is fitted, so images are added "
                "to its sums in one pass. Leave it out, or give --output_dir FOLDER for a task in a run of its own."
            )
    except ValueError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2

    def added(run: ChangingRun, model: Any, processor: Any) -> Made | None:
        images = read_images(options.data)
        for note in images.notes:
            say(f"note: {note}")
        images, moves = to_add(run, model, images)
        return (model.add(images, images.labels, processor), moves) if moves else None

    return change(options, added)


def create_run(
    folder: Path, student: str, teacher: str | None, tag: str | None, plugins: bool = False
) -> Callable[[], None]:
    """Create the run: models, ledger, and a recipe that continues from theirs. Returns a function that undoes it.

    `plugins`: whether any were named on the command line.
    """
    changed = find(student, "student", tag)
    first = changed.with_present_classes()
    recipe, left = inherited(student, first.results["recipe"], plugins)
    if "classifier" in {recipe.student.model, recipe.teacher and recipe.teacher.model}:
        raise HubError(f"{student} is of a run with a model: classifier, which learns one task alone.")
    origins = {}
    if recipe.teacher is not None:
        check_unchanged(student, changed)
        try:
            origins["teacher"] = find(teacher or default_teacher(student), "teacher", f"task-{first.tasks:02d}")
        except HubError as error:
            raise HubError(f"The student had a teacher, which is needed for the next task: {error}") from error
        check_pair(first, origins["teacher"])
    elif teacher is not None:
        raise HubError(f"The student had no teacher, so --teacher {visible(teacher)} has none to be. Leave it out.")
    origins["student"] = first
    text = yaml.safe_dump(
        continued(recipe, first), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    say(f"{first.place} knows {counted(first.tasks, 'task')}. Taking it over into {folder}/")
    if left:
        say(f"Ignored from its recipe, because it belongs to other machines: {', '.join(left)[:1000]}")
    return continue_elsewhere(
        folder,
        {"tasks": first.tasks, "roles": {role: origin.as_dict() for role, origin in origins.items()}},
        {role: origin.results for role, origin in origins.items()},
        lambda role, target: origins[role].copy(target),
        text,
    )


def find(where: str, role: str, tag: str | None) -> Origin:
    """Find a model in a folder or on the Hub. Raises HubError if there is none."""
    if not (place := Path(where)).is_dir():
        return read_origin(HfApi(), where, role, tag)
    one = (place / "config.json").exists() and role == "teacher"
    return read_folder(place, role, None if one else tag)  # check_pair compares a checkpoint with the student


def default_teacher(student: str) -> str:
    """The default location of a student's teacher."""
    place = Path(student)
    if not place.is_dir():
        return f"{student}-teacher"
    if not (place / "config.json").exists():
        return student
    parts = place.resolve().parts
    return str(
        Path(*("teacher" if part == "student" and i >= len(parts) - 2 else part for i, part in enumerate(parts)))
    )


def check_unchanged(student: str, changed: Origin) -> None:
    """Check that a student with a teacher was not changed since its last task. Raises HubError if it was."""
    if changed.changes and last_learnt(changed.changes, changed.revision) is None:
        raise HubError(
            f"{visible(student)} was changed after its {counted(changed.tasks, 'task')}, and its teacher was not, so "
            "they cannot learn a further task together. Go on from before (--revision "
            f"{revision_name(changed.tasks)}), or undo the changes (hf-cdl undo)."
        )


def check_pair(student: Origin, teacher: Origin) -> None:
    """Check that both learnt the same classes in the same tasks. Raises HubError if not."""
    ours, theirs = (origin.results["class_names"][: origin.tasks] for origin in (student, teacher))
    if ours != theirs:
        shown = [", ".join(map(visible, names[0][:3])) for names in (theirs, ours)]
        raise HubError(
            f"{teacher.place} learnt other classes than {student.place}: {shown[0]} ... "
            f"({counted(len(theirs), 'task')}) in place of {shown[1]} ... ({counted(len(ours), 'task')}). Name the "
            "teacher of this student with --teacher."
        )


def continued(recipe: Recipe, origin: Origin) -> dict[str, Any]:
    """The recipe that continues from an inherited one: new data, after the classes already known."""
    content = json.loads(json.dumps(recipe.as_dict()))
    content["data"]["known_classes"] = origin.results["class_names"][: origin.tasks]
    del content["data"]["path"]  # the path and the name come from the command line
    repository = origin.as_dict().get("repository")
    return {**content, **({} if repository is None else {"hub_model_id": repository})}


def refuse_plugins(folder: Path) -> None:
    """Refuse an inherited recipe that names Python files: reading it would run them. Raises RecipeError."""
    if named := read_yaml(folder / "recipe.yaml").get("plugins"):
        raise RecipeError(
            f"{folder / 'recipe.yaml'} names plugins, which nobody asked for here: {visible(named)[:300]}. Take them "
            "out there; those that you want, name yourself: --plugins '[FILE.py]'."
        )


def checked(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe unchanged. Raises RecipeError if its models differ from the inherited ones."""
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
    """The student's accuracy on earlier tasks before and after the new one, where there are test images."""
    run = Run(recipe.folder, recipe.as_dict(), writer=False)
    count, split = run.origin["tasks"], recipe.data.eval_split
    stream = TaskStream(recipe.data.labelled, build_processors(recipe, run.checkpoint), seed=recipe.seed)
    old = [task for task in stream if task.index < count and len(getattr(task, split))]
    if not old:
        return "There are no test images of earlier tasks in the data: what was forgotten is not known."
    model = load_model(recipe, recipe.student, recipe.folder / "student" / f"task-{count:02d}")
    given = {**recipe.training_args("student"), "shard_teacher": False}  # the student is measured alone
    arguments = CDLTrainingArguments(**{**given, "output_dir": str(recipe.folder)})
    before = CDLTrainer(model, arguments, eval_split=split, num_tasks=len(stream))
    answers = before.answer(old)
    row = run.results()["roles"]["student"]["accuracy_matrix"][-1]
    shown = zip(old, answers["counts"], answers["row"], strict=True)
    lines = difference_lines([(task.index + 1, task.class_names, n, was, row[task.index]) for task, n, was in shown])
    return "\n".join([f"\nstudent: accuracy (%) on earlier tasks, before and after task {count + 1}", *lines])
