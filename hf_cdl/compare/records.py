"""Results of a comparison's runs: one line for each row and unit of the comparison, as Parquet and CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_cdl.runs.files import write_whole
from hf_cdl.runs.metrics import METRICS

Unit = tuple[int, int | None]
"""(seed, class order): runs with the same unit are paired."""

_ANSWERS = ("within_task_accuracy", "task_identification", "calibration_error", "confidence")
TOLD = (
    *("unlearnt_auroc", "unlearnt_fpr95", "foreign_auroc", "foreign_fpr95"),
    *("kept", "unlearnt_passing", "foreign_passing"),
)
"""How well images of known classes are told from those of classes not learnt yet (after the last task but one, and so
over the images of the last) and from foreign ones."""
METRIC_COLUMNS = (*METRICS, "sample_average_accuracy", *_ANSWERS, *TOLD)
"""Columns that contrasts can compare, after the last task, in percent: see runs.metrics and training.evaluation."""

CHANGING = ("train_seconds", "eval_seconds", "latency_ms", "peak_memory_bytes")
"""Columns that differ when the same run is repeated."""


@dataclass(frozen=True)
class Measured:
    """A row's run of one unit. `entry`: the role's part of results.json; `flops`: its multiply-adds, by column."""

    label: str
    variant: str
    role: str
    unit: Unit
    recipe_hash: str
    split: str
    stream: str
    entry: Mapping[str, Any]
    flops: Mapping[str, float]

    def record(self) -> dict[str, Any]:
        """One line of the table. Percent, seconds, milliseconds, bytes; None for what was not measured."""
        entry, cost = self.entry, self.entry.get("cost", {})
        return {
            "row": self.label,
            "variant": self.variant,
            "role": self.role,
            "seed": self.unit[0],
            "class_order": self.unit[1],
            "recipe_hash": self.recipe_hash,
            "split": self.split,
            "stream": self.stream,
            **{name: self.metric(name) for name in METRIC_COLUMNS},
            **{name: self.flops.get(name) for name in ("training_flops", "inference_flops")},
            "train_seconds": sum(entry["train_seconds"]),
            "eval_seconds": sum(entry["eval_seconds"]),
            "peak_memory_bytes": max(entry["peak_memory_bytes"]),
            **{name: cost.get(name) for name in ("parameters", "bytes", "latency_ms", "device")},
        }

    def metric(self, name: str) -> float | None:
        """A metric after the last task; None if it was not measured."""
        if name in TOLD:
            return next(
                (known[name] for known in reversed(self.entry.get("known", [])) if name in (known or {})), None
            )
        if name not in _ANSWERS:
            return self.entry["metrics"].get(name)
        if name in ("calibration_error", "confidence"):
            return self.entry.get(name, [None])[-1]
        last = self.entry.get("within_task" if name == "within_task_accuracy" else name, [[]])[-1]
        return fmean(last) if last and None not in last else None


def values(measured: Iterable[Measured], name: str) -> dict[str, dict[Unit, float]]:
    """Label -> unit -> a metric, in the order of `measured`; missing measurements are left out."""
    found: dict[str, dict[Unit, float]] = {}
    for run in measured:
        value = run.metric(name)
        if value is not None:
            found.setdefault(run.label, {})[run.unit] = value
    return found


def class_values(measured: Iterable[Measured]) -> dict[str, dict[Unit, Mapping[str, float]]]:
    """Label -> unit -> class -> accuracy in percent after the last task, for the runs that measured it."""
    found: dict[str, dict[Unit, Mapping[str, float]]] = {}
    for run in measured:
        if by_class := (run.entry.get("class_accuracy") or [None])[-1]:
            found.setdefault(run.label, {})[run.unit] = by_class
    return found


def save_table(measured: Iterable[Measured], folder: Path) -> None:
    """Write table.parquet and table.csv, each completely or not at all. `class_order` is empty for the data's own."""
    import pandas

    frame = pandas.DataFrame([run.record() for run in measured])
    frame["class_order"] = frame["class_order"].astype("Int64")
    for column in frame.columns[frame.isna().all()]:
        frame[column] = frame[column].astype("Float64")  # an empty column has no type of its own
    write_whole(folder / "table.parquet", lambda file: frame.to_parquet(file, index=False))
    write_whole(folder / "table.csv", lambda file: frame.to_csv(file, index=False))
