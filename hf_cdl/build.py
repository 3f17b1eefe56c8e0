"""From a recipe to the things it names: image processors, models, objectives, and readable names for tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoImageProcessor, set_seed

from hf_cdl.distill import TERMS, Objective
from hf_cdl.models.backbone import check_image_size, load_config
from hf_cdl.models.modeling_cdl import CDLForImageClassification
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe import BASELINES, ModelRecipe, Recipe
from hf_cdl.tasks.transforms import output_size, query_view

Models = dict[str, CDLForImageClassification]


def build_processors(recipe: Recipe) -> dict[str, Any]:
    """The image processor of each role; the baselines have the student's.

    Raises ValueError naming the role whose processor is missing or does not fit its backbone.
    """
    found: dict[str, Any] = {}
    raw = {} if recipe.normalise else {"do_normalize": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for role in ("student", "teacher"):
        section = getattr(recipe, role)
        if section is None:
            continue
        with about(role, section):
            config = load_config(section.backbone, section.revision)
            try:
                found[role] = AutoImageProcessor.from_pretrained(section.backbone, revision=section.revision, **raw)
            except (OSError, ValueError) as error:
                raise ValueError(f"There is no usable preprocessor_config.json. {error}") from error
            check_image_size(config, output_size(found[role]))
    return {**found, **dict.fromkeys(recipe.baselines, found["student"])}


def build_models(
    recipe: Recipe,
    processors: dict[str, Any],
    stored: Callable[[str], CDLForImageClassification | None] = lambda role: None,
    create: Callable[..., CDLForImageClassification] = CDLForImageClassification.from_backbone,
) -> Models:
    """The recipe's models by role: what `stored(role)` has, or a new one by `create`, without tasks.

    `processors` are those of build_processors: a teacher that shares the student's query makes its view of the pixels.
    Raises ValueError naming the role whose backbone is wrong.
    """
    models: Models = {}
    for role in ("teacher", "student"):
        section = getattr(recipe, role)
        if section is not None:
            with about(role, section):
                models[role] = stored(role) or _build(recipe, section, role, create, processors, models.get("teacher"))
    for name in recipe.baselines:
        bare = ModelRecipe(recipe.student.backbone, recipe.student.revision, head=BASELINES[name])
        models[name] = stored(name) or _build(recipe, bare, name, create, processors)
    return models


def _build(
    recipe: Recipe,
    section: ModelRecipe,
    role: str,
    create: Callable[..., CDLForImageClassification],
    processors: dict[str, Any],
    teacher: CDLForImageClassification | None = None,
) -> CDLForImageClassification:
    set_seed(recipe.seed)  # here, so that a model does not depend on which others were built or loaded before
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
        query="one_pass" if section.query == "one_pass" else "two_pass",
        kd_prompt=section.kd_prompt,
        mapping=section.mapping,
        teacher_pool=None if section.mapping is None or teacher is None else teacher.pool_config,
        train_backbone=section.train_backbone,
    )


def build_objective(recipe: Recipe, role: str, models: Models) -> Objective:
    """What a role is trained with: the terms and `ce_weight` are the student's."""
    set_seed(recipe.seed)  # for the layers that terms own
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
    """Readable names of the roles, for tables and pictures."""

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


@contextmanager
def about(role: str, section: ModelRecipe) -> Iterator[None]:
    """Errors say whose they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"The {role} on backbone '{section.backbone}': {error}") from error
