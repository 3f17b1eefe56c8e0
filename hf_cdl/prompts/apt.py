r"""APT: a prompt added to the CLS token's key and value (arXiv 2503.07979).

In every layer one vector is added to the key of the CLS token and one to its value; no token is concatenated, no query
is computed and nothing is selected:

    k_{cls}^l <- k_{cls}^l + p_k^l,    v_{cls}^l <- v_{cls}^l + p_v^l

A single prompt P keeps training through all tasks. After task t it is merged into the prompt used in evaluation, an
exponential moving average over the tasks; training continues from the un-merged P:

    \hat P_t = a \hat P_{t-1} + (1 - a) P_t,    \hat P_0 = P_0

Notation: `prompt` (L, 2, D) holds p_k and p_v of all layers, block t's `merged` (L, 2, D) is \hat P_t, `ema` is a.
The authors' head normalises its weight rows: `head: {type: weight_normalised}`.

Where we differ from the code of Continual Distillation Learning (CDL, arXiv 2407.13911): there the merge runs after
both phases of a task, so the teacher teaches with \hat P_{t-1} (zeros in the first task), never with the prompt it has
just trained for that task. Here it teaches with P_t; `teach_with: merged_before` restores their behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from hf_cdl.checked import check_types
from hf_cdl.prompts.base import PromptPool
from hf_cdl.types import KV


@dataclass(frozen=True)
class APTConfig:
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "Backbone layers with prompts; null: all."})
    ema: float = field(default=0.7, metadata={"help": "Weight a of the earlier tasks when a task's prompt is merged."})
    teach_with: Literal["trained", "merged_before"] = field(
        default="trained",
        metadata={"help": "A teacher's prompt: the one just trained, or the merged one of earlier tasks (authors)."},
    )

    def __post_init__(self):
        check_types(self, "APT")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"APT's ema is a share from 0 to 1; got {self.ema}.")


class Merged(nn.Module):
    """Buffer of the merged prompt after a task; until the task is learnt, the previous task's (initially zeros)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("merged", torch.empty(shape))


class APT(PromptPool):
    config_class = APTConfig
    config: APTConfig
    needs_query = False

    def __init__(self, config: APTConfig, hidden_size: int, query_size: int, num_layers: int):
        super().__init__(config, hidden_size, query_size, num_layers)
        self.prompt = nn.Parameter(torch.empty(len(self.layers), 2, hidden_size))

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], role: str) -> list[tuple[str, str]]:
        if role != "teacher" and fields.get("teach_with", "trained") != "trained":
            return [("teach_with", f"is a teacher's, but the {role} teaches no one; leave it out")]
        return []

    def init_shared(self) -> None:
        init.trunc_normal_(self.prompt, std=0.02)

    def add_task(self) -> None:
        self.blocks.append(Merged(*self.prompt.shape))

    def init_task(self, task: int) -> None:
        init.copy_(self._block(task).merged, self._merged(task - 1))

    @torch.no_grad()
    def end_task(self) -> None:
        task, ema = len(self.blocks) - 1, self.config.ema
        merged = torch.lerp(self.prompt, self._merged(task - 1), ema) if task else self.prompt
        self._block(task).merged.copy_(merged)

    def forward(
        self, layer: int, query: torch.Tensor | None, task_id: int | None = None
    ) -> tuple[KV | None, torch.Tensor | None]:
        if layer not in self.layers:
            return None, None
        if self.training:
            prompt = self.prompt
        elif task_id is None:
            prompt = self._merged(len(self.blocks) - 1)
        else:  # teaching that task
            prompt = self.prompt if self.config.teach_with == "trained" else self._merged(task_id - 1)
        key, value = prompt[self.layers.index(layer)].view(2, 1, 1, -1)
        return KV(key, value, "add_to_cls"), None

    def _block(self, task: int) -> Any:
        return self.blocks[task]

    def _merged(self, task: int) -> torch.Tensor:
        """The merged prompt (L, 2, D) after a task; zeros before the first task."""
        return torch.zeros_like(self.prompt) if task < 0 else self._block(task).merged
