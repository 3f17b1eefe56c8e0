"""Heads solved in closed form from sums over the images: a Gram matrix, and class sums with their counts.

Sums add up, so whatever happens to a classifier is exact: images are added to any class or taken away again, and
classes are merged or removed, in any order, with the same solution as learning the final images at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import check_finite
from hf_cdl.heads.base import FittedConfig, FittedHead, at_least_float32
from hf_cdl.heads.bits import add, movable, read
from hf_cdl.heads.standardise import check_features

_ZERO, _STRANGE = 1e-12, 1e-6
"""Eigenvalues below this share of the largest are 0; features may have this share of their square along those."""


@dataclass(frozen=True)
class SumsConfig(FittedConfig):
    features: int | None = field(
        default=None, metadata={"help": "Number M of random features in place of the D own ones; null: none."}
    )
    sums: bool | str = field(
        default=True,
        metadata={"help": "Keep the Gram matrix and the class sums; per_class: a Gram matrix of each class, so that a "
                  "class can be forgotten without its images; false: a smaller head that can only answer."},
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.features is not None and self.features < 1:
            raise ValueError(f"A head of sums needs features >= 1 or null; got {self.features}.")
        if self.sums not in (True, False, "per_class"):
            raise ValueError(f"A head's sums are {self.sums!r}; allowed: true, false, per_class.")


class ClassSums(nn.Module):
    """What the images of a task's C_t classes leave: `total` (C_t, M) and `count` (C_t,), and the solved weights.

    With `per_class` also `grams` (C_t, M (M + 1) / 2), the upper triangle of each class's Gram matrix. Float64 numbers
    are stored as their bits in integers, which changing the model's dtype cannot round.
    """

    def __init__(self, width: int, num_classes: int, sums: bool | str, bias: bool):
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.total: torch.Tensor
        self.count: torch.Tensor
        self.grams: torch.Tensor
        packed = torch.zeros(num_classes, width * (width + 1) // 2, dtype=torch.int64) if sums == "per_class" else None
        self.register_buffer("weight", torch.zeros(num_classes, width))
        self.register_buffer("bias", torch.zeros(num_classes) if bias else None)
        self.register_buffer("total", torch.zeros(num_classes, width, dtype=torch.int64) if sums else None)
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64) if sums else None)
        self.register_buffer("grams", packed)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.linear(features, self.weight, self.bias)


class SumsHead(FittedHead):
    r"""Head that is a function of G = \sum_n h_n h_n^T (M, M) and of each class's sum \sum_n h_n and count.

    h is the (standardised) feature, or with `features` M its random map ReLU(x P), P (D, M) drawn once and kept. Ours:
    P ~ N(0, 1 / D), so that h has the scale of x. A subclass solves for weights of all classes in `solve`.

    `gram` (M, M) is the Gram matrix of all `images` that were learnt, classes removed without their images included;
    it is not stored if every class has its own.
    """

    config_class: ClassVar[type] = SumsConfig
    bits: ClassVar[tuple[str, ...]] = ("gram", "grams", "total")
    class_sums: ClassVar[tuple[str, ...]] = ("total", "count", "grams")
    keeps_sums: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False

    def __init__(self, config: SumsConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        self.width = config.features or hidden_size
        self.gram: torch.Tensor
        self.images: torch.Tensor
        self.projection: torch.Tensor | None
        whole = torch.zeros(self.width, self.width, dtype=torch.int64) if config.sums is True else None
        self.register_buffer("gram", whole)
        self.register_buffer("images", torch.zeros((), dtype=torch.int64) if config.sums else None)
        self.register_buffer("projection", torch.empty(hidden_size, self.width) if config.features else None)

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], has_teacher: bool) -> list[tuple[str, str]]:
        if fields.get("sums") is False:
            return [("sums", "is false, but to learn it needs them; drop them from what was learnt")]
        return []

    @abstractmethod
    def solve(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Solve for weights (C, M) and biases (C,) or None, from G, class sums (C, M) and counts (C,) in float64."""

    # ---- growing ----

    def init_shared(self) -> None:
        super().init_shared()
        for value in (self.gram, self.images):
            if value is not None:
                init.zeros_(value)
        if self.projection is not None:
            init.normal_(self.projection, std=self.hidden_size**-0.5)

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(ClassSums(self.width, num_classes, self.config.sums, self.has_bias))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        for value in self.blocks[task].buffers():
            init.zeros_(value)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        features = super().prepare(features)
        return features if self.projection is None else torch.relu(features @ self.projection)

    def check_growth(self) -> None:
        if not self.config.sums:
            raise ValueError(
                f"This model's {self.name} head has no sums (head.sums is false): it can answer, but learn no further "
                "task. "
                "Load the checkpoint that still has them, such as task-05 of its run."
            )

    def drop_sums(self) -> None:
        """Keep only what inference needs: weights and random map."""
        self.config = replace(self.config, sums=False)
        for module in (self, *self.blocks):
            for name in {"images", "count", *self.bits} & module._buffers.keys():
                module.register_buffer(name, None)

    # ---- changing ----

    @torch.no_grad()
    def accumulate(
        self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None = None, sign: int = 1
    ) -> None:
        check_features(features)
        self.check_labels(labels)
        mapped = movable(self.prepare(at_least_float32(features))).double()
        first = 0
        for block in map(_sums_of, self.blocks):
            own = (labels >= first) & (labels < first + len(block.count))
            if own.any():
                self._add_to(block, mapped[own], labels[own] - first, None if taught is None else taught[own], sign)
            first += len(block.count)
        if self.gram is not None:
            add(self.gram, sign * (mapped.T @ mapped))
        self.images.add_(sign * len(labels))

    def _add_to(
        self, block: ClassSums, mapped: torch.Tensor, rows: torch.Tensor, taught: torch.Tensor | None, sign: int
    ) -> None:
        """Add images of a task's classes to its sums, or take them away; `rows` (B,) count from its first class."""
        targets = self._targets(F.one_hot(rows, len(block.count)).to(mapped), taught)
        add(block.total, sign * (targets.T @ mapped))
        block.count.add_(sign * torch.bincount(rows, minlength=len(block.count)))
        if block.grams is not None:
            upper = torch.triu_indices(self.width, self.width, device=mapped.device)
            for row in rows.unique().tolist():
                of_class = mapped[rows == row]
                add(block.grams[row], sign * (of_class.T @ of_class)[upper[0], upper[1]])

    def _targets(self, targets: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        """Targets of a task's images (B, C_t), given as one-hot."""
        return targets

    @torch.no_grad()
    def keep(self, task: int, rows: list[int]) -> None:
        if self.config.sums == "per_class":
            block = _sums_of(self.blocks[task])
            kept = torch.zeros_like(block.count, dtype=torch.bool)
            kept[rows] = True
            self.images.sub_(block.count[~kept].sum())
        super().keep(task, rows)

    @property
    def forgets(self) -> bool:
        return self.config.sums == "per_class"

    @torch.no_grad()
    def check_learnt(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        mapped = movable(self.prepare(at_least_float32(features))).double()
        if self.gram is not None:
            parts = [(read(self.gram), torch.ones_like(labels, dtype=torch.bool))]
        else:
            grams = torch.cat([read(_sums_of(block).grams) for block in self.blocks])
            parts = [(self._unpacked(grams[label]), labels == label) for label in labels.unique().tolist()]
        for gram, own in parts:
            values, vectors = torch.linalg.eigh(gram)
            outside = mapped[own] @ vectors[:, values < _ZERO * values[-1]]
            strange = outside.square().sum(dim=1) > _STRANGE * mapped[own].square().sum(dim=1)
            if strange.any():
                raise ValueError(
                    f"{int(strange.sum())} of {int(own.sum())} images were not learnt with the label that they are "
                    "said to have had: their features are no combination of those that were. Give the images and "
                    "labels of the training."
                )

    def _mean_square(self) -> torch.Tensor:
        return self.gram_matrix().diagonal().sum() / self.images.clamp(min=1)

    # ---- solving ----

    def gram_matrix(self) -> torch.Tensor:
        """G (M, M) of all images, in float64; a copy."""
        if self.gram is not None:
            return read(self.gram).clone()
        return self._unpacked(torch.cat([read(_sums_of(block).grams) for block in self.blocks]).sum(dim=0))

    def _unpacked(self, upper: torch.Tensor) -> torch.Tensor:
        """The symmetric matrix (M, M) with this upper triangle."""
        row, column = torch.triu_indices(self.width, self.width, device=upper.device)
        gram = torch.zeros(self.width, self.width, dtype=upper.dtype, device=upper.device)
        gram[row, column] = upper
        return gram + gram.triu(diagonal=1).T

    @torch.no_grad()
    def end_task(self) -> None:
        """Solve for all classes. Raises FloatingPointError if the sums are NaN or infinite, or cannot be solved."""
        try:
            check_finite(self.numbers(), f"The sums of the {self.name} head")
        except ValueError as error:
            raise FloatingPointError(str(error)) from error
        blocks = [*map(_sums_of, self.blocks)]
        sizes = [len(block.count) for block in blocks]
        total, count = torch.cat([read(block.total) for block in blocks]), torch.cat([b.count for b in blocks])
        weight, bias = self.solve(self.gram_matrix(), total, count.to(total))
        for block, rows in zip(blocks, weight.split(sizes), strict=True):
            block.weight.copy_(rows)
        for block, rows in zip(blocks, () if bias is None else bias.split(sizes), strict=False):
            if block.bias is not None:
                block.bias.copy_(rows)


def _sums_of(block: Any) -> ClassSums:
    return block
