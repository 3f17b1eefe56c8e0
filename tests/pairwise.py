"""Pairwise testing: all combinations in the slow tier; in the fast tier just enough to cover every pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]


def pairs_of(row: Row) -> set[tuple[tuple[int, Any], ...]]:
    """All pairs of a row's values, each with its column."""
    return {*itertools.combinations(enumerate(row), 2)}


def pairwise(rows: Sequence[Row]) -> list[Row]:
    """A subset of the rows, in their order, that covers every pair of values in them.

    It is chosen greedily: always the row with the most missing pairs.
    """
    missing, chosen = set().union(*map(pairs_of, rows)), set()
    while missing:
        best = max(rows, key=lambda row: len(missing & pairs_of(row)))
        missing -= pairs_of(best)
        chosen.add(best)
    return [row for row in rows if row in chosen]


def tiered(rows: Sequence[Row]) -> list[Any]:
    """The rows as parameters of a test; those not needed by `pairwise` are marked slow."""
    fast = pairwise(rows)
    return [pytest.param(*row, marks=() if row in fast else pytest.mark.slow) for row in rows]
