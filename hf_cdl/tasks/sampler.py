"""The order of the training images, and the view of each: a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ViewSampler(Sampler[tuple[int, int]]):
    """Yields (sample, view): every sample once an epoch, view = epoch; a pure function of (seed, epoch)."""

    def __init__(self, length: int, seed: int, shuffle: bool = True):
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        yield from ((index, self.epoch) for index in order.tolist())
