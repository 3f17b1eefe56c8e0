"""Classification heads that are trained, and the dict of all heads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import build_fields, check_size, pick
from hf_cdl.heads.base import Head, HeadConfig
from hf_cdl.heads.fitted import NearestMeanHead, RidgeHead


class LinearHead(Head):
    """A linear layer per task, with PyTorch's own initialisation as in the authors' code."""

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
    """A linear layer whose weight rows have unit length; the bias stays."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, F.normalize(self.weight, dim=-1), self.bias)


class WeightNormalisedHead(LinearHead):
    """APT's head (arXiv 2503.07979, the code): layer norm, then a linear map with unit weight rows, plus bias.

    The features are not scaled to unit length, so it is no cosine head. As in the authors' code the layer norm keeps
    its initial weight and bias.
    """

    def __init__(self, config: HeadConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        self.norm_weight: torch.Tensor
        self.norm_bias: torch.Tensor
        self.register_buffer("norm_weight", torch.empty(hidden_size))
        self.register_buffer("norm_bias", torch.empty(hidden_size))

    def init_shared(self) -> None:
        super().init_shared()
        init.ones_(self.norm_weight)
        init.zeros_(self.norm_bias)

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(NormalisedLinear(self.hidden_size, num_classes))

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(super().prepare(features), (self.hidden_size,), self.norm_weight, self.norm_bias)


@dataclass(frozen=True)
class CosineConfig(HeadConfig):
    scale: float = field(default=10.0, metadata={"help": "Factor eta of the cosines (where it starts, if learnt)."})
    learn_scale: bool = field(default=True, metadata={"help": "Train the scale, in every task, as in the paper."})

    def __post_init__(self):
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"A cosine head needs scale > 0; got {self.scale}.")


class CosineHead(LinearHead):
    r"""Cosines of features and weight rows, times a scale (LUCIR, Hou et al. 2019, Sec. 3.1): \eta <\bar w_i, \bar f>.

    No class wins by a longer weight row, and none has a bias. One \eta serves all tasks, so that their logits stay
    comparable; [ours] it starts at 10, since logits within -1 and 1 train slowly.
    """

    config_class: ClassVar[type] = CosineConfig
    config: CosineConfig

    def __init__(self, config: CosineConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        self.scale: torch.Tensor
        if config.learn_scale:
            self.scale = nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("scale", torch.empty(1))

    def init_shared(self) -> None:
        super().init_shared()
        init.constant_(self.scale, self.config.scale)

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(NormalisedLinear(self.hidden_size, num_classes, bias=False))

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * F.normalize(super().prepare(features), dim=-1)


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "weight_normalised": WeightNormalisedHead,
    "cosine": CosineHead,
    "ncm": NearestMeanHead,
    "ridge": RidgeHead,
}


def build_head(head: dict[str, Any], hidden_size: int) -> Head:
    """The head of a config's `head` section.

    Raises ValueError for an unknown type or field, and for one that would not fit into memory.
    """
    kind, fields = pick(head, "head", HEADS)
    config = build_fields(HEADS[kind].config_class, fields, f"Head type '{kind}'")

    def with_a_task() -> Head:
        made = HEADS[kind](config, hidden_size)
        made.add_task(1)
        return made

    check_size(f"A head of type '{kind}'", with_a_task)
    return HEADS[kind](config, hidden_size)
