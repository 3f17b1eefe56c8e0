r"""L2P: a pool of prompts selected by their keys (Wang et al., CVPR 2022, arXiv 2112.08654).

Each prompted layer has M prompts with keys. For each query the N prompts with the highest cosine similarity are picked
(Eq. 3), and the match loss (second term of Eq. 5) pulls their keys towards the query:

    K_x = top-N_m \gamma(q, k_m),    L_{pool} = 1/B \sum_b \sum_{K_x} (1 - \gamma(q_b, k_m))

Notation: `prompt` holds the paper's P_m (M, l, D) of each layer, `key` its k_m (M, D_q), `query` its q(x) (B, D_q),
`top_k` its N, \gamma is cosine similarity; the gradient of the loss reaches the keys only. The pool is shared by all
tasks and keeps training: only the heads grow.

Where we differ: the paper prepends the picked prompts to the sequence of the first layer; here, as in Continual
Distillation Learning (CDL, arXiv 2407.13911), the first half of each picked prompt joins the keys of the
self-attention and the second half its values, by decreasing similarity, and the pool is initialised in U(0, 1). The
paper's \lambda (0.5) is 1, as in CDL. `reduction: sum` is the loss of CODA-Prompt's code and of CDL's first version:
it pairs every query with the keys picked by every sample of the batch, \sum_b \sum_{b'} \sum_{K_{x_{b'}}}
(1 - \gamma(q_b, k_m)), so it grows with B^2; with gradient accumulation or several processes B is the micro-batch
size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import check_types
from hf_cdl.prompts.base import PromptPool, picks
from hf_cdl.types import KV


@dataclass(frozen=True)
class L2PConfig:
    pool_size: int = field(default=30, metadata={"help": "Prompts in the pool of a layer."})
    length: int = field(default=20, metadata={"help": "Tokens per prompt, half for keys and half for values; even."})
    top_k: int = field(default=5, metadata={"help": "Prompts picked for a sample."})
    layers: tuple[int, ...] = field(
        default=(0,), metadata={"help": "Backbone layers with a pool; (0, 1, 2, 3, 4) is the authors' deep variant."}
    )
    reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "Match loss: batch mean, or the sum over all pairs of older code."}
    )

    def __post_init__(self):
        check_types(self, "L2P")
        if not 1 <= self.top_k <= self.pool_size or self.length < 2 or self.length % 2:
            raise ValueError(
                f"L2P needs 1 <= top_k <= pool_size and an even length >= 2; got top_k={self.top_k}, "
                f"pool_size={self.pool_size}, length={self.length}."
            )


class L2P(PromptPool):
    """The pools of all layers stacked: prompt (L, M, l, D), key (L, M, D_q)."""

    config_class = L2PConfig
    config: L2PConfig

    def __init__(self, config: L2PConfig, hidden_size: int, query_size: int, num_layers: int):
        super().__init__(config, hidden_size, query_size, num_layers)
        pools = (len(self.layers), config.pool_size)
        self.prompt = nn.Parameter(torch.empty(*pools, config.length, hidden_size))
        self.key = nn.Parameter(torch.empty(*pools, query_size))

    def init_shared(self) -> None:
        init.uniform_(self.prompt)
        init.uniform_(self.key)

    def add_task(self) -> None:
        """Add nothing: the pool is shared by all tasks."""

    def init_task(self, task: int) -> None:
        """Do nothing: no task has its own parameters."""

    def similarity(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        if layer not in self.layers:
            return None
        key = self.key[self.layers.index(layer)]
        return F.normalize(query.detach(), dim=-1) @ F.normalize(key, dim=-1).T

    def usage(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        """1 for the prompts that are picked, 0 for the others."""
        similarity = self.similarity(layer, query)
        return None if similarity is None else picks(similarity, self.config.top_k)

    def forward(
        self, layer: int, query: torch.Tensor, task_id: int | None = None
    ) -> tuple[KV | None, torch.Tensor | None]:
        similarity = self.similarity(layer, query)
        if similarity is None:
            return None, None
        best = similarity.topk(self.config.top_k, dim=-1)
        picked = self.prompt[self.layers.index(layer)][best.indices]  # (B, N, l, D)
        half = self.config.length // 2
        prefix = KV(picked[:, :, :half].flatten(1, 2), picked[:, :, half:].flatten(1, 2))
        if not self.training:
            return prefix, None
        if self.config.reduction == "sum":
            return prefix, (1 - similarity[:, best.indices.flatten()]).sum()
        return prefix, (1 - best.values).sum(dim=-1).mean()
