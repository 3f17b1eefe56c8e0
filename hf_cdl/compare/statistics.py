"""Statistics of paired runs: means with intervals, exact sign-flip tests of paired differences, Holm's correction.

Intervals are Student's, 95 %: with the five or ten units of a comparison, a bootstrap interval has too little
coverage. They assume approximately normal differences; the tests assume only that a difference is as likely to be -d
as d under the null hypothesis. The tests are scipy's, the correction is statsmodels' (extra `report`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.05
"""Familywise error rate: the allowed rate of false wins over all contrasts of a comparison together."""

EXACT = 14
"""Up to this many pairs all sign flips are counted; with more, 2**14 random ones."""

Values = Mapping[str, Mapping[Any, float]]
"""Row -> unit -> metric."""


@dataclass(frozen=True)
class Mean:
    """Mean of n values, sample standard deviation and 95 % interval; the latter two are NaN for a single value."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Contrast:
    """first - second over the units of both. `p`: two-sided, uncorrected; `p_holm`: corrected for all contrasts.

    `over_classes`: the mean over the classes of each class's mean difference; None if it was not measured. The units
    share their test images, so the interval over units says nothing about other images or classes. The one over
    classes does, if the classes are regarded as drawn at random.
    """

    first: str
    second: str
    differences: Mapping[Hashable, float]
    mean: Mean
    p: float
    p_holm: float
    over_classes: Mean | None = None

    @property
    def above(self) -> int:
        """How many differences are above 0."""
        return sum(value > 0 for value in self.differences.values())

    @property
    def proven(self) -> bool:
        """Whether the difference survives the correction at LEVEL."""
        return self.p_holm <= LEVEL


def mean_of(numbers: Sequence[float]) -> Mean:
    """Mean, standard deviation and interval. Raises ValueError if there are no numbers."""
    from scipy import stats

    if not len(numbers):
        raise ValueError("there is no mean of no values; leave the row out")
    sample = np.asarray(numbers, dtype=float)
    n, mean = len(sample), float(sample.mean())
    if n == 1:
        return Mean(1, mean, math.nan, math.nan, math.nan)
    sd = float(sample.std(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Mean(n, mean, sd, mean - half, mean + half)


def sign_flip(differences: Any) -> np.ndarray:
    """Two-sided p values of the means of paired differences (n, ...), one test per column.

    Exact: the fraction of all 2**n sign flips whose mean is at least as far from 0.
    """
    from scipy import stats

    sample = np.asarray(differences, dtype=float)
    if len(sample) < 2:
        return np.ones(sample.shape[1:])
    random: Any = {"rng": np.random.default_rng(0)}
    found: Any = stats.permutation_test(
        (sample,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        axis=0,
        n_resamples=2**EXACT,
        batch=max(1, 2**21 // sample.size),
        **random,
    )
    return np.asarray(found.pvalue, dtype=float)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """The p values after Holm's correction: those at or below LEVEL are jointly significant at that level."""
    from statsmodels.stats.multitest import multipletests

    return np.asarray(multipletests(p_values, alpha=LEVEL, method="holm")[1]) if len(p_values) else np.empty(0)


def contrasts_of(
    values: Values,
    pairs: Sequence[tuple[str, str]],
    by_class: Mapping[str, Mapping[Any, Mapping[str, float]]] | None = None,
) -> list[Contrast]:
    """All contrasts [A, B], corrected as one family; pairs without a common unit yet are left out.

    `by_class`: row -> unit -> class -> the same metric for this class alone.
    """
    found, by_class = [], by_class or {}
    for first, second in pairs:
        ours, theirs = values.get(first, {}), values.get(second, {})
        if common := [unit for unit in ours if unit in theirs]:
            found.append((first, second, {unit: ours[unit] - theirs[unit] for unit in common}))
    raw = [float(sign_flip(list(differences.values()))) for _, _, differences in found]
    return [
        Contrast(
            first,
            second,
            differences,
            mean_of([*differences.values()]),
            p,
            float(corrected),
            _over_classes(by_class.get(first, {}), by_class.get(second, {}), [*differences]),
        )
        for (first, second, differences), p, corrected in zip(found, raw, holm(raw), strict=True)
    ]


def _over_classes(
    first: Mapping[Any, Mapping[str, float]], second: Mapping[Any, Mapping[str, float]], units: Sequence[Any]
) -> Mean | None:
    """Mean over classes of each class's mean difference; None unless all units share the same two or more classes."""
    if not all(unit in first and unit in second for unit in units):
        return None
    names = {frozenset(run[unit]) for run in (first, second) for unit in units}
    if len(names) != 1 or len(classes := sorted(*names)) < 2:
        return None
    return mean_of([float(np.mean([first[unit][c] - second[unit][c] for unit in units])) for c in classes])


def smallest_p(pairs: int, contrasts: int = 1) -> float:
    """The smallest corrected p that the best of this many contrasts can have with this many pairs."""
    return min(1.0, contrasts * 2.0 ** (1 - pairs))


def pairs_needed(contrasts: int) -> int:
    """The number of pairs needed to prove any difference at all among this many contrasts."""
    return math.ceil(1 - math.log2(LEVEL / contrasts))
