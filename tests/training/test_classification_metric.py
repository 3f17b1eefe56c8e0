"""Accuracy and calibration as `evaluate` and a trainer's compute_metrics report them."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_cdl.training import classification_metric
from hf_cdl.training.classification_metric import ClassificationMetric, compute_metrics
from hf_cdl.training.evaluation import calibration_error

LOGITS = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.randint(5, (40,), generator=torch.Generator().manual_seed(1))


def by_hand() -> dict[str, float]:
    chances = torch.exp(LOGITS) / torch.exp(LOGITS).sum(dim=1, keepdim=True)
    right = torch.tensor([row.tolist().index(max(row.tolist())) for row in LOGITS]) == LABELS
    sure = torch.stack([row.max() for row in chances])
    error = calibration_error(sure, right)
    return {"accuracy": 2.5 * int(right.sum()), "confidence": 100 * sure.mean().item(), "calibration_error": error}


def test_the_numbers_are_those_computed_by_hand_however_the_batches_arrive() -> None:
    expected = pytest.approx(by_hand(), abs=1e-3)
    assert 0 < by_hand()["accuracy"] < 100
    metric = ClassificationMetric()
    assert metric.compute(predictions=LOGITS, references=LABELS) == expected
    for start in range(0, 40, 16):
        part = slice(start, start + 16)
        metric.add_batch(predictions=LOGITS[part], references=LABELS[part])
    assert metric.compute() == expected
    assert compute_metrics(EvalPrediction(LOGITS.numpy(), LABELS.numpy())) == expected
    assert compute_metrics(EvalPrediction(LOGITS.numpy().astype(np.float16), LABELS.numpy())) == pytest.approx(
        by_hand(), abs=0.1
    )


def test_evaluate_loads_it_from_its_file(tmp_path: Path) -> None:
    metric = evaluate.load(classification_metric.__file__, cache_dir=str(tmp_path))
    found = metric.compute(predictions=[[2.0, 0.0], [0.0, 1.0]], references=[0, 0])
    assert found is not None and found["accuracy"] == 50


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no predictions; add logits"):
        ClassificationMetric()._compute(predictions=np.zeros((0, 3)), references=[])


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        ([[0.0, 1.0, 2.0]], [7], "from 0 to 2"),
        ([[0.0, 1.0, 2.0]], [-100], "from 0 to 2"),
        ([[0.0, float("nan"), 2.0]], [1], "NaN or infinite"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(logits: list[list[float]], labels: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClassificationMetric().compute(predictions=logits, references=labels)


def test_there_is_no_part_of_it_alone() -> None:
    with pytest.raises(ValueError, match="no configuration 'accuracy'; leave it out"):
        ClassificationMetric("accuracy")
