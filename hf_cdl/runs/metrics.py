"""Continual-learning metrics: pure functions of an accuracy matrix. continual_metric.py wraps them for `evaluate`.

The accuracy matrix R: `R[t][i]` is the accuracy in percent on the test images of task i after learning task t, counted
from 0. Row t has t + 1 entries; entries right of the diagonal are ignored. T is the number of rows: an unfinished
stream is measured as if it ended with its last row. Every function raises ValueError if there are no rows, a row is
too short or a used entry is not a number in 0..100. None means not measured; metrics that depend on it are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

AccuracyMatrix = Iterable[Iterable[float | None]]


def average_accuracy(R: AccuracyMatrix) -> float:
    """Mean of the last row, with equal weight per task: 1/T * sum_i R[T-1][i], in percent.

    A_T of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840, eq. 2); the CDL authors report it too.
    """
    return fmean(_lower_triangle(R)[-1])


def sample_average_accuracy(R: AccuracyMatrix, counts: Sequence[int]) -> float:
    """Mean of the last row weighted by `counts`, the test images per task: the share of correct images, in percent.

    Equals `average_accuracy` if all tasks have the same number of images. Raises ValueError unless there is one
    positive count for each of the T tasks.
    """
    last = _lower_triangle(R)[-1]
    if any(map(math.isnan, last)):
        return math.nan
    if len(counts) != len(last) or not all(count > 0 for count in counts):
        raise ValueError(f"got counts {list(counts)} for {len(last)} learned tasks; give one positive count for each")
    return sum(a * n for a, n in zip(last, counts, strict=True)) / sum(counts)


def average_incremental_accuracy(R: AccuracyMatrix) -> float:
    """Mean over all t of the average accuracy after task t: 1/T * sum_t 1/(t+1) * sum_{i<=t} R[t][i], in percent.

    Rebuffi et al. 2017 (iCaRL, arXiv:1611.07725, section 4). iCaRL averages over images at each step, this over tasks:
    both are equal if all tasks have the same number of test images.
    """
    return fmean(fmean(row) for row in _lower_triangle(R))


def forgetting(R: AccuracyMatrix) -> float:
    """Mean over i < T-1 of max_{i<=t<T-1} R[t][i] - R[T-1][i], in percentage points; 0.0 if T = 1.

    F_T of Chaudhry et al. 2018 (arXiv:1801.10112, eq. 3). The best accuracy is taken over the rows before the last, so
    the value is negative if old tasks end better than they ever were. The last task, just learned, is left out.
    """
    rows = _lower_triangle(R)
    old = range(len(rows) - 1)
    return fmean(_best([row[i] for row in rows[i:-1]]) - rows[-1][i] for i in old) if old else 0.0


def official_forgetting(R: AccuracyMatrix) -> float:
    """The CDL authors' forgetting: 1/T * sum over all T tasks of R[i][i] - R[T-1][i], in percentage points.

    Differs from `forgetting` in two ways: it compares with the accuracy right after learning a task instead of the
    best one, and divides by T although the last task always adds 0. Always -(T-1)/T * `backward_transfer`; 0.0 if
    T = 1.
    """
    rows = _lower_triangle(R)
    return fmean(rows[i][i] - rows[-1][i] for i in range(len(rows)))


def one_step_forgetting(R: AccuracyMatrix) -> float:
    """CODA-Prompt's forgetting: mean over t = 1..T-1 of mean over i < t of R[t-1][i] - R[t][i]; 0.0 if T = 1.

    The average drop of an old task in one step, in percentage points: much smaller than the drop from best to final
    accuracy that `forgetting` measures. Smith et al. 2023 (arXiv:2211.13218), as computed by their published code.
    """
    rows = _lower_triangle(R)
    steps = range(1, len(rows))
    return fmean(fmean(rows[t - 1][i] - rows[t][i] for i in range(t)) for t in steps) if steps else 0.0


def backward_transfer(R: AccuracyMatrix) -> float:
    """Mean over i < T-1 of R[T-1][i] - R[i][i], in percentage points, negative for forgetting; 0.0 if T = 1.

    BWT of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840, eq. 3).
    """
    rows = _lower_triangle(R)
    old = range(len(rows) - 1)
    return fmean(rows[-1][i] - rows[i][i] for i in old) if old else 0.0


METRICS: dict[str, Callable[[AccuracyMatrix], float]] = {
    "average_accuracy": average_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
    "forgetting": forgetting,
    "official_forgetting": official_forgetting,
    "one_step_forgetting": one_step_forgetting,
    "backward_transfer": backward_transfer,
}
"""All metrics that need only the accuracy matrix; `sample_average_accuracy` also needs the counts."""


def continual_metrics(R: AccuracyMatrix, counts: Sequence[int] | None = None) -> dict[str, Any]:
    """Compute all of METRICS by name, and `sample_average_accuracy` if `counts` (test images per task) are given.

    A metric that depends on an unmeasured entry is None rather than NaN, which JSON lacks.
    """
    rows = [list(row) for row in R]
    values = {name: metric(rows) for name, metric in METRICS.items()}
    if counts is not None:
        values["sample_average_accuracy"] = sample_average_accuracy(rows, counts)
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _lower_triangle(R: AccuracyMatrix) -> list[list[float]]:
    """Check R and cut row t to its t + 1 entries."""
    try:
        rows = [[None if value is None else float(value) for value in row] for row in R]
    except (TypeError, ValueError) as error:
        raise ValueError(f"an accuracy matrix is a list of rows of numbers, R[t][i] in percent: {error}") from error
    if not rows:
        raise ValueError("the accuracy matrix has no rows; add the row of the first task, [accuracy in percent]")
    for t, row in enumerate(rows):
        if len(row) <= t:
            raise ValueError(f"row {t} of the accuracy matrix has length {len(row)}; row t (from 0) needs t + 1")
        for i, value in enumerate(row[: t + 1]):
            if value is not None and not 0.0 <= value <= 100.0:
                raise ValueError(f"R[{t}][{i}] is {value}; accuracies are percentages from 0 to 100")
    return [[math.nan if value is None else value for value in row[: t + 1]] for t, row in enumerate(rows)]


def _best(values: list[float]) -> float:
    """The largest value; NaN if any is NaN, which max() would return or not depending on order."""
    return math.nan if any(map(math.isnan, values)) else max(values)
