"""The part of someone else's recipe that a new run inherits: what rebuilds the models, and how they learn.

It includes nothing that names a machine's code, files or services: no plugins, folders, trackers or launchers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cdl.escape import needs_escaping, visible
from hf_cdl.places import HUB_ID, by_name, is_private
from hf_cdl.recipe.fields import ModelRecipe, Recipe
from hf_cdl.recipe.files import RecipeError
from hf_cdl.recipe.training import PLACES

_WHOLE = ("distill", "ce_weight", "protocol", "normalise", "seed", "save_backbone", "save_code")
_DATA = (
    *("crop_scale", "crop_ratio", "crop_padding", "flip", "views", "eval_split", "split_seed"),
    *("unlabelled_split", "unlabelled_ratio"),
)
"""Data fields that the new task shares with the earlier tasks."""
_TRAIN = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "epoch_cosine", "lr_steps"),
    *("lr_decay", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("gradient_accumulation_steps", "label_smoothing_factor", "dataloader_drop_last", "data_seed"),
    *("bf16", "fp16", "frozen_bf16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "full_determinism"),
    *("gradient_checkpointing", "eval_strategy", "eval_steps", "logging_strategy", "logging_steps", "save_strategy"),
)
_NEVER = ("name", "data", "baselines", "card", "teacher_from", *PLACES)
"""Fields specific to the other run; dropping them is not worth reporting."""


def inherited_recipe(stored: Any, build: Callable[[dict[str, Any]], Recipe]) -> tuple[Recipe, list[str]]:
    """The inherited recipe, its data without a path, and the names of the fields that were dropped.

    `build` checks it; refusing plugins is up to the caller. Raises RecipeError if the stored recipe is invalid.
    """
    if not isinstance(stored, dict):
        raise RecipeError(f"it must have fields, but is {visible(repr(stored))[:60]}")
    if not isinstance(seed := stored.get("seed", 0), int) or not 0 <= seed < 2**32:
        raise RecipeError(f"'seed' is {visible(repr(seed))[:60]}, but must be a whole number from 0 to 2^32 - 1")
    left = [key for key in stored if key not in (*_WHOLE, *_NEVER, "student", "teacher", "train", "plugins")]
    content: dict[str, Any] = {key: stored[key] for key in _WHOLE if key in stored}
    content |= {"name": "taken over", "baselines": [], "data": {"path": ".", "classes_per_task": None}}
    content["data"] |= {**_kept(stored.get("data"), _DATA), **_unlabelled(stored.get("data"), left)}
    content["card"] = _kept(stored.get("card"), ("license",))
    content["train"] = _training(stored.get("train"), "train", left)
    for role in ("student", "teacher"):
        section = stored.get(role)
        content[role] = _model(section, role, left) if isinstance(section, dict) else section
    _check_texts(content)
    try:
        return build(json.loads(json.dumps(content))), [visible(field) for field in left]
    except RecipeError as error:
        lines = str(error).split("\n")[1:]
        more = f"; and {len(lines) - 2} more" if len(lines) > 2 else ""
        raise RecipeError("; ".join(visible(line.removeprefix("- "))[:300] for line in lines[:2]) + more) from error


def _kept(section: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    return {key: section[key] for key in fields if key in section} if isinstance(section, dict) else {}


def _unlabelled(section: Any, left: list[str]) -> dict[str, Any]:
    """The unlabelled images, which the next task has too: those on the Hub, or a folder that the user is to name.

    Until then it is one that is not there: another's recipe chooses no folder of this machine to learn from.
    """
    name = section.get("unlabelled") if isinstance(section, dict) else None
    if not isinstance(name, str) or (HUB_ID.fullmatch(name) and "/" in name and not Path(name).exists()):
        return {} if name is None else {"unlabelled": name}
    left.append("data.unlabelled (a folder; name yours by --data.unlabelled FOLDER)")
    return {"unlabelled": f"./{by_name(name)} of its author"}


def _training(section: Any, path: str, left: list[str]) -> dict[str, Any]:
    left += [f"{path}.{key}" for key in (section if isinstance(section, dict) else ()) if key not in _TRAIN]
    return _kept(section, _TRAIN)


def _model(section: dict[str, Any], role: str, left: list[str]) -> dict[str, Any]:
    """A model's section; of a local backbone only the name is kept, for the user to point to their own copy."""
    fields = tuple(f.name for f in dataclasses.fields(ModelRecipe))
    left += [f"{role}.{key}" for key in section if key not in fields]
    model = _kept(section, fields)
    if isinstance(model.get("train"), dict):
        model["train"] = _training(model["train"], f"{role}.train", left)
    if isinstance(name := model.get("backbone"), str) and is_private(name):
        model["backbone"] = f"./{by_name(name)}"
    for part in ("head", "first_session"):
        head = model.get(part)
        if isinstance(head, dict) and head.get("standardise") not in (None, "first_task"):
            left.append(f"{role}.{part}.standardise (a file; its statistics are in the checkpoint)")
            model[part] = {**head, "standardise": "first_task"}
    return model


def _check_texts(value: Any, path: str = "") -> None:
    """Check all strings. Raises RecipeError for one that is not a plain word or name."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key, f"{path}.{visible(key)}")
            _check_texts(item, f"{path}.{visible(key)}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_texts(item, f"{path}.{number}")
    elif isinstance(value, str) and (needs_escaping(value) or "\n" in value or len(value) > 500):
        raise RecipeError(f"'{path[1:]}' is {visible(value)[:60]!r}, but names have no control characters")
