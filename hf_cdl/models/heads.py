"""Classification heads that grow by one block per task and score all classes seen so far."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


class Head(nn.Module):
    """Features (B, D) -> logits (B, C) over the classes of all tasks, in stream order. One block per task.

    A `fitted` head has no parameters: it accumulates statistics of fixed features instead of being trained.
    """

    fitted: ClassVar[bool] = False

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.blocks = nn.ModuleList()

    def init_shared(self) -> None:
        """Initialise what all tasks share (outside `blocks`)."""

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


class NormalisedLinear(nn.Linear):
    """A linear layer whose weight rows have unit length; the bias stays."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, F.normalize(self.weight, dim=-1), self.bias)


class WeightNormalisedHead(LinearHead):
    """APT's head (arXiv 2503.07979, the code): layer norm, then a linear map with unit weight rows, plus bias.

    The features are not scaled to unit length, so it is no cosine head. As in the authors' code the layer norm keeps
    its initial weight and bias.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.norm_weight: torch.Tensor
        self.norm_bias: torch.Tensor
        self.register_buffer("norm_weight", torch.empty(hidden_size))
        self.register_buffer("norm_bias", torch.empty(hidden_size))

    def init_shared(self) -> None:
        init.ones_(self.norm_weight)
        init.zeros_(self.norm_bias)

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(NormalisedLinear(self.hidden_size, num_classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(F.layer_norm(features, (self.hidden_size,), self.norm_weight, self.norm_bias))


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

    fitted: ClassVar[bool] = True

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
    "weight_normalised": WeightNormalisedHead,
    "ncm": NearestMeanHead,
}


def build_head(head: dict[str, Any], hidden_size: int) -> Head:
    """The head of a config's `head` section. Raises ValueError for an unknown type."""
    kind = head["type"]
    if kind not in HEADS:
        raise ValueError(f"Unknown head type '{kind}'; allowed: {', '.join(HEADS)}.")
    return HEADS[kind](hidden_size)
