"""Training arguments in a recipe: shared ones in `train`, and each model's differences in its own `train`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from hf_cdl.recipe.type_checks import default_of, hints_of, near_name, typed_value
from hf_cdl.training.arguments import CDLTrainingArguments

PLACES = ("output_dir", "cache", "push_to_hub", "push_teacher", "hub_model_id", "hub_private_repo", "hub_strategy")
"""Fields of a recipe that do not affect the run's numbers."""


def training(section: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    """Check the names and types of a `train` section. null means the default for a field that cannot be null."""
    hints = hints_of(CDLTrainingArguments)
    fields = {f.name: f for f in dataclasses.fields(CDLTrainingArguments) if f.init}
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key in ("seed", *PLACES):
            problems.append(f"'{path}.{key}': set '{key}' at the top level of the recipe")
        elif str(key).startswith("hub_"):
            problems.append(f"'{path}.{key}' has no place in a recipe; log in with `hf auth login` or set HF_TOKEN")
        elif key not in fields:
            near = near_name(key, fields)
            problems.append(f"unknown field '{path}.{key}'" + (f"; did you mean '{near}'?" if near else ""))
        else:
            if value is None and type(None) not in typing.get_args(hints[key]):
                value = default_of(fields[key])
            values[key] = typed_value(hints[key], value, f"{path}.{key}", problems)
    return values


def training_problems(content: dict[str, Any], role: str) -> Iterator[str]:
    """Yield what is wrong with a role's training arguments, alone or combined, if their names and types are right."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    wrong: list[str] = []
    for path, section in (("train", content.get("train")), (f"{role}.train", content[role].get("train"))):
        if isinstance(section, dict):
            values |= training(section, path, wrong)
            places |= {key: f"{path}.{key}" for key in section}
    if wrong:
        return  # the sections' own checks report it
    if isinstance(content.get("seed", 0), int):
        values["seed"], places["seed"] = content.get("seed", 0), "seed"
    if found := CDLTrainingArguments.problems(values):
        yield from (f"'{places.get(name, f'{role}.train.{name}')}' {what}" for name, what in found)
        return
    if values.get("shard_teacher") and content.get("teacher") is None:
        yield f"'{places['shard_teacher']}' is true, but 'teacher' is null; leave it out"
    try:
        CDLTrainingArguments(output_dir="work", **values)
    except (ValueError, TypeError) as error:
        yield f"train ({role}): {error}"
