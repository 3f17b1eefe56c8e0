"""Base class of prompt pools: one block of parameters per task, and a prompt for a layer given a query.

A pool returns one of two kinds of prompt (hf_cdl.types): `KV`, extra keys and values of a layer's attention, or
`Tokens`, which join the layer's sequence. `models/prompted_backbone.py` inserts both. A third kind, such as adapter
weights, needs its own class in hf_cdl.types and one more case in `PromptedBackbone._enter_layer`, which sees a layer's
input before the layer does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from hf_cdl.counted import counted
from hf_cdl.types import Prompt


class PromptPool(nn.Module, ABC):
    """Base class of the prompt pools.

    A method's file defines a frozen config dataclass (its fields are the recipe's) and a subclass with `config_class`,
    `add_task`, `init_task` and `forward`. `layers` are the backbone layers that get prompts (None: all). A pool that
    returns `Tokens` sets `num_tokens`, the number of them in the sequence from its first layer on.

    Growth: `blocks` holds one module of parameters per task. The model freezes all blocks but the newest, so what a
    task learnt never changes again; parameters outside `blocks` are shared and train in every task (`init_shared`
    initialises them once).
    """

    config_class: ClassVar[type]
    needs_query: ClassVar[bool] = True
    num_tokens: int = 0

    def __init__(self, config: Any, hidden_size: int, query_size: int, num_layers: int):
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.query_size = query_size
        self.layers = _check_layers(range(num_layers) if config.layers is None else config.layers, num_layers)
        self.blocks = nn.ModuleList()

    @classmethod
    def check_class(cls) -> str | None:
        """What the class lacks, worded to follow its name in a message; None if it is complete."""
        if not cls.needs_query and cls.similarity is not PromptPool.similarity:
            return (
                "has a similarity of queries, but not needs_query, so there would be none; set that, or leave it out"
            )
        return None

    @classmethod
    def check_recipe(cls, fields: Mapping[str, Any], role: str) -> list[tuple[str, str]]:
        """Problems of a recipe's fields for this pool, as pairs (field, problem and remedy).

        The values of `fields` may be of any type: types are checked elsewhere. `role`: of the model, as "student".
        """
        return []

    def init_shared(self) -> None:
        """Initialise what all tasks share (outside `blocks`), with the same functions as in `init_task`."""

    @abstractmethod
    def add_task(self) -> None:
        """Append the next task's block, with its parameters not yet initialised."""

    @abstractmethod
    def init_task(self, task: int) -> None:
        """Initialise block `task` in place, given the earlier ones, with transformers' `initialization` functions."""

    def end_task(self) -> None:
        """Hook called once a task is learnt (APT merges here); does nothing by default."""

    @abstractmethod
    def forward(
        self, layer: int, query: torch.Tensor, task_id: int | None = None
    ) -> tuple[Prompt | None, torch.Tensor | None]:
        """Return the prompt of `layer` for queries (B, D_q) and the pool's loss there; None where there is none.

        In training `task_id` is the current task; in evaluation mode it means that the model is teaching that task to
        a student. Otherwise evaluation never knows the task.
        """

    def similarity(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        """Cosines (B, M) of queries (B, D_q) with the pool's keys in `layer`; None if the layer matches no keys."""
        return None

    def usage(self, layer: int, query: torch.Tensor) -> torch.Tensor | None:
        """How much each prompt of `layer` is used (B, M) for queries (B, D_q); None if the layer matches no keys."""
        similarity = self.similarity(layer, query)
        return None if similarity is None else similarity.abs()


def picks(similarity: torch.Tensor, count: int = 1) -> torch.Tensor:
    """1 at the `count` largest entries of each row of (B, M), 0 elsewhere."""
    return torch.zeros_like(similarity).scatter(-1, similarity.topk(count, dim=-1).indices, 1.0)


def _check_layers(layers: Iterable[int], num_layers: int) -> tuple[int, ...]:
    """The layers as a tuple. Raises ValueError if there are none, repeated ones, or some the backbone lacks."""
    layers = tuple(layers)
    if not layers:
        raise ValueError(
            "Prompt layers [] are none, so nothing would be prompted. Name some, or set prompt.type none."
        )
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside or len(set(layers)) != len(layers):
        raise ValueError(
            f"Prompt layers {list(layers)} must be different numbers from 0 to {num_layers - 1} (the backbone has "
            f"{counted(num_layers, 'layer')})."
        )
    return layers
