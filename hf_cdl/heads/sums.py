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
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import check_finite
from hf_cdl.heads.base import FittedConfig, FittedHead, at_least_float32
from hf_cdl.heads.bits import add, movable, read
from hf_cdl.heads.class_sums import ClassSums, outside, packed, sums_of, unpacked

_OWN = 4
"""Squared length of the own features beside random ones, as a multiple of that of the random ones."""


@dataclass(frozen=True)
class SumsConfig(FittedConfig):
    features: int | None = field(
        default=None, metadata={"help": "Number M of random features in place of the D own ones; null: none."}
    )
    own_features: bool = field(default=False, metadata={"help": "Keep the own features beside the random ones."})
    sums: bool | str = field(
        default=True,
        metadata={"help": "Keep the Gram matrix and the class sums; per_class: a Gram matrix of each class, so that a "
                  "class can be forgotten without its images; false: a smaller head that can only answer."},
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.features is not None and self.features < 1:
            raise ValueError(f"A head of sums needs features >= 1 or null; got {self.features}.")
        if self.own_features and self.features is None:
            raise ValueError(
                "A head's own_features would have no effect: without random ones they are all that there is. Give "
                "their number, as features: 2000, or leave own_features out."
            )
        if self.sums not in (True, False, "per_class"):
            raise ValueError(f"A head's sums are {self.sums!r}; allowed: true, false, per_class.")


class SumsHead(FittedHead):
    r"""Head that is a function of G = \sum_n h_n h_n^T (M, M) and of each class's sum \sum_n h_n and count.

    h is the (standardised) feature x (D,), or with `features` its random map ReLU(x P), P drawn once and kept, or with
    `own_features` both side by side, the own ones with four times the squared length of the random ones. Ours:
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
        self.width = (config.features or 0) + (hidden_size if config.own_features or not config.features else 0)
        self.gram: torch.Tensor
        self.images: torch.Tensor
        self.projection: torch.Tensor | None
        whole = torch.zeros(self.width, self.width, dtype=torch.int64) if config.sums is True else None
        self.register_buffer("gram", whole)
        self.register_buffer("images", torch.zeros((), dtype=torch.int64) if config.sums else None)
        self.register_buffer("projection", torch.empty(hidden_size, config.features) if config.features else None)

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
        if self.projection is None:
            return features
        mapped = torch.relu(features @ self.projection)
        if not self.config.own_features:
            return mapped
        factor = (_OWN * mapped.shape[1] / (2 * features.shape[1])) ** 0.5  # |ReLU(x P)|^2 is M |x|^2 / 2D on average
        return torch.cat([factor * features, mapped], dim=-1)

    def check_growth(self) -> None:
        if not self.config.sums:
            raise ValueError(
                f"This model's {self.name} head has no sums (head.sums is false): it can answer, but learn no further "
                "task. Load the checkpoint that still has them, such as task-05 of its run."
            )

    def drop_sums(self) -> None:
        """Keep only what inference needs, weights and random map, and what was chosen."""
        self.config = replace(self.config, sums=False)
        for module in (self, *self.blocks):
            for name in {"gram", "images", *self.class_sums} & module._buffers.keys():
                module.register_buffer(name, None)

    # ---- changing ----

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None, sign: int) -> None:
        mapped, labels, first = movable(features).double(), movable(labels), 0
        taught = None if taught is None else movable(taught)
        for block in map(sums_of, self.blocks):
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
        block.count.add_(sign * torch.bincount(rows, minlength=len(block.count)).to(block.count))
        if block.grams is not None:
            for row in rows.unique().tolist():
                of_class = mapped[rows == row]
                add(block.grams[row], sign * packed(of_class.T @ of_class))

    def _targets(self, targets: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
        """Targets of a task's images (B, C_t), given as one-hot."""
        return targets

    @torch.no_grad()
    def keep(self, task: int, rows: list[int]) -> None:
        if self.config.sums == "per_class":
            block = sums_of(self.blocks[task])
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
            grams = torch.cat([read(sums_of(block).grams) for block in self.blocks])
            parts = [(unpacked(self.width, grams[label]), labels == label) for label in labels.unique().tolist()]
        for gram, own in parts:
            if strange := outside(gram, mapped[own]):
                raise ValueError(
                    f"{strange} of {int(own.sum())} images were not learnt with the label that they are "
                    "said to have had: their features are no combination of those that were. Give the images and "
                    "labels of the training."
                )

    def _mean_square(self) -> torch.Tensor:
        return self.gram_matrix().diagonal().sum() / max(1, int(self.images))

    # ---- solving ----

    def gram_matrix(self) -> torch.Tensor:
        """G (M, M) of all images, in float64; a copy."""
        if self.gram is not None:
            return read(self.gram).clone()
        return unpacked(self.width, torch.cat([read(sums_of(block).grams) for block in self.blocks]).sum(dim=0))

    @torch.no_grad()
    def end_task(self) -> None:
        """Solve for all classes. Raises FloatingPointError if the sums are NaN or infinite, or cannot be solved."""
        try:
            check_finite(self.numbers(), f"The sums of the {self.name} head")
        except ValueError as error:
            raise FloatingPointError(str(error)) from error
        blocks = [*map(sums_of, self.blocks)]
        sizes = [len(block.count) for block in blocks]
        total, count = torch.cat([read(block.total) for block in blocks]), torch.cat([b.count for b in blocks])
        weight, bias = self.solve(self.gram_matrix(), total, count.to(total))
        for block, rows in zip(blocks, weight.split(sizes), strict=True):
            block.weight.copy_(rows)
        for block, rows in zip(blocks, () if bias is None else bias.split(sizes), strict=False):
            if block.bias is not None:
                block.bias.copy_(rows)
        super().end_task()
