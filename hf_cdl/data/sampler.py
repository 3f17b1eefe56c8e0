"""Order, views and distribution to processes of the training images: a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class Companions:
    """The `ratio` of `count` unlabelled images beside each training image: a pure function of seed and place.

    They are drawn in passes over all of them, each pass in a new order (if `shuffle`) and with a new view.
    """

    def __init__(self, count: int, ratio: int, seed: int, shuffle: bool = True):
        self.count, self.ratio, self.seed, self.shuffle = count, ratio, seed, shuffle
        self._pass, self._order = -1, [*range(count)]

    def at(self, place: int) -> tuple[tuple[int, int], ...]:
        """(image, view) of the companions of the image at a place; places are counted across epochs."""
        return tuple(self._number(number) for number in range(place * self.ratio, (place + 1) * self.ratio))

    def _number(self, number: int) -> tuple[int, int]:
        view, at = divmod(number, self.count)
        if self.shuffle and view != self._pass:
            self._pass, self._order = view, _order(self.count, self.seed + view)
        return self._order[at], view


class ViewSampler(Sampler[Any]):
    """Yield (sample, view): every sample once per epoch, view = epoch; a pure function of (seed, epoch).

    With `views` an epoch from that number on has the view and the blocks of `block` samples of an earlier one, epoch
    modulo `views`, in another order; an incomplete block stays last. With `companions`: ((sample, view), their keys).
    """

    def __init__(
        self,
        length: int,
        seed: int,
        shuffle: bool = True,
        companions: Companions | None = None,
        views: int | None = None,
        block: int = 1,
    ):
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0
        self.companions, self.views, self.block = companions, views, block

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        view = self.epoch if self.views is None else self.epoch % self.views
        order = _order(self.length, self.seed + view) if self.shuffle else [*range(self.length)]
        if self.shuffle and view != self.epoch:
            whole = self.length // self.block
            blocks = [*_order(whole, self.seed + self.epoch), whole]
            order = [index for number in blocks for index in order[number * self.block : (number + 1) * self.block]]
        for place, index in enumerate(order, self.epoch * self.length):
            key = (index, view)
            yield key if self.companions is None else (key, self.companions.at(place))


def _order(length: int, seed: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


class Rounds(Sampler[list[Any]]):
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

    def __iter__(self) -> Iterator[list[Any]]:
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
