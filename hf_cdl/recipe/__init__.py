"""A recipe: everything that defines a run, read from YAML and the command line, checked before anything is loaded.

files.py reads it, plugins.py runs the user's own files, fields.py defines the fields. type_checks.py checks single
fields, training.py the training arguments, checks.py the rules between fields; all problems are reported in one
message.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_cdl.recipe.checks import broken_rules, idle_arguments, student_parts, without_effect
from hf_cdl.recipe.continuation import inherited_recipe
from hf_cdl.recipe.fields import BASELINES, CardRecipe, ModelRecipe, Recipe
from hf_cdl.recipe.files import RecipeError, merge, read_recipe
from hf_cdl.recipe.frozen import frozen_problems
from hf_cdl.recipe.plugins import load_plugins
from hf_cdl.recipe.type_checks import build_typed, check_finite
from hf_cdl.recipe.views import views_problems

__all__ = [
    "BASELINES",
    "CardRecipe",
    "ModelRecipe",
    "Recipe",
    "RecipeError",
    "build_recipe",
    "completed",
    "described",
    "idle_arguments",
    "load_plugins",
    "load_recipe",
    "inherited_recipe",
    "untrained",
]

PROTOCOLS: dict[str, dict[str, Any]] = {
    "default": {},
    "cdl": {"normalise": False, "train": {"epoch_cosine": True, "dataloader_drop_last": True}},
}
"""Values a protocol sets where the recipe does not; cdl is how Continual Distillation Learning's authors train."""


def load_recipe(arguments: Sequence[str], default: str | Path) -> Recipe:
    """Load a recipe from arguments `[RECIPE.yaml ...] [--any.field value ...]`; `default`: the file if none is given.

    Values are YAML: `--teacher null`, `--distill.0.weight 0.3`, `--train.learning_rate=0.01`. Its `plugins` are run
    before it is checked, so that it can use what they register: arguments and files must be the user's own. Raises
    RecipeError with all problems at once.
    """
    content = read_recipe(arguments, default)
    load_plugins(content.get("plugins", []))
    return build_recipe(content)


def build_recipe(content: dict[str, Any]) -> Recipe:
    """Build a recipe from a plain dict; its plugins are not run. Raises RecipeError with all problems at once."""
    protocol = content.get("protocol")
    preset = PROTOCOLS.get(protocol, {}) if isinstance(protocol, str) else {}
    content = copy.deepcopy(merge(preset, content))
    problems: list[str] = []
    check_finite(content, "", problems)
    _refuse(problems)  # the later checks compute with these numbers
    if isinstance(content.get("student"), dict) and content["student"].get("model") == "classifier":
        content.setdefault("baselines", [])  # baselines need a frozen backbone
    recipe = build_typed(Recipe, content, "", problems)
    _refuse([*problems, *broken_rules(content)])
    _refuse([*without_effect(recipe), *views_problems(recipe), *frozen_problems(recipe)])
    parts = {
        name: {**defaults, **(getattr(recipe.student, name) or {})}
        for name, defaults in student_parts(content).items()
    }
    return dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, **parts))


def _refuse(problems: Iterable[str]) -> None:
    if lines := [f"- {line}" for line in dict.fromkeys(problems)]:
        raise RecipeError("\n".join(["The recipe cannot be run:", *lines]))


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a run stored it (`as_dict`), with defaults for fields added since."""
    return build_recipe(stored).as_dict()


def described(stored: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a run stored it, completed for readers of the run's numbers only.

    Training arguments stay as they are, unchecked: transformers would open files that some of them name.
    """
    whole = completed({**untrained(stored), "protocol": "default"})
    for role in ("student", "teacher"):
        if whole[role] is not None:
            whole[role] |= {key: value for key, value in stored[role].items() if key == "train"}
    return {**whole, **{key: stored[key] for key in ("train", "protocol") if key in stored}}


def untrained(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe without its training arguments."""
    roles = {role: stored[role] for role in ("student", "teacher") if isinstance(stored.get(role), dict)}
    bare = {role: {**section, "train": {}} for role, section in roles.items() if section.get("train")}
    return {**stored, **bare, "train": {}}
