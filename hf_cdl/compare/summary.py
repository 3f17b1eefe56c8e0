"""The tables of a comparison, as rows of cells: accuracy and forgetting, paired differences, decomposition, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from hf_cdl.compare.aa import Check
from hf_cdl.compare.records import Measured, Unit, values
from hf_cdl.compare.statistics import LEVEL, Contrast, Mean, mean_of

DEFAULT = ("average_accuracy", "forgetting", "average_incremental_accuracy")
CDL = ("average_accuracy", "official_forgetting", "forgetting", "average_incremental_accuracy")
ONE_TASK = ("average_accuracy",)
"""Metrics in a table: for streams (DEFAULT), for streams by the CDL authors' protocol (CDL), for a single task."""

DECOMPOSITION = ("average_accuracy", "within_task_accuracy", "task_identification", "confidence", "calibration_error")


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first column is text, the others are numbers."""

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        shown = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        shown[1] = shown[1].replace(" ", "")
        return "\n".join(shown) + "\n"


def metrics_table(measured: Sequence[Measured], metrics: Sequence[str], interval_of: str = "") -> Table:
    """For each row its number of units and mean ± sample standard deviation of the metrics; `–` for a single unit.

    The column after the metric `interval_of` has the 95 % interval of its mean.
    """
    headings, columns = ["row", "n"], []
    for name in metrics:
        headings.append(name.replace("_", " "))
        columns.append((values(measured, name), spread))
        if name == interval_of:
            headings.append("95 % interval")
            columns.append((values(measured, name), interval))
    return Table(headings, [[label, str(n), *cells] for label, n, cells in _rows(measured, columns)])


def contrasts_table(contrasts: Sequence[Contrast], metric: str) -> Table:
    """For each contrast its number of pairs, mean ± standard deviation, 95 % interval, p values, and number above 0.

    The interval over the classes, if measured, follows the one over the units.
    """
    classes = any(contrast.over_classes for contrast in contrasts)
    headings = ["paired difference", "n", metric.replace("_", " "), "95 % interval", *["over classes"] * classes]
    headings += ["p", "p (Holm)", "above 0"]
    rows = []
    for contrast in contrasts:
        mean, name = contrast.mean, f"{contrast.first} − {contrast.second}"
        numbers = [str(mean.n), spread(mean, "+"), interval(mean, "+")]
        if classes:
            numbers.append(interval(contrast.over_classes, "+") if contrast.over_classes else "–")
        star = " *" if contrast.proven else ""
        p_values = [p_text(contrast.p), p_text(contrast.p_holm) + star]
        rows.append([name, *numbers, *p_values, f"{contrast.above} of {mean.n}"])
    return Table(headings, rows)


def cost_table(measured: Sequence[Measured]) -> Table:
    """For each row the costs of training and of use, averaged over its units."""
    columns = {
        "training GFLOPs": ("training_flops", lambda x: f"{x / 1e9:,.1f}"),
        "training seconds": ("train_seconds", lambda x: f"{x:,.1f}"),
        "MFLOPs an image": ("inference_flops", lambda x: f"{x / 1e6:,.1f}"),
        "ms an image": ("latency_ms", lambda x: f"{x:,.1f}"),
        "parameters": ("parameters", lambda x: f"{x:,.0f}"),
        "MiB": ("bytes", lambda x: f"{x / 2**20:,.1f}"),
    }
    rows = []
    for label in dict.fromkeys(run.label for run in measured):
        records = [run.record() for run in measured if run.label == label]
        cells = [label, str(len(records))]
        for name, text in columns.values():
            known = [record[name] for record in records if record[name] is not None]
            cells.append(text(fmean(known)) if known else "–")
        rows.append(cells)
    return Table(["row", "n", *columns], rows)


def checks_table(checks: Sequence[Check]) -> Table:
    """For each A/A check the rate of false wins with its 95 % interval, and whether anything could have won."""
    rows = []
    for check in checks:
        verdict = "within 5 %" if check.passed else "ABOVE 5 %"
        if check.smallest > LEVEL:
            verdict = f"cannot win: p ≥ {p_text(check.smallest)}"
        share = f"{100 * check.rate:.1f} %"
        limits = f"{100 * check.low:.1f} to {100 * check.high:.1f} %"
        rows.append([check.what, str(check.pairs), str(check.draws), share, limits, verdict])
    return Table(["comparison of equals", "pairs", "draws", "false wins", "95 % interval", "verdict"], rows)


def spread(mean: Mean, sign: str = "") -> str:
    """Mean ± standard deviation, with two decimals."""
    return f"{_number(mean.mean, sign)} ± {_number(mean.sd)}"


def interval(mean: Mean, sign: str = "") -> str:
    """The 95 % interval as `low to high`; `–` for a single value."""
    return "–" if math.isnan(mean.low) else f"{_number(mean.low, sign)} to {_number(mean.high, sign)}"


def p_text(p: float) -> str:
    """A p value with three decimals, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _rows(
    measured: Sequence[Measured], columns: Sequence[tuple[Mapping[str, Mapping[Unit, float]], Callable[[Mean], str]]]
) -> list[tuple[str, int, list[str]]]:
    """For each row its label, number of units and one cell per column, `–` where nothing was measured."""
    counts: dict[str, int] = {}
    for run in measured:
        counts[run.label] = counts.get(run.label, 0) + 1
    rows = []
    for label, count in counts.items():
        found = [(by_label.get(label), text) for by_label, text in columns]
        rows.append((label, count, [text(mean_of([*runs.values()])) if runs else "–" for runs, text in found]))
    return rows


def _number(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{round(value, 2) + 0.0:{sign}.2f}"  # + 0.0 turns -0.0 into 0.0
