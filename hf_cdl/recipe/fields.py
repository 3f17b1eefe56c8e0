"""The fields of a recipe: everything that defines a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hf_cdl.backbones.lora import LoraOptions
from hf_cdl.data import StreamConfig
from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.models.sessions import LaterSessions
from hf_cdl.prompts import PROMPTS, KDPromptConfig, MappingConfig
from hf_cdl.recipe.training import PLACES, training
from hf_cdl.recipe.type_checks import fields_of, method

BASELINES: dict[str, dict[str, Any]] = {
    "nearest_class_mean": {"type": "ncm"},
    "linear_head": {"type": "linear"},
    "ridge_head": {
        **{"type": "ridge", "standardise": "first_task", "strength": "auto", "scale": "auto"},
        **{"features": 2000, "own_features": True, "balanced": True, "known": 0.95},
    },
}
"""The baselines' heads: class means, one trained alone on the frozen features, and the recommended student's."""
RECOMMENDED = "ridge_head"
"""The baseline whose head also reads the mean of the patches, if the backbone has one beside its feature."""


Prompt = Annotated[dict[str, Any], method(PROMPTS)]
Head = Annotated[dict[str, Any], method(HEADS)]
Term = Annotated[dict[str, Any], method(TERMS)]
Training = Annotated[dict[str, Any], training]


def _help(text: str, classifier: bool = False, **default: Any) -> Any:
    """A field with its description. `classifier`: whether a model's section has it with model: classifier too."""
    return field(**default, metadata={"help": text, "classifier": classifier})


@dataclass(frozen=True)
class ModelRecipe:
    """One model: the `teacher` or the `student` section."""

    backbone: str = _help("Hub id or folder of the pre-trained backbone, or of the classifier.", True)
    revision: str | None = _help("Commit, tag or branch of the backbone.", True, default=None)
    model: Literal["cdl", "classifier"] = _help(
        "cdl: frozen backbone with prompts and heads; classifier: transformers' image classifier, all weights of "
        "which are trained on the stream's only task.",
        True,
        default="cdl",
    )
    pretrained: bool = _help("Of a classifier: load its weights; false: random weights.", True, default=True)
    prompt: Prompt = _help("Prompt pool: type and its fields.", default_factory=lambda: {"type": "none"})
    head: Head = _help("Head: type and its fields.", default_factory=lambda: {"type": "linear"})
    first_session: Head | None = _help(
        "Trained head beside which prompts, adapters or backbone learn on the first task; then `head` is fitted.",
        default=None,
    )
    later_sessions: Annotated[dict[str, Any], fields_of(LaterSessions)] | None = _help(
        "Fields for learning in later tasks too, in each with a new head like that of first_session ({}: the "
        "defaults); null: only the first task has a session.",
        default=None,
    )
    lora: Annotated[dict[str, Any], fields_of(LoraOptions)] | None = _help(
        "Fields of low-rank adapters (LoRA) on the backbone. They learn only in sessions.", default=None
    )
    kd_prompt: Annotated[dict[str, Any], fields_of(KDPromptConfig)] | None = _help(
        "Fields of KD token and KD prompts; the terms that use them set this.", default=None
    )
    mapping: Annotated[dict[str, Any], fields_of(MappingConfig)] | None = _help(
        "Fields of the mapping of the teacher's prompts; `prompt_mapping` sets this.", default=None
    )
    query: Literal["student", "self", "one_pass"] = _help(
        "What selects prompts. student: the CLS feature of the student's frozen backbone, for both models; self: that "
        "of the model's own; one_pass: the CLS token that enters each layer (OS-Prompt; no query pass).",
        default="student",
    )
    patch_mean: bool = _help("The head reads the mean of the patch tokens in addition to CLS.", default=False)
    train_backbone: bool = _help("Train the backbone too (sequential fine-tuning).", default=False)
    train: Training | None = _help(
        "Training arguments that differ for this model; null: do not train it (a teacher that already classifies "
        "these classes).",
        True,
        default_factory=dict,
    )


@dataclass(frozen=True)
class CardRecipe:
    """The `card` section: facts for the model card that a run cannot know. You may change it at any time."""

    license: str | None = _help("Licence of the models, as the Hub names it (apache-2.0, mit ...).", default=None)
    data_card: str | None = _help("Web page of the data; null: that of its Hub id.", default=None)
    data_license: str | None = _help("Licence of the data, as its owners state it.", default=None)
    pretraining: str | None = _help("What the backbones saw of these classes in pre-training.", default=None)


@dataclass(frozen=True)
class Recipe:
    """A run. `train` takes every field of CDLTrainingArguments except output_dir and seed.

    Raises ValueError if the name or output_dir cannot be a folder's, or if ce_weight is negative.
    """

    name: str = _help("Name of the run, for titles.")
    data: StreamConfig = _help("The stream of tasks.")
    student: ModelRecipe = _help("The small model that you keep.")
    teacher: ModelRecipe | None = _help("The large model that teaches; null: the student learns alone.", default=None)
    teacher_from: str | None = _help(
        "Folder of a run with the same teacher, data and seed, whose trained teacher is used instead of a new one.",
        default=None,
    )
    distill: list[Term] = _help("Distillation terms, each with type, weight, ...", default_factory=list)
    ce_weight: float = _help("Weight of the student's cross-entropy (with one term: 1 - its weight).", default=1.0)
    train: Training = _help("Training arguments of both models.", default_factory=dict)
    protocol: Literal["default", "cdl"] = _help(
        "cdl: the CDL authors' defaults (raw pixels, their schedule, full batches only), and their forgetting first "
        "in tables.",
        default="default",
    )
    normalise: bool = _help(
        "Normalise pixels with the image processors' mean and deviation; false: raw pixels in [0, 1].", default=True
    )
    baselines: list[Literal["nearest_class_mean", "linear_head", "ridge_head"]] = _help(
        "Simple heads on the student's frozen backbone, measured for comparison (not for a classifier).",
        default_factory=lambda: ["nearest_class_mean"],
    )
    plugins: list[str] = _help("Python files that register your models and methods.", default_factory=list)
    save_backbone: bool = _help(
        "Store the frozen backbones in checkpoints; false: store only what was learnt, and fetch them on loading.",
        default=True,
    )
    save_code: bool = _help(
        "Store the model's code in checkpoints, so that trust_remote_code loads them without hf_cdl.", default=False
    )
    card: CardRecipe = _help("What model cards say that no run can know.", default_factory=CardRecipe)
    seed: int = _help("Seed of initialisation, data order and augmentation.", default=0)
    output_dir: str | None = _help("Folder of the run; null: runs/NAME.", default=None)
    cache: str | None = _help(
        "Folder in which runs on this machine share what frozen models computed for images. It changes no result, and "
        "you may delete it at any time; null: only in memory, during the run.",
        default=None,
    )
    push_to_hub: bool = _help("Push the student to the Hugging Face Hub, a commit and a tag per task.", default=False)
    push_teacher: bool = _help("Push the teacher too, to the repository hub_model_id with -teacher.", default=False)
    hub_model_id: str | None = _help("Repository, OWNER/NAME or NAME; null: the run's name.", default=None)
    hub_private_repo: bool = _help("Whether new repositories are private.", default=True)
    hub_strategy: Literal["every_task", "end"] = _help(
        "When to push: after every task, or at the end.", default="every_task"
    )

    def __post_init__(self) -> None:
        problems: list[str] = []
        place = Path(self.name)
        if not self.name.strip() or not place.parts or place.is_absolute() or ".." in place.parts:
            problems.append(f"'name' is {self.name!r}, but becomes the folder runs/NAME; give a name for it")
        if self.output_dir is not None and not self.output_dir.strip():
            problems.append(f"'output_dir' is {self.output_dir!r}; name a folder, or leave it out for runs/NAME")
        if self.cache is not None:
            problems += self._cache_problems(Path(self.cache))
        for field_name, value in {
            "name": self.name,
            "output_dir": self.output_dir or "",
            "cache": self.cache or "",
        }.items():
            if "\0" in value:
                problems.append(f"'{field_name}' is {value!r}; leave out the null byte, which no folder's name has")
        if self.ce_weight < 0:
            problems.append(f"'ce_weight' is {self.ce_weight}, but a weight must be at least 0")
        if problems:
            raise ValueError("; ".join(problems))

    def _cache_problems(self, cache: Path) -> list[str]:
        if not str(self.cache).strip():
            return ["'cache' is empty; name a folder, or leave it out"]
        where = cache.resolve()
        roles = [self.folder.resolve() / role for role in ("student", "teacher", *self.baselines)]
        if inside := next((role for role in roles if role in (where, *where.parents)), None):
            return [f"'cache' is {self.cache!r}, in the folder of the run's checkpoints {inside}; name another folder"]
        return []

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir or Path("runs") / self.name)

    def as_dict(self) -> dict[str, Any]:
        """What defines the run, for its ledger: everything except where it is stored and pushed."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in PLACES}

    @property
    def repositories(self) -> dict[str, str]:
        """Role -> Hub repository that it is pushed to."""
        name = self.hub_model_id or self.name
        roles = {"student": name, **({"teacher": f"{name}-teacher"} if self.push_teacher else {})}
        return roles if self.push_to_hub else {}

    def training_args(self, role: Literal["teacher", "student"]) -> dict[str, Any]:
        """The keyword arguments of CDLTrainingArguments for a role."""
        section = self.teacher if role == "teacher" else self.student
        own = section.train if section and section.train else {}
        return {"data_seed": self.seed, **self.train, **own, "seed": self.seed}
