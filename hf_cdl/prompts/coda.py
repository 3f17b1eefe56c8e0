r"""CODA-Prompt: attention over prompt components (Smith et al., CVPR 2023, arXiv 2211.13218).

In each layer the prompt is a sum of components weighted by cosine similarities (Eqs. 2-4):

    p = \sum_m \alpha_m P_m,    \alpha_m = \gamma(q \odot A_m, K_m)

Notation: `prompt` is the paper's P (M, l, D), `key` its K (M, D_q), `attention` its A (M, D_q), `query` its q(x)
(B, D_q), \gamma cosine similarity. The first half of the l tokens joins the keys of the self-attention, the second
half its values (prefix tuning). Each task adds `components` rows to P, K and A (Sec. 4.2, "expansion"); earlier rows
are frozen, and all rows so far are used. New rows are orthogonalised against the earlier ones, and in training the
penalty \mu \sum mean((X X^T - I)^2) over K, A and the flattened P of all rows keeps them orthogonal (Eq. 6; the
authors of Continual Distillation Learning use \mu = 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_cdl.checked import check_types
from hf_cdl.prompts.base import PromptPool
from hf_cdl.prompts.components import ComponentBlock, init_block, rows, weighted_sum, weights
from hf_cdl.types import KV


@dataclass(frozen=True)
class CodaConfig:
    components: int = field(
        default=10, metadata={"help": "New prompt components per task (paper: 100 over 10 tasks)."}
    )
    length: int = field(default=8, metadata={"help": "Tokens per component, half for keys and half for values; even."})
    layers: tuple[int, ...] = field(default=(0, 1, 2, 3, 4), metadata={"help": "Backbone layers with prompts."})
    orthogonality: float = field(default=0.0, metadata={"help": "Weight mu of the orthogonality penalty."})
    attention: bool = field(
        default=True, metadata={"help": "Attention vectors A; false: plain cosines with the keys, as in OS-Prompt."}
    )

    def __post_init__(self):
        check_types(self, "CODA-Prompt")
        if self.components < 1 or self.length < 2 or self.length % 2 or self.orthogonality < 0:
            raise ValueError(
                f"CODA-Prompt needs components >= 1, an even length >= 2 and orthogonality >= 0; got components="
                f"{self.components}, length={self.length}, orthogonality={self.orthogonality}."
            )


class Coda(PromptPool):
    config_class = CodaConfig
    config: CodaConfig

    def add_task(self) -> None:
        config = self.config
        sizes = (len(self.layers), config.components, config.length, self.hidden_size, self.query_size)
        self.blocks.append(ComponentBlock(*sizes, attention=config.attention))

    def init_task(self, task: int) -> None:
        init_block(self.blocks, task)

    def similarity(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        return weights(self.blocks, self.layers.index(layer), query) if layer in self.layers else None

    def forward(
        self, layer: int, query: torch.Tensor, task_id: int | None = None
    ) -> tuple[KV | None, torch.Tensor | None]:
        weight = self.similarity(layer, query)  # (B, M)
        if weight is None:
            return None, None
        index = self.layers.index(layer)
        prefix = weighted_sum(self.blocks, index, weight, query)  # (B, l, D)
        half = prefix.shape[1] // 2
        loss = None
        if self.training and self.config.orthogonality:
            names = ("key", "attention") if self.config.attention else ("key",)
            parts = [rows(self.blocks, name, index).flatten(1) for name in ("prompt", *names)]
            loss = self.config.orthogonality * torch.stack([_penalty(part) for part in parts]).sum()
        return KV(prefix[:, :half], prefix[:, half:]), loss


def _penalty(rows: torch.Tensor) -> torch.Tensor:
    """mean((X X^T - I)^2) of rows (M, D)."""
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().mean()
