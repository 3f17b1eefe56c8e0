"""Accuracy and calibration of logits, as an `evaluate.Metric` and as `compute_metrics` for a trainer.

`evaluate.load(hf_cdl.training.classification_metric.__file__)` also loads the metric.
"""

from __future__ import annotations

from typing import Any

import evaluate
import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from transformers import EvalPrediction

from hf_cdl.counted import counted
from hf_cdl.training.evaluation import calibration_error


class ClassificationMetric(evaluate.Metric):
    """`accuracy`, `confidence` and `calibration_error`, all in percent.

    `accuracy` is the share of images whose largest logit is that of their class, `confidence` the mean of the largest
    softmax probability, `calibration_error` the expected difference between the two. `add_batch(predictions=logits,
    references=labels)` takes logits (B, C) and labels (B,); `compute` takes all of them at once. Batches are kept in
    memory, so no file is left behind. Raises ValueError for no images, labels without a class, and logits that are not
    finite.
    """

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        if config_name not in (None, "default"):
            raise ValueError(f"there is no configuration {config_name!r}; leave it out: all metrics come together")
        super().__init__(config_name, **{**options, "keep_in_memory": True})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599",
            inputs_description="predictions: logits, a row for each image; references: the labels.",
            features=Features({"predictions": ListOf(Value("float32")), "references": Value("int64")}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        logits, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        if not len(labels):
            raise ValueError("there are no predictions; add logits and labels of at least one image")
        if not logits.isfinite().all():
            raise ValueError("there are logits that are NaN or infinite; check the model")
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(
                f"labels lie between {labels.min()} and {labels.max()}, but the logits have "
                f"{counted(logits.shape[1], 'class')}; give labels from 0 to {logits.shape[1] - 1}"
            )
        confidence, answers = logits.softmax(dim=-1).max(dim=-1)
        return {
            "accuracy": 100 * (answers == labels).double().mean().item(),
            "confidence": 100 * confidence.double().mean().item(),
            "calibration_error": calibration_error(confidence, answers == labels),
        }


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute ClassificationMetric for `CDLTrainer(..., compute_metrics=compute_metrics)`."""
    found = ClassificationMetric().compute(predictions=prediction.predictions, references=prediction.label_ids)
    return {} if found is None else found  # evaluate returns None on processes that gather nothing
