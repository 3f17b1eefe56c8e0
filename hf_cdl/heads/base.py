"""Base classes of classification heads: one block per task, on features that may be standardised first."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import initialization as init

from hf_cdl.checked import check_types
from hf_cdl.counted import counted
from hf_cdl.heads.bits import movable, read, write
from hf_cdl.heads.calibration import RecentImages, fit_scale, standardised
from hf_cdl.heads.drift import Drift
from hf_cdl.heads.standardise import Standardise, check_features

_LEFT = 1e-4
"""Share of a mean squared feature that rounding may leave in a class's sum once all its images are taken away."""
_ENOUGH = 200
"""Images that determine the scale; with fewer, the previous scale keeps a share."""


@dataclass(frozen=True)
class HeadConfig:
    standardise: str | None = field(
        default=None,
        metadata={"help": "Give each feature mean 0 and deviation 1, by fixed statistics. first_task: those of the "
                  "first task's un-augmented images, measured before the head learns; or a safetensors file "
                  "with `mean` and `std` (D,), read when the model is built."},
    )  # fmt: skip

    def __post_init__(self):
        check_types(self, "A head")
        if self.standardise not in (None, "first_task") and self.given_statistics is None:
            raise ValueError(
                f"A head's standardise is {self.standardise!r}; allowed: null, first_task, a .safetensors file."
            )

    @property
    def given_statistics(self) -> Path | None:
        """The file of statistics, if they are given instead of measured."""
        return Path(self.standardise) if self.standardise and self.standardise.endswith(".safetensors") else None


def share_of(images: int) -> float:
    """The weight of newly learnt images in a fit, relative to that of earlier images."""
    return min(1.0, images / _ENOUGH)


def at_least_float32(features: torch.Tensor) -> torch.Tensor:
    """Features as they are summed: half precision becomes float32."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


class Head(nn.Module, ABC):
    """Features (B, D) -> logits (B, C) over the classes of all tasks, in stream order. One block per task.

    A `fitted` head is not trained, see FittedHead. A subclass with more options than HeadConfig sets `config_class` to
    its own dataclass.
    """

    fitted: ClassVar[bool] = False
    config_class: ClassVar[type] = HeadConfig
    bits: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers of the head and its blocks that hold the bits of float64 numbers."""
    keeps_sums: ClassVar[bool] = False
    """Whether its checkpoints hold sums needed only to learn further tasks, which `drop_sums` drops."""
    needs_teacher = False
    """Whether it learns from a teacher's outputs."""
    reads_layers = False
    """Whether it reads the mean patch tokens of some layers too, see known.py."""

    def __init__(self, config: Any, hidden_size: int):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.standard = Standardise(hidden_size, config.given_statistics) if config.standardise else None
        self.blocks = nn.ModuleList()

    @classmethod
    def check_class(cls) -> str | None:
        """What the class lacks, worded to follow its name in a message; None if it is complete."""
        learns, fits = inspect.getattr_static(cls, "needs_teacher") is not False, issubclass(cls, FittedHead)
        if cls.fitted != fits:
            return f"has fitted {cls.fitted}, which heads derived from FittedHead have and no others; derive it so"
        if fits and not issubclass(cls.config_class, FittedConfig):
            return "is fitted, so its config_class has the `scale` of FittedConfig; derive it from that"
        if learns and not fits:
            return "needs_teacher, but a trained head learns by terms; derive it from FittedHead, or leave that out"
        if learns and cls.targets is FittedHead.targets:  # type: ignore[attr-defined]
            return "needs_teacher, but does not say what it learns: define `targets`, or leave needs_teacher out"
        if cls.keeps_sums and cls.drop_sums is Head.drop_sums:
            return "keeps_sums, but does not say how to drop them: define `drop_sums`, or leave keeps_sums out"
        return None

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], has_teacher: bool) -> list[tuple[str, str]]:
        """Problems of a recipe's fields for this head, as pairs (field, problem and remedy).

        The values of `fields` may be of any type: types are checked elsewhere. `has_teacher`: whether it has a
        teacher.
        """
        return []

    def init_shared(self) -> None:
        """Initialise what all tasks share (outside `blocks`)."""
        if self.standard is not None:
            self.standard.reset()

    @abstractmethod
    def add_task(self, num_classes: int) -> None:
        """Append the block of the next task."""

    @abstractmethod
    def init_task(self, task: int) -> None:
        """Initialise block `task` in place."""

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return the weights by name, with the buffers in `bits` as the numbers they encode."""
        return {
            name: movable(value).view(torch.float64) if name.rpartition(".")[2] in self.bits else value
            for name, value in self.state_dict().items()
        }

    def end_task(self) -> None:
        """Hook called once a task is learnt (ridge regression solves here); does nothing by default."""

    def choices(self) -> dict[str, float]:
        """Option -> value, for options that the head chose by itself."""
        return {}

    def read_layers(self, size: int) -> None:
        """Set up what a head that `reads_layers` needs, for layers of this width."""

    def known_score(self, features: torch.Tensor, layers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
        """Known score (B,) from features (B, D), means of layers (B, 3, W) and logits (B, C); higher: more known.

        None for a head without one.
        """

    def check_growth(self) -> None:
        """Raise ValueError if the head cannot learn further tasks."""

    @torch.no_grad()
    def keep(self, task: int, rows: list[int]) -> None:
        """Keep these classes of a task, in this order, and drop the others; an empty block is removed.

        Every tensor of a block has a row per class.
        """
        if not rows:
            del self.blocks[task]
            return
        block = self.blocks[task]
        for module in block.modules():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                kept = value[rows].clone()
                if isinstance(value, nn.Parameter):
                    setattr(module, name, nn.Parameter(kept, requires_grad=value.requires_grad))
                else:
                    setattr(module, name, kept)
            if isinstance(module, nn.Linear):
                module.out_features = len(rows)

    def drop_sums(self) -> None:
        """Drop the sums of a head that `keeps_sums` for good, and record that in its `config`."""
        raise NotImplementedError(f"{type(self).__name__} keeps sums, but does not say how to drop them.")

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        """Transform features (B, D) into what the blocks read."""
        return features if self.standard is None else self.standard(features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.prepare(features)
        return torch.cat([block(features) for block in self.blocks], dim=-1)


@dataclass(frozen=True)
class FittedConfig(HeadConfig):
    scale: float | Literal["auto"] = field(
        default=10.0,
        metadata={"help": "Factor from scores to logits. It changes confidence, not accuracy. auto: fitted after "
                  "every task to leave-one-out scores of its images, so that mean confidence equals accuracy."},
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.scale != "auto" and self.scale <= 0:
            raise ValueError(f"A fitted head needs scale > 0 or auto; got {self.scale}.")


class FittedHead(Head):
    """Head without parameters that accumulates statistics of fixed features instead of being trained.

    Its scores (cosines or regression outputs) are multiplied by `scale` (ours) to give logits; otherwise their softmax
    would be nearly uniform. With `auto` see calibration.py.
    """

    fitted: ClassVar[bool] = True
    config_class: ClassVar[type] = FittedConfig
    class_sums: ClassVar[tuple[str, ...]] = ()
    """Names of a block's buffers that add up over a class's images: `total`, `count` and any others."""

    def __init__(self, config: Any, hidden_size: int):
        super().__init__(config, hidden_size)
        if config.scale == "auto" and type(self).leave_one_out is FittedHead.leave_one_out:
            raise ValueError(
                f"{type(self).__name__} has no leave_one_out scores, which scale: auto is fitted to. Define them, or "
                "give the scale as a number."
            )
        self.fitted_scale: torch.Tensor | None
        self.variance: torch.Tensor
        self.register_buffer("fitted_scale", torch.zeros(()) if config.scale == "auto" else None)
        self.register_buffer("variance", torch.zeros(()) if config.scale == "auto" else None)
        self._recent = RecentImages()

    @property
    def scale(self) -> Any:
        """Factor of the scores as logits."""
        return self.config.scale if self.fitted_scale is None else self.fitted_scale

    def init_shared(self) -> None:
        super().init_shared()
        if self.fitted_scale is not None:
            init.zeros_(self.fitted_scale)
            init.zeros_(self.variance)

    def choices(self) -> dict[str, float]:
        return {} if self.fitted_scale is None else {"scale": float(self.fitted_scale)}

    @torch.no_grad()
    def accumulate(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        taught: torch.Tensor | None = None,
        sign: int = 1,
        layers: torch.Tensor | None = None,
    ) -> None:
        """Add features (B, D) with `labels` (B,) over all classes to the sums; with `sign` -1 take them away.

        `taught` (B, C_t): the `targets` made of a teacher's logits over the classes of the one task that they are of,
        for a head that `needs_teacher`. `layers` (B, 3, W): the means of layers, for a head that `reads_layers`.
        Raises FloatingPointError for features or targets that are NaN or infinite.
        """
        check_features(features)
        self._check_labels(labels)
        features = at_least_float32(features)
        self.update(self.prepare(features), labels, taught, sign)
        read = ()
        if self.reads_layers:
            if layers is None:
                raise ValueError(f"This {self.name} head says how known an image is, so it needs the means of layers.")
            check_features(layers.flatten(1))
            read = (at_least_float32(layers),)
            self.update_layers(*read, labels, sign)
        if sign > 0 and (self.fitted_scale is not None or read):
            self._recent.add(labels, features, *read)

    @abstractmethod
    def update(self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None, sign: int) -> None:
        """Add prepared features (B, M) to the sums, or take them away, as `accumulate` says."""

    @property
    def why_fixed(self) -> str | None:
        """Why the sums cannot be moved along with the features; None if `move` can do it."""
        return f"the sums of a {self.name} head cannot be moved"

    @torch.no_grad()
    def move(self, drift: Drift, layers: Sequence[Drift] = ()) -> None:
        """Move the sums as prepared features moved and, for a head that `reads_layers`, the means of layers."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its sums move.")

    def update_layers(self, layers: torch.Tensor, labels: torch.Tensor, sign: int) -> None:
        """The same for the means of layers (B, 3, W), for a head that `reads_layers`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads of layers.")

    def leave_one_out(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scores (N, C) of prepared features (N, M) that are in the sums, each by a head that never learnt it."""
        raise NotImplementedError(f"{type(self).__name__} does not say its leave-one-out scores.")

    @torch.no_grad()
    def end_task(self) -> None:
        """Fit what depends on leave-one-out scores to the images learnt since the last fit."""
        recent = self._recent.take()
        if recent is not None:
            labels, features, *layers = recent
            scores = movable(self.leave_one_out(self.prepare(features), labels))
            self.fit_recent(scores, movable(labels), features, layers[0] if layers else None)

    def fit_recent(
        self, scores: torch.Tensor, labels: torch.Tensor, features: torch.Tensor, layers: Any = None
    ) -> None:
        """Fit the scale to leave-one-out scores (N, C) of images with `labels` (N,); a few move it only in part."""
        if self.fitted_scale is None:
            return
        before = float(self.fitted_scale)
        share = share_of(len(labels)) if before else 1.0
        self.variance.lerp_(scores.var(dim=1, correction=0).mean().to(self.variance), share)
        found = fit_scale(standardised(scores, self.variance.to(scores)), labels)
        self.fitted_scale.fill_(found**share * before ** (1 - share))

    @property
    def name(self) -> str:
        """The head's name in messages."""
        return type(self).__name__.removesuffix("Head").lower()

    def _check_labels(self, labels: torch.Tensor) -> None:
        """Raise ValueError for labels beyond the known classes."""
        classes = sum(len(block.count) for block in self.blocks if isinstance(block.count, torch.Tensor))
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"Labels run from {int(labels.min())} to {int(labels.max())}, but the head has "
                f"{counted(classes, 'class')}; count them from 0 over all tasks."
            )

    def check_change(self) -> None:
        """Raise ValueError if the sums of known classes cannot change."""
        self.check_growth()
        if not self.class_sums:
            raise ValueError(f"A {type(self).__name__} does not say which sums it keeps of a class (class_sums).")

    @property
    def forgets(self) -> bool:
        """Whether dropping a class removes its images from the sums completely."""
        return True

    def check_learnt(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Raise ValueError for features (B, D) that were certainly not learnt with these labels (B,).

        By default this cannot be known.
        """

    def check_forgotten(self, task: int, row: int) -> None:
        """Raise ValueError unless all images of a class, and no others, have been taken away."""
        block: Any = self.blocks[task]
        left, total = int(block.count[row]), block.total[row]
        if left:
            number = f"{left} of them are missing" if left > 0 else f"these are {-left} too many"
            raise ValueError(f"To forget a class, give all images that it was learnt from and no others; {number}.")
        total = read(total) if "total" in self.bits else total
        if total.square().sum() > _LEFT * self._mean_square():
            raise ValueError(
                "These are as many images as the class was learnt from, but not the same ones: taken away, they leave "
                "more than zero. Give the very images that it was learnt from."
            )

    def _mean_square(self) -> Any:
        """The mean squared length of the features that are summed."""
        return 1.0

    @torch.no_grad()
    def merge(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """Move the sums of the second class, given as (task, row), to the first."""
        for name in self.class_sums:
            sums = [getattr(self.blocks[task], name) for task, _ in (first, second)]
            if sums[0] is None:
                continue
            whole, part = sums[0][first[1]], sums[1][second[1]]
            if name in self.bits:
                write(whole, read(whole) + read(part))
            else:
                whole.add_(part)
            part.zero_()  # of float64 bits too: they are those of 0.0

    def targets(self, logits: torch.Tensor, teacher: FittedHead | None) -> torch.Tensor:
        """Turn a teacher's logits (B, C_t) over the task's classes into targets, for a head that `needs_teacher`.

        `teacher`: the fitted head that produced them; None for logits of a trained head.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it learns from a teacher.")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scaled(super().forward(features))

    def scaled(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (N, C) as logits."""
        if self.fitted_scale is None:
            return self.scale * scores
        return self.scale.to(scores) * standardised(scores, self.variance.to(scores))
