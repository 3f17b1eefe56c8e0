"""Ridge regression: one pass over each task's images gives the joint solution for all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F

from hf_cdl.checked import check_effect
from hf_cdl.heads.base import FittedHead
from hf_cdl.heads.bits import movable
from hf_cdl.heads.sums import SumsConfig, SumsHead
from hf_cdl.heads.validation import choose_strength


@dataclass(frozen=True)
class RidgeConfig(SumsConfig):
    strength: float | Literal["auto"] = field(
        default="auto",
        metadata={"help": "Lambda, added to the diagonal of the Gram matrix; auto: chosen after every task from the "
                  "sums, by generalised cross-validation. With soft_targets it must be a number."},
    )  # fmt: skip
    balanced: bool = field(
        default=False,
        metadata={"help": "Divide each class's weights by the root of its relative number of images, so that classes "
                  "with few images are not answered too rarely."},
    )  # fmt: skip
    soft_targets: float = field(
        default=0.0, metadata={"help": "Share rho of the teacher's softmax in the targets; the labels have the rest."}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature tau of the teacher's softmax; not for a teacher with a fitted head."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_effect(self, "A ridge head", "temperature", self.soft_targets != 0, "soft_targets is 0")
        if not 0 <= self.soft_targets <= 1 or self.temperature <= 0:
            raise ValueError(
                f"A ridge head needs soft_targets from 0 to 1 and temperature > 0; got {self.soft_targets} and "
                f"{self.temperature}."
            )
        if self.strength != "auto" and self.strength <= 0:
            raise ValueError(f"A ridge head needs strength > 0 or auto; got {self.strength}.")
        if self.strength == "auto" and self.soft_targets:
            raise ValueError(
                "A ridge head chooses its strength by targets that are labels alone, but soft_targets is "
                f"{self.soft_targets}. Give the strength as a number, or leave soft_targets out."
            )


class RidgeHead(SumsHead):
    r"""Ridge regression from features to one-hot labels on all images seen so far (RanPAC, arXiv 2307.02251, Sec. 4).

        G = \sum_n h_n h_n^T    C = \sum_n h_n y_n^T    W = (G + \lambda I)^{-1} C    scores = W^T h

    y is one-hot, or with `soft_targets` \rho it is (1 - \rho) one-hot + \rho times the teacher's output over the
    task's classes (ours). The random map's N(0, 1 / D) is equivalent to the paper's N(0, 1) with \lambda D times
    larger, and the paper chooses \lambda per task on images held back; `auto` (ours) needs none, see validation.py.

    With `balanced` (ours) the columns of W are divided by the roots of the classes' numbers of images. The sums are in
    float64, since the condition number of G is far beyond float32, and W is solved again for all classes after each
    task, so it is the joint solution however the tasks are split.
    """

    config_class: ClassVar[type] = RidgeConfig
    choice: ClassVar[str] = "strength"
    config: RidgeConfig

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return self.config.soft_targets > 0

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], has_teacher: bool) -> list[tuple[str, str]]:
        problems = super().check_recipe(fields, has_teacher)
        if fields.get("soft_targets") and not has_teacher:
            problems.insert(0, ("soft_targets", "are a teacher's answers, but the model has none; set it to 0"))
        return problems

    # ---- targets ----

    def targets(self, logits: torch.Tensor, teacher: FittedHead | None) -> torch.Tensor:
        """Return probabilities softened by the temperature, or a fitted teacher's unscaled scores."""
        if teacher is None:
            return (logits / self.config.temperature).softmax(dim=-1)
        return logits / teacher.scale

    def check_change(self) -> None:
        super().check_change()
        if self.needs_teacher:
            raise ValueError(
                f"This ridge head learnt a teacher's answers (soft_targets is {self.config.soft_targets}), which are "
                "not known for these images, so its sums can only grow by training with the teacher."
            )

    def _targets(self, targets: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        if not self.needs_teacher:
            return targets
        if taught is None:
            raise ValueError(f"soft_targets is {self.config.soft_targets}, but there are no answers of a teacher.")
        if not torch.isfinite(taught).all():
            raise FloatingPointError(
                "The teacher's answers are NaN or infinite, so they are no targets; check the teacher."
            )
        return torch.lerp(targets, taught.to(targets), self.config.soft_targets)

    # ---- the solution ----

    def choose(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> float:
        return choose_strength(gram, total, count, int(self.images))

    def solve(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, None]:
        gram.diagonal().add_(self.choice_made)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise FloatingPointError(
                f"The ridge head's strength {self.choice_made} is too small for features of this size (diagonal "
                f"of the Gram matrix up to {gram.diagonal().max().item():.3g}); raise head.strength."
            )
        self._factor = factor
        return self._factors(count)[:, None] * torch.cholesky_solve(total.T, factor).T, None

    def _factors(self, count: torch.Tensor) -> torch.Tensor:
        """Factors (C,) of the classes' scores, for their numbers of images (C,); 1 if all have as many."""
        root = count.double().clamp(min=1).sqrt()
        return root.mean() / root if self.config.balanced else torch.ones_like(root)

    def leave_one_out(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        r"""(f - l y) / (1 - l) of scores f, targets y and leverage l = h^T (G + \lambda I)^{-1} h."""
        h = movable(features).double()
        leverage = (h * torch.cholesky_solve(h.T, self._solved()).T).sum(dim=1, keepdim=True)
        factors = self._factors(self.of_classes("count"))
        scores = h @ self.of_classes("weight").double().T
        return (scores - leverage * factors * F.one_hot(movable(labels), scores.shape[1])) / (1 - leverage)

    def class_left_out(self, features: torch.Tensor, label: int) -> torch.Tensor | None:
        r"""(I - K)^{-1} F of scores F and K = H (G + \lambda I)^{-1} H^T; the factors of `balanced` stay."""
        if self.needs_teacher:  # other classes had a part in these images' targets
            return None
        h = movable(features).double()
        kept = torch.eye(len(h)).to(h) - h @ torch.cholesky_solve(h.T, self._solved())
        return torch.linalg.solve(kept, h @ self.of_classes("weight").double().T)

    def _solved(self) -> torch.Tensor:
        r"""Cholesky factor of G + \lambda I."""
        if self._factor is not None:
            return self._factor
        gram = self.gram_matrix()
        gram.diagonal().add_(self.choice_made)
        return torch.linalg.cholesky(gram)
