r"""DualPrompt: prompts shared by all tasks and one expert per task (Wang et al., ECCV 2022, arXiv 2204.04799).

General prompts g sit in the first layers and train in every task; the layers after them get the expert prompt e_t of
task t, which has a key k_t (Sec. 4.1). In training the task is known: its own expert is used, and the match loss
(Eq. 6, first term) pulls its key towards the task's queries. In evaluation the expert with the nearest key is used:

    L_{match} = 1/B \sum_b (1 - \gamma(q_b, k_t)),    t_x = argmax_t \gamma(q(x), k_t)

Notation: `general` holds the paper's g (l_g, D) of each layer, a block's `prompt` its e_t (l_e, D) and `key` its k_t
(D_q) of each layer, `query` its q(x) (B, D_q); \gamma is cosine similarity. Prompts are used as in prefix tuning
(Sec. 4.2): the first half of the tokens joins the keys of the self-attention, the second half its values.

As in the code of Continual Distillation Learning (CDL, arXiv 2407.13911), every expert layer has its own keys and so
makes its own choice, and everything is initialised in U(0, 1). `reduction: sum` is the loss of CODA-Prompt's code and
of CDL's first version: B times as large, where B is the micro-batch size per process. Where we differ: there,
evaluation chooses among the keys of all tasks, including untrained ones of future tasks; here among the tasks seen.
With `reserved_tasks: N` (theirs: the number of tasks) the first N keys and experts exist from the start; those of
future tasks compete untrained in evaluation, and each task takes over its own when it begins. More than N tasks are
fine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import check_effect, check_types
from hf_cdl.prompts.base import PromptPool, picks
from hf_cdl.types import KV


@dataclass(frozen=True)
class DualPromptConfig:
    general_length: int = field(default=6, metadata={"help": "Tokens of a general prompt, half keys, half values."})
    general_layers: tuple[int, ...] = field(default=(0, 1), metadata={"help": "Backbone layers with general prompts."})
    expert_length: int = field(default=20, metadata={"help": "Tokens of an expert prompt, half keys, half values."})
    expert_layers: tuple[int, ...] = field(
        default=(2, 3, 4), metadata={"help": "Backbone layers with expert prompts; none of general_layers."}
    )
    reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "Match loss: mean over the batch, or the sum of older code."}
    )
    reserved_tasks: int = field(
        default=0,
        metadata={"help": "Tasks whose keys compete in evaluation, seen or not (authors: all tasks); 0: only seen."},
    )

    def __post_init__(self):
        check_types(self, "DualPrompt")
        check_effect(self, "DualPrompt", "general_length", bool(self.general_layers), "general_layers names no layer")
        lengths = (self.general_length, self.expert_length)
        if any(length < 2 or length % 2 for length in lengths) or not self.expert_layers or self.reserved_tasks < 0:
            raise ValueError(
                "DualPrompt needs even lengths >= 2, at least one of expert_layers and reserved_tasks >= 0; got "
                f"general_length={self.general_length}, expert_length={self.expert_length}, "
                f"expert_layers={self.expert_layers}, reserved_tasks={self.reserved_tasks}."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that have prompts."""
        return (*self.general_layers, *self.expert_layers)


class Expert(nn.Module):
    """Parameters of one task, all expert layers stacked: prompt (L, l, D), key (L, D_q)."""

    def __init__(self, prompt: tuple[int, ...], key: tuple[int, ...]):
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(prompt))
        self.key = nn.Parameter(torch.empty(key))


class DualPrompt(PromptPool):
    """Shared general prompts (L, l, D) and one Expert per block; reserved experts are untrained buffers."""

    config_class = DualPromptConfig
    config: DualPromptConfig

    def __init__(self, config: DualPromptConfig, hidden_size: int, query_size: int, num_layers: int):
        super().__init__(config, hidden_size, query_size, num_layers)
        count, experts = len(config.general_layers), len(config.expert_layers)
        self.general = nn.Parameter(torch.empty(count, config.general_length, hidden_size)) if count else None
        self.shapes = {"prompt": (experts, config.expert_length, hidden_size), "key": (experts, query_size)}
        for name, shape in self.shapes.items():
            self.register_buffer(
                f"reserved_{name}", torch.empty(config.reserved_tasks, *shape), config.reserved_tasks > 0
            )

    def init_shared(self) -> None:
        if self.general is not None:
            init.uniform_(self.general)
        for buffer in self.buffers(recurse=False):
            init.uniform_(buffer)

    def add_task(self) -> None:
        self.blocks.append(Expert(**self.shapes))

    def init_task(self, task: int) -> None:
        for name, parameter in self.blocks[task].named_parameters():
            if task < self.config.reserved_tasks:
                init.copy_(parameter, getattr(self, f"reserved_{name}")[task])
            else:
                init.uniform_(parameter)

    def similarity(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        if layer not in self.config.expert_layers:
            return None
        return _cosine(query, self._experts("key", self.config.expert_layers.index(layer)))  # (B, T)

    def usage(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        """1 for the expert that is picked, 0 for the others."""
        similarity = self.similarity(layer, query)
        return None if similarity is None else picks(similarity)

    def forward(
        self, layer: int, query: torch.Tensor, task_id: int | None = None
    ) -> tuple[KV | None, torch.Tensor | None]:
        if self.general is not None and layer in self.config.general_layers:
            return _prefix(self.general[self.config.general_layers.index(layer)].unsqueeze(0)), None
        if layer not in self.config.expert_layers:
            return None, None
        index = self.config.expert_layers.index(layer)
        if task_id is None or not self.training:
            similarity = _cosine(query, self._experts("key", index))  # (B, T)
            return _prefix(self._experts("prompt", index)[similarity.argmax(dim=-1)]), None
        expert: Any = self.blocks[task_id]
        distance = 1 - _cosine(query, expert.key[index].unsqueeze(0))  # (B, 1)
        loss = distance.sum() if self.config.reduction == "sum" else distance.mean()
        return _prefix(expert.prompt[index].unsqueeze(0)), loss

    def _experts(self, name: str, index: int) -> torch.Tensor:
        """Keys or prompts (T, ...) of one layer: those of the tasks seen and the reserved ones of future tasks."""
        seen = torch.stack([getattr(block, name)[index] for block in self.blocks])
        return torch.cat([seen, getattr(self, f"reserved_{name}")[len(self.blocks) :, index]])


def _cosine(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Cosine similarities (B, T) of queries (B, D_q), which get no gradient, and keys (T, D_q)."""
    return F.normalize(query.detach(), dim=-1) @ F.normalize(key, dim=-1).T


def _prefix(prompt: torch.Tensor) -> KV:
    """Split prompts (B or 1, l, D) into keys (first half) and values."""
    half = prompt.shape[1] // 2
    return KV(prompt[:, :half], prompt[:, half:])
