"""What makes a recipe impossible, by the rules between its fields; every problem in words, none raised.

Each check looks at a section only as far as it has the right kind: `build_typed` reports it otherwise. The checks put
values of the right type into the content: 8 for 8.0.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_cdl.backbones.lora import LoraOptions
from hf_cdl.distill import TERMS
from hf_cdl.distill.objective import Asks
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS, KDPromptConfig, MappingConfig
from hf_cdl.recipe.fields import PLACES, ModelRecipe, Recipe
from hf_cdl.recipe.typed import WRONG, typed_fields, typed_value
from hf_cdl.registry import Registry
from hf_cdl.training.arguments import CDLTrainingArguments
from hf_cdl.training.arguments.table import IN_PASSES

_CLASSIFIER = ("backbone", "revision", "model", "pretrained", "train")
"""The fields of a model's section that a classifier has."""

_PARTS = {"kd_prompt": KDPromptConfig, "mapping": MappingConfig}
"""Sections of the student that terms ask for."""


def _section(content: dict[str, Any], name: str, default: Any) -> Any:
    """A section as far as it has the right kind; `build_typed` reports it otherwise."""
    value = content.get(name)
    return value if isinstance(value, type(default)) else default


def _known(registry: Registry[Any], section: Any) -> Any:
    """The class that a `{type: ..., fields}` section names; None if it names none that exists."""
    kind = section.get("type") if isinstance(section, dict) else None
    return registry.get(kind) if isinstance(kind, str) else None


def _check_typed(registry: Registry[Any], content: Any, path: str, problems: list[str]) -> None:
    """Check a `{type: ..., fields}` section by its registry."""
    kind = content.get("type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in registry.types:
        problems.append(f"'{path}.type' is {kind!r}; allowed: {', '.join(registry.types)}")
    elif (known := registry.get(kind)) is not None:
        fields = {key: value for key, value in content.items() if key != "type"}
        content.update(typed_fields(known.config_class, fields, path, problems))
    else:
        problems += [f"unknown field '{path}.{key}'; type {kind} has none" for key in content if key != "type"]


def check_terms(content: dict[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Check the distillation terms; the parts that they ask of the student, with defaults."""
    parts: dict[str, dict[str, Any]] = {}
    terms, teacher = _section(content, "distill", []), content.get("teacher")
    student, taught = _asks(content.get("student")), _asks(teacher) if isinstance(teacher, dict) else None
    for number, term in enumerate(terms):
        _check_typed(TERMS, term, f"distill.{number}", problems)
        if (known := _known(TERMS, term)) is None:
            continue
        name = f"'distill.{number}' ({term['type']})"
        for part, defaults in known.student_parts.items():
            if parts.setdefault(part, defaults) != defaults:
                problems.append(f"{name} wants another '{part}' than the terms before; keep one")
        if known.needs_teacher and teacher is None:
            problems.append(f"{name} has no teacher to learn from; give one or leave it out")
        if known.needs_query and student.query != "one_pass":
            problems.append(
                f"{name} compares one-pass queries with keys; it needs 'student.query' one_pass and a prompt type "
                "with keys"
            )
        problems += [f"'{path}' {what}" for path, what in known.check_recipe(student, taught)]
    if content.get("teacher_from") is not None and teacher is None:
        problems.append("'teacher_from' names a run, but 'teacher' is null; describe the teacher as that run does")
    if len(parts) > 1:
        problems.append(f"the terms want {' and '.join(parts)}, which both train the student's KD head; keep one term")
    return parts


def _asks(section: Any) -> Asks:
    """What the prompts of a model's section ask of whom."""
    section = section if isinstance(section, dict) else {}
    pool = _known(PROMPTS, section.get("prompt"))
    return Asks(pool is not None, section.get("query", "student") if pool and pool.needs_query else None)


def check_model(content: dict[str, Any], role: str, parts: dict[str, Any], problems: list[str]) -> None:
    section = content[role]
    prompt, head = _section(section, "prompt", {"type": "none"}), _section(section, "head", {"type": "linear"})
    _check_typed(PROMPTS, prompt, f"{role}.prompt", problems)
    _check_typed(HEADS, head, f"{role}.head", problems)
    if (known := _known(HEADS, head)) is not None:
        taught = role == "student" and content.get("teacher") is not None
        problems += [f"'{role}.head.{name}' {what}" for name, what in known.check_recipe(head, taught)]
    trains, prompted = section.get("train_backbone") is True, prompt.get("type") != "none"
    if trains and prompted:
        problems.append(
            f"'{role}.train_backbone' with prompts: their queries come from the frozen backbone; set prompt.type none"
        )
    adapts = section.get("lora") is not None
    if adapts:
        _check_lora(section, role, prompted, problems)
    _check_session(content, role, prompted or trains or adapts, problems)
    named = ((PROMPTS, "prompt"), (HEADS, "head"), (HEADS, "first_session"))
    if content.get("save_code") is True:
        problems += [
            f"'save_code' is true, but '{role}.{part}.type' {section[part]['type']} is a plugin's, whose code is not "
            "copied beside the weights; set save_code false"
            for registry, part in named
            if _known(registry, section.get(part)) and section[part]["type"] in registry.added
        ]
    if trains and content.get("save_backbone") is False:
        problems.append(
            f"'save_backbone' is false, but '{role}.train_backbone' is true: what it learns would be lost; change one"
        )
    for part, kind in _PARTS.items():
        if section.get(part) is None:
            continue
        if role == "teacher":
            problems.append(f"'teacher.{part}': only a student has it; leave it out")
        elif part not in parts:
            problems.append(
                f"'student.{part}' is set, but no term of 'distill' trains it; add one of: "
                + ", ".join(name for name, term in TERMS.items() if part in term.student_parts)
            )
        if isinstance(section[part], dict):
            section[part].update(typed_fields(kind, section[part], f"{role}.{part}", problems))


def _fitted(head: Any) -> bool:
    known = _known(HEADS, head)
    return known is not None and known.fitted


def _check_lora(section: dict[str, Any], role: str, prompted: bool, problems: list[str]) -> None:
    """Adapters learn in a first session, and nothing but they; a KD head is refused there anyway."""
    if isinstance(section["lora"], dict):
        section["lora"].update(typed_fields(LoraOptions, section["lora"], f"{role}.lora", problems))
    if prompted:
        problems.append(f"'{role}.lora' with prompts: it adapts the backbone in their place; set prompt.type none")
    if section.get("train_backbone") is True:
        problems.append(f"'{role}.lora' with train_backbone, which trains what it would adapt; keep one of them")
    if section.get("first_session") is None:
        problems.append(
            f"'{role}.lora' learns on the first task alone; set '{role}.first_session' to a trained head, as "
            "{type: linear}, and head to a fitted one, as {type: ridge}"
        )


def _check_session(content: dict[str, Any], role: str, learns: bool, problems: list[str]) -> None:
    """Beside a fitted head nothing learns, but in a first session; `learns`: prompts, adapters or backbone would."""
    section = content[role]
    head, first = _section(section, "head", {"type": "linear"}), section.get("first_session")
    terms = _section(content, "distill", []) if role == "student" else []
    if first is None:
        if _fitted(head) and (learns or terms):
            problems.append(
                f"'{role}.head.type' {head['type']} is fitted without training: prompts, backbone and terms can learn "
                f"on the first task alone. Set '{role}.first_session' to a trained head, as {{type: linear}}; or "
                "prompt.type none, train_backbone false and distill []"
            )
        return
    _check_typed(HEADS, first, f"{role}.first_session", problems)
    fitted, trained = ([name for name in HEADS if HEADS[name].fitted == wanted] for wanted in (True, False))
    if _fitted(first):
        problems.append(f"'{role}.first_session.type' {first['type']} is not trained; use one of {', '.join(trained)}")
    if not _fitted(head):
        problems.append(
            f"'{role}.first_session' is set, but '{role}.head.type' {head.get('type')} is not fitted after it; use "
            f"one of {', '.join(fitted)}, or leave first_session out"
        )
    if not learns:
        problems.append(f"'{role}.first_session' has nothing to train; give '{role}' prompts, lora or train_backbone")
    for number, term in enumerate(terms):
        if (known := _known(TERMS, term)) and known.student_parts:
            problems.append(
                f"'distill.{number}' ({term['type']}) trains a KD head, which is not fitted after a first session; "
                "use a term on the student's own head, as kd"
            )


def check_classifiers(content: dict[str, Any], problems: list[str]) -> None:
    """A classifier has none of the parts of a cdl model; a student's has no baselines and no KD head."""
    models = {role: _section(content, role, {}) for role in ("teacher", "student")}
    plain = {role for role, section in models.items() if section.get("model") == "classifier"}
    for role, section in models.items():
        if role in plain:
            given = [
                f.name
                for f in dataclasses.fields(ModelRecipe)
                if f.name not in _CLASSIFIER and section.get(f.name, _default(f)) != _default(f)
            ]
            problems += [f"'{role}.{name}': a model: classifier has none; leave it out" for name in given]
        elif section.get("pretrained") is False:
            problems.append(f"'{role}.pretrained' is false, but only a model: classifier starts from random weights")
        if "train" in section and section["train"] is None and (role == "student" or role not in plain):
            problems.append(f"'{role}.train' is null, but only a teacher that is a model: classifier is used as it is")
    if "train" in models["teacher"] and models["teacher"]["train"] is None and content.get("teacher_from") is not None:
        problems.append("'teacher_from' takes over a teacher, 'teacher.train' null uses a ready one; keep one of them")
    if models["teacher"].get("pretrained") is False and models["teacher"].get("train", {}) is None:
        problems.append("'teacher.train' is null, but 'teacher.pretrained' is false: it would teach by chance")
    logits_alone = [
        name
        for name, term in TERMS.items()
        if not (term.student_parts or term.needs_hidden_states or term.needs_features or term.needs_query)
    ]
    for number, term in enumerate(_section(content, "distill", [])):
        known = _known(TERMS, term)
        if known and known.student_parts and "student" in plain:
            problems.append(
                f"'distill.{number}' ({term['type']}) trains a KD head, which a model: classifier has not; use one of "
                + ", ".join(logits_alone)
            )
        if known and (known.needs_hidden_states or known.needs_features) and plain:
            compared = "hidden states" if known.needs_hidden_states else "features"
            problems.append(
                f"'distill.{number}' ({term['type']}) compares {compared}, but a model: classifier shows its logits "
                f"alone; use one of {', '.join(logits_alone)}"
            )
    if "student" in plain:
        if content.setdefault("baselines", []):
            problems.append(
                "'baselines' are of a frozen backbone, which a student of model: classifier has not; set []"
            )
        if _asks(models["teacher"]).query == "student":
            problems.append("'teacher.query' is student, but a model: classifier answers no queries; set it to self")


def check_hub(content: dict[str, Any], problems: list[str]) -> None:
    """Where to push: a name that the Hub takes, and a teacher if it is to be pushed."""
    if content.get("push_to_hub") is not True:
        return
    if content.get("push_teacher") is True and content.get("teacher") is None:
        problems.append("'push_teacher' is true, but there is no teacher; leave it out")
    source = "name" if content.get("hub_model_id") is None else "hub_model_id"
    try:
        validate_repo_id(f"{content.get(source)}{'-teacher' if content.get('push_teacher') else ''}")
    except HFValidationError as error:
        problems.append(f"'{source}' cannot name a repository on the Hub: {error} Set hub_model_id OWNER/NAME.")


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def check_training(content: dict[str, Any], role: str, problems: list[str]) -> None:
    """Names and types of the training arguments, then what each does alone and beside the others.

    null is the default of a field that cannot be null.
    """
    before = len(problems)
    hints = typing.get_type_hints(CDLTrainingArguments)
    fields = {f.name: f for f in dataclasses.fields(CDLTrainingArguments) if f.init}
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for path, section in (("train", content), (f"{role}.train", content[role])):
        for key, value in _section(section, "train", {}).items():
            if key in ("seed", *PLACES):
                problems.append(f"'{path}.{key}': set '{key}' at the top level of the recipe")
            elif key.startswith("hub_"):
                problems.append(
                    f"'{path}.{key}' has no place in a recipe; log in with `hf auth login` or set HF_TOKEN"
                )
            elif key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                problems.append(f"unknown field '{path}.{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
            else:
                if value is None and type(None) not in typing.get_args(hints[key]):
                    value = _default(fields[key])
                values[key] = typed_value(hints[key], value, f"{path}.{key}", problems)
                places[key] = f"{path}.{key}"
                if values[key] is not WRONG:
                    section["train"][key] = values[key]
    if isinstance(content.get("seed", 0), int):
        values["seed"], places["seed"] = content.get("seed", 0), "seed"
    if len(problems) > before:
        return
    for name, what in CDLTrainingArguments.problems(values):
        problems.append(f"'{places.get(name, f'{role}.train.{name}')}' {what}")
    if len(problems) == before:
        try:
            CDLTrainingArguments(output_dir="work", **values)
        except (ValueError, TypeError) as error:
            problems.append(f"train ({role}): {error}")


def check_weights(recipe: Recipe, problems: list[str]) -> None:
    """Of the losses of a student that trains, one has a weight."""
    if _trains(recipe.student) and recipe.ce_weight == 0:
        if not any(term.get("weight", TERMS[term["type"]].config_class.weight) > 0 for term in recipe.distill):
            problems.append(
                "'ce_weight' is 0 and no term of 'distill' has a weight above 0, so nothing would be learnt; give one "
                "of them a weight"
            )


def idle_arguments(recipe: Recipe) -> list[str]:
    """Training arguments of a recipe that have no effect, since no loss trains what they are of: heads are fitted."""
    sections = {"teacher": recipe.teacher, "student": recipe.student}
    trained = {role for role, section in sections.items() if section is not None and _trains(section)}
    trained |= {"student"} if "linear_head" in recipe.baselines else set()
    given = {
        f"{role}.train": section.train or {} for role, section in sections.items() if section and role not in trained
    }
    if not trained:
        given["train"] = recipe.train
    return [f"{place}.{name}" for place, values in given.items() for name in values if name not in IN_PASSES]


def _trains(section: ModelRecipe) -> bool:
    if section.model == "classifier":
        return section.train is not None
    return section.first_session is not None or not _fitted(section.head)


def check_idle(recipe: Recipe, problems: list[str]) -> None:
    """A model's own training arguments need something that trains; the shared ones may come with a base file."""
    problems += [
        f"'{name}' has no effect: the head is fitted in one pass, no loss trains; leave it out"
        for name in idle_arguments(recipe)
        if not name.startswith("train.")
    ]
