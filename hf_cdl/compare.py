"""Several runs beside each other: tables of mean ± standard deviation over the seeds, paired differences, curves.

Runs of one seed share what chance decides (class order, initialisation, batches), so that differences of two methods
within a seed say more than those of their means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_cdl.report import COLOURS

DEFAULT = ("average_accuracy", "forgetting", "average_incremental_accuracy")
CDL = ("average_accuracy", "official_forgetting", "forgetting", "average_incremental_accuracy")
ONE_TASK = ("average_accuracy",)
"""The metrics that a table compares: of streams, of streams by the CDL authors' protocol, of a single task."""

Runs = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Label -> seed -> metrics, as `continual_metrics` gives them."""

CURVES = {
    "eval_teacher_accuracy": "teacher, original path",
    "eval_prompt_path_accuracy": "teacher, prompt path",
    "eval_accuracy": "student",
}
"""What `eval_strategy` writes into the log of a phase."""


def compare_table(runs: Runs, metrics: Sequence[str] = DEFAULT) -> str:
    """A Markdown table: for each label its number of seeds and mean ± sample standard deviation of the metrics.

    One seed has the deviation `–`. Raises ValueError for a label without runs.
    """
    heading = " | ".join(metrics).replace("_", " ")
    lines = [f"| run | seeds | {heading} |", "|---|" + "---:|" * (len(metrics) + 1)]
    for label, seeds in runs.items():
        if not seeds:
            raise ValueError(f"{label!r} has no runs; leave the label out or give one dict of metrics per seed")
        cells = [_spread([run[name] for run in seeds.values()]) for name in metrics]
        lines.append(f"| {' | '.join([_escape(label), str(len(seeds)), *cells])} |")
    return "\n".join(lines) + "\n"


def difference_table(runs: Runs, contrasts: Sequence[Sequence[str]], metric: str = "average_accuracy") -> str:
    """A Markdown table of paired differences: for each contrast [A, B] the mean of A - B over the seeds of both.

    Beside it its standard deviation over the seeds, its standard error, and how many seeds are above 0.

    Raises ValueError for a contrast with an unknown label or without a common seed.
    """
    name = metric.replace("_", " ")
    lines = [f"| paired difference | seeds | {name} | standard error | above 0 |", "|---|" + "---:|" * 4]
    for first, second in contrasts:
        if first not in runs or second not in runs:
            raise ValueError(f"The contrast [{first}, {second}] names no runs; there are: {', '.join(runs)}.")
        common = [seed for seed in runs[first] if seed in runs[second]]
        if not common:
            raise ValueError(f"The contrast [{first}, {second}] has no seed in common.")
        values = [runs[first][seed][metric] - runs[second][seed][metric] for seed in common]
        error = f"{stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else "–"
        above = f"{sum(value > 0 for value in values)} of {len(values)}"
        cells = [f"{first} − {second}", str(len(values)), _spread(values, "+"), error, above]
        lines.append("| " + " | ".join(map(_escape, cells)) + " |")
    return "\n".join(lines) + "\n"


def save_curves(panels: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], file: Path, title: str) -> None:
    """Draw accuracy over training: a panel per label, a line per path with its mean over the seeds and a band of ± one
    standard deviation.

    `panels`: label -> seed -> log entries of a role's phases, one after the other, made with `eval_strategy`. Raises
    ValueError for a panel whose logs hold no accuracies. Needs the extra `report`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 4.2 * len(panels), 4.0), dpi=150, layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (label, logs) in zip(axes, panels.items(), strict=True):
        seeds = [[entry for entry in log if "eval_accuracy" in entry] for log in logs]
        if not all(seeds):
            raise ValueError(f"The logs of {label!r} hold no accuracies; it needs train.eval_strategy: epoch.")
        for colour, (name, text) in zip(COLOURS, CURVES.items(), strict=False):
            lines = [[entry[name] for entry in seed if name in entry] for seed in seeds]
            if not lines[0]:
                continue
            points = list(zip(*lines, strict=True))
            mean, steps = [fmean(point) for point in points], range(1, len(points) + 1)
            spread = [stdev(point) if len(point) > 1 else 0.0 for point in points]
            axis.plot(steps, mean, color=colour, label=text)
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_title(label, fontsize=10, parse_math=False)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy (%)")
    axes[-1].legend(loc="lower right", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(file)


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = round(fmean(values), 2) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{mean:{sign}.2f} ± {f'{stdev(values):.2f}' if len(values) > 1 else '–'}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
