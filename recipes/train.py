"""Teach, distil, evaluate, task after task.

accelerate launch recipes/train.py [RECIPE.yaml] [--any.field value ...]     (default: recipes/quickstart.yaml)
Running the same command again goes on where the run stopped.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from accelerate import PartialState  # noqa: E402
from datasets import disable_progress_bars  # noqa: E402
from transformers import AutoImageProcessor, set_seed  # noqa: E402
from transformers.utils import logging as hf_logging  # noqa: E402

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, TaskStream  # noqa: E402
from hf_cdl.distill import TERMS, Objective  # noqa: E402
from hf_cdl.models.backbone import check_image_size, load_config  # noqa: E402
from hf_cdl.recipe import BASELINES, ModelRecipe, Recipe, load_recipe  # noqa: E402
from hf_cdl.report import plotting_available  # noqa: E402
from hf_cdl.run import Run, RunError  # noqa: E402
from hf_cdl.tasks import ImageError  # noqa: E402
from hf_cdl.tasks.transforms import output_size  # noqa: E402

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    try:
        try:
            recipe = load_recipe(arguments, HERE / "quickstart.yaml")
            run = Run(recipe.folder, recipe.as_dict(), writer=PartialState().is_main_process)
            prepared = None if run.finished else prepare(recipe, run)
        except ValueError as error:  # recipe, data or backbones; a later ValueError is a bug and shows its traceback
            raise RunError(str(error)) from error
        if prepared is None:
            say(f"This run is finished. Its results are in {recipe.folder}/ (results.json, pictures, checkpoints).")
        else:
            train(run, *prepared)
    except (RunError, ImageError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error} A changed recipe needs a new folder: --output_dir FOLDER.", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        say(f"\nStopped. Nothing finished is lost; the same command goes on from there:\n  {again(arguments)}")
        return 130
    say("Use the student:")
    say(
        '  python -c "from transformers import pipeline; import hf_cdl; '
        f"print(pipeline('image-classification', model='{recipe.folder}/student')('IMAGE.png'))\""
    )
    return 0


def prepare(recipe: Recipe, run: Run) -> tuple[TaskStream, list[CDLTrainer]]:
    """The tasks and the trainers. Raises ValueError for whatever is wrong with the data or the backbones."""
    processor = load_processor(recipe)
    stream = TaskStream(recipe.data, processor, seed=recipe.seed)
    models = {}
    if recipe.teacher is not None:
        shared = recipe.teacher.query == "student" and recipe.teacher.prompt["type"] != "none"
        with about("teacher", recipe.teacher):
            models["teacher"] = load(run, "teacher") or build(recipe, recipe.teacher, shared)
    with about("student", recipe.student):
        models["student"] = load(run, "student") or build(recipe, recipe.student)
    for name in recipe.baselines:
        bare = ModelRecipe(recipe.student.backbone, recipe.student.revision, head=BASELINES[name])
        models[name] = load(run, name) or build(recipe, bare)
    if not run.started:
        stream.check_images()
    run.bind(stream.fingerprint, [list(task.class_names) for task in stream])
    run.set_labels(labels(recipe))
    if not plotting_available():
        say("matplotlib is not installed: the run will have no pictures (pip install 'hf-cdl[report]').")
    say(f"{recipe.name}: {len(stream)} tasks, {len(stream.class_names)} classes -> {recipe.folder}/")

    trainers = []
    for role, model in models.items():
        set_seed(recipe.seed)  # for the layers that terms own
        terms = [(fields["type"], build_term(fields, models)) for fields in recipe.distill if role == "student"]
        objective = Objective(recipe.ce_weight if role == "student" else 1.0, terms)
        section = recipe.training_args("teacher" if role == "teacher" else "student")
        arguments = CDLTrainingArguments(output_dir=str(run.folder / "work"), **section)
        rest = {"eval_split": stream.config.eval_split, "processor": processor, "num_tasks": len(stream)}
        trainers.append(CDLTrainer(model, arguments, objective, models.get("teacher"), role=role, run=run, **rest))
    return stream, trainers


def train(run: Run, stream: TaskStream, trainers: list[CDLTrainer]) -> None:
    for task in stream:
        for trainer in trainers:
            trainer.learn(task)
        rows = {trainer.role: trainer.evaluate_seen() for trainer in trainers}
        averages = ", ".join(f"{role.replace('_', ' ')} {sum(r.row) / len(r.row):.1f} %" for role, r in rows.items())
        say(f"task {task.index + 1}/{len(stream)}: average accuracy on the classes seen so far: {averages}")
    say(f"\n{run.finish()}")


def build(recipe: Recipe, section: ModelRecipe, query_of_student: bool = False) -> CDLForImageClassification:
    set_seed(recipe.seed)  # here, so that a model does not depend on which others were built or loaded before
    query = recipe.student if query_of_student else None
    return CDLForImageClassification.from_backbone(
        section.backbone,
        section.revision,
        query_name=query.backbone if query else None,
        query_revision=query.revision if query else None,
        prompt=section.prompt,
        head=section.head,
        kd_prompt=section.kd_prompt,
        train_backbone=section.train_backbone,
    )


def load(run: Run, role: str) -> CDLForImageClassification | None:
    folder = run.checkpoint(role)
    return None if folder is None else CDLForImageClassification.from_pretrained(folder)


def build_term(fields: dict, models: dict[str, CDLForImageClassification]):
    term = TERMS[fields["type"]]
    config = term.config_class(**{key: value for key, value in fields.items() if key != "type"})
    return term(config, models["student"].shape, models["teacher"].shape)


def load_processor(recipe: Recipe):
    """The student's image processor, after checking that it and the teacher's agree with the backbones."""
    found = {}
    for role in ("student", "teacher"):
        section = getattr(recipe, role)
        if section is None:
            continue
        with about(role, section):
            config = load_config(section.backbone, section.revision)
            try:
                found[role] = AutoImageProcessor.from_pretrained(section.backbone, revision=section.revision)
            except (OSError, ValueError) as error:
                raise ValueError(f"There is no usable preprocessor_config.json. {error}") from error
            check_image_size(config, output_size(found[role]))
    views = {role: (output_size(p), p.image_mean, p.image_std) for role, p in found.items()}
    if len({str(view) for view in views.values()}) > 1:
        raise ValueError(f"Teacher and student must see the same pixels, but their processors differ: {views}.")
    return found["student"]


@contextmanager
def about(role: str, section: ModelRecipe) -> Iterator[None]:
    """Errors say whose they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The {role} on backbone '{section.backbone}': {error}") from error


def labels(recipe: Recipe) -> dict[str, str]:
    def describe(section: ModelRecipe | None) -> str:
        if section is None:
            return ""
        prompt = str(section.prompt["type"])
        return "fine-tuned" if section.train_backbone else "linear head" if prompt == "none" else prompt

    terms = "".join(f" + {fields['type']}" for fields in recipe.distill)
    return {
        "teacher": f"teacher ({describe(recipe.teacher)})",
        "student": f"student ({describe(recipe.student)}{terms})",
        "nearest_class_mean": "class means, no training",
        "linear_head": "linear head alone",
    }


def again(arguments: list[str]) -> str:
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else [sys.executable]
    return shlex.join([*launcher, sys.argv[0], *arguments])


def say(*lines: str, **options) -> None:
    if PartialState().is_main_process:
        print(*lines, flush=True, **options)


if __name__ == "__main__":
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
