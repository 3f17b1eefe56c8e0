"""Products of many values: all of them in the slow tier, and in the fast one as few as hold every pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]


def pairs_of(row: Row) -> set[tuple[tuple[int, Any], ...]]:
    """Every two of a row's values, each with its column."""
    return {*itertools.combinations(enumerate(row), 2)}


def pairwise(rows: Sequence[Row]) -> list[Row]:
    """Some of the rows, in their order, which hold every pair of values that occurs in any: always the row that holds
    most of what is missing.
    """
    missing, chosen = set().union(*map(pairs_of, rows)), set()
    while missing:
        best = max(rows, key=lambda row: len(missing & pairs_of(row)))
        missing -= pairs_of(best)
        chosen.add(best)
    return [row for row in rows if row in chosen]


def tiered(rows: Sequence[Row]) -> list[Any]:
    """The rows as parameters of a test; those that `pairwise` does without are slow."""
    fast = pairwise(rows)
    return [pytest.param(*row, marks=() if row in fast else pytest.mark.slow) for row in rows]
