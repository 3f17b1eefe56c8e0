"""Accuracy decomposed: on numbers worked by hand, and in a trainer's evaluation of real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import make_recipe, train, write_recipe

from hf_cdl.training.evaluation import calibration_error, class_accuracy, judge


def test_an_answer_is_right_exactly_if_the_task_is_identified_and_it_is_right_within_it():
    """Four classes, of which 2 and 3 are the task's; four images of class 3, one of class 2."""
    logits = torch.tensor(
        [
            [0.0, 0.0, 1.0, 2.0],  # right
            [3.0, 0.0, 1.0, 2.0],  # another task, right within its own
            [0.0, 0.0, 2.0, 1.0],  # its task, the wrong class
            [3.0, 0.0, 2.0, 1.0],  # another task, and wrong within its own
            [0.0, 0.0, 2.0, 1.0],  # of class 2: right
        ]
    )
    found = judge(logits, torch.tensor([3, 3, 3, 3, 2]), slice(2, 4))
    assert found["correct"].tolist() == [True, False, False, False, True]
    assert found["within_task"].tolist() == [True, True, False, False, True]
    assert found["task_identification"].tolist() == [True, False, True, False, True]
    both = found["within_task"] & found["task_identification"]
    assert torch.equal(both, found["correct"])
    total = 2 + torch.e + torch.e**2
    assert found["confidence"][0].item() == pytest.approx(torch.e**2 / total, abs=1e-6)


def test_the_calibration_error_of_numbers_worked_by_hand():
    """Bins of 1/15: 0.95 and 0.97 share one (1 of 2 right, 0.46 too sure); 0.5 has its own (right, 0.5 too unsure)."""
    confidence = torch.tensor([0.95, 0.97, 0.5, 0.5])
    correct = torch.tensor([True, False, True, True])
    assert calibration_error(confidence, correct) == pytest.approx(100 * (2 * 0.46 + 2 * 0.5) / 4, abs=1e-4)
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([True, True])) == 0
    assert calibration_error(torch.tensor([0.0, 1 / 15]), torch.tensor([False, False])) == pytest.approx(100 / 30)
    # Two bins whose gaps would cancel out in a single one: 0.6 is always right, 1.0 never.
    assert calibration_error(torch.tensor([0.6, 1.0]), torch.tensor([True, False])) == pytest.approx(70, abs=1e-4)


def test_the_accuracy_of_each_class_that_has_images():
    correct, label = torch.tensor([True, False, True, True]), torch.tensor([4, 4, 6, 4])
    found = class_accuracy(correct, label, ("book", "bus", "car"), 4)
    assert found == {"book": pytest.approx(200 / 3), "car": 100.0}


@pytest.mark.slow
def test_a_run_lists_them_after_every_task(tmp_path: Path):
    code, output = train(write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path)), "--output_dir", tmp_path / "run")
    assert code == 0, output
    results = json.loads((tmp_path / "run/results.json").read_text())
    roles, names = results["roles"], results["class_names"]
    assert set(roles) == {"teacher", "student", "nearest_class_mean"}
    for entry in roles.values():
        for t in range(3):
            rows = zip(
                entry["accuracy_matrix"][t], entry["within_task"][t], entry["task_identification"][t], strict=True
            )
            for right, within, identified in rows:
                assert max(0, within + identified - 100) - 1e-9 <= right <= min(within, identified)
            assert (
                0 <= entry["calibration_error"][t] <= 100 and 100 / (2 * t + 2) - 1e-4 <= entry["confidence"][t] <= 100
            )
            for own, right in zip(names, entry["accuracy_matrix"][t], strict=False):  # as many images of each class
                assert sum(entry["class_accuracy"][t][name] for name in own) / len(own) == pytest.approx(right)
            assert list(entry["class_accuracy"][t]) == [name for own in names[: t + 1] for name in own]
        assert entry["task_identification"][0] == [100.0]  # there is but one task
        assert entry["within_task"][0] == entry["accuracy_matrix"][0]
