"""Features of evaluation images, kept in memory while the weights that make them stay the same.

A fitted head is solved anew after every task, but what it reads of an image stays. So the backbone sees an image once
in a run, not once per task. The answers are the same to the bit, since the batches stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_cdl.data.task_split import TaskSplit
from hf_cdl.training.kept.weights import state_of
from hf_cdl.types import CDLOutput

_MOST = 2**29
"""Bytes that are kept; beyond them features are computed again."""


class KeptFeatures:
    """Batches of splits, for a model whose features are fixed."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Any, list[Any], int]] = {}
        self._weights: tuple[Any, ...] = ()
        self.held = self.found = 0

    def begin(self, model: Any) -> None:
        """Begin an evaluation: forget the outputs of other weights. Called once, since it reads all weights."""
        if (weights := state_of(model)) != self._weights:
            self._of, self._weights, self.held = {}, weights, 0

    def find(self, split: Any, model: Any) -> Iterator[tuple[CDLOutput, dict[str, Any]]] | None:
        """The model's outputs for the batches of a split, and their labels; None if it has not been kept."""
        if id(split) not in self._of:
            return None
        _, batches, size = self._of[id(split)]
        self.found += size
        return ((model.answer(found), batch) for found, batch in batches)

    def keep(self, split: Any, batches: list[tuple[CDLOutput, dict[str, Any]]]) -> None:
        """Keep the outputs for all batches of a split, if there is room."""
        kept = [
            (
                CDLOutput(features=output.features, kd_features=output.kd_features, layers=output.layers),
                {name: value for name, value in batch.items() if name == "labels"},
            )
            for output, batch in batches
        ]
        size = sum(value.nbytes for found, batch in kept for value in (*found.values(), *batch.values()))
        if self.held + size <= _MOST:
            self._of[id(split)] = split, kept, size  # the split too, so that no other gets its id
            self.held += size


def keepable(split: Any, model: Any) -> bool:
    """Whether the features of a split's images stay the same: the images do, and so do the weights."""
    return isinstance(split, TaskSplit) and model.fitted and model.session_head is None
