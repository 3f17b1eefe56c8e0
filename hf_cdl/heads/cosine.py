"""LUCIR's head: cosines of features and weight rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.heads.base import HeadConfig
from hf_cdl.heads.linear import LinearHead, NormalisedLinear


@dataclass(frozen=True)
class CosineConfig(HeadConfig):
    scale: float = field(default=10.0, metadata={"help": "Factor eta of the cosines (its initial value, if learnt)."})
    learn_scale: bool = field(default=True, metadata={"help": "Train the scale in every task, as in the paper."})

    def __post_init__(self):
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"A cosine head needs scale > 0; got {self.scale}.")


class CosineHead(LinearHead):
    r"""Cosines of features and weight rows, times a scale (LUCIR, Hou et al. 2019, Sec. 3.1): \eta <\bar w_i, \bar f>.

    No class gains from a longer weight row or a bias. One \eta is shared by all tasks, so that their logits stay
    comparable; [ours] it starts at 10, since logits between -1 and 1 train slowly.
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
