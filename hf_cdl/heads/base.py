"""What every classification head is: a block per task, and features that may be standardised before it."""

from __future__ import annotations

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
        """The file of statistics that are given instead of being measured."""
        return Path(self.standardise) if self.standardise and self.standardise.endswith(".safetensors") else None


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """On its device, or on the CPU for one without float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


class Head(nn.Module, ABC):
    """Features (B, D) -> logits (B, C) over the classes of all tasks, in stream order. One block per task.

    A `fitted` head is no trained one, see FittedHead. A subclass with more options than HeadConfig's names its
    dataclass in `config_class`.
    """

    fitted: ClassVar[bool] = False
    config_class: ClassVar[type] = HeadConfig
    bits: ClassVar[tuple[str, ...]] = ()
    """Names of buffers, of the head and its blocks, that hold the bits of float64 numbers."""
    keeps_sums: ClassVar[bool] = False
    """Whether its checkpoints hold what it needs to learn further tasks and not to answer: `drop_sums` drops it."""
    needs_teacher = False
    """Whether it learns from a teacher's answers."""

    def __init__(self, config: Any, hidden_size: int):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.standard = Standardise(hidden_size, config.given_statistics) if config.standardise else None
        self.blocks = nn.ModuleList()

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], has_teacher: bool) -> list[tuple[str, str]]:
        """What is wrong with a recipe's fields of this head: pairs of a field and what is wrong and what to do.

        The values of `fields` may be of any type: types are checked elsewhere. `has_teacher`: it learns beside one.
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
        """The weights by name, and the numbers that `bits` stand for in their place."""
        return {
            name: movable(value).view(torch.float64) if name.rpartition(".")[2] in self.bits else value
            for name, value in self.state_dict().items()
        }

    def end_task(self) -> None:
        """What the head does when a task is learnt (a regression solves here); nothing by default."""

    def check_growth(self) -> None:
        """Raise ValueError if it can learn no further task."""

    def drop_sums(self) -> None:
        """Of a head that `keeps_sums`: drop them for good, and say so in its `config`."""
        raise NotImplementedError(f"{type(self).__name__} keeps sums, but does not say how to drop them.")

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, D) as the blocks read them."""
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
    """A head without parameters, which accumulates statistics of fixed features instead of being trained.

    Its scores, cosines or a regression's answers, become logits by a factor `scale` (ours): as they are, the softmax
    over them is nearly uniform.
    """

    fitted: ClassVar[bool] = True
    config_class: ClassVar[type] = FittedConfig

    @abstractmethod
    def accumulate(self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None = None) -> None:
        """Add features (B, D) of the newest task; `labels` (B,) count from its first class.

        Raises FloatingPointError for features or answers that are NaN or infinite.
        `taught` (B, C_t): the `targets` of a teacher's answers, for a head that `needs_teacher`.
        """

    def targets(self, logits: torch.Tensor, teacher: FittedHead | None) -> torch.Tensor:
        """What a head that `needs_teacher` learns of a teacher's logits (B, C_t) over the task's classes.

        `teacher`: the fitted head that they are of; None for the logits of a model that was trained.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it learns from a teacher.")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.config.scale * super().forward(features)
