"""Heads solved in closed form from sums over the images: a Gram matrix, and class sums with their counts.

Sums can be added and subtracted, so every change of a classifier is exact: images are added to any class or removed,
and classes are merged or removed, in any order. The solution is the same as from learning the final images at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import check_finite, check_share
from hf_cdl.heads.base import FittedConfig, FittedHead, at_least_float32, share_of
from hf_cdl.heads.bits import add, movable, read, write
from hf_cdl.heads.class_sums import ClassSums, count_never_learnt, packed, sums_of, unpacked
from hf_cdl.heads.drift import Drift
from hf_cdl.heads.known import LAYERS, Known
from hf_cdl.heads.move_sums import move_sums
from hf_cdl.heads.sampled_images import learnt, sample_images, score_parts
from hf_cdl.heads.unlearnt import unlearnt

_OWN = 4
"""Squared length of the own features beside random ones, as a multiple of that of the random ones."""


@dataclass(frozen=True)
class SumsConfig(FittedConfig):
    features: int | None = field(
        default=None, metadata={"help": "Number M of random features in place of the D own ones; null: none."}
    )
    own_features: bool = field(default=False, metadata={"help": "Use the own features beside the random ones."})
    sums: bool | str = field(
        default=True,
        metadata={"help": "Store the Gram matrix and the class sums; per_class: one Gram matrix per class, so that a "
                  "class can be removed without its images; false: none, a smaller head that cannot learn more."},
    )  # fmt: skip
    known: float | None = field(
        default=None,
        metadata={"help": "Also score how known an image is. The value is the share of images of known classes, such "
                  "as 0.95, that keep their answer when you ask for `unknown`."},
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
        if self.known is not None:
            check_share(self.known, "A head's known")
            if self.features is not None and not self.own_features:
                raise ValueError(
                    "A head's known is read from the own features, but it has random ones alone. Set own_features to "
                    "true, which keeps both, or leave known out."
                )


class SumsHead(FittedHead):
    r"""Head that is a function of G = \sum_n h_n h_n^T (M, M) and of each class's sum \sum_n h_n and count.

    h is the (standardised) feature x (D,), or with `features` its random map ReLU(x P), P drawn once and kept, or with
    `own_features` both side by side, the own ones with four times the squared length of the random ones. Ours:
    P ~ N(0, 1 / D), so that h has the scale of x. A subclass solves for weights of all classes in `solve`.

    `gram` (M, M) is the Gram matrix of all `images` learnt, including those of classes that were removed without their
    images. It is not stored if every class has its own. `gone` (D, D) is the share of the means of those classes in
    it, see `drop_means`.
    """

    config_class: ClassVar[type] = SumsConfig
    bits: ClassVar[tuple[str, ...]] = (
        *("gram", "grams", "total", "gone", "own_total", "layer_gram", "layer_grams", "layer_total", "chosen"),
    )
    class_sums: ClassVar[tuple[str, ...]] = ("total", "count", "grams", "own_total", "layer_total", "layer_grams")
    keeps_sums: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False
    choice: ClassVar[str]
    """Name of the option that may be `auto`: chosen from the sums at every task's end."""

    def __init__(self, config: SumsConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        self.width = (config.features or 0) + (hidden_size if config.own_features or not config.features else 0)
        self.gram: torch.Tensor
        self.images: torch.Tensor
        self.chosen: torch.Tensor
        self.projection: torch.Tensor | None
        self.known: Known | None = None
        self.layer_gram: torch.Tensor
        self.gone: torch.Tensor
        whole = torch.zeros(self.width, self.width, dtype=torch.int64) if config.sums is True else None
        self.register_buffer("gram", whole)
        self.register_buffer("images", torch.zeros((), dtype=torch.int64) if config.sums else None)
        self.register_buffer("projection", torch.empty(hidden_size, config.features) if config.features else None)
        chooses = getattr(config, self.choice) == "auto"
        self.register_buffer("chosen", torch.zeros((), dtype=torch.int64) if chooses else None)
        self.register_buffer("layer_gram", None)
        self.register_buffer("gone", None)
        self._factor: torch.Tensor | None = None  # of the last solution, while a task ends
        self._before: tuple[Any, torch.Tensor] | None = None  # drawn images, and their scores before

    @property
    def reads_layers(self) -> bool:  # type: ignore[override]
        return self.config.known is not None

    def read_layers(self, size: int) -> None:
        self.known = Known(self.hidden_size, size)
        if self.config.sums is True:
            self.layer_gram = torch.zeros(LAYERS, size, size, dtype=torch.int64)
            self.gone = torch.zeros(self.hidden_size, self.hidden_size, dtype=torch.int64)

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], has_teacher: bool) -> list[tuple[str, str]]:
        if fields.get("sums") is False:
            return [("sums", "is false, but to learn it needs them; drop them from what was learnt")]
        return []

    @property
    def choice_made(self) -> float:
        """The value of the option `choice`, or the one chosen at the newest task's end; 0 if nothing was learnt."""
        return float(read(self.chosen)) if self.chosen is not None else getattr(self.config, self.choice)

    def choices(self) -> dict[str, float]:
        return {**({} if self.chosen is None else {self.choice: self.choice_made}), **super().choices()}

    @abstractmethod
    def choose(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> float:
        """Choose the option `choice`, from the arguments of `solve`."""

    @abstractmethod
    def solve(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Solve for weights (C, M) and biases (C,) or None, from G, class sums (C, M) and counts (C,) in float64."""

    # ---- growing ----

    def init_shared(self) -> None:
        super().init_shared()
        for value in (self.gram, self.images, self.chosen, self.layer_gram, self.gone):
            if value is not None:
                init.zeros_(value)
        if self.known is not None:
            self.known.reset()
        if self.projection is not None:
            init.normal_(self.projection, std=self.hidden_size**-0.5)

    def add_task(self, num_classes: int) -> None:
        known = None if self.known is None else (self.hidden_size, self.known.layer_means.shape[1])
        soft = self.needs_teacher
        self.blocks.append(ClassSums(self.width, num_classes, self.config.sums, self.has_bias, known, soft))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        for value in self.blocks[task].buffers():
            init.zeros_(value)

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """The backbone's own features (B, D), standardised if the head does that."""
        return super().prepare(features)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        return self.mapped(self.standardised(features))

    def mapped(self, features: torch.Tensor) -> torch.Tensor:
        """Map own features (B, D) to what is summed (B, M)."""
        if self.projection is None:
            return features
        mapped = torch.relu(features @ self.projection.to(features))
        return torch.cat([self._own * features, mapped], dim=-1) if self.config.own_features else mapped

    @property
    def _own(self) -> float:
        """Factor of the own features."""
        if self.projection is None:
            return 1.0
        return (_OWN * self.config.features / (2 * self.hidden_size)) ** 0.5  # |ReLU(x P)|^2 is about M |x|^2 / 2D

    def own(self, prepared: torch.Tensor) -> torch.Tensor:
        """The own features (B, D) within prepared ones (B, M), for a head that has them."""
        return prepared[:, : self.hidden_size] / self._own

    def check_growth(self) -> None:
        if not self.config.sums:
            raise ValueError(
                f"This model's {self.name} head has no sums (head.sums is false): it can answer, but learn no further "
                "task. Load the checkpoint that still has them, such as task-05 of its run."
            )

    def drop_sums(self) -> None:
        """Keep only what inference needs (weights and random map) and the options that were chosen."""
        self.config = replace(self.config, sums=False)
        for module in (self, *self.blocks):
            for name in {"gram", "images", "layer_gram", "gone", *self.class_sums} & module._buffers.keys():
                module.register_buffer(name, None)

    # ---- changing ----

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None, sign: int) -> None:
        mapped, labels = movable(features).double(), movable(labels)
        taught = None if taught is None else movable(taught)
        for block, own, rows in self._by_block(labels):
            self._add_to(block, mapped[own], rows, None if taught is None else taught[own], sign)
        if self.gram is not None:
            add(self.gram, sign * (mapped.T @ mapped))
        self.images.add_(sign * len(labels))

    def _by_block(self, labels: torch.Tensor) -> Iterator[tuple[ClassSums, torch.Tensor, torch.Tensor]]:
        """Each task's block that has some of the images, which they are (N,), and their rows in it."""
        first = 0
        for block in map(sums_of, self.blocks):
            own = (labels >= first) & (labels < first + len(block.count))
            if own.any():
                yield block, own, labels[own] - first
            first += len(block.count)

    @torch.no_grad()
    def update_layers(self, layers: torch.Tensor, labels: torch.Tensor, sign: int) -> None:
        layers, labels = movable(layers).double(), movable(labels)
        for block, own, rows in self._by_block(labels):
            add(block.layer_total, sign * torch.zeros_like(read(block.layer_total)).index_add(0, rows, layers[own]))
            for row in rows.unique().tolist() if block.layer_grams is not None else ():
                of_class = layers[own][rows == row]
                squares = packed(torch.einsum("nlw,nlv->lwv", of_class, of_class))
                add(block.layer_grams[row], sign * squares)
        if self.layer_gram is not None:
            add(self.layer_gram, sign * torch.einsum("nlw,nlv->lwv", layers, layers))

    def _add_to(
        self, block: ClassSums, mapped: torch.Tensor, rows: torch.Tensor, taught: torch.Tensor | None, sign: int
    ) -> None:
        """Add images of a task's classes to its sums, or take them away; `rows` (B,) count from its first class."""
        targets = self._targets(F.one_hot(rows, len(block.count)).to(mapped), taught)
        add(block.total, sign * (targets.T @ mapped))
        if block.own_total is not None:
            add(block.own_total, sign * torch.zeros_like(read(block.own_total)).index_add(0, rows, self.own(mapped)))
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
        block = sums_of(self.blocks[task])
        gone = [
            row
            for row in range(0 if block.count is None else len(block.count))
            if row not in rows and block.count[row]
        ]
        if self.config.sums == "per_class":
            self.images.sub_(block.count[gone].sum())
        elif gone:
            self.drop_means(block, gone)
            if self.layer_gram is not None:
                add(self.layer_gram, -_squares(read(block.layer_total)[gone], movable(block.count)[gone]))
        super().keep(task, rows)

    def drop_means(self, block: ClassSums, gone: list[int]) -> None:
        """Account for classes of a task, given as rows of its block, that are dropped without their images.

        For `known` their scatter stays, but not their means: all their images would be far from any class.
        """
        if self.gone is not None:
            add(self.gone, _squares(self._own_total(block)[gone], movable(block.count)[gone]))

    def _own_total(self, block: ClassSums) -> torch.Tensor:
        """Sums (C_t, D) of the own features of the images with each label."""
        if block.own_total is not None:
            return read(block.own_total)
        return self.own(read(block.total))

    @property
    def forgets(self) -> bool:
        return self.config.sums == "per_class"

    def check_learnt(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        mapped = movable(self.prepare(at_least_float32(features))).double()
        if strange := count_never_learnt(self, mapped, labels):
            raise ValueError(
                f"Of these images ({len(labels)}), {strange} cannot have been learnt with the given label: the head's "
                "sums hold nothing like them. Give the images and labels of the training."
            )

    def _mean_square(self) -> torch.Tensor:
        return self.gram_matrix().diagonal().sum() / max(1, int(self.images))

    # ---- moving ----

    @property
    def why_fixed(self) -> str | None:
        return "with soft_targets the class sums are not those of images" if self.needs_teacher else None

    def move(self, drift: Drift, layers: Sequence[Drift] = ()) -> None:
        move_sums(self, drift, layers)

    # ---- solving ----

    def gram_matrix(self) -> torch.Tensor:
        """G (M, M) of all images, in float64; a copy."""
        if self.gram is not None:
            return read(self.gram).clone()
        return unpacked(self.width, torch.cat([read(sums_of(block).grams) for block in self.blocks]).sum(dim=0))

    def of_classes(self, name: str) -> torch.Tensor:
        """One buffer of all blocks, over all classes (C, ...), as numbers."""
        values = [getattr(block, name) for block in self.blocks]
        return movable(torch.cat([read(value) if name in self.bits else value for value in values]))

    @torch.no_grad()
    def fit_recent(
        self, scores: torch.Tensor, labels: torch.Tensor, features: torch.Tensor, layers: Any = None
    ) -> None:
        super().fit_recent(scores, labels, features, layers)
        if self.known is not None:
            x, logits = movable(self.standardised(features)), self.scaled(scores)
            share = share_of(len(labels))
            centres, count = self.of_classes("centre"), self.of_classes("count")
            layers = movable(layers)
            if self._before is not None and share < 1:
                images, before = self._before
                self.known.carry(before, score_parts(self, *images))
            self.known.fit(x, layers, labels, logits, centres, count, share)
            if (strange := unlearnt(self, movable(features), labels, layers)) is not None:
                self.known.note_unlearnt(strange, share)

    def known_score(self, features: torch.Tensor, layers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
        if self.known is None:
            return None
        centres = torch.cat([sums_of(block).centre for block in self.blocks])
        return self.known(self.standardised(features), layers, logits, centres)

    def class_left_out(self, features: torch.Tensor, label: int) -> torch.Tensor | None:
        """Scores (N, C) of all images of a class, prepared features (N, M), by a head that never learnt them.

        The column of that class has no meaning. None for a head that cannot do this.
        """
        return None

    def own_sums(self, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gram matrix (D, D) and class sums (C, D) of the own features, from G, and class counts (C,)."""
        square, count = gram[: self.hidden_size, : self.hidden_size] / self._own**2, self.of_classes("count")
        square = square if self.gone is None else square - read(self.gone)
        total = torch.cat([self._own_total(sums_of(block)) for block in self.blocks])
        return self._part_of_classes(square, total, count), total, count

    def layer_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gram matrices (3, W, W) and sums (3, W) of the means of layers."""
        total, count = self.of_classes("layer_total"), self.of_classes("count")
        if self.layer_gram is not None:
            return self._part_of_classes(read(self.layer_gram).clone(), total, count), total.sum(dim=0)
        return unpacked(total.shape[-1], self.of_classes("layer_grams").sum(dim=0)), total.sum(dim=0)

    def _part_of_classes(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The part of a Gram matrix (..., D, D) that is of these classes, of sums (C, ..., D) and counts (C,).

        The rest is scatter of classes dropped without their images, which is taken to be like theirs.
        """
        if (left := int(count.sum())) == int(self.images) or not left:
            return gram
        between = _squares(total, count)
        return between + left / int(self.images) * (gram - between)

    @torch.no_grad()
    def end_task(self) -> None:
        """Solve for all classes. Raises FloatingPointError if the sums are NaN or infinite, or cannot be solved.

        Raises ValueError for a head without sums.
        """
        self.check_growth()
        try:
            check_finite(self.numbers(), f"The sums of the {self.name} head")
        except ValueError as error:
            raise FloatingPointError(str(error)) from error
        total, count, gram = self.of_classes("total"), self.of_classes("count"), self.gram_matrix()
        if self.chosen is not None:
            write(self.chosen, torch.tensor(self.choose(gram, total, count), dtype=torch.float64))
        if self.known is not None and self.known.fitted and learnt(self).any():
            self._before = (images := sample_images(self)), score_parts(self, *images)
        solved: dict[str, torch.Tensor | None] = {}
        if self.known is not None:
            solved["centre"] = self.known.solve(*self.own_sums(gram), *self.layer_sums())
        solved["weight"], solved["bias"] = self.solve(gram, total, count.to(total))
        for name, rows in solved.items():
            of_blocks = () if rows is None else rows.split([len(sums_of(block).count) for block in self.blocks])
            for block, own in zip(self.blocks, of_blocks, strict=False):
                getattr(block, name).copy_(own)
        try:
            super().end_task()
        finally:
            self._factor = self._before = None


def _squares(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """What the means of classes, of sums (C, ..., D) and counts (C,), leave in a Gram matrix (..., D, D)."""
    means = total.movedim(0, -1) / count.clamp(min=1)
    return total.movedim(0, -1) @ means.mT
