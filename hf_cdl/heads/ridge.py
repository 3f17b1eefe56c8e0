"""Ridge regression: one pass over each task's images gives the joint solution for all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import check_effect, check_finite
from hf_cdl.heads.base import FittedConfig, FittedHead, movable
from hf_cdl.heads.standardise import check_features


@dataclass(frozen=True)
class RidgeConfig(FittedConfig):
    strength: float = field(default=10.0, metadata={"help": "Lambda, added to the diagonal of the Gram matrix."})
    features: int | None = field(
        default=None, metadata={"help": "Number M of random features in place of the D own ones; null: none."}
    )
    soft_targets: float = field(
        default=0.0, metadata={"help": "Share rho of the teacher's answers in the targets, the labels have the rest."}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature tau of the teacher's softmax; a fitted teacher's scores have none."},
    )
    sums: bool = field(
        default=True,
        metadata={"help": "Keep the Gram matrix and the class sums; false: a smaller head that can only answer."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_effect(self, "A ridge head", "temperature", self.soft_targets != 0, "soft_targets is 0")
        if not 0 <= self.soft_targets <= 1 or self.temperature <= 0:
            raise ValueError(
                f"A ridge head needs soft_targets from 0 to 1 and temperature > 0; got {self.soft_targets} and "
                f"{self.temperature}."
            )
        if self.strength <= 0 or (self.features is not None and self.features < 1):
            raise ValueError(
                f"A ridge head needs strength > 0 and features >= 1 or null; got {self.strength} and {self.features}."
            )


class RidgeBlock(nn.Module):
    """A task's class sums of features (C_t, M), stored as bits of float64, and its weight rows of the solution."""

    def __init__(self, width: int, num_classes: int, sums: bool):
        super().__init__()
        self.total: torch.Tensor
        self.weight: torch.Tensor
        self.register_buffer("total", torch.zeros(num_classes, width, dtype=torch.int64) if sums else None)
        self.register_buffer("weight", torch.zeros(num_classes, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight)


class RidgeHead(FittedHead):
    r"""Ridge regression from features to one-hot labels on all images seen so far (RanPAC, arXiv 2307.02251, Sec. 4).

        G = \sum_n h_n h_n^T    C = \sum_n h_n y_n^T    W = (G + \lambda I)^{-1} C    scores = W^T h

    y is one-hot, or with `soft_targets` \rho it is (1 - \rho) one-hot + \rho times the teacher's output over the
    task's classes (ours). h is the (standardised) feature, or with `features` M its random map ReLU(x P), P (D, M)
    drawn once and kept. Ours: P ~ N(0, 1 / D), so that h has the scale of x; the paper's N(0, 1) is equivalent with
    \lambda D times larger, and the paper chooses \lambda per task. `gram` (M, M) and the class sums are accumulated in
    float64 and W is solved again for all classes after each task, so it is the joint solution however the tasks are
    split. (The condition number of G is far beyond float32.) They are stored as the bits of float64 in integers, which
    changing the model's dtype cannot round.
    """

    config_class: ClassVar[type] = RidgeConfig
    bits: ClassVar[tuple[str, ...]] = ("gram", "total")
    keeps_sums: ClassVar[bool] = True
    config: RidgeConfig

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return self.config.soft_targets > 0

    def __init__(self, config: RidgeConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        self.width = config.features or hidden_size
        self.gram: torch.Tensor
        self.projection: torch.Tensor | None
        self.register_buffer("gram", torch.zeros(self.width, self.width, dtype=torch.int64) if config.sums else None)
        self.register_buffer("projection", torch.empty(hidden_size, self.width) if config.features else None)

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], has_teacher: bool) -> list[tuple[str, str]]:
        problems = []
        if fields.get("soft_targets") and not has_teacher:
            problems.append(("soft_targets", "are a teacher's answers, but the model has none; set it to 0"))
        if fields.get("sums") is False:
            problems.append(("sums", "is false, but to learn it needs them; drop them from what was learnt"))
        return problems

    def check_growth(self) -> None:
        if not self.config.sums:
            raise ValueError(
                "This model's ridge head has no sums (head.sums is false): it can answer, but learn no further task. "
                "Load the checkpoint that still has them, such as task-05 of its run."
            )

    def drop_sums(self) -> None:
        """Keep only what inference needs: weight rows and random map."""
        self.config = replace(self.config, sums=False)
        for module in (self, *self.blocks):
            for name in {*self.bits} & module._buffers.keys():
                module.register_buffer(name, None)

    def targets(self, logits: torch.Tensor, teacher: FittedHead | None) -> torch.Tensor:
        """Return probabilities softened by the temperature, or a fitted teacher's unscaled scores."""
        if teacher is None:
            return (logits / self.config.temperature).softmax(dim=-1)
        return logits / teacher.config.scale

    def init_shared(self) -> None:
        super().init_shared()
        if self.config.sums:
            init.zeros_(self.gram)
        if self.projection is not None:
            init.normal_(self.projection, std=self.hidden_size**-0.5)

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(RidgeBlock(self.width, num_classes, self.config.sums))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        block: Any = self.blocks[task]
        if self.config.sums:
            init.zeros_(block.total)
        init.zeros_(block.weight)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        features = super().prepare(features)
        return features if self.projection is None else torch.relu(features @ self.projection)

    @torch.no_grad()
    def accumulate(self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None = None) -> None:
        check_features(features)
        block: Any = self.blocks[-1]
        mapped = movable(self.prepare(features.float())).double()
        targets = F.one_hot(labels, len(block.total)).to(mapped)
        if self.needs_teacher:
            if taught is None:
                raise ValueError(f"soft_targets is {self.config.soft_targets}, but there are no answers of a teacher.")
            if not torch.isfinite(taught).all():
                raise FloatingPointError(
                    "The teacher's answers are NaN or infinite, so they are no targets; check the teacher."
                )
            targets = torch.lerp(targets, taught.to(mapped), self.config.soft_targets)
        _add(self.gram, mapped.T @ mapped)
        _add(block.total, targets.T @ mapped)

    @torch.no_grad()
    def end_task(self) -> None:
        """Solve for all classes.

        Raises FloatingPointError if the sums are NaN or infinite, or the Gram matrix is singular despite lambda.
        """
        try:
            check_finite(self.numbers(), "The sums of the ridge head")
        except ValueError as error:
            raise FloatingPointError(str(error)) from error
        gram = _read(self.gram).clone()
        gram.diagonal().add_(self.config.strength)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise FloatingPointError(
                f"The ridge head's strength {self.config.strength} is too small for features of this size (diagonal "
                f"of the Gram matrix up to {gram.diagonal().max().item():.3g}); raise head.strength."
            )
        for module in self.blocks:
            block: Any = module
            block.weight.copy_(torch.cholesky_solve(_read(block.total).T, factor).T)


def _read(bits: torch.Tensor) -> torch.Tensor:
    """The float64 numbers encoded in a buffer of bits."""
    return movable(bits).view(torch.float64)


def _add(bits: torch.Tensor, value: torch.Tensor) -> None:
    """Add float64 numbers to a buffer of bits."""
    bits.copy_((_read(bits) + value).view(torch.int64))
