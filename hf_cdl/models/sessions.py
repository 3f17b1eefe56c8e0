"""Sessions, in which prompts, adapters or backbone of a model with a fitted head learn: on the first task, or more."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hf_cdl.backbones import lora
from hf_cdl.checked import build_fields, check_effect, check_types
from hf_cdl.config import CDLConfig
from hf_cdl.heads import HEADS, build_head, example
from hf_cdl.heads.base import FittedHead
from hf_cdl.heads.bits import movable
from hf_cdl.heads.calibration import RecentImages
from hf_cdl.heads.drift import fit_drift
from hf_cdl.models.checkpointing import Checkpointed
from hf_cdl.types import CDLOutput

_ANCHORS = 2000
"""Number of images used to measure how features moved, if there are that many; up to twice as many."""


@dataclass(frozen=True)
class LaterSessions:
    """How training continues after the first session. Raises ValueError for a value out of range."""

    until: int | None = field(
        default=None, metadata={"help": "Last task with a session, counted from 1; null: every task has one."}
    )
    rate: float = field(default=1.0, metadata={"help": "Factor of the learning rate after the first session."})
    keep: float = field(
        default=0.0,
        metadata={"help": "Weight of a loss that holds features in place: the mean squared change, since the session "
                  "began, of the standardised features of images (keep_on)."},
    )  # fmt: skip
    drift: Literal["linear", "none"] = field(
        default="linear",
        metadata={"help": "How the head's sums over images of earlier tasks follow the features. linear: a linear map "
                  "from the features before the session to those after it moves them; none: they stay."},
    )  # fmt: skip
    anchors: Literal["task", "unlabelled", "both"] = field(
        default="task",
        metadata={"help": "Images to which this map is fitted: the task's, with three augmented views of each, those "
                  "of data.unlabelled, or both.", "unlabelled": True},
    )  # fmt: skip
    keep_on: Literal["task", "unlabelled", "both"] = field(
        default="task",
        metadata={"help": "Images of a batch whose features `keep` holds: the task's, those of data.unlabelled, or "
                  "both.", "unlabelled": True},
    )  # fmt: skip

    def __post_init__(self):
        check_types(self, "later_sessions")
        if (self.until is not None and self.until < 2) or self.rate <= 0 or self.keep < 0:
            raise ValueError(
                "later_sessions needs until >= 2 (or null), rate > 0 and keep >= 0; got until "
                f"{self.until}, rate {self.rate} and keep {self.keep}."
            )
        check_effect(self, "later_sessions", "keep_on", self.keep > 0, "keep is 0")

    def has(self, task: int) -> bool:
        """Whether a task, counted from 0, has a session."""
        return self.until is None or task < self.until

    @property
    def held(self) -> tuple[bool, bool]:
        """Whether `keep` holds features of the task's images, and whether it holds those of the unlabelled images."""
        return self.keep > 0 and self.keep_on != "unlabelled", self.keep > 0 and self.keep_on != "task"


def check_session(config: CDLConfig, prompts: Sequence[str]) -> None:
    """Raise ValueError unless the head, the first session and the trainable parts fit together.

    `prompts`: which of "prompts", "KD prompts" and "a mapping" the model has. A mapping follows the teacher's prompts;
    sums of features cannot.
    """
    first, kind = config.first_session, config.head["type"]
    fitted, maps = HEADS[kind].fitted, "a mapping" in prompts
    learns = bool(prompts) or config.train_backbone or config.lora is not None
    if config.lora is not None:
        if others := [*prompts, *["train_backbone"] * config.train_backbone]:
            raise ValueError(f"lora adapts the backbone alone, but the model has {', '.join(others)} too.")
        if first is None:
            raise ValueError(
                f"lora learns in a first session: give first_session a trained head, as {example(fitted=False)}, and "
                f"`head` a fitted one, as {example(fitted=True)}."
            )
    if first is not None:
        if not fitted or HEADS[first["type"]].fitted or not learns or maps:
            raise ValueError(
                f"first_session ({first['type']}) needs a trained head, a fitted `head` (got {kind}), prompts, "
                "KD prompts, lora or train_backbone, and no prompt mapping."
            )
    elif config.later_sessions is not None:
        raise ValueError(
            f"later_sessions continue a first session. Give first_session a trained head, as {example(fitted=False)}."
        )
    elif fitted and learns:
        raise ValueError(
            f"A head of type {kind} is fitted to fixed features, but prompts or backbone would learn in every "
            f"task. Give first_session a trained head, as {example(fitted=False)}: they learn on the first task alone."
        )


def check_one_head(parts: Mapping[str, object], what: str) -> None:
    """Raise ValueError if a model whose head reads more than one token has another head, for the KD token alone.

    `parts`: name -> KD prompts and mapping, or None; `what`: the option that makes it read more, as in "it is true".
    """
    if taught := [name for name, part in parts.items() if part is not None and name != "prompts"]:
        raise ValueError(
            f"{what}, but the model has {taught[0]}, whose head reads one token. Leave {what.split()[0]} out."
        )


class LearnsInSessions(Checkpointed):
    """A model that learns in every task or, with a fitted head, only in sessions."""

    later: LaterSessions | None

    @property
    def reads_token(self) -> bool:
        """Whether the head reads the KD token beside CLS: a fitted head does, because no KD head is fitted."""
        kind = HEADS.get(self.config.head.get("type", ""))
        return self.kd_prompt is not None and kind is not None and kind.fitted

    def later_options(self) -> LaterSessions | None:
        """The options of `later_sessions`, which become those of the config. Raises ValueError if they do not fit."""
        if self.config.later_sessions is None:
            return None
        later = build_fields(LaterSessions, self.config.later_sessions, "later_sessions")
        self.config.later_sessions = dataclasses.asdict(later)
        why = self.head.why_fixed if isinstance(self.head, FittedHead) else None
        if later.drift != "none" and why is not None:
            raise ValueError(f"later_sessions.drift is {later.drift}, but {why}. Set drift to none, or change that.")
        return later

    def trains(self, task: int) -> bool:
        """Whether a loss trains anything in this task (from 0): with a fitted head that happens in sessions alone."""
        return not self.fitted or self.has_session(task)

    def has_session(self, task: int) -> bool:
        """Whether this task, from 0, has a session."""
        if self.config.first_session is None:
            return False
        return task == 0 or (self.later is not None and self.later.has(task))

    def begin_session(self, task: int = -1) -> None:
        """Create a session's head for a task, by default the newest, and in the first one re-initialise any adapters.

        `freeze` then makes trainable what learns.
        """
        first: Any = self.config.first_session
        self.session_head = build_head(first, self.session_size)
        if self.kd_prompt is not None:
            self.session_kd_head = build_head(first, self.shape.hidden_size)
        for head in (self.session_head, self.session_kd_head):
            if head is not None:
                head.add_task(len(self.config.tasks[task]))
                self._init_weights(head)
        if self.config.lora is not None and len(self.config.tasks) == 1:
            lora.reset_adapters(self.backbone)

    def end_session(self) -> None:
        """End the session, if one is running: what it trained is now fixed, and `head` can be fitted."""
        if self.session_head is not None:
            self.session_head = self.session_kd_head = None
            if self.pool is not None:
                self.pool.end_task()
            model: Any = self
            model.freeze()

    def later_session(self, task: int) -> Session | None:
        """The session of a task after the first, made before the model begins that task; None if it has none.

        Raises ValueError for a model that has begun it.
        """
        if not task or not self.has_session(task):
            return None
        if len(self.config.tasks) > task:
            raise ValueError(
                f"The model has begun task {task + 1} already, but a session compares it with what it was before. "
                "Leave model.begin_task to the trainer."
            )
        return Session(self)

    def rates(self) -> dict[nn.Parameter, float]:
        """Learning-rate factors of the parameters that train at a reduced rate in the newest task."""
        if len(self.config.tasks) == 1:
            return {}
        rates: dict[nn.Parameter, float] = {}
        if self.later is not None and self.later.rate != 1:
            heads = [head for head in (self.session_head, self.session_kd_head) if head is not None]
            new = {parameter for head in heads for parameter in head.parameters()}
            rates = {p: self.later.rate for p in self.parameters() if p.requires_grad and p not in new}
        if self.kd_prompt is not None and self.kd_prompt.config.later_rate != 1:
            own = self.kd_prompt.config.later_rate
            rates |= {parameter: own * rates.get(parameter, 1.0) for parameter in self.kd_prompt.parameters()}
        return rates


class Session:
    """A task's session of a model, made before it begins the task."""

    def __init__(self, model: Any):
        self.model, self.later = model, model.later
        shared = [model.head, model.query_backbone, model.scaffold]
        memo: dict[int, Any] = {id(part): part for part in shared if part is not None}
        if not model.config.train_backbone:
            named = [*model.backbone.named_parameters(), *model.backbone.named_buffers()]
            memo |= {id(value): value for name, value in named if not lora.is_adapter(name)}
        self.before = copy.deepcopy(model, memo).eval().requires_grad_(False)
        self.before.scaffold = None

    def with_keep(
        self,
        losses: dict[str, torch.Tensor],
        output: CDLOutput,
        pixels: torch.Tensor,
        labelled: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch with `keep` among them, which is also added to their sum.

        The first `labelled` of its images (B, 3, H, W) are the task's.
        """
        if self.later.keep == 0:
            return losses
        of_task, others = self.later.held
        held = slice(0 if of_task else labelled, None if others else labelled)
        with torch.no_grad(), autocast():
            query: Any = output.query
            query = query[held] if self.before.needs_query else None
            before = self.before(pixel_values=pixels[held], query=query).features
        features: Any = output.features
        kept = self._moved(before, features[held])
        return {**losses, "keep": kept, "loss": losses["loss"] + self.later.keep * kept}

    def _moved(self, before: Any, now: Any) -> torch.Tensor:
        """Mean squared difference of features (B, D), each dimension divided by its deviation."""
        before, now, standard = before.float(), now.float(), self.model.head.standard
        if standard is not None:
            return F.mse_loss(standard(now), standard(before))
        spread = before.std(dim=0, correction=0)
        return ((now - before) / torch.maximum(spread, 0.01 * spread.mean() + 1e-6)).square().mean()

    @torch.no_grad()
    def follow(
        self,
        batches: Iterable[Mapping[str, Any]],
        gather: Callable[[Any], Any],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, float]:
        """Measure how the features of these images moved, and move the head's sums likewise unless drift is `none`.

        `batches`: their pixels and `labels`, below 0 for images without one; `gather`: collects a batch from
        all processes; `autocast`: the precision of the features in the sums. Returns the drift's `change`, how much of
        it is `explained`, both in percent, and the `strength` of the map, see heads/drift.py.
        """
        head, kept = self.model.head, RecentImages(_ANCHORS)
        for batch in batches:
            found = []
            for model in (self.before, self.model):
                with autocast():
                    output = model(pixel_values=batch["pixel_values"])
                found.append(head.prepare(output.features.float()))
                found += [output.layers.float()] if head.reads_layers else []
            read = gather({"labels": batch["labels"]} | {str(number): value for number, value in enumerate(found)})
            kept.add(movable(read["labels"]), *(movable(read[str(number)]) for number in range(len(found))))
        read = kept.take()
        if read is None:
            raise ValueError("There are no images by which the head's sums could be moved.")
        labels, *read = read
        half = len(read) // 2
        drift = fit_drift(read[0], read[half], labels)
        layers = []
        if head.reads_layers:
            was, now = read[1], read[half + 1]
            layers = [fit_drift(was[:, number], now[:, number], labels) for number in range(was.shape[1])]
        if self.later.drift != "none":
            head.move(drift, layers)
        return {"change": 100 * drift.change, "explained": 100 * drift.explained, "strength": drift.strength}
