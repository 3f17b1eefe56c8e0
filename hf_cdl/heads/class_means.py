"""Nearest-class-mean head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.heads.base import FittedHead
from hf_cdl.heads.drift import Drift


class ClassMeans(nn.Module):
    """Sum and count of the unit-length features of each class of a task; scores are cosines to the class means."""

    def __init__(self, hidden_size: int, num_classes: int):
        super().__init__()
        self.total: torch.Tensor
        self.count: torch.Tensor
        self.register_buffer("total", torch.zeros(num_classes, hidden_size))
        self.register_buffer("count", torch.zeros(num_classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features @ F.normalize(self.total, dim=-1).T


class NearestMeanHead(FittedHead):
    """Nearest class mean without training (iCaRL's classifier, Rebuffi et al. 2017, arXiv 1611.07725, on all data)."""

    class_sums: ClassVar[tuple[str, ...]] = ("total", "count")

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(ClassMeans(self.hidden_size, num_classes))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        block: Any = self.blocks[task]
        init.zeros_(block.total)
        init.zeros_(block.count)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().prepare(features), dim=-1)

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None, sign: int) -> None:
        first = 0
        for module in self.blocks:
            block: Any = module
            own = (labels >= first) & (labels < first + len(block.count))
            rows = labels[own] - first
            block.total.index_add_(0, rows, features[own], alpha=sign)
            block.count.index_add_(0, rows, torch.ones_like(rows, dtype=block.count.dtype), alpha=sign)
            first += len(block.count)

    @property
    def why_fixed(self) -> None:
        return None

    @torch.no_grad()
    def move(self, drift: Drift, layers: Sequence[Drift] = ()) -> None:
        for module in self.blocks:
            block: Any = module
            block.total.copy_(drift.sums(block.total.double(), block.count))

    def leave_one_out(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = torch.cat([block.total for block in self.blocks])  # type: ignore[arg-type]
        scores = features @ F.normalize(total, dim=-1).T
        own = (features * F.normalize(total[labels] - features, dim=-1)).sum(dim=-1)
        return scores.scatter(1, labels[:, None], own[:, None])
