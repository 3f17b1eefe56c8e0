"""Continual metrics: matrices worked by hand, relations that hold for any matrix, and the `evaluate` interface."""

from __future__ import annotations

import pickle
import random
from typing import Any

import evaluate
import numpy as np
import pytest
import torch

from hf_cdl.runs import continual_metric
from hf_cdl.runs.continual_metric import ContinualMetric
from hf_cdl.runs.metrics import METRICS, continual_metrics

# Task 0 gets better before it gets worse, so its best accuracy (90) is not the one right after learning it (80).
HAND = [[80.0], [90.0, 60.0], [70.0, 50.0, 100.0]]
HAND_COUNTS = [10, 30, 60]
HAND_VALUES = {
    "average_accuracy": 220 / 3,  # (70 + 50 + 100) / 3
    "average_incremental_accuracy": (80 + 75 + 220 / 3) / 3,
    "forgetting": 15.0,  # ((90 - 70) + (60 - 50)) / 2
    "official_forgetting": 20 / 3,  # ((80 - 70) + (60 - 50) + 0) / 3
    "one_step_forgetting": 2.5,  # ((80 - 90) + ((90 - 70) + (60 - 50)) / 2) / 2
    "backward_transfer": -10.0,  # ((70 - 80) + (50 - 60)) / 2
    "sample_average_accuracy": 82.0,  # (10 * 70 + 30 * 50 + 60 * 100) / 100
}


def random_matrix(seed: int) -> list[list[float]]:
    source = random.Random(seed)
    return [[source.uniform(0, 100) for _ in range(t + 1)] for t in range(source.randint(2, 12))]


@pytest.fixture(autouse=True)
def offline_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))


def test_hand_worked_matrix():
    assert continual_metrics(HAND, HAND_COUNTS) == pytest.approx(HAND_VALUES)


def test_without_counts_only_the_weighted_mean_is_missing():
    assert continual_metrics(HAND).keys() == METRICS.keys() == HAND_VALUES.keys() - {"sample_average_accuracy"}


def test_one_task_has_nothing_to_forget():
    expected = dict.fromkeys(HAND_VALUES, 0.0)
    expected |= dict.fromkeys(["average_accuracy", "average_incremental_accuracy", "sample_average_accuracy"], 70.0)
    assert continual_metrics([[70.0]], [5]) == expected


@pytest.mark.parametrize("upper", [0.0, 77.0, float("nan")])
def test_what_is_right_of_the_diagonal_does_not_count(upper):
    square = [row + [upper] * (4 - len(row)) for row in HAND]  # three rows of a stream of four tasks
    matrices: list[Any] = [square, np.array(square), torch.tensor(square)]
    for matrix in matrices:
        assert continual_metrics(matrix, HAND_COUNTS) == pytest.approx(HAND_VALUES)


@pytest.mark.parametrize("seed", range(5))
def test_relations_between_the_metrics(seed):
    R = random_matrix(seed)
    T = len(R)
    values = continual_metrics(R, [7] * T)
    assert values["forgetting"] >= -values["backward_transfer"] - 1e-9
    assert values["official_forgetting"] == pytest.approx(-values["backward_transfer"] * (T - 1) / T)
    assert values["sample_average_accuracy"] == pytest.approx(values["average_accuracy"])
    assert values["average_incremental_accuracy"] == pytest.approx(
        np.mean([METRICS["average_accuracy"](R[: t + 1]) for t in range(T)])
    )


@pytest.mark.parametrize("seed", range(5))
def test_official_forgetting_where_every_task_is_best_right_after_learning_it(seed):
    R = random_matrix(seed)
    T = len(R)
    for i in range(T):
        R[i][i] = max(R[t][i] for t in range(i, T))
    values = continual_metrics(R)
    assert values["official_forgetting"] == pytest.approx(values["forgetting"] * (T - 1) / T)
    assert values["forgetting"] == pytest.approx(-values["backward_transfer"])


def test_two_tasks_make_all_kinds_of_forgetting_one_step():
    values = continual_metrics([[90.0], [60.0, 80.0]])
    assert values["forgetting"] == values["one_step_forgetting"] == -values["backward_transfer"] == 30.0
    assert values["official_forgetting"] == 15.0


def test_an_old_task_that_ends_better_than_ever_is_negative_forgetting():
    values = continual_metrics([[50.0], [80.0, 60.0]])
    assert values["forgetting"] == values["one_step_forgetting"] == -values["backward_transfer"] == -30.0


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "no rows"),
        ([[]], "row 0 of the accuracy matrix has length 0"),
        ([[80.0], [70.0]], r"row 1 .* has length 1; row t \(from 0\) needs t \+ 1"),
        ([[80.0], [70.0, float("nan")]], r"R\[1\]\[1\] is nan"),
        ([[80.0], [70.0, 100.5]], r"R\[1\]\[1\] is 100.5; accuracies are percentages"),
        ([[-1.0]], r"R\[0\]\[0\] is -1.0"),
        ([80.0, 70.0], "list of rows of numbers"),
        ([["good"]], "list of rows of numbers"),
    ],
)
def test_bad_matrices(matrix, message):
    for metric in METRICS.values():
        with pytest.raises(ValueError, match=message):
            metric(matrix)


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 3, 4], [1, 0, 2]])
def test_bad_counts(counts):
    with pytest.raises(ValueError, match=r"for 3 learned tasks; give one positive count for each"):
        continual_metrics(HAND, counts)


@pytest.mark.parametrize("name", [*METRICS, None])
def test_the_evaluate_class_agrees_with_the_functions_however_the_rows_arrive(name):
    metric = ContinualMetric(name)
    for R in (HAND, random_matrix(1)):
        values = continual_metrics(R)
        expected = pytest.approx(values if name is None else {name: values[name]})
        assert metric.compute(accuracies=R) == expected
        for row in R:
            metric.add(accuracies=row)
        assert metric.compute() == expected
        metric.add_batch(accuracies=R[:2])
        metric.add_batch(accuracies=R[2:])
        assert pickle.loads(pickle.dumps(ContinualMetric(name))).compute(accuracies=R) == expected
        assert metric.compute() == expected


def test_the_evaluate_class_takes_counts_combines_and_knows_its_names():
    assert ContinualMetric().compute(accuracies=HAND, counts=HAND_COUNTS) == pytest.approx(HAND_VALUES)
    names = ["average_accuracy", "forgetting"]
    combined = evaluate.combine([ContinualMetric(name) for name in names])
    assert combined.compute(accuracies=HAND) == pytest.approx({name: HAND_VALUES[name] for name in names})
    with pytest.raises(ValueError, match="no metric 'forgeting'; allowed: average_accuracy, .*forgetting"):
        ContinualMetric("forgeting")
    with pytest.raises(ValueError, match="counts have no effect on forgetting"):
        ContinualMetric("forgetting").compute(accuracies=HAND, counts=HAND_COUNTS)


def test_the_evaluate_class_is_usable_after_an_error():
    metric = ContinualMetric("forgetting")
    with pytest.raises(ValueError, match="percentages"):
        metric.compute(accuracies=[[101.0]])
    assert metric.compute(accuracies=HAND) == {"forgetting": 15.0}


def test_evaluate_loads_it_from_its_file(tmp_path):
    metric = evaluate.load(continual_metric.__file__, "forgetting", cache_dir=tmp_path)
    assert metric.compute(accuracies=HAND) == {"forgetting": 15.0}


def test_the_evaluate_class_leaves_no_files(tmp_path):
    metric = ContinualMetric(cache_dir=str(tmp_path))
    metric.compute(accuracies=HAND)
    metric.add(accuracies=HAND[0])
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
