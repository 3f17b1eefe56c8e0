"""Classification heads that grow by one block per task and score all classes seen so far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


class Head(nn.Module):
    """Features (B, D) -> logits (B, C) over the classes of all tasks, in stream order. One block per task."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.blocks = nn.ModuleList()

    def add_task(self, num_classes: int) -> None:
        """Append the block of the next task."""
        raise NotImplementedError

    def init_task(self, task: int) -> None:
        """Initialise block `task` in place."""
        raise NotImplementedError

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([block(features) for block in self.blocks], dim=-1)


class LinearHead(Head):
    """A linear layer per task, with PyTorch's own initialisation as in the authors' code."""

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(nn.Linear(self.hidden_size, num_classes))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        linear: Any = self.blocks[task]
        bound = 1 / math.sqrt(self.hidden_size)
        init.uniform_(linear.weight, -bound, bound)
        init.uniform_(linear.bias, -bound, bound)


class ClassMeans(nn.Module):
    """Sum and number of the unit-length features of each class of a task; logits are cosines to the class means."""

    def __init__(self, hidden_size: int, num_classes: int):
        super().__init__()
        self.total: torch.Tensor
        self.count: torch.Tensor
        self.register_buffer("total", torch.zeros(num_classes, hidden_size))
        self.register_buffer("count", torch.zeros(num_classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features, dim=-1) @ F.normalize(self.total, dim=-1).T


class NearestMeanHead(Head):
    """Nearest class mean, no training (iCaRL's classifier, Rebuffi et al. 2017, arXiv 1611.07725, on all data)."""

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(ClassMeans(self.hidden_size, num_classes))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        block: Any = self.blocks[task]
        init.zeros_(block.total)
        init.zeros_(block.count)

    @torch.no_grad()
    def accumulate(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add features (B, D) of the newest task; `labels` (B,) count from its first class."""
        block: Any = self.blocks[-1]
        block.total.index_add_(0, labels, F.normalize(features.float(), dim=-1))
        block.count.index_add_(0, labels, torch.ones_like(labels, dtype=block.count.dtype))


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "ncm": NearestMeanHead,
}
