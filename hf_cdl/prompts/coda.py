r"""CODA-Prompt: attention over prompt components (Smith et al., CVPR 2023, arXiv 2211.13218).

Per layer the prompt is a weighted sum of components, the weights being cosines (Eqs. 2-4):

    p = \sum_m \alpha_m P_m,    \alpha_m = \gamma(q \odot A_m, K_m)

Notation: `prompt` is the paper's P (M, l, D), `key` its K (M, D_q), `attention` its A (M, D_q), `query` its q(x)
(B, D_q), \gamma cosine similarity. The first half of the l tokens goes to the keys of the self-attention, the second
half to its values (prefix tuning). A task adds `components` rows of P, K and A (Sec. 4.2, "expansion"); earlier rows
stay frozen, all rows so far are used. New rows are orthogonalised against the earlier ones, and in training the
penalty \mu \sum mean((X X^T - I)^2) over K, A and the flattened P of all rows keeps them so (Eq. 6; the authors of
Continual Distillation Learning use \mu = 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.prompts.base import PromptPool
from hf_cdl.types import KV


@dataclass(frozen=True)
class CodaConfig:
    components: int = field(
        default=10, metadata={"help": "New prompt components per task (paper: 100 over 10 tasks)."}
    )
    length: int = field(default=8, metadata={"help": "Tokens per component, half for keys and half for values; even."})
    layers: tuple[int, ...] = field(default=(0, 1, 2, 3, 4), metadata={"help": "Backbone layers with prompts."})
    orthogonality: float = field(default=0.0, metadata={"help": "Weight mu of the orthogonality penalty."})

    def __post_init__(self):
        if self.components < 1 or self.length < 2 or self.length % 2 or self.orthogonality < 0:
            raise ValueError(
                f"CODA-Prompt needs components >= 1, an even length >= 2 and orthogonality >= 0; got components="
                f"{self.components}, length={self.length}, orthogonality={self.orthogonality}."
            )


class CodaBlock(nn.Module):
    """The components of one task, all layers stacked: prompt (L, m, l, D), key and attention (L, m, D_q)."""

    def __init__(self, config: CodaConfig, hidden_size: int, query_size: int):
        super().__init__()
        rows = (len(config.layers), config.components)
        self.prompt = nn.Parameter(torch.empty(*rows, config.length, hidden_size))
        self.key = nn.Parameter(torch.empty(*rows, query_size))
        self.attention = nn.Parameter(torch.empty(*rows, query_size))


class Coda(PromptPool):
    config_class = CodaConfig
    config: CodaConfig

    def add_task(self) -> None:
        self.blocks.append(CodaBlock(self.config, self.hidden_size, self.query_size))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        for name, new in self.blocks[task].named_parameters():
            draws = torch.randn(new.shape, device=new.device).flatten(2)  # (L, m, D)
            rows = [
                orthogonalise(draw, self._rows(name, index, task).flatten(1) if task else draw[:0])
                for index, draw in enumerate(draws)
            ]
            init.copy_(new, torch.stack(rows).view_as(new))

    def _rows(self, name: str, index: int, tasks: int | None = None) -> torch.Tensor:
        """(M, ...): the rows of one layer, of the first `tasks` tasks."""
        return torch.cat([getattr(block, name)[index] for block in self.blocks[:tasks]])

    def forward(
        self, layer: int, query: torch.Tensor, task_id: int | None = None
    ) -> tuple[KV | None, torch.Tensor | None]:
        if layer not in self.layers:
            return None, None
        index = self.layers.index(layer)
        prompt, key, attention = (self._rows(name, index) for name in ("prompt", "key", "attention"))
        weight = component_weights(query, attention, key)  # (B, M)
        length, size = prompt.shape[1:]
        prefix = (weight @ prompt.flatten(1)).view(-1, length, size)  # (B, l, D)
        half = length // 2
        loss = None
        if self.training and self.config.orthogonality:
            loss = self.config.orthogonality * sum(_penalty(x) for x in (key, attention, prompt.flatten(1)))
        return KV(prefix[:, :half], prefix[:, half:]), cast("torch.Tensor | None", loss)


def component_weights(query: torch.Tensor, attention: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    r"""(B, M) weights \alpha_m = cos(q \odot A_m, K_m) (Eq. 4) for queries (B, D_q), attention and keys (M, D_q).

    With \hat K the row-normalised keys, \alpha = q (A \odot \hat K)^T / sqrt(q^2 (A^2)^T): two matrix products, and no
    (B, M, D_q) tensor.
    """
    product = query @ (attention * F.normalize(key, dim=-1)).T
    norm = (query.square() @ attention.square().T).clamp_min(1e-24).sqrt()
    return product / norm


def orthogonalise(draws: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt of new rows (m, D) against earlier ones (n, D), as the authors' code does it.

    Each draw loses its projections on every row before it: the earlier rows as trained (not orthogonal among
    themselves) and the new rows not yet normalised; all projections are of the draw itself. Norm 1 at the very end.
    With more rows than dimensions a draw can vanish; it is then kept as drawn.
    """
    rows = list(earlier)
    for draw in draws:
        new = draw.clone()
        for row in rows:
            new = new - (draw @ row) / (row @ row).clamp_min(1e-24) * row
        rows.append(new if new.norm() > 1e-6 * draw.norm() else draw)
    return F.normalize(torch.stack(rows[len(earlier) :]), dim=-1)


def _penalty(rows: torch.Tensor) -> torch.Tensor:
    """mean((X X^T - I)^2) of rows (M, D)."""
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().mean()
