"""Base classes of classification heads: one block per task, on features that may be standardised first."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hf_cdl.checked import check_types
from hf_cdl.heads.standardise import Standardise


@dataclass(frozen=True)
class HeadConfig:
    standardise: str | None = field(
        default=None,
        metadata={"help": "Each dimension of the features gets mean 0 and deviation 1, by statistics that stay: "
                  "first_task, those of the first task's un-augmented images, measured before the head learns; or a "
                  "safetensors file with `mean` and `std` (D,), read when the model is made."},
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


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on its device, or on the CPU if the device lacks float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


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

    def __init__(self, config: Any, hidden_size: int):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.standard = Standardise(hidden_size, config.given_statistics) if config.standardise else None
        self.blocks = nn.ModuleList()

    @classmethod
    def check_class(cls) -> str | None:
        """What a class lacks of what its attributes promise, to follow its name in a message; None if nothing."""
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
        """List the problems of a recipe's fields for this head, as pairs of a field and a problem with its remedy.

        The values of `fields` may be of any type: types are checked elsewhere. `has_teacher`: it learns from one.
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

    def check_growth(self) -> None:
        """Raise ValueError if the head cannot learn further tasks."""

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
    scale: float = field(
        default=10.0,
        metadata={"help": "Factor of the scores, which are about 0 to 1, as logits: for confidence, not accuracy."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"A fitted head needs scale > 0; got {self.scale}.")


class FittedHead(Head):
    """Head without parameters that accumulates statistics of fixed features instead of being trained.

    Its scores (cosines or regression outputs) are multiplied by `scale` (ours) to give logits; otherwise their softmax
    would be nearly uniform.
    """

    fitted: ClassVar[bool] = True
    config_class: ClassVar[type] = FittedConfig

    @abstractmethod
    def accumulate(self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None = None) -> None:
        """Add features (B, D) of the newest task; `labels` (B,) count from its first class.

        `taught` (B, C_t): the `targets` made of a teacher's logits, for a head that `needs_teacher`. Raises
        FloatingPointError for features or targets that are NaN or infinite.
        """

    def targets(self, logits: torch.Tensor, teacher: FittedHead | None) -> torch.Tensor:
        """Turn a teacher's logits (B, C_t) over the task's classes into targets, for a head that `needs_teacher`.

        `teacher`: the fitted head that produced them; None for logits of a trained head.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it learns from a teacher.")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.config.scale * super().forward(features)
