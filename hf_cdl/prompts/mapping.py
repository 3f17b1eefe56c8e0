r"""Prompt mapping: turns the teacher's prompts into student prompts (CDL-Prompt, arXiv 2407.13911, v1).

In every layer where the teacher has a prompt, its key and value tokens (or [ours] its tokens in the sequence) are
averaged into one vector, and attention over components as in CODA-Prompt turns that into a prefix of the student's
width, concatenated to the student's own:

    \bar p = mean([P^t_K; P^t_V]),    p^{s} = \sum_m \gamma(\bar p \odot A_m, K_m) P_m

Notation: \bar p (B, D_t), D_t the teacher's width; a block's `prompt` holds P (m, l, D_s), `key` K and `attention` A
(m, D_t) of all mapped layers; \gamma is cosine similarity. The first half of the l tokens joins the keys of the
self-attention, the second half its values. A KD head reads the CLS token; inference averages both heads 1:1 (`alpha`).

The student needs the teacher's prompts at inference too, for its own query: it keeps a frozen copy of the teacher's
prompt *pool* (`teacher_pool`), which is small, and nothing else of the teacher. No gradient reaches that copy.

Where we differ: each task adds components as in CODA-Prompt, with earlier ones frozen; in the authors' code the
mapper's task counter never advances, so one set of rows is used and overwritten in all tasks: `grow: false`. If the
depths differ [ours], layers correspond by number, and teacher layers that the student lacks are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from hf_cdl.checked import check_types
from hf_cdl.prompts.base import PromptPool
from hf_cdl.prompts.components import ComponentBlock, init_block, weighted_sum, weights
from hf_cdl.types import KV


@dataclass(frozen=True)
class MappingConfig:
    components: int = field(default=10, metadata={"help": "New components per task (authors: their pool / tasks)."})
    length: int = field(default=8, metadata={"help": "Tokens of a mapped prompt, half keys, half values; even."})
    grow: bool = field(
        default=True, metadata={"help": "Every task adds components; false: one set for all tasks (authors)."}
    )
    alpha: float = field(
        default=0.5, metadata={"help": "Weight of the KD head in evaluation: (1 - alpha) * cls + alpha * kd."}
    )

    def __post_init__(self):
        check_types(self, "A prompt mapping")
        if self.components < 1 or self.length < 2 or self.length % 2 or not 0 <= self.alpha <= 1:
            raise ValueError(
                "A prompt mapping needs components >= 1, an even length >= 2 and alpha from 0 to 1; got "
                f"components={self.components}, length={self.length}, alpha={self.alpha}."
            )


class PromptMapping(nn.Module):
    """Map the prompts of `teacher_pool` to a student of width D_s with `num_layers` layers; one block per task.

    Raises ValueError if the student has none of the teacher's prompt layers.
    """

    def __init__(self, config: MappingConfig, teacher_pool: PromptPool, hidden_size: int, num_layers: int):
        super().__init__()
        self.config, self.hidden_size, self.teacher_pool = config, hidden_size, teacher_pool
        self.layers = tuple(layer for layer in teacher_pool.layers if layer < num_layers)
        if not self.layers:
            raise ValueError(
                f"The teacher has prompts in layers {list(teacher_pool.layers)}, the student only layers 0 to "
                f"{num_layers - 1}: there is nothing to map. Give the teacher prompts in these layers."
            )
        self.blocks = nn.ModuleList()

    def add_task(self) -> None:
        """Append the next task's components, and a block to the copy of the teacher's pool."""
        self.teacher_pool.add_task()
        if self.config.grow or not self.blocks:
            sizes = (self.config.components, self.config.length, self.hidden_size, self.teacher_pool.hidden_size)
            self.blocks.append(ComponentBlock(len(self.layers), *sizes))

    def init_task(self, task: int) -> None:
        """Initialise block `task`, and the teacher pool's copy until it gets the teacher's own values."""
        self.teacher_pool.init_task(task)
        if task < len(self.blocks):
            init_block(self.blocks, task)

    def forward(self, layer: int, query: torch.Tensor | None, task_id: int | None = None) -> KV | None:
        """Map the teacher's prompt for queries (B, D_q) to (B or 1, length / 2, D_s); None if the layer has none."""
        if layer not in self.layers:
            return None
        with torch.no_grad():
            teacher, _ = self.teacher_pool(layer, query, task_id)
            # keys and values, or tokens
            mean = torch.cat(teacher[:2], dim=1).mean(dim=1)  # (B or 1, D_t)
        index = self.layers.index(layer)
        prompt = weighted_sum(self.blocks, index, weights(self.blocks, index, mean), mean)
        half = prompt.shape[1] // 2
        return KV(prompt[:, :half], prompt[:, half:])
