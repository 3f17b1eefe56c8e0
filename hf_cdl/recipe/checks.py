"""Rules between the fields of a recipe; problems are yielded as text, not raised.

The rules look at the recipe as written, and skip sections of the wrong type: single fields are checked in
type_checks.py. What a single method requires of a recipe is in its own `check_recipe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.models.sessions import LaterSessions
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe.fields import BASELINES, RECOMMENDED, ModelRecipe, Recipe
from hf_cdl.recipe.training import training_problems
from hf_cdl.recipe.written import DEFAULTS, Written, WrittenTerm, heads, is_fitted, registered
from hf_cdl.training.arguments.table import IN_PASSES

_PUSHED = {"push_teacher": False, "hub_private_repo": True, "hub_strategy": "every_task"}
"""Fields on how a run is pushed, with their defaults; where to may be set before a run is pushed."""


def broken_rules(content: dict[str, Any]) -> Iterator[str]:
    """Yield the problems between the fields of a recipe as written."""
    models = {r: Written(r, content[r]) for r in ("teacher", "student") if isinstance(content.get(r), dict)}
    terms = [
        WrittenTerm(f"'distill.{number}' ({term['type']})", known)
        for number, term in enumerate(_terms(content))
        if (known := registered(TERMS, term)) is not None
    ]
    if isinstance(content.get("data"), dict) and content["data"].get("path") is None:
        yield "'data.path' is missing"
    yield from _term_rules(content, models, terms)
    for model in models.values():
        yield from _head_rules(model, content.get("teacher") is not None)
        yield from _learning_rules(model, content)
        yield from _session_rules(model, terms if model.role == "student" else [], _terms(content))
        yield from _part_rules(model, student_parts(content))
        yield from _classifier_rules(model)
        yield from _prompt_rules(model)
        yield from training_problems(content, model.role)
    yield from _unlabelled_rules(content, models)
    yield from _foreign_rules(content, models)
    yield from _teacher_rules(content, models)
    yield from _plain_rules(content, models, terms)
    yield from _saving_rules(content, models)
    yield from _hub_rules(content)


def _terms(content: dict[str, Any]) -> list[Any]:
    terms = content.get("distill")
    return terms if isinstance(terms, list) else []


def student_parts(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts that the terms require of the student, with defaults."""
    parts: dict[str, dict[str, Any]] = {}
    for term in _terms(content):
        if (known := registered(TERMS, term)) is not None:
            parts = {**known.student_parts, **parts}
    return parts


def _term_rules(content: dict[str, Any], models: dict[str, Written], terms: list[WrittenTerm]) -> Iterator[str]:
    parts: dict[str, dict[str, Any]] = {}
    student, teacher = models.get("student", Written("student", {})).asks, models.get("teacher")
    for term in terms:
        for part, defaults in term.kind.student_parts.items():
            if parts.setdefault(part, defaults) != defaults:
                yield f"{term.name} wants another '{part}' than the terms before; keep one"
        if term.kind.needs_teacher and content.get("teacher") is None:
            yield f"{term.name} has no teacher to learn from; give one or leave it out"
        if term.kind.needs_query and student.query != "one_pass":
            yield (
                f"{term.name} compares one-pass queries with keys; it needs 'student.query' one_pass and a prompt "
                "type with keys"
            )
        for path, what in term.kind.check_recipe(student, teacher.asks if teacher else None):
            yield f"'{path}' {what}"
    if len(parts) > 1:
        yield f"the terms want {' and '.join(parts)}, which both train the student's KD head; keep one term"


def _unlabelled_rules(content: dict[str, Any], models: dict[str, Written]) -> Iterator[str]:
    """Images without labels need a teacher, a term that learns from them, and a student that trains."""
    data = content.get("data")
    data = data if isinstance(data, dict) else {}
    listed = [(number, term, registered(TERMS, term)) for number, term in enumerate(_terms(content))]
    terms = [(number, term, known) for number, term, known in listed if known is not None]
    if data.get("unlabelled") is None:
        yield from _idle_without_images(data, terms, models)
        return
    able = ", ".join(name for name, term in TERMS.items() if term.reads_unlabelled)
    in_sessions = {name for model in models.values() for name in _of_sessions(model)}
    student, why = models.get("student"), None
    if student and is_fitted(student.part("head")) and student.section.get("first_session") is None:
        why = "the student's head is fitted without training"
    elif content.get("teacher") is None:
        why = "there is no teacher, who teaches on these images"
    elif not any(known.reads_unlabelled and term.get("weight", 1) != 0 for _, term, known in terms):
        why = f"no term of 'distill' learns from images without labels, as these do: {able}"
    if why is not None and not in_sessions:
        yield f"'data.unlabelled' would have no effect: {why}; change that, or leave it out"
    elif why is not None and "keep_on" not in in_sessions and data.get("unlabelled_ratio", 1) != 1:
        yield (
            "'data.unlabelled_ratio' would have no effect: these images only tell how features moved in a session, "
            f"all of them, and {why}; leave it out"
        )
    if content.get("protocol") == "cdl":
        yield (
            "'data.unlabelled' is not of 'protocol' cdl, whose authors train on the images of a task alone; leave one "
            "of them out (what the protocol sets may be set without it: normalise, train.epoch_cosine, "
            "train.dataloader_drop_last)"
        )


def _foreign_rules(content: dict[str, Any], models: dict[str, Written]) -> Iterator[str]:
    """Foreign images are measured by heads that say how known an image is."""
    data, tells = content.get("data"), RECOMMENDED in (content.get("baselines") or ())
    tells = tells or any(model.part("head").get("known") is not None for model in models.values())
    if isinstance(data, dict) and data.get("foreign") is not None and not tells:
        why = "no head says how known an image is; set known: 0.95 in a head of sums (ridge, lda), or leave it out"
        yield f"'data.foreign' would have no effect: {why}"


def _head_rules(model: Written, has_teacher: bool) -> Iterator[str]:
    head = model.part("head")
    if (known := registered(HEADS, head)) is not None:
        for name, what in known.check_recipe(head, model.role == "student" and has_teacher):
            yield f"'{model.role}.head.{name}' {what}"


def _prompt_rules(model: Written) -> Iterator[str]:
    """What the pool asks of its fields, and a query only where something reads it."""
    pool, prompt, query = registered(PROMPTS, model.part("prompt")), model.part("prompt"), model.section.get("query")
    if pool is not None:
        for name, what in pool.check_recipe(prompt, model.role):
            yield f"'{model.role}.prompt.{name}' {what}"
    default = (None, DEFAULTS["query"], *(["self"] if model.role == "student" else []))  # the same for a student
    if model.plain or query in default or (pool is None and model.prompted):
        return  # an unknown type is another problem
    if pool is None or not pool.needs_query:
        able = ", ".join(name for name, kind in PROMPTS.items() if kind.needs_query)
        yield (
            f"'{model.role}.query' is {query}, but prompts of type {prompt['type']} read no query; leave it out, or "
            f"use one of {able}"
        )


def _learning_rules(model: Written, content: dict[str, Any]) -> Iterator[str]:
    """Only one of prompts, adapters and backbone learns; adapters only in sessions."""
    role = model.role
    if model.trains and model.prompted:
        why = "their queries come from the frozen backbone"
        yield f"'{role}.train_backbone' with prompts: {why}; set prompt.type none"
    if model.trains and content.get("save_backbone") is False:
        why = "what it learns would be lost"
        yield f"'save_backbone' is false, but '{role}.train_backbone' is true: {why}; change one"
    if model.has("lora") and model.prompted:
        yield f"'{role}.lora' with prompts: it adapts the backbone in their place; set prompt.type none"
    if model.has("lora") and model.trains:
        yield f"'{role}.lora' with train_backbone, which trains what it would adapt; keep one of them"
    if model.has("lora") and not model.has("first_session"):
        yield (
            f"'{role}.lora' learns on the first task alone; set '{role}.first_session' to a trained head, as "
            f"{{type: {heads(False)[0]}}}, and head to a fitted one, as {{type: {heads(True)[0]}}}"
        )
    if content.get("save_code") is True:
        for part, registry in (("prompt", PROMPTS), ("head", HEADS), ("first_session", HEADS)):
            if (kind := model.part(part).get("type")) in registry.added:
                yield (
                    f"'save_code' is true, but '{role}.{part}.type' {kind} is a plugin's, whose code is not copied "
                    "beside the weights; set save_code false"
                )


def _idle_without_images(data: dict[str, Any], terms: list[Any], models: dict[str, Written]) -> Iterator[str]:
    """Fields about images without labels, in a recipe that names none."""
    for role, model in models.items():
        for name, value in _of_sessions(model).items():
            yield (
                f"'{role}.later_sessions.{name}' {value} is about images without labels; name some in "
                "'data.unlabelled', or take the task's own: task"
            )
    for name, default in (("unlabelled_split", None), ("unlabelled_ratio", 1)):
        if data.get(name, default) != default:
            yield f"'data.{name}' would have no effect, since there is no 'data.unlabelled'; leave it out"
    for number, term, known in terms:
        marked = [f for f in dataclasses.fields(known.config_class) if f.metadata.get("unlabelled")]
        idle = [f.name for f in marked if term.get(f.name, f.default) != f.default]
        for name in ["type"] if known.needs_unlabelled else idle:
            yield (
                f"'distill.{number}.{name}' {term[name]} is about images without labels; name some in "
                "'data.unlabelled', or leave it out"
            )


def _of_sessions(model: Written) -> dict[str, Any]:
    """The fields of a model's later sessions that are set and are about images without labels."""
    later = model.part("later_sessions")
    marked = [f for f in dataclasses.fields(LaterSessions) if f.metadata.get("unlabelled")]
    return {f.name: later[f.name] for f in marked if later.get(f.name, f.default) != f.default}


def _session_rules(model: Written, terms: list[WrittenTerm], listed: list[Any]) -> Iterator[str]:
    """With a fitted head, nothing is trained except in a first session. `listed`: the recipe's terms, known or not."""
    role, head, first = model.role, model.part("head"), model.section.get("first_session")
    taught = role == "student" and any(term.kind.student_parts for term in terms)
    learns = model.prompted or model.trains or model.has("lora") or taught
    if first is None:
        if model.has("later_sessions"):
            yield (
                f"'{role}.later_sessions' continue a first session; set '{role}.first_session' to a trained head, as "
                f"{{type: {heads(False)[0]}}}, or leave them out"
            )
        if is_fitted(head) and (learns or (role == "student" and listed)):
            yield (
                f"'{role}.head.type' {head['type']} is fitted without training: prompts, backbone and terms can learn "
                f"on the first task alone. Set '{role}.first_session' to a trained head, as "
                f"{{type: {heads(False)[0]}}}; or prompt.type none, train_backbone false and distill []"
            )
        return
    if is_fitted(first):
        yield f"'{role}.first_session.type' {first['type']} is not trained; use one of {', '.join(heads(False))}"
    if not is_fitted(head):
        yield (
            f"'{role}.first_session' is set, but '{role}.head.type' {head.get('type')} is not fitted after it; use "
            f"one of {', '.join(heads(True))}, or leave first_session out"
        )
    if not learns:
        yield f"'{role}.first_session' has nothing to train; give '{role}' prompts, lora or train_backbone"
    for term in terms:
        instead = f"use another term, as {next(name for name in TERMS if not TERMS[name].student_parts)}"
        if taught and model.has("lora") and term.kind.student_parts:
            yield f"{term.name} trains tokens beside 'student.lora', which adapts the backbone alone; {instead}"
        elif "mapping" in term.kind.student_parts:
            why = "continue to change after a fitted head has read them"
            yield f"{term.name} maps the teacher's prompts, which {why}; {instead}"


def _part_rules(model: Written, asked: dict[str, Any]) -> Iterator[str]:
    """Parts that terms train belong to a student, with a term that trains them."""
    for part in dict.fromkeys(part for term in TERMS.values() for part in term.student_parts):
        if model.has(part) and model.role == "teacher":
            yield f"'teacher.{part}': only a student has it; leave it out"
        elif model.has(part) and part not in asked:
            able = ", ".join(name for name, term in TERMS.items() if part in term.student_parts)
            yield f"'student.{part}' is set, but no term of 'distill' trains it; add one of: {able}"


def _classifier_rules(model: Written) -> Iterator[str]:
    """A classifier has none of a cdl model's parts, and only a classifier may be used without training."""
    role, section = model.role, model.section
    if model.plain:
        for f in dataclasses.fields(ModelRecipe):
            if not f.metadata["classifier"] and section.get(f.name, DEFAULTS[f.name]) != DEFAULTS[f.name]:
                yield f"'{role}.{f.name}': a model: classifier has none; leave it out"
    elif section.get("pretrained") is False:
        yield f"'{role}.pretrained' is false, but only a model: classifier starts from random weights"
    if model.ready and (role == "student" or not model.plain):
        yield f"'{role}.train' is null, but only a teacher that is a model: classifier is used as it is"


def _teacher_rules(content: dict[str, Any], models: dict[str, Written]) -> Iterator[str]:
    teacher, taken = models.get("teacher"), content.get("teacher_from") is not None
    if taken and content.get("teacher") is None:
        yield "'teacher_from' names a run, but 'teacher' is null; describe the teacher as that run does"
    if teacher and teacher.ready and taken:
        yield "'teacher_from' uses a run's trained teacher, 'teacher.train' null uses a ready one; keep one of them"
    if teacher and teacher.ready and teacher.section.get("pretrained") is False:
        yield "'teacher.train' is null, but 'teacher.pretrained' is false: it would teach by chance"


def _plain_rules(content: dict[str, Any], models: dict[str, Written], terms: list[WrittenTerm]) -> Iterator[str]:
    """A classifier gives only logits and no queries; as a student it has no baselines and no KD head."""
    plain = {role for role, model in models.items() if model.plain}
    able = ", ".join(
        name
        for name, term in TERMS.items()
        if not (term.student_parts or term.needs_hidden_states or term.needs_features or term.needs_query)
    )
    for term in terms:
        if term.kind.student_parts and "student" in plain:
            yield f"{term.name} trains a KD head, which a model: classifier has not; use one of {able}"
        if (term.kind.needs_hidden_states or term.kind.needs_features) and plain:
            seen = "hidden states" if term.kind.needs_hidden_states else "features"
            yield f"{term.name} compares {seen}, but a model: classifier shows its logits alone; use one of {able}"
    if "student" in plain:
        if content.get("baselines", []):
            yield "'baselines' are of a frozen backbone, which a student of model: classifier has not; set []"
        if "teacher" in models and models["teacher"].asks.query == "student":
            yield "'teacher.query' is student, but a model: classifier answers no queries; set it to self"


def _saving_rules(content: dict[str, Any], models: dict[str, Written]) -> Iterator[str]:
    """Only cdl models have a choice of how checkpoints are saved."""
    if models and all(model.plain for model in models.values()):
        for name, default in (("save_backbone", True), ("save_code", False)):
            if content.get(name, default) is not default:
                yield f"'{name}' is of cdl models, but here every model is a model: classifier; leave it out"


def _hub_rules(content: dict[str, Any]) -> Iterator[str]:
    """Pushing needs a repository name that the Hub accepts, and a teacher if one is to be pushed."""
    if content.get("push_to_hub") is not True:
        for name, default in _PUSHED.items():
            if content.get(name, default) != default:
                yield f"'{name}' is set, but 'push_to_hub' is false, so nothing is pushed; set it, or leave that out"
        return
    if content.get("push_teacher") is True and content.get("teacher") is None:
        yield "'push_teacher' is true, but there is no teacher; leave it out"
    source = "name" if content.get("hub_model_id") is None else "hub_model_id"
    try:
        validate_repo_id(f"{content.get(source)}{'-teacher' if content.get('push_teacher') else ''}")
    except HFValidationError as error:
        yield f"'{source}' cannot name a repository on the Hub: {error} Set hub_model_id OWNER/NAME."


# ---- rules for a recipe with valid fields ----


def idle_arguments(recipe: Recipe) -> list[str]:
    """Training arguments that have no effect, because the heads they apply to are fitted, not trained by a loss."""
    sections = {"teacher": recipe.teacher, "student": recipe.student}
    trained = {role for role, section in sections.items() if section is not None and trains(section)}
    trained |= {"student"} if any(not is_fitted(BASELINES[name]) for name in recipe.baselines) else set()
    given = {
        f"{role}.train": section.train or {} for role, section in sections.items() if section and role not in trained
    }
    if not trained:
        given["train"] = recipe.train
    return [f"{place}.{name}" for place, values in given.items() for name in values if name not in IN_PASSES]


def trains(section: ModelRecipe) -> bool:
    if section.model == "classifier":
        return section.train is not None
    return section.first_session is not None or not is_fitted(section.head)


def without_effect(recipe: Recipe) -> Iterator[str]:
    """Yield settings that train nothing: a model's own training arguments (a base may give shared ones), weights."""
    for name in idle_arguments(recipe):
        if not name.startswith("train."):
            yield f"'{name}' has no effect: the head is fitted in one pass, no loss trains; leave it out"
    if not trains(recipe.student) and recipe.ce_weight != Recipe.ce_weight:
        yield f"'ce_weight' is {recipe.ce_weight:g}, but no loss trains a student whose head is fitted; leave it out"
    weights = [term.get("weight", TERMS[term["type"]].config_class.weight) for term in recipe.distill]
    if trains(recipe.student) and recipe.ce_weight == 0 and not any(weight > 0 for weight in weights):
        yield (
            "'ce_weight' is 0 and no term of 'distill' has a weight above 0, so nothing would be learnt; give one of "
            "them a weight"
        )
