"""Views that recur: an epoch has the batches of an earlier one, in another order."""

from __future__ import annotations

import pytest

from hf_cdl.data import StreamConfig
from hf_cdl.data.sampler import Rounds, ViewSampler


def epoch(number: int, **fields: int | bool | None) -> list[tuple[int, int]]:
    sampler = ViewSampler(23, 5, **fields)  # type: ignore[arg-type]
    sampler.epoch = number
    return [*sampler]


def blocks(order: list[tuple[int, int]], size: int) -> list[tuple[tuple[int, int], ...]]:
    return [tuple(order[first : first + size]) for first in range(0, len(order), size)]


@pytest.mark.parametrize("size", [1, 4, 6, 23, 40])
def test_whole_blocks_come_again_in_another_order(size: int) -> None:
    for number in range(3):
        first = epoch(number, views=3, block=size)
        assert first == epoch(number), "as without views"
        for later in (number + 3, number + 6):
            again = epoch(later, views=3, block=size)
            assert {view for _, view in again} == {number}
            assert sorted(blocks(again, size)) == sorted(blocks(first, size))
            if size <= 4:
                assert again != first
            if 23 % size:
                assert blocks(again, size)[-1] == blocks(first, size)[-1], "the incomplete one"
    assert epoch(5, views=3, block=4) != epoch(8, views=3, block=4)


def test_a_fixed_order_stays() -> None:
    assert epoch(4, views=2, block=4, shuffle=False) == [(index, 0) for index in range(23)]


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_gets_whole_batches_again(processes: int) -> None:
    batches = []
    for number in (0, 2):
        sampler = ViewSampler(23, 5, views=2, block=4 * processes)
        sampler.epoch = number
        batches.append([tuple(batch) for batch in Rounds(sampler, 4, processes=processes)])
    assert sorted(batches[0]) == sorted(batches[1])
    assert batches[0] != batches[1]


@pytest.mark.parametrize("views", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_views_is_refused(views: object) -> None:
    with pytest.raises(ValueError, match=f"views is {views}, but must be a whole number of at least 1"):
        StreamConfig(views=views)  # type: ignore[arg-type]
