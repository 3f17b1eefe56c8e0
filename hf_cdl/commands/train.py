"""hf-cdl train: train and evaluate, task after task."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.commands import stopping
from hf_cdl.commands.console import say
from hf_cdl.commands.duration import announcement
from hf_cdl.commands.example import NAMES, write_example
from hf_cdl.commands.images import explained, names_images, recommended
from hf_cdl.commands.output_outside_images import check_apart
from hf_cdl.commands.settings_without_effect import check_views, without_sessions
from hf_cdl.counted import counted
from hf_cdl.data import ImageError, NoDataError, nothing_held_out
from hf_cdl.data.views import output_size
from hf_cdl.distill import TERMS, Objective
from hf_cdl.escape import visible_lines
from hf_cdl.hub import HubError, Pusher
from hf_cdl.hub.card.text import read_in_sessions
from hf_cdl.recipe import Recipe, RecipeError, completed, idle_arguments, load_recipe
from hf_cdl.recipe.build import Models, build_models, build_objective, build_processors, check_classes, labels
from hf_cdl.runs.cost import cost_in_use
from hf_cdl.runs.files import RunError, first_line, write_whole
from hf_cdl.runs.ledger import read_ledger
from hf_cdl.runs.page import PAGE
from hf_cdl.runs.pictures import plotting_available
from hf_cdl.runs.report import unknown_images
from hf_cdl.runs.run import Run
from hf_cdl.runs.verdict import Verdict, verdict
from hf_cdl.training.checking import check_task, learns_from_teacher
from hf_cdl.training.memory import gc_frozen


def main(arguments: list[str], default: Path | None = None) -> int:
    """Train as the command line says; `default`: the recipe to use if it names none."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run = None
    try:
        stopping.ready()
        try:
            if any(word.partition("=")[0] == "--example" for word in arguments):
                say(write_example(arguments))
                return 0
            check_apart(recipe := read(arguments, default))
            if "--plan" in arguments:
                say(planned(recipe))
                return 0
            with PartialState().main_process_first():  # it repairs files that the others read
                run = Run(recipe.folder, recipe.as_dict(), PartialState().is_main_process, completed, say)
            prepared = check(recipe, run) if run.finished else prepare(recipe, run, names_images(arguments))
            pusher = push_from(run, recipe)
        except ValueError as error:  # recipe, data or backbones; a later ValueError is a bug and shows its traceback
            raise RunError(str(error)) from error
        if prepared is None:
            say(f"This run is finished. Its results are in {recipe.folder}/ (results.json, pictures, checkpoints).")
        else:
            train(run, pusher, *prepared)
        pushed, best = pusher.finish(run.results()), verdict(run.results())
    except (RunError, ImageError, HubError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        said = visible_lines(error)  # printed by every process: perhaps only one of them hit the error
        print(f"error: {said} A changed recipe needs a new folder: --output_dir FOLDER.", file=sys.stderr)
        return 3
    except KeyboardInterrupt as stop:
        stopping.print_how_to_continue()
        return getattr(stop, "code", 130)
    finally:
        if run is not None:
            run.close()
    say(use(recipe, best))
    return 0 if pushed else 4


def read(arguments: list[str], default: Path | None) -> Recipe:
    """Load the recipe that the arguments name, or the recommended one for the images that they name.

    Raises RecipeError if it is wrong or if nothing is named.
    """
    words = [word for word in arguments if word != "--plan"]
    if names_images(words):
        return recommended(words)
    if default is None and (not words or words[0].startswith("--")):
        raise RecipeError(
            "No recipe was named; its file comes before every --field VALUE, or a folder of images does:\n"
            f"  {stopping.command('train', 'RECIPE.yaml')}\n  {stopping.command('train', 'IMAGES')}\n"
            "This writes a recipe into the current folder, to begin with:\n"
            f"  {stopping.command('train', '--example', NAMES[0])}"
        )
    if any(word.partition("=")[0] == "--backbone" for word in words):
        raise RecipeError(
            "--backbone goes with images in the place of a recipe. With a recipe write --student.backbone NAME."
        )
    return load_recipe(words, default or "")


def planned(recipe: Recipe) -> str:
    """What the run would need, as text. Raises ValueError if it could not be trained."""
    from hf_cdl.commands.plan import plan

    file = recipe.folder / "run.json"
    refuse_known(recipe, read_ledger(recipe.folder).get("origin") if file.exists() else None)
    return plan(recipe)


def use(recipe: Recipe, best: Verdict | None) -> str:
    """How to classify IMAGE.png with the run's student, or with the baseline that is better: a shell command."""
    role = "student" if best is None else best.role
    plain, more = recipe.student.model == "classifier", ""
    if recipe.plugins and plain:
        more = ", trust_remote_code=True"  # the plugin's source is in the folder
    needed = "" if plain else "import hf_cdl; "
    if recipe.plugins and not plain:
        needed = f"from hf_cdl.recipe import load_plugins; load_plugins({list(recipe.plugins)}); "
    folder = json.dumps(str(recipe.folder / role), ensure_ascii=False)
    call = f'pipeline("image-classification", model={folder}{more})("IMAGE.png")'
    words = [stopping.python(), "-c", f"from transformers import pipeline; {needed}print({call})"]
    said = f"Try the {role.replace('_', ' ')} on an image:\n  {stopping.shell_line(words)}"
    page = recipe.folder / PAGE
    return f"{said}\nAll of it on a page: {page}" if page.exists() else said


def refuse_known(recipe: Recipe, origin: dict[str, Any] | None) -> None:
    """Refuse known classes in a run whose models start untrained. Raises ValueError."""
    if recipe.data.known_classes and not origin:
        raise ValueError(
            "'data.known_classes' names tasks that the models have learnt, but this run starts with untrained ones. "
            "Leave it out, or continue from a trained student with hf-cdl add, which sets it."
        )


def check(recipe: Recipe, run: Run) -> None:
    """Check that a finished run is unchanged. Raises RunError if its data changed or files are missing."""
    run.check()
    try:
        stream = TaskStream(recipe.data, {}, seed=recipe.seed)  # without processors: no image is decoded
    except (NoDataError, OSError) as error:
        say(f"The data of this run could not be checked; its results stand. {first_line(error)}")
        return
    except ValueError as error:
        raise RunError(
            f"The data changed since {run.folder} was finished, and make no stream now: {error}\nRestore the data, or "
            "start again in another folder with --output_dir FOLDER."
        ) from error
    bind(run, stream)


def bind(run: Run, stream: TaskStream) -> None:
    unlabelled = None
    if stream.unlabelled is not None:
        terms = [term["type"] for term in run.recipe["distill"] if TERMS[term["type"]].reads_unlabelled]
        unlabelled = {"images": len(stream.unlabelled), "terms": terms}
    names, bad = [list(task.class_names) for task in stream], run.ledger.get("bad_image")
    before = None if bad is None else stream.fingerprint_before(bad)
    run.bind(stream.fingerprint, names, stream.images, unlabelled, before)


def unlabelled_text(recipe: Recipe, run: Run) -> str:
    """How many unlabelled images there are, and what learns from them when, as text."""
    found, ratio = run.ledger["unlabelled"], recipe.data.unlabelled_ratio
    terms = ", ".join(found["terms"])
    alone = recipe.student.first_session and not recipe.student.later_sessions
    when = "the first session alone, the last one that trains" if alone else "every session"
    learns = [f"{ratio} beside each training image in {when}; the student learns from them by {terms}"]
    return "; ".join(
        [
            f"{counted(found['images'], 'unlabelled image')} of {recipe.data.unlabelled}",
            *(learns if terms else []),
            *read_in_sessions(run.recipe),
        ]
    )


def prepare(recipe: Recipe, run: Run, chosen: bool = False) -> tuple[TaskStream, list[CDLTrainer]]:
    """Build the tasks and the trainers. Raises ValueError if something is wrong with the data or the backbones.

    `chosen`: whether the recipe was chosen for the user, and is therefore explained.
    """
    refuse_known(recipe, run.origin)
    if chosen:
        TaskStream(recipe.data, {}, seed=recipe.seed)  # first of all: no backbone is fetched for images of no use
    processors = build_processors(recipe, run.checkpoint)
    stream = TaskStream(recipe.data, processors, seed=recipe.seed)
    run.check_source(stream.fingerprint, run.to_learn(stream))
    models = build_models(recipe, processors, run.checkpoint)
    check_classes(recipe, models, [task.class_names for task in stream])
    for role, objective, arguments in roles(recipe, models, run.folder):
        for task in run.to_learn(stream):
            if run.result(role, task) is None:
                check_task(role, models[role], objective, arguments, task, models.get("teacher"))
    if not run.started:
        begin(recipe, run, stream, models, chosen)
    bind(run, stream)
    if stream.unlabelled is not None:
        say(f"note: {unlabelled_text(recipe, run)}")
    run.set_labels(labels(recipe))
    if not plotting_available():
        say("matplotlib is not installed: the run will have no pictures (pip install 'hf-cdl[report]').")
    if idle := idle_arguments(recipe):
        say(f"note: the heads are fitted in one pass, no loss trains; without effect: {', '.join(idle)}")
    trainers, same = [], {"eval_split": stream.config.eval_split, "num_tasks": len(stream), "cache": recipe.cache}
    for role, objective, arguments in roles(recipe, models, run.folder):
        rest = {**same, "processing_class": processors[role]}
        model = models[role]
        teacher = models.get("teacher") if learns_from_teacher(model, objective) else None
        trainers.append(CDLTrainer(model, arguments, objective, teacher, role=role, run=run, **rest))
        for task in run.to_learn(stream):
            trainers[-1].check(task)
    say(announcement(recipe.name, run.to_learn(stream), trainers))
    say(f"stream {stream.fingerprint} -> {recipe.folder}/")
    return stream, trainers


def begin(recipe: Recipe, run: Run, stream: TaskStream, models: Models, chosen: bool) -> None:
    """Check what only the data tell, and say what is to be known of them. Raises ValueError as `prepare` does."""
    to_learn = run.to_learn(stream)
    given = [arguments for role, _, arguments in roles(recipe, models, run.folder) if models[role].trains(0)]
    check_views(recipe.data.views, to_learn, given)
    plain = any(role is not None and role.model == "classifier" for role in (recipe.teacher, recipe.student))
    known = nothing_held_out(getattr(stream[0].test, "name", "")) if chosen else None  # `explained` says it
    for note in (*stream.notes, *without_sessions(to_learn, models), *stream.check_images(plain)):
        if note != known:
            say(f"note: {note}")
    for line in explained(recipe, stream) if chosen else ():
        say(line)


def roles(recipe: Recipe, models: Models, folder: Path) -> Iterator[tuple[str, Objective, CDLTrainingArguments]]:
    """Each role with its objective and training arguments, in the order of a task's phases."""
    for role in models:
        section = recipe.training_args("teacher" if role == "teacher" else "student")
        yield role, build_objective(recipe, role, models), CDLTrainingArguments(str(folder / "work"), **section)


def push_from(run: Run, recipe: Recipe) -> Pusher:
    """Create what pushes the run while it trains. Raises HubError if pushing is not possible."""
    if recipe.push_to_hub:
        for role in recipe.repositories:
            backbone = getattr(recipe, role).backbone
            if not recipe.save_backbone and Path(backbone).exists():
                say(
                    f"The {role}'s backbone '{backbone}' is a folder of this machine, and small checkpoints only name "
                    "it: who loads them elsewhere needs it too. Push the backbone and name it by its Hub id, or leave "
                    "out save_backbone: false."
                )
        run.set_hub({name: getattr(recipe, name) for name in ("hub_model_id", "push_teacher", "hub_private_repo")})
    repositories = recipe.repositories if PartialState().is_main_process else {}
    every_task = recipe.hub_strategy == "every_task"
    named = ["--plugins", *recipe.plugins] if recipe.plugins else []
    later = stopping.command("push", run.folder, *named)
    pusher = Pusher(run.folder, repositories, recipe.hub_private_repo, every_task, say, origin=run.origin, later=later)
    pusher.check(run.results())
    return pusher


def train(run: Run, pusher: Pusher, stream: TaskStream, trainers: list[CDLTrainer]) -> None:
    """Learn, measure, store and push all tasks. Raises ImageError, with what to do, for a bad image."""
    arguments: Any = trainers[-1].args
    if arguments.chose_workers and (workers := arguments.dataloader_num_workers):
        say(f"note: images are loaded by {counted(workers, 'process')} (--train.dataloader_num_workers says how many)")
    try:
        with gc_frozen():
            learn(run, pusher, stream, trainers)
    except ImageError as error:
        raise stopped_by(error, run, stream) from error


def learn(run: Run, pusher: Pusher, stream: TaskStream, trainers: list[CDLTrainer]) -> None:
    to_learn = run.to_learn(stream)
    for task in stream:
        for trainer in trainers:
            trainer.learn(task)
        if task not in to_learn:
            continue
        later = [other for other in stream if other.index > task.index]
        rows = {trainer.role: trainer.evaluate_seen(later, stream.foreign) for trainer in trainers}
        averages = ", ".join(f"{role.replace('_', ' ')} {average_text(result.row)}" for role, result in rows.items())
        say(f"task {task.index + 1}/{len(stream)}: average accuracy on the classes seen so far: {averages}")
        for role, result in rows.items():
            if result.choices:
                chosen = ", ".join(f"{name} {value:.4g}" for name, value in result.choices.items())
                say(f"  the {role.replace('_', ' ')}'s head chose: {chosen}")
            if result.known:
                say(f"  {unknown_images(result.known, 'the ' + role.replace('_', ' '))}")
        write_recipe(run)
        if task is to_learn[-1]:  # before the push: the card reports the costs
            sizes = {trainer.role: output_size(trainer.processing_class) for trainer in trainers}  # type: ignore[arg-type]
            run.set_costs({trainer.role: cost_in_use(trainer.model, sizes[trainer.role]) for trainer in trainers})
        pusher.push(run.results())
    if used := trainers[-1].cache_use:
        say(f"cache: {used}")
    say(f"\n{run.finish()}")


def stopped_by(error: ImageError, run: Run, stream: TaskStream) -> ImageError:
    """The error of an image that stopped the run, with what to do about it."""
    image = stream.found(error)
    way = "It is not one of the labelled images: repair it, and start in another folder with --output_dir FOLDER."
    if image is not None:
        run.stopped_by(image)
        way = (
            "Repair it in place, under the same name, and leave the others as they are. What was learnt is stored; "
            f"the same command resumes from there:\n  {stopping.own_command()}"
        )
    if not run.writer:  # the main process has not met it
        print(f"error: {visible_lines(error)}\n{way}", file=sys.stderr)
    return ImageError(f"{error}\n{way}")


def write_recipe(run: Run) -> None:
    """Write the run's complete recipe beside its ledger as recipe.yaml, unless the run was started from one there."""
    file = run.folder / "recipe.yaml"
    if not run.writer or file.exists():
        return
    told = "# The recipe of this run with every default. Again: hf-cdl train recipe.yaml --output_dir FOLDER\n"
    content = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    write_whole(file, lambda path: path.write_text(told + content, encoding="utf-8"))


def average_text(row: list[float | None]) -> str:
    """The average of the measured accuracies, as text."""
    measured = [value for value in row if value is not None]
    rest = "" if len(measured) == len(row) else f" (on {len(measured)} of {counted(len(row), 'task')})"
    return f"{sum(measured) / len(measured):.1f} %{rest}"
