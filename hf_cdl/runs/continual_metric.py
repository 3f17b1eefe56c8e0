"""The metrics of an accuracy matrix as an `evaluate.Metric`.

`evaluate.load(hf_cdl.runs.continual_metric.__file__, "forgetting")` also loads it. Importing `evaluate` takes a
second, so nothing that a run needs imports it.
"""

from __future__ import annotations

from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from hf_cdl.runs.metrics import METRICS, AccuracyMatrix, continual_metrics

_CITATION = """\
Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning, CVPR 2017, arXiv:1611.07725
Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017, arXiv:1706.08840
Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018, arXiv:1801.10112
Smith et al., CODA-Prompt, CVPR 2023, arXiv:2211.13218"""


class ContinualMetric(evaluate.Metric):
    """The metrics of runs/metrics.py: `ContinualMetric("forgetting")` is one of METRICS, `ContinualMetric()` all.

    Call `add(accuracies=row)` once per task, or `compute(accuracies=R)`, which also takes `counts=` like
    `continual_metrics`. Raises ValueError for an unknown name. Rows are kept in memory, so no file is left behind.
    """

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        if config_name not in (None, "default", *METRICS):
            raise ValueError(f"there is no metric {config_name!r}; allowed: {', '.join(METRICS)}")
        super().__init__(config_name, **{**options, "keep_in_memory": True})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation=_CITATION,
            inputs_description="accuracies: rows of the accuracy matrix in percent, row t with t + 1 entries.",
            features=Features({"accuracies": ListOf(Value("float64"))}),
        )

    def _compute(self, *, accuracies: AccuracyMatrix, **options: Any) -> dict[str, Any]:
        if options and self.config_name not in (None, "default"):
            raise ValueError(f"counts have no effect on {self.config_name}; leave them out, or make ContinualMetric()")
        values = continual_metrics(accuracies, **options)
        return {name: value for name, value in values.items() if self.config_name in (None, "default", name)}
