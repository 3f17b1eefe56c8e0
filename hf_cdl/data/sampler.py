"""The order of the training images, the view of each, and who learns from which: a pure function of seed and epoch."""

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


class Rounds(Sampler[list[tuple[int, int]]]):
    """The order of an epoch cut into rounds: in each, every process learns from one batch of its own.

    Iterating yields the batches of all processes in turn, as Accelerate deals them out: `batch_size` images for each;
    the last round has the rest, evenly, or with `drop_last` there is none of less. A process for which nothing is left
    gets an image all the same, since all take part in a step: `sizes` tells that it counts for nothing.
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
        """How many images of a round each process learns from."""
        whole = self.batch_size * self.processes
        images = min(whole, len(self.sampler) - number * whole)
        return [images // self.processes + (rank < images % self.processes) for rank in range(self.processes)]


def count_rounds(images: int, batch_size: int, drop_last: bool, processes: int = 1) -> int:
    """Rounds of an epoch, which are the micro-batches of each process."""
    whole = batch_size * processes
    return images // whole if drop_last else -(-images // whole)
