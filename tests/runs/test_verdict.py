"""Which model to use: the sentence under a run's table, its interval, and where there is none."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hf_cdl.runs.verdict import interval, verdict, with_verdict


def results(counts: list[int] | None, finished: bool = True, **rows: list[float | None]) -> dict[str, Any]:
    """Results with these last rows; earlier ones do not matter."""
    roles: dict[str, Any] = {}
    for role, row in rows.items():
        roles[role] = {"accuracy_matrix": [row[: t + 1] for t in range(len(row))]}
        roles[role] |= {} if counts is None else {"counts": counts}
    return {"roles": roles, "finished": finished}


def said(*arguments: Any, **options: Any) -> str:
    found = verdict(results(*arguments, **options))
    assert found is not None
    return found.said


def test_the_three_sentences() -> None:
    ahead = results([500, 500], student=[40.0, 20.0], nearest_class_mean=[50.0, 36.0], linear_head=[30.0, 34.0])
    assert verdict(ahead) == (
        "nearest_class_mean",
        "Use the nearest class mean: 43.0 %, 13.0 points ahead of the student (95 % interval 8.8 to 17.2, by 1,000 "
        "test images).",
    )
    better = results([500, 500], student=[50.0, 36.0], nearest_class_mean=[40.0, 20.0], teacher=[90.0, 90.0])
    assert verdict(better) == (
        "student",
        "Use the student: 43.0 %, 13.0 points ahead of the nearest class mean (95 % interval 8.8 to 17.2, by 1,000 "
        "test images).",
    )
    level = results([24], student=[100 * 20 / 24], linear_head=[100.0])
    assert verdict(level) == (
        "student",
        "Use the student or the linear head: 83.3 % and 100.0 %, which 24 test images cannot tell apart (16.7 points, "
        "95 % interval -1.5 to +32.2).",
    )
    level["recipe"] = {"data": {"eval_split": "validation"}}
    found = verdict(level)
    assert found is not None and "which 24 validation images cannot tell apart" in found.said


def test_without_counts_there_is_no_interval() -> None:
    assert (
        said(None, student=[30.0], ridge_head=[45.5])
        == "Use the ridge head: 45.5 %, 15.5 points ahead of the student."
    )


def test_equal_accuracies_are_level() -> None:
    assert "cannot tell apart (0.0 points" in said([10_000], student=[50.0], linear_head=[50.0])


@pytest.mark.parametrize(
    "found",
    [
        results([9], finished=False, student=[30.0], linear_head=[40.0]),
        results([9], student=[30.0], teacher=[40.0]),
        results([9], linear_head=[30.0], nearest_class_mean=[40.0]),
        results([0, 9], student=[None, 30.0], linear_head=[None, 40.0]),
        results([9]),
    ],
    ids=["not finished", "no baseline", "no student", "a task that was not measured", "nothing"],
)
def test_where_there_is_none_and_an_old_sentence_goes(found: dict[str, Any]) -> None:
    assert verdict(found) is None
    assert with_verdict({**found, "verdict": "Use it."}) == found


def test_the_field_is_the_sentence() -> None:
    found = results([50], student=[30.0], linear_head=[90.0])
    assert with_verdict(found) == {**found, "verdict": said([50], student=[30.0], linear_head=[90.0])}


def test_the_interval_by_hand() -> None:
    """20 of 24 and 24 of 24: 21/26 and 25/26, of which the variances are added."""
    assert interval(100.0, 100 * 20 / 24, [24]) == pytest.approx((-1.473, 32.242), abs=0.01)
    assert interval(60.0, 40.0, [30, 30]) == pytest.approx(interval(60.0, 40.0, [60]))
    few, even = (interval(60.0, 40.0, counts) for counts in ([2, 58], [30, 30]))
    assert few[0] < even[0] and few[1] > even[1], "a task of two images says little, but weighs as much as another"


@pytest.mark.parametrize(("p", "q", "n"), [(0.9, 0.8, 60), (0.99, 0.97, 40), (0.5, 0.45, 200), (0.2, 0.2, 25)])
def test_the_interval_holds_the_difference_in_95_of_100_samples(p: float, q: float, n: int) -> None:
    source, held, trials = random.Random(f"{p} {q} {n}"), 0, 2000
    for _ in range(trials):
        first, second = (100 * sum(source.random() < share for _ in range(n)) / n for share in (p, q))
        least, most = interval(first, second, [n])
        held += least <= 100 * (p - q) <= most
    assert 0.94 <= held / trials
