r"""VPT: learned tokens in the sequence (Visual Prompt Tuning, Jia et al., ECCV 2022, arXiv 2203.12119, Sec. 3.2).

N tokens enter a layer after CLS, are attended to like patches, and are removed before the output is read. VPT-deep
(all layers, the default) gives each layer its own tokens, which replace the previous layer's; VPT-shallow
(`layers: [0]`) adds tokens in the first layer only, and their outputs pass through the others:

    [x_i, \_, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])    (deep)
    [x_i, Z_i, E_i] = L_i([x_{i-1}, Z_{i-1}, E_{i-1}]),    Z_0 = P    (shallow)

Notation: `prompt` (L, N, D) holds the paper's P of every layer with tokens, x is CLS, E are the patches. No query is
computed and nothing is selected.

Where we differ: the paper learns one task. Here one set of tokens is shared by all tasks and keeps training, like
L2P's pool; to train it on the first task only, set `first_session`. Tokens are initialised in U(-v, v),
v^2 = 6 / (768 + D): the authors' bound for 16-pixel patches, whatever the backbone's patch size. There is no dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import initialization as init

from hf_cdl.checked import check_types
from hf_cdl.prompts.base import PromptPool
from hf_cdl.types import Tokens


@dataclass(frozen=True)
class VPTConfig:
    length: int = field(default=10, metadata={"help": "Prompt tokens in a layer's sequence."})
    layers: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "Backbone layers with their own tokens; null: all (VPT-deep), [0]: VPT-shallow."},
    )

    def __post_init__(self):
        check_types(self, "VPT")
        if self.length < 1:
            raise ValueError(f"VPT needs length >= 1; got {self.length}.")


class VPT(PromptPool):
    config_class = VPTConfig
    config: VPTConfig
    needs_query = False

    def __init__(self, config: VPTConfig, hidden_size: int, query_size: int, num_layers: int):
        super().__init__(config, hidden_size, query_size, num_layers)
        self.num_tokens = config.length
        self.prompt = nn.Parameter(torch.empty(len(self.layers), config.length, hidden_size))

    def init_shared(self) -> None:
        bound = math.sqrt(6 / (3 * 16**2 + self.hidden_size))
        init.uniform_(self.prompt, -bound, bound)

    def add_task(self) -> None:
        """Add nothing: the tokens are shared by all tasks."""

    def init_task(self, task: int) -> None:
        """Do nothing: no task has its own parameters."""

    def forward(
        self, layer: int, query: torch.Tensor | None, task_id: int | None = None
    ) -> tuple[Tokens | None, torch.Tensor | None]:
        if layer not in self.layers:
            return None, None
        return Tokens(self.prompt[self.layers.index(layer)].unsqueeze(0)), None
