"""One linear layer per task, and a variant with unit-length weight rows for other heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.heads.base import Head


class LinearHead(Head):
    """One linear layer per task, with PyTorch's default initialisation as in the authors' code."""

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(nn.Linear(self.hidden_size, num_classes))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        linear: Any = self.blocks[task]
        bound = 1 / math.sqrt(self.hidden_size)
        init.uniform_(linear.weight, -bound, bound)
        if linear.bias is not None:
            init.uniform_(linear.bias, -bound, bound)


class NormalisedLinear(nn.Linear):
    """Linear layer with unit-length weight rows and an ordinary bias."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, F.normalize(self.weight, dim=-1), self.bias)
