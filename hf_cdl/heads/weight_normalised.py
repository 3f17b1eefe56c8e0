"""APT's head: unit-length weight rows after a layer norm."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.heads.base import HeadConfig
from hf_cdl.heads.linear import LinearHead, NormalisedLinear


class WeightNormalisedHead(LinearHead):
    """APT's head (arXiv 2503.07979, the code): layer norm, then a linear layer with unit-length weight rows.

    It has a bias, and features are not scaled to unit length, so it is not a cosine head. As in the authors' code the
    layer norm keeps its initial weight and bias.
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
