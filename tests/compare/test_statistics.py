"""The statistics of a comparison: p values and Holm's correction by hand, and how often equals seem to differ."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from hf_cdl.compare.aa import DRAWS, halves, relabelled
from hf_cdl.compare.statistics import LEVEL, contrasts_of, holm, mean_of, pairs_needed, sign_flip, smallest_p

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")


def by_hand(differences: list[float]) -> float:
    """All 2**n sign flips, one by one."""
    observed = abs(sum(differences))
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


def test_the_p_value_is_the_share_of_sign_flips_as_far_from_zero():
    assert float(sign_flip([1.0, 2.0, 3.0])) == 0.25  # + + + and - - - of 8
    assert float(sign_flip([3.0, 2.0, -1.0])) == 0.5  # the sums ±6 and ±4 of 8
    assert float(sign_flip([0.0, 0.0, 0.0])) == 1.0
    assert float(sign_flip([5.0])) == 1.0
    rng = np.random.default_rng(0)
    for n in (2, 4, 7, 10):
        differences = rng.normal(0.5, 1, n).round(1).tolist()  # rounded: with ties, as accuracies have them
        assert float(sign_flip(differences)) == pytest.approx(by_hand(differences), abs=1e-12)
    many = rng.normal(0.5, 1, (6, 5))
    assert sign_flip(many).tolist() == [float(sign_flip(column)) for column in many.T]


def test_ten_wins_of_ten_are_the_smallest_p_of_ten_pairs():
    assert float(sign_flip(np.linspace(0.1, 3, 10))) == smallest_p(10) == 2 / 1024
    assert smallest_p(10, contrasts=3) == 6 / 1024
    assert smallest_p(5) == 0.0625 > LEVEL >= smallest_p(6)
    for contrasts in (1, 3, 10):
        n = pairs_needed(contrasts)
        assert smallest_p(n, contrasts) <= LEVEL < smallest_p(n - 1, contrasts)


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.04: times 3, 2, 1, never falling."""
    assert holm([0.04, 0.01, 0.02]).tolist() == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.4]).tolist() == pytest.approx([0.8, 0.8])
    assert len(holm([])) == 0


def test_the_interval_is_students():
    """1, 2, 3: standard error 1/sqrt(3), t of 2 degrees of freedom 4.3027."""
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.n, mean.mean, mean.sd) == (3, 2.0, 1.0)
    assert (mean.high - 2.0, 2.0 - mean.low) == pytest.approx((4.3027 / math.sqrt(3),) * 2, abs=1e-4)
    assert math.isnan(mean_of([1.0]).low) and mean_of([4.0, 4.0]).low == 4.0
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_differences_are_paired_by_unit():
    """Units far apart, differences small: an unpaired test finds nothing. Units missing in one row are left out."""
    ours = {(2, None): 92.0, (0, None): 12.0, (1, None): 52.0, (7, None): 0.0}
    theirs = {(0, None): 11.0, (1, None): 50.0, (2, None): 89.0}
    third = {(9, None): 1.0}
    values = {"kd": ours, "alone": theirs, "other": third}
    first, second = contrasts_of(values, [("kd", "alone"), ("kd", "other"), ("alone", "kd")])  # no unit with `other`
    assert dict(first.differences) == {(0, None): 1.0, (1, None): 2.0, (2, None): 3.0}
    assert (first.p, first.p_holm, first.above, first.proven) == (0.25, 0.5, 3, False)
    assert (second.mean.mean, second.above) == (-2.0, 0)


def test_over_classes_is_the_interval_that_holds_for_other_images():
    """Equals, each better at some classes: ten units with the same classes agree; only the classes show the spread."""
    rng, pair, wins = np.random.default_rng(6), [("a", "b")], {"units": 0, "classes": 0}
    for _ in range(300):
        better = rng.normal(0, 8, 50)
        drawn: dict[str, Any] = {
            label: {unit: dict(enumerate(50 + share * better + rng.normal(0, 2, 50))) for unit in range(10)}
            for label, share in (("a", 0.5), ("b", -0.5))
        }
        values = {
            label: {unit: float(np.mean([*by.values()])) for unit, by in runs.items()} for label, runs in drawn.items()
        }
        [contrast] = contrasts_of(values, pair, drawn)
        assert contrast.over_classes is not None
        assert contrast.over_classes.mean == pytest.approx(contrast.mean.mean) and contrast.over_classes.n == 50
        for name, mean in (("units", contrast.mean), ("classes", contrast.over_classes)):
            wins[name] += not mean.low <= 0 <= mean.high
    assert wins["units"] > 150 and wins["classes"] <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_over_classes_asks_for_the_same_classes_of_all_units():
    values = {"a": {0: 60.0, 1: 50.0}, "b": {0: 40.0, 1: 50.0}}
    whole = {"a": {0: {"x": 70.0, "y": 50.0}, 1: {"x": 50.0, "y": 50.0}}}
    whole["b"] = {0: {"x": 40.0, "y": 40.0}, 1: {"x": 60.0, "y": 40.0}}
    [found] = contrasts_of(values, [("a", "b")], whole)
    assert found.over_classes == mean_of([10.0, 10.0])
    for other in (
        {},
        {"a": whole["a"]},
        {**whole, "b": {0: whole["b"][0]}},
        {**whole, "b": {0: {"x": 1.0}, 1: {"x": 1.0}}},
    ):
        [found] = contrasts_of(values, [("a", "b")], other)
        assert found.over_classes is None


def invented(rng: np.random.Generator, rows: int, units: int, effect: float = 0.0) -> dict[str, dict[int, float]]:
    """Realistic accuracies: a class order makes all rows better or worse; noise with outliers; 500 images."""
    order, noise = rng.normal(0, 3, units), rng.standard_t(4, (rows, units))
    found = 45 + order + noise + effect * np.arange(rows)[:, None]
    return {f"row {i}": dict(enumerate((row * 5).round() / 5)) for i, row in enumerate(found)}


@pytest.mark.parametrize("units", [6, 10])
def test_equals_differ_in_at_most_five_percent_of_all_comparisons(units: int):
    """The A/A check: a comparison of five equal rows by four contrasts finds something in no more than 5 % of 1000."""
    rng, comparisons = np.random.default_rng(units), 1000
    p_values = []
    for _ in range(comparisons):
        found = np.array([[*runs.values()] for runs in invented(rng, 5, units).values()])
        p_values.append(found[1:] - found[0])
    raw = sign_flip(np.stack(p_values, axis=-1).transpose(1, 0, 2))  # contrasts, comparisons
    wins = (raw.min(axis=0) * 4 <= LEVEL).mean()
    for column in raw.T[
        np.argsort(raw.min(axis=0))[::50]
    ]:  # Holm finds something exactly if four times the smallest p is small enough
        assert (holm(column).min() <= LEVEL) == (column.min() * 4 <= LEVEL)
    error = math.sqrt(LEVEL * (1 - LEVEL) / comparisons)
    assert wins <= LEVEL + 3 * error
    assert smallest_p(units, 4) > LEVEL or wins > 0.01  # the procedure does find something
    assert (raw.min(axis=0) <= LEVEL).mean() > LEVEL + 3 * error  # without the correction there would be too many


def test_the_interval_holds_the_truth_in_95_percent():
    rng = np.random.default_rng(3)
    hits = [mean.low <= 45 <= mean.high for mean in (mean_of((45 + rng.normal(0, 2, 8)).tolist()) for _ in range(600))]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_a_real_difference_is_found():
    rng = np.random.default_rng(4)
    pairs = [("row 1", "row 0"), ("row 2", "row 0")]
    found = [contrasts_of(invented(rng, 3, 10, effect=3.0), pairs) for _ in range(10)]
    assert sum(contrast.proven for family in found for contrast in family) >= 18


def test_the_check_on_a_comparisons_own_numbers():
    """Even for very different rows: without their means only noise is left, and noise must not win."""
    rng = np.random.default_rng(5)
    values = invented(rng, 4, 12, effect=10.0)
    pairs = [("row 1", "row 0"), ("row 2", "row 0"), ("row 3", "row 0")]
    assert all(contrast.proven for contrast in contrasts_of(values, pairs))
    check = relabelled(values, pairs)
    assert check is not None and check.pairs == 12 and check.passed and 0 < check.rate <= 0.07
    [own] = halves(values)
    assert (own.pairs, own.draws) == (6, 4 * DRAWS) and own.passed and 0 < own.rate <= 0.07


def test_the_check_says_when_nothing_could_win():
    values = invented(np.random.default_rng(6), 2, 5)
    check = relabelled(values, [("row 1", "row 0")])
    assert check is not None and check.wins == 0 and check.smallest == 0.0625
    assert [own.smallest for own in halves(values)] == [0.5]
    assert relabelled(values, [("row 1", "row 7")]) is None and halves({"one": {0: 1.0, 1: 2.0}}) == []
