"""Queries of frozen backbones, kept by batch while the process goes on.

The roles of a run train on the same views of a task's images in the same batches, and after every task evaluation asks
about the same images again. Nothing trains what a query comes from, so each is computed once; of a model without
prompts it is the whole pass. Only a whole batch is found again: beside other images its last bits could differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import default_data_collator

from hf_cdl.data.task_split import TaskSplit
from hf_cdl.training.compiling import is_compiled
from hf_cdl.training.kept_features import state_of
from hf_cdl.training.sharding import everywhere, is_sharded
from hf_cdl.types import Task

MOST = 2**29
"""Bytes that are kept; queries beyond them are computed again."""

_OF: WeakKeyDictionary[Any, KeptQueries] = WeakKeyDictionary()

Query = Callable[[torch.Tensor, Any], torch.Tensor]
"""Of pixel values (B, 3, H, W), and what identifies the images, a query (B, D_q), without gradient."""


class KeptQueries:
    """What the models of a run keep together."""

    def __init__(self) -> None:
        self._weights: list[tuple[ReferenceType[nn.Module], tuple[Any, ...]]] = []
        self._asking: set[int] = set()
        self._views: dict[Any, torch.Tensor] = {}
        self._images: dict[Any, torch.Tensor] = {}
        self._held: list[Any] = []
        self._task: Task | None = None
        self._bytes = 0

    def begin(self, task: Task) -> None:
        """A task begins to be learnt: forget the training views of another."""
        if self._task is not task:
            self._bytes -= sum(query.nbytes for query in self._views.values())
            self._task, self._views = task, {}

    def hold(self, split: Any) -> None:
        """Keep a stream's split alive, so that no other images are taken for its."""
        if isinstance(split, TaskSplit) and not any(split is held for held in self._held):
            self._held.append(split)

    def reader(self, model: Any) -> Query | None:
        """What gives a model's queries while its weights stay; None if they must be computed in every pass."""
        if not getattr(model, "reads_query", False):  # a user's own model need not know of queries
            return None
        backbone = asked_backbone(model)
        if any(parameter.requires_grad for parameter in backbone.parameters()):
            return None
        number = self._number(backbone)
        self._asking.add(id(model))
        sharded = is_sharded(backbone)

        def query(pixels: torch.Tensor, images: Any) -> torch.Tensor:
            kind = pixels.device.type
            precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pixels.dtype
            trained = images[0][-1] is not None
            if trained and len(self._asking) < 2:
                return model.compute_query(pixels)
            kept = self._views if trained else self._images
            way = precision, str(pixels.device), is_compiled(backbone)
            key = number, way, repr(model.config.query_view), images
            found = kept.get(key)
            shared = not sharded or everywhere(found is not None, pixels.device)
            if found is None or not shared:
                found = model.compute_query(pixels)
                if key not in kept and self._bytes + found.nbytes <= MOST:
                    kept[key] = found
                    self._bytes += found.nbytes
            return found

        return query

    def _number(self, backbone: nn.Module) -> int:
        """The number of the weights that a backbone has now, which equal ones share."""
        now = state_of(backbone)
        for number, (reference, then) in enumerate(self._weights):
            known = reference()
            if known is backbone and then == now:
                return number
            if known is not None and known is not backbone and state_of(known) == then and same(known, backbone):
                return number
        self._weights.append((ref(backbone), now))
        return len(self._weights) - 1


def kept_with(*owners: Any) -> KeptQueries:
    """What is kept for the first of these that is not None, a run or a model; trainers with the same one share it."""
    return _OF.setdefault(next(owner for owner in owners if owner is not None), KeptQueries())


def asked_backbone(model: Any) -> nn.Module:
    """What computes a model's queries."""
    return model.backbone if model.query_backbone is None else model.query_backbone


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights of two modules are equal; not said of sharded ones, which no process has whole."""
    if is_sharded(first) or is_sharded(second):
        return False
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        value.shape == theirs[name].shape and torch.equal(value, theirs[name].to(value.device))
        for name, value in ours.items()
    )


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch as transformers makes it, with what identifies its images by the name of their pixel values."""
    batch = default_data_collator([{k: v for k, v in item.items() if k != "images"} for item in items])
    if "images" in items[0]:
        names = items[0]["images"]
        batch["images"] = {name: tuple(item["images"][name] for item in items) for name in names}
    return batch
