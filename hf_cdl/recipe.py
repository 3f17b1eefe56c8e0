"""A recipe: everything that defines a run, read from YAML and the command line, checked before anything is loaded."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_cdl.distill import TERMS
from hf_cdl.models.heads import HEADS
from hf_cdl.prompts import PROMPTS, KDPromptConfig, MappingConfig, PromptPool
from hf_cdl.recipe_files import RecipeError, merge, read_recipe
from hf_cdl.tasks import StreamConfig
from hf_cdl.training_args import CDLTrainingArguments
from hf_cdl.typed import WRONG, build_typed, typed_fields, typed_value

BASELINES: dict[str, dict[str, Any]] = {"nearest_class_mean": {"type": "ncm"}, "linear_head": {"type": "linear"}}
"""The heads of the baselines: without any training, and trained alone on the frozen features."""

PROTOCOLS: dict[str, dict[str, Any]] = {
    "default": {},
    "cdl": {"normalise": False, "train": {"epoch_cosine": True, "dataloader_drop_last": True}},
}
"""What a protocol sets where the recipe does not; cdl is the training of Continual Distillation Learning's authors."""


_CLASSIFIER = ("backbone", "revision", "model", "pretrained", "train")
"""The fields of a model's section that a classifier has."""

_PLACES = ("output_dir", "push_to_hub", "push_teacher", "hub_model_id", "hub_private_repo", "hub_strategy")
"""The fields of a recipe that do not define the run's numbers."""

_PARTS = {"kd_prompt": KDPromptConfig, "mapping": MappingConfig}
"""Sections of the student that terms ask for."""


def _help(text: str, **default: Any) -> Any:
    return field(**default, metadata={"help": text})


@dataclass(frozen=True)
class ModelRecipe:
    """One model: the `teacher` or the `student` section."""

    backbone: str = _help("Hub id or folder of the pre-trained backbone, or of the classifier.")
    revision: str | None = _help("Commit, tag or branch of the backbone.", default=None)
    model: Literal["cdl", "classifier"] = _help(
        "cdl: frozen backbone, prompts and heads; classifier: transformers' image classifier, trained whole on the "
        "stream's only task.",
        default="cdl",
    )
    pretrained: bool = _help("Of a classifier; false: random weights, by its config alone.", default=True)
    prompt: dict[str, Any] = _help("Prompt pool: type and its fields.", default_factory=lambda: {"type": "none"})
    head: dict[str, Any] = _help("Head: type and its fields.", default_factory=lambda: {"type": "linear"})
    first_session: dict[str, Any] | None = _help(
        "Trained head with which prompts or backbone learn on the first task alone; then `head` is fitted.",
        default=None,
    )
    kd_prompt: dict[str, Any] | None = _help("KD token and prompts; set by the terms that use them.", default=None)
    mapping: dict[str, Any] | None = _help("Mapping of the teacher's prompts; set by its term.", default=None)
    query: Literal["student", "self", "one_pass"] = _help(
        "What selects prompts: the CLS feature of the student's frozen backbone (shared by both models), of the "
        "model's own, or the CLS token that enters each layer (OS-Prompt; no query pass).",
        default="student",
    )
    train_backbone: bool = _help("Train the backbone too (sequential fine-tuning).", default=False)
    train: dict[str, Any] | None = _help(
        "Training arguments that differ for this model; null: a teacher that is a ready classifier of these classes "
        "is used as it is.",
        default_factory=dict,
    )


@dataclass(frozen=True)
class CardRecipe:
    """The `card` section: what a model card says that no run can know. It may change at any time."""

    license: str | None = _help("Licence of the models, by its name on the Hub (apache-2.0, mit ...).", default=None)
    data_card: str | None = _help("The data's own page; by default that of its Hub id.", default=None)
    data_license: str | None = _help("Licence of the data, as its owners state it.", default=None)
    pretraining: str | None = _help("What the backbones' pre-training saw of these classes.", default=None)


@dataclass(frozen=True)
class Recipe:
    """A run. `train` takes every field of CDLTrainingArguments but output_dir and seed."""

    name: str = _help("Name of the run, for titles.")
    data: StreamConfig = _help("The stream of tasks.")
    student: ModelRecipe = _help("The small model that is deployed.")
    teacher: ModelRecipe | None = _help("The large model that teaches; null: the student learns alone.", default=None)
    teacher_from: str | None = _help(
        "Folder of a run with the same teacher, data and seed: its teacher is taken over instead of trained again.",
        default=None,
    )
    distill: list[dict[str, Any]] = _help("Distillation terms, each with type, weight, ...", default_factory=list)
    ce_weight: float = _help("Weight of the student's cross-entropy (with one term: 1 - its weight).", default=1.0)
    train: dict[str, Any] = _help("Training arguments of both models.", default_factory=dict)
    protocol: Literal["default", "cdl"] = _help(
        "cdl: the CDL authors' choices (raw pixels, their schedule, full batches only) where the recipe has none, and "
        "their forgetting first in tables.",
        default="default",
    )
    normalise: bool = _help(
        "Pixels with the image processors' mean and deviation; false: as they are, in [0, 1].", default=True
    )
    baselines: list[Literal["nearest_class_mean", "linear_head"]] = _help(
        "The student's bare backbone, measured beside the models (a classifier has none).",
        default_factory=lambda: ["nearest_class_mean"],
    )
    plugins: list[str] = _help(
        "Python files that register models of your own with transformers.", default_factory=list
    )
    save_backbone: bool = _help(
        "Checkpoints hold the frozen backbones; false: prompts and heads alone, and loading fetches the backbones.",
        default=True,
    )
    save_code: bool = _help(
        "Checkpoints hold the model's code too, so that trust_remote_code loads them without hf_cdl.", default=False
    )
    card: CardRecipe = _help("What model cards say that no run can know.", default_factory=CardRecipe)
    seed: int = _help("Seed of initialisation, data order and augmentation.", default=0)
    output_dir: str | None = _help("Folder of the run; default runs/NAME.", default=None)
    push_to_hub: bool = _help("Push the student to the Hugging Face Hub, a commit and a tag per task.", default=False)
    push_teacher: bool = _help("Push the teacher too, to the repository hub_model_id with -teacher.", default=False)
    hub_model_id: str | None = _help("Repository, OWNER/NAME or NAME; default the run's name.", default=None)
    hub_private_repo: bool = _help("Whether repositories that are made are private.", default=True)
    hub_strategy: Literal["every_task", "end"] = _help(
        "When to push: after every task, or at the end.", default="every_task"
    )

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir or Path("runs") / self.name)

    def as_dict(self) -> dict[str, Any]:
        """What defines the run, for its ledger: all but where it is stored and pushed."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _PLACES}

    @property
    def repositories(self) -> dict[str, str]:
        """Role -> repository on the Hub that it is pushed to."""
        name = self.hub_model_id or self.name
        roles = {"student": name, **({"teacher": f"{name}-teacher"} if self.push_teacher else {})}
        return roles if self.push_to_hub else {}

    def training_args(self, role: Literal["teacher", "student"]) -> dict[str, Any]:
        """The keyword arguments of CDLTrainingArguments for a role."""
        section = self.teacher if role == "teacher" else self.student
        own = section.train if section and section.train else {}
        return {"data_seed": self.seed, **self.train, **own, "seed": self.seed}


def load_recipe(arguments: Sequence[str], default: str | Path) -> Recipe:
    """Recipe from command-line arguments: `[RECIPE.yaml ...] [--any.field value ...]`; without a file from `default`.

    Values are YAML: `--teacher null`, `--distill.0.weight 0.3`, `--train.learning_rate=0.01`. Raises RecipeError with
    all problems at once.
    """
    return build_recipe(read_recipe(arguments, default))


def build_recipe(content: dict[str, Any]) -> Recipe:
    """Recipe from a plain dict. Raises RecipeError with all problems at once."""
    problems: list[str] = []
    protocol = content.get("protocol")
    preset = PROTOCOLS.get(protocol, {}) if isinstance(protocol, str) else {}
    content = copy.deepcopy(merge(preset, content))  # the checks put values of the right type into it: 8 for 8.0
    parts = _check_terms(content, problems)
    if isinstance(content.get("data"), dict) and content["data"].get("path") is None:
        problems.append("'data.path' is missing")
    for role in ("teacher", "student"):
        if isinstance(content.get(role), dict):
            _check_model(content, role, parts, problems)
            _check_training(content, role, problems)
    _check_classifiers(content, problems)
    _check_hub(content, problems)
    recipe = build_typed(Recipe, content, "", problems)
    if problems:
        raise RecipeError("The recipe cannot be run:\n" + "\n".join(f"- {line}" for line in dict.fromkeys(problems)))
    student = {name: {**defaults, **(getattr(recipe.student, name) or {})} for name, defaults in parts.items()}
    return dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, **student))


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a run stored it (`as_dict`), with the defaults of fields that came later."""
    return build_recipe(stored).as_dict()


# ---- checking ----


def _section(content: dict[str, Any], name: str, default: Any) -> Any:
    """A section as far as it has the right kind; `build_typed` reports it otherwise."""
    value = content.get(name)
    return value if isinstance(value, type(default)) else default


def _check_typed(registry: Any, content: Any, path: str, problems: list[str], extra: tuple[str, ...] = ()) -> None:
    """Check a `{type: ..., fields}` section by its registry (name -> class with `config_class`).

    A type without a `config_class`, or of `extra`, has no fields.
    """
    kind = content.get("type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in (*extra, *registry):
        problems.append(f"'{path}.type' is {kind!r}; allowed: {', '.join([*extra, *registry])}")
    elif hasattr(registry.get(kind), "config_class"):
        fields = {key: value for key, value in content.items() if key != "type"}
        content.update(typed_fields(registry[kind].config_class, fields, path, problems))
    else:
        problems += [f"unknown field '{path}.{key}'; type {kind} has none" for key in content if key != "type"]


def _check_terms(content: dict[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Check the distillation terms; the parts that they ask of the student, with defaults."""
    parts: dict[str, dict[str, Any]] = {}
    terms = _section(content, "distill", [])
    for number, term in enumerate(terms):
        _check_typed(TERMS, term, f"distill.{number}", problems)
        kind = term.get("type") if isinstance(term, dict) else None
        known = TERMS.get(kind) if isinstance(kind, str) else None
        for part, defaults in (known.student_parts if known else {}).items():
            if parts.setdefault(part, defaults) != defaults:
                problems.append(f"'distill.{number}' ({kind}) wants another '{part}' than the terms before; keep one")
        if known and known.needs_teacher and content.get("teacher") is None:
            problems.append(f"'distill.{number}' ({kind}) has no teacher to learn from; give one or leave it out")
        student = _section(content, "student", {})
        pool = _pool_class(student)
        if known and known.needs_query and not (student.get("query") == "one_pass" and pool and pool.needs_query):
            problems.append(
                f"'distill.{number}' ({kind}) compares one-pass queries with keys; it needs 'student.query' one_pass "
                "and a prompt type with keys"
            )
    if content.get("teacher_from") is not None and content.get("teacher") is None:
        problems.append("'teacher_from' names a run, but 'teacher' is null; describe the teacher as that run does")
    if len(parts) > 1:
        problems.append(f"the terms want {' and '.join(parts)}, which both train the student's KD head; keep one term")
    return parts


def _pool_class(section: dict[str, Any]) -> type[PromptPool] | None:
    """The prompt pool that a model's section names; None if it names none that exists."""
    kind = _section(section, "prompt", {}).get("type")
    return PROMPTS.get(kind) if isinstance(kind, str) else None


def _check_model(content: dict[str, Any], role: str, parts: dict[str, Any], problems: list[str]) -> None:
    section = content[role]
    prompt, head = _section(section, "prompt", {"type": "none"}), _section(section, "head", {"type": "linear"})
    _check_typed(PROMPTS, prompt, f"{role}.prompt", problems, extra=("none",))
    _check_typed(HEADS, head, f"{role}.head", problems)
    trains, prompted = section.get("train_backbone") is True, prompt.get("type") != "none"
    if trains and prompted:
        problems.append(
            f"'{role}.train_backbone' with prompts: their queries come from the frozen backbone; set prompt.type none"
        )
    _check_session(content, role, prompted or trains, problems)
    if trains and content.get("save_backbone") is False:
        problems.append(f"'save_backbone' is false, but '{role}.train_backbone' is true: what it learns would be lost")
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
    if role == "teacher" and "mapping" in parts:
        known = _pool_class(section)
        if known is None:
            problems.append("'teacher.prompt.type' is none, but a mapping needs a teacher with prompts")
        elif known.needs_query and section.get("query", "student") != "student":
            problems.append(
                f"'teacher.query' is {section['query']!r}, but a mapping asks the teacher's prompts with the "
                "student's query; set it to student"
            )


def _fitted(head: Any) -> bool:
    kind = head.get("type") if isinstance(head, dict) else None
    return isinstance(kind, str) and kind in HEADS and HEADS[kind].fitted


def _check_session(content: dict[str, Any], role: str, learns: bool, problems: list[str]) -> None:
    """Beside a fitted head nothing learns, but in a first session; `learns`: prompts or backbone would."""
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
        problems.append(f"'{role}.first_session' has nothing to train; give '{role}' prompts or train_backbone")
    for number, term in enumerate(terms):
        kind = term.get("type") if isinstance(term, dict) else None
        if isinstance(kind, str) and kind in TERMS and TERMS[kind].student_parts:
            problems.append(
                f"'distill.{number}' ({kind}) trains a KD head, which is not fitted after a first session; use a term "
                "on the student's own head, as kd"
            )


def _check_classifiers(content: dict[str, Any], problems: list[str]) -> None:
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
        if not (term.student_parts or term.needs_hidden_states or term.needs_query)
    ]
    for number, term in enumerate(_section(content, "distill", [])):
        kind = term.get("type") if isinstance(term, dict) else None
        known = TERMS.get(kind) if isinstance(kind, str) else None
        if known and known.student_parts and "student" in plain:
            problems.append(
                f"'distill.{number}' ({kind}) trains a KD head, which a model: classifier has not; use one of "
                + ", ".join(logits_alone)
            )
        if known and known.needs_hidden_states and plain:
            problems.append(
                f"'distill.{number}' ({kind}) compares hidden states, but a model: classifier shows its logits alone; "
                f"use one of {', '.join(logits_alone)}"
            )
    if "student" in plain:
        if content.setdefault("baselines", []):
            problems.append(
                "'baselines' are of a frozen backbone, which a student of model: classifier has not; set []"
            )
        pool = _pool_class(models["teacher"])
        if pool and pool.needs_query and models["teacher"].get("query", "student") == "student":
            problems.append("'teacher.query' is student, but a model: classifier answers no queries; set it to self")


def _check_hub(content: dict[str, Any], problems: list[str]) -> None:
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


def _check_training(content: dict[str, Any], role: str, problems: list[str]) -> None:
    """Names and types of the training arguments, then their own checks on the whole."""
    before = len(problems)
    hints = typing.get_type_hints(CDLTrainingArguments)
    fields = {f.name for f in dataclasses.fields(CDLTrainingArguments) if f.init}
    values: dict[str, Any] = {}
    for path, section in (("train", content), (f"{role}.train", content[role])):
        for key, value in _section(section, "train", {}).items():
            if key in ("seed", *_PLACES):
                problems.append(f"'{path}.{key}': set '{key}' at the top level of the recipe")
            elif key.startswith("hub_"):
                problems.append(
                    f"'{path}.{key}' has no place in a recipe; log in with `hf auth login` or set HF_TOKEN"
                )
            elif key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                problems.append(f"unknown field '{path}.{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
            else:
                values[key] = typed_value(hints[key], value, f"{path}.{key}", problems)
                if values[key] is not WRONG:
                    section["train"][key] = values[key]
    if len(problems) == before:
        try:
            CDLTrainingArguments(output_dir="work", **values)
        except (ValueError, TypeError) as error:
            problems.append(f"train ({role}): {error}")
