"""Split a checkpoint's weights into files by what can still change, so that the next one shares unchanged files.

Weights that no longer change (a frozen backbone, the blocks of earlier tasks) are stored once: a file of the previous
checkpoint whose weights are all still the same, to the bit, is linked, not written. This is found by comparing,
whatever the method, so a damaged file is never passed on. The layout is transformers' own:
model-0000k-of-0000n.safetensors, and an index.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_cdl.runs.files import WEIGHTS, lines, link

WORTH = 2**20
"""Bytes from which on settled weights get a file of their own; fewer are written again with the rest."""
SMALL, MANY = 10 * WORTH, 10
"""This many files of fewer bytes are merged into one: settled weights are written at most twice."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Shard:
    """The weights of one file; `source`: an existing file with exactly these weights."""

    names: Set[str]
    source: Path | None = None


def save_checkpoint(model: Any, processor: Any, folder: Path, before: Path) -> None:
    """Write a model and its image processor into a new folder, which shares weights with the checkpoint `before`.

    If few weights are settled, or the model does not say how it stores its weights, they are one file.
    """
    weights, backbone, newest = model.to_store() if hasattr(model, "to_store") else ({}, set(), set())
    shards = plan(weights, backbone, newest, before)
    if len(shards) > 1:
        _write(model, weights, shards, folder)
    else:
        model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def plan(weights: Mapping[str, torch.Tensor], backbone: Set[str], newest: Set[str], before: Path) -> list[Shard]:
    """The files for these weights, the one that still changes last.

    `backbone`: names of frozen weights, which are not mixed with others; `newest`: of those that are frozen from the
    next task on.
    """

    def size(names: Set[str]) -> int:
        return sum(weights[name].nbytes for name in names)

    kept, stored, same = list[Shard](), set[str](), set[str]()
    few = size(weights.keys() - backbone) < WORTH  # then it is not worth finding out what files of small weights share
    for file in sorted(before.glob("*.safetensors")):
        names = _names(file)
        small = few and size(names & weights.keys()) < WORTH
        equal = set[str]() if small else _equal(file, names, weights)
        if equal == names and size(equal) >= WORTH:
            kept.append(Shard(equal, file))
        stored |= names
        same |= equal
    left = weights.keys() - {name for shard in kept for name in shard.names}
    settled = left & (same | ((backbone | newest) - stored))
    piles = [settled & backbone, settled - backbone]
    small = [shard for shard in kept if size(shard.names) < SMALL and not shard.names & backbone]
    if len(small) + (WORTH <= size(piles[1]) < SMALL) >= MANY:
        kept = [shard for shard in kept if shard not in small]
        piles[1] |= {name for shard in small for name in shard.names}
    shards = kept + [Shard(pile) for pile in piles if size(pile) >= WORTH]
    rest = weights.keys() - {name for shard in shards for name in shard.names}
    return [*shards, Shard(rest)] if rest else shards


def _names(file: Path) -> set[str]:
    """The names of the weights in a file of a checkpoint; none if it cannot be read or is not the checkpoint's own."""
    if not WEIGHTS.fullmatch(file.name) or file.is_symlink():
        return set()
    try:
        with safe_open(file, "pt") as opened:
            return {*opened.keys()}
    except (OSError, SafetensorError):
        return set()


def _equal(file: Path, names: Set[str], weights: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of those weights in a file that are the same, to the bit."""
    if not names:
        return set()
    with safe_open(file, "pt") as opened:
        return {name for name in names & weights.keys() if _same(opened.get_tensor(name), weights[name])}


def _same(stored: torch.Tensor, now: torch.Tensor) -> bool:
    if stored.shape != now.shape or stored.dtype != now.dtype:
        return False
    bits = _BITS[now.element_size()]
    return torch.equal(stored.view(bits), now.detach().cpu().contiguous().view(bits))


def _write(model: Any, weights: Mapping[str, torch.Tensor], shards: list[Shard], folder: Path) -> None:
    """Write the files of a plan, and with the smallest of the weights the config and all else that belongs to a model.

    The weights are in their final format already: transformers, which looks at each of them several times, need not
    see the others.
    """
    smallest = min(weights, key=lambda name: weights[name].nbytes)
    how = {"save_original_format": False, "max_shard_size": 2**62}
    model.save_pretrained(folder, state_dict={smallest: weights[smallest]}, **how)
    os.unlink(folder / SAFE_WEIGHTS_NAME)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if shard.source is not None:
            link(shard.source, folder / name)
        else:
            tensors = {weight: weights[weight].detach().contiguous() for weight in sorted(shard.names)}
            save_file(tensors, folder / name, metadata={"format": "pt"})
    where = {weight: name for name, shard in zip(names, shards, strict=True) for weight in sorted(shard.names)}
    sizes = {"total_size": sum(value.nbytes for value in weights.values())}
    index = lines({"metadata": sizes, "weight_map": dict(sorted(where.items()))}, {})
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(f"{index}\n")
