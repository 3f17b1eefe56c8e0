"""Order, views and distribution to processes of the training images: a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ViewSampler(Sampler[tuple[int, int]]):
    """Yield (sample, view): every sample once per epoch, view = epoch; a pure function of (seed, epoch)."""

    def __init__(self, length: int, seed: int, shuffle: bool = True):
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        yield from ((index, self.epoch) for index in order.tolist())


class Rounds(Sampler[list[tuple[int, int]]]):
    """Epoch order split into rounds, in each of which every process learns from its own batch.

    Iteration yields the processes' batches in turn, as Accelerate distributes them: `batch_size` images each. The last
    round splits the rest evenly, or is dropped with `drop_last`. A process with no images left still gets one, since
    all take part in a step; `sizes` shows that it does not count.
    """

    def __init__(self, sampler: ViewSampler, batch_size: int, drop_last: bool = False, processes: int = 1):
        self.sampler, self.batch_size, self.processes = sampler, batch_size, processes
        self.count = count_rounds(len(sampler), batch_size, drop_last, processes)

    def __len__(self) -> int:
        return self.count * self.processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, first = [*self.sampler], 0
        for number in range(self.count):
            for size in self.sizes(number):
                yield order[first : first + size] or order[:1]
                first += size

    def sizes(self, number: int) -> list[int]:
        """Number of images that each process learns from in a round."""
        whole = self.batch_size * self.processes
        images = min(whole, len(self.sampler) - number * whole)
        return [images // self.processes + (rank < images % self.processes) for rank in range(self.processes)]


def count_rounds(images: int, batch_size: int, drop_last: bool, processes: int = 1) -> int:
    """Number of rounds per epoch, i.e. micro-batches per process."""
    whole = batch_size * processes
    return images // whole if drop_last else -(-images // whole)
