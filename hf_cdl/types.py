"""Values passed between the parts: prompts, model outputs, tasks and their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from transformers.utils.generic import ModelOutput

OURS = "cdl"
"""Model type of CDLForImageClassification."""


def is_ours(config: Any) -> bool:
    """Whether a config, or the content of a config.json, belongs to an hf_cdl model."""
    kind = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return kind == OURS


class KV(NamedTuple):
    """Extra keys and values of one self-attention layer, used raw (not passed through k_proj / v_proj).

    `key`, `value`: (B or 1, P, D), split into heads like the layer's own keys and values.
    `where`: `prepend` / `append` concatenate them before / after the sequence's own (the order does not affect the
    result); `add_to_cls` adds them (P = 1) to the key and value of the CLS token, as in APT; `instead` replaces all
    keys and values, for a last layer that computes only the tokens that are read (hf_cdl.backbones.last_layer).
    """

    key: torch.Tensor
    value: torch.Tensor
    where: Literal["prepend", "append", "add_to_cls", "instead"] = "prepend"


class Tokens(NamedTuple):
    """Extra tokens that enter a layer after CLS: (B or 1, P, D), like embedded tokens.

    They replace the outputs of an earlier layer's tokens; where a layer gets none, the earlier ones are kept.
    """

    tokens: torch.Tensor


Prompt = KV | Tokens
"""What a pool returns for a layer."""


class ModelShape(NamedTuple):
    """Width D and number of layers L of a backbone, for loss terms with their own layers."""

    hidden_size: int
    num_layers: int


Prompts = Mapping[int, "list[Prompt]"]
"""Layer number -> that layer's prompts."""


@dataclass
class CDLOutput(ModelOutput):
    """Output of a continual model.

    `loss`: scalar cross-entropy, only if labels were given. `logits`: (B, C) over all classes seen so far, in stream
    order; in evaluation the blend of both heads if the model has a KD head. `kd_logits`: (B, C) of the KD head.
    `prompt_loss`: scalar, the pool's own loss (CODA's orthogonality penalty, a match loss). `query`: (B, D_q).
    `features`, `kd_features`: (B, D), the inputs of the CLS head and the KD head.
    `hidden_states`: embeddings and every layer's output before the final norm, L + 1 entries, (B, N, D) each: CLS (if
    the family has one) and patches, without KD token, registers and the like; None for layers not requested.
    `similarities`: only for a one-pass model given a query; for every layer with keys, the cosines (B, M) of its keys
    with the CLS token entering it, and with that query.
    `layers`: (B, 3, W), the mean patch tokens of three layers, and `known`: (B,), how known the images are (higher:
    more known), for a head that scores this, see hf_cdl.heads.known.
    `path_logits`: (B, C) of a second path through a teacher, if a loss term has added one.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor = None  # type: ignore[assignment]  # a ModelOutput's fields need defaults
    kd_logits: torch.Tensor = None  # type: ignore[assignment]
    prompt_loss: torch.Tensor | None = None
    query: torch.Tensor | None = None
    features: torch.Tensor | None = None
    kd_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    similarities: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None
    layers: torch.Tensor | None = None
    known: torch.Tensor | None = None
    path_logits: torch.Tensor | None = None


class TaskSplit(Protocol):
    """Images of one task and split: `split[i]` is the evaluation view, `split[(i, v)]` the augmented view v.

    It may have `seen_by(*roles)`, if the roles' models need different pixel values: see hf_cdl.data.TaskSplit.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Task:
    """One step of the stream. `index` counts from 0; its classes are `first_class ..` in stream order.

    A task learnt elsewhere has no training images, and test images only if they are provided. `unlabelled` are images
    without labels on which a teacher teaches its student beside the task's own, `unlabelled_ratio` of them for each.
    `views`: augmented views of each training image, which later epochs repeat; None: a new one in every epoch.
    """

    index: int
    class_names: tuple[str, ...]
    first_class: int
    train: TaskSplit
    validation: TaskSplit | None
    test: TaskSplit
    unlabelled: TaskSplit | None = None
    unlabelled_ratio: int = 1
    views: int | None = None

    @property
    def classes(self) -> slice:
        """The slice of the logits that belongs to this task."""
        return slice(self.first_class, self.first_class + len(self.class_names))

    @property
    def name(self) -> str:
        """`task-01` for the first task: the name of its checkpoint folder and Hub tag."""
        return f"task-{self.index + 1:02d}"


@dataclass
class TaskResult:
    """Results of one phase (a role on a task): accuracies in percent, time in seconds, memory in bytes.

    `row`: accuracy per task, None for a task without test images. `within_task`, `task_identification`: likewise for
    within-task and task-identification accuracy; `confidence` and `calibration_error` over all images;
    `class_accuracy` by class name; all in percent, see hf_cdl.training.evaluation. `choices`: options that the head
    chose by itself, with their values. `known`: how well images of other classes are recognised, for a head that
    scores this. `drift`: how features moved in a session after the first, see hf_cdl.models.sessions. `kept`: bytes of
    frozen models' outputs that the run holds in memory, and that the phase found there instead of computing them, read
    from the cache and wrote into it.
    """

    role: str
    task: int
    row: list[Any] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    within_task: list[Any] = field(default_factory=list)
    task_identification: list[Any] = field(default_factory=list)
    confidence: float | None = None
    calibration_error: float | None = None
    class_accuracy: dict[str, float] = field(default_factory=dict)
    choices: dict[str, float] = field(default_factory=dict)
    known: dict[str, float] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    images_per_second: float = 0.0
    peak_memory_bytes: int = 0
