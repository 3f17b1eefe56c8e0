"""The A/A check: how often the procedure finds a difference where there is none, on a comparison's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_cdl.compare.statistics import LEVEL, Values, sign_flip, smallest_p
from hf_cdl.counted import counted

DRAWS = 1000


@dataclass(frozen=True)
class Check:
    """`wins` false wins in `draws` comparisons of equals; `low` to `high`: 95 % interval of their rate.

    `smallest`: the smallest p that this many `pairs` can give. Above LEVEL nothing can win: the check is meaningless.
    """

    what: str
    pairs: int
    draws: int
    wins: int
    low: float
    high: float
    smallest: float

    @property
    def rate(self) -> float:
        return self.wins / self.draws

    @property
    def passed(self) -> bool:
        """Whether the interval includes a rate of LEVEL or less."""
        return self.low <= LEVEL


def relabelled(values: Values, pairs: Sequence[tuple[str, str]]) -> Check | None:
    """Run the whole procedure with labels shuffled within every unit, so that every win is false.

    Each row's mean is subtracted first, which leaves the noise of the runs. None if there are fewer than two units.
    """
    pairs = [pair for pair in pairs if pair[0] in values and pair[1] in values]
    labels = list(dict.fromkeys(label for pair in pairs for label in pair))
    units = [unit for unit in values[labels[0]] if all(unit in values[x] for x in labels)] if labels else []
    if len(units) < 2:
        return None
    noise = np.array([[values[label][unit] for unit in units] for label in labels])
    noise -= noise.mean(axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.permuted(noise, axis=0) for _ in range(DRAWS)], axis=-1)  # rows, units, draws
    where = [(labels.index(first), labels.index(second)) for first, second in pairs]
    p_values = np.stack([sign_flip(drawn[first] - drawn[second]) for first, second in where])
    wins = int((p_values.min(axis=0) * len(pairs) <= LEVEL).sum())  # Holm's first step: is there any win at all?
    what = f"{counted(len(labels), 'row')} relabelled within units, {counted(len(pairs), 'contrast')} with Holm"
    return _check(what, len(units), wins, 1, smallest_p(len(units), len(pairs)))


def halves(values: Values) -> list[Check]:
    """Compare every row with itself: its units split at random into two halves and paired, one test per draw.

    Rows with the same number of pairs form one check; a row needs four units.
    """
    rng, wins = np.random.default_rng(0), {}
    for runs in values.values():
        pairs = len(runs) // 2
        if pairs >= 2:
            drawn = rng.permuted(np.tile([*runs.values()], (DRAWS, 1)), axis=1).T
            won = sign_flip(drawn[:pairs] - drawn[pairs : 2 * pairs]) <= LEVEL
            wins.setdefault(pairs, []).append(int(won.sum()))
    return [
        _check(f"{counted(len(f), 'row')}, one half of the units against the other", n, sum(f), len(f), smallest_p(n))
        for n, f in wins.items()
    ]


def _check(what: str, pairs: int, wins: int, rows: int, smallest: float) -> Check:
    from scipy import stats

    interval = stats.binomtest(wins, rows * DRAWS).proportion_ci()
    return Check(what, pairs, rows * DRAWS, wins, float(interval.low), float(interval.high), smallest)
