"""Build what a recipe names: image processors, models, objectives, and readable names for tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, set_seed

from hf_cdl.backbones.families import adds_patch_mean, check_image_size
from hf_cdl.backbones.loading import load_config, read_config
from hf_cdl.checked import one_line
from hf_cdl.config import CDLConfig
from hf_cdl.data.views import check_processor, output_size, query_view
from hf_cdl.distill import TERMS, Objective
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.models.modeling_cdl import CDLForImageClassification
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe import BASELINES, ModelRecipe, Recipe
from hf_cdl.recipe.fields import RECOMMENDED

Model = CDLForImageClassification | ImageClassifier
Models = dict[str, Model]
MODELS: dict[str, Any] = {"cdl": CDLForImageClassification, "classifier": ImageClassifier}
CREATE: dict[str, Callable[..., Model]] = {kind: model.from_backbone for kind, model in MODELS.items()}


def build_processors(recipe: Recipe, stored: Callable[[str], Path | None] = lambda role: None) -> dict[str, Any]:
    """Load the image processor of each role: from the folder `stored(role)`, or else from its backbone.

    The baselines use the student's. Raises ValueError naming the role whose processor is missing or does not fit its
    backbone.
    """
    found: dict[str, Any] = {}
    raw = {} if recipe.normalise else {"do_normalize": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for role in ("student", "teacher"):
        section = getattr(recipe, role)
        if section is None:
            continue
        with about(role, section):
            if (folder := stored(role)) is not None:
                found[role] = load_processor(folder)
                continue
            reads = read_config if section.model == "classifier" else load_config
            config = reads(section.backbone, section.revision)
            found[role] = load_processor(section.backbone, section.revision, **raw)
            if section.model == "cdl":
                check_image_size(config, output_size(found[role]))
    return {**found, **dict.fromkeys(recipe.baselines, found["student"])}


def load_processor(place: str | Path, revision: str | None = None, **fields: Any) -> Any:
    """Load the image processor at a Hub id or in a folder, overriding `fields`; no remote code is run.

    Raises ValueError if there is none, or if it does not turn images into pixel values.
    """
    try:
        found = AutoImageProcessor.from_pretrained(place, revision=revision, trust_remote_code=False, **fields)
        check_processor(found)
    except Exception as error:  # transformers raises many kinds of errors
        missing = Path(place).is_dir() and not (Path(place) / "preprocessor_config.json").exists()
        reason = "it is missing." if missing else one_line(error)
        if isinstance(error, AttributeError | KeyError | TypeError):  # from code that takes its fields for granted
            reason = f"it is not as save_pretrained writes it ({reason})."
        raise ValueError(
            f"'{place}' has no usable preprocessor_config.json: {reason} Get it again from where "
            "the model came, or save an image processor there with save_pretrained."
        ) from error
    return found


def build_models(
    recipe: Recipe,
    processors: dict[str, Any],
    stored: Callable[[str], Path | None] = lambda role: None,
    create: Mapping[str, Callable[..., Any]] = CREATE,
) -> Models:
    """Build the recipe's models by role: loaded from the folder `stored(role)`, or new from `create`, without tasks.

    `processors` are those of build_processors: a teacher that shares the student's query derives the student's view
    from its own pixels. Raises ValueError naming the role whose backbone is wrong.
    """
    student = recipe.student
    sections = {"teacher": recipe.teacher, "student": student}
    for name in recipe.baselines:
        patches = name == RECOMMENDED and adds_patch_mean(load_config(student.backbone, student.revision))
        sections[name] = ModelRecipe(student.backbone, student.revision, head=BASELINES[name], patch_mean=patches)
    models: Models = {}
    for role, section in sections.items():
        if section is not None:
            folder = stored(role)
            with about(role, section):
                if folder is None:
                    models[role] = _build(recipe, section, role, create[section.model], processors, models)
                else:
                    models[role] = load_model(recipe, section, folder)
    return models


def load_model(recipe: Recipe, section: ModelRecipe, folder: Path) -> Model:
    """Load a model from a run's checkpoint; a small checkpoint's backbones come from where the recipe names them."""
    places: dict[str, str | None] = {}
    if section.model == "cdl" and not recipe.save_backbone:
        places = {"backbone_name": section.backbone, "backbone_revision": section.revision}
        if CDLConfig.from_pretrained(folder).query_name is not None:
            places |= {"query_name": recipe.student.backbone, "query_revision": recipe.student.revision}
    return MODELS[section.model].from_pretrained(folder, **places)


def _build(
    recipe: Recipe,
    section: ModelRecipe,
    role: str,
    create: Callable[..., Model],
    processors: dict[str, Any],
    models: Models,
) -> Model:
    set_seed(recipe.seed)  # here, so that a model does not depend on which others were built or loaded first
    if section.model == "classifier":
        return create(section.backbone, section.revision, pretrained=section.pretrained)
    teacher: Any = models.get("teacher")
    pool = PROMPTS.get(section.prompt["type"])
    shared = role == "teacher" and section.query == "student" and pool is not None and pool.needs_query
    return create(
        section.backbone,
        section.revision,
        query_name=recipe.student.backbone if shared else None,
        query_revision=recipe.student.revision if shared else None,
        query_view=query_view(processors[role], processors["student"]) if shared else None,
        prompt=section.prompt,
        head=section.head,
        first_session=section.first_session,
        later_sessions=section.later_sessions,
        query="one_pass" if section.query == "one_pass" else "two_pass",
        kd_prompt=section.kd_prompt,
        mapping=section.mapping,
        teacher_pool=None if section.mapping is None or teacher is None else teacher.pool_config,
        lora=section.lora,
        patch_mean=section.patch_mean,
        train_backbone=section.train_backbone,
        save_backbone=recipe.save_backbone,
        save_code=recipe.save_code,
    )


def check_classes(recipe: Recipe, models: Models, tasks: Sequence[Sequence[str]]) -> None:
    """Check that classifiers learn a single task; one used as is must know its classes, and adopts their order.

    `tasks`: the class names of each task. Raises ValueError if something does not fit.
    """
    for role, model in models.items():
        if not isinstance(model, ImageClassifier):
            continue
        if len(tasks) > 1:
            raise ValueError(
                f"The {role} is a model: classifier, which learns one task, but the data are cut into {len(tasks)}. "
                f"Set data.classes_per_task to {sum(map(len, tasks))}, the number of all classes."
            )
        section = getattr(recipe, role)
        if section.train is None and not model.tasks:
            with about(role, section):
                model.use_as_is(tasks[0])
        elif section.train is None:
            model.requires_grad_(False)  # loaded from its checkpoint: still used as it is


def build_objective(recipe: Recipe, role: str, models: Models) -> Objective:
    """Build a role's objective; only the student has the terms and `ce_weight`."""
    set_seed(recipe.seed)  # for the terms' own layers
    if role != "student":
        return Objective()
    student, teacher = models["student"].shape, models.get("teacher", models["student"]).shape
    terms = []
    for fields in recipe.distill:
        kind = TERMS[fields["type"]]
        config = kind.config_class(**{key: value for key, value in fields.items() if key != "type"})
        terms.append((fields["type"], kind(config, student, teacher)))
    return Objective(recipe.ce_weight, terms)


def labels(recipe: Recipe) -> dict[str, str]:
    """Readable names of the roles, for tables and figures."""

    def describe(section: ModelRecipe | None) -> str:
        if section is None:
            return ""
        if section.model == "classifier":
            return Path(section.backbone).name + (", as it is" if section.train is None else "")
        prompt, head = str(section.prompt["type"]), f"{section.head['type']} head"
        learns = "LoRA" if section.lora is not None else head if prompt == "none" else prompt
        name = "fine-tuned" if section.train_backbone else learns
        if section.first_session is None:
            return name
        return f"{name} {'on the first task' if section.later_sessions is None else 'in sessions'}, {head}"

    terms = "".join(f" + {fields['type']}" for fields in recipe.distill)
    return {
        "teacher": f"teacher ({describe(recipe.teacher)})",
        "student": f"student ({describe(recipe.student)}{terms})",
        "nearest_class_mean": "class means, no training",
        "linear_head": "linear head alone",
        "ridge_head": "ridge head, recommended",
    }


@contextmanager
def about(role: str, section: ModelRecipe) -> Iterator[None]:
    """Prefix errors with the role and backbone they concern."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The {role} on backbone '{section.backbone}': {error}") from error
