"""Move the sums of a head as its features move: see drift.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_cdl.heads.bits import movable, read, write
from hf_cdl.heads.class_sums import ClassSums, packed, sums_of, unpacked
from hf_cdl.heads.drift import Drift


@torch.no_grad()
def move_sums(head: Any, drift: Drift, layers: Sequence[Drift]) -> None:
    """Move a head's sums by the drift of the summed features, and by that of the means of each layer it reads."""
    count, total = head.of_classes("count"), head.of_classes("total")
    images = count.sum()
    if head.gram is not None:
        write(head.gram, drift.gram(read(head.gram), total.sum(dim=0), images))
    if head.gone is not None:  # of means alone, which say nothing of a shift
        own = drift.part(head.hidden_size)
        write(head.gone, own.gram(read(head.gone), torch.zeros_like(own.mean), 0))
    if head.layer_gram is not None:
        squares, sums = read(head.layer_gram), head.of_classes("layer_total").sum(dim=0)
        moved = [one.gram(squares[n], sums[n], images) for n, one in enumerate(layers)]
        write(head.layer_gram, torch.stack(moved))
    for block in map(sums_of, head.blocks):
        _move_block(block, drift, layers)


def _move_block(block: ClassSums, drift: Drift, layers: Sequence[Drift]) -> None:
    """Move what the images of a task's classes left."""
    count, total = movable(block.count), read(block.total).clone()
    for row, gram in enumerate(() if block.grams is None else block.grams):
        write(gram, packed(drift.gram(unpacked(len(total[row]), read(gram)), total[row], count[row])))
    write(block.total, drift.sums(total, count))
    of_layers = read(block.layer_total).clone() if layers else total
    for number, one in enumerate(layers):
        for row, grams in enumerate(() if block.layer_grams is None else block.layer_grams):
            square = unpacked(len(one.mean), read(grams[number]))
            write(grams[number], packed(one.gram(square, of_layers[row, number], count[row])))
        write(block.layer_total[:, number], one.sums(of_layers[:, number], count))
