"""The figures of a comparison, made with matplotlib (extra `report`).

Lines and points are means over the units, bands and bars their 95 % intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from hf_cdl.compare.records import Measured, values
from hf_cdl.compare.statistics import Contrast, mean_of
from hf_cdl.runs.pictures import COLOURS, draw_curve, draw_matrix, figure_of, finish_curves, seen_so_far

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {
    "eval_teacher_accuracy": "teacher, original path",
    "eval_prompt_path_accuracy": "teacher, prompt path",
    "eval_accuracy": "student",
}
"""Metrics that `eval_strategy` writes into a phase's log, with their legends."""

COSTS = {
    "training_flops": ("GFLOPs to train", 1e9),
    "train_seconds": ("seconds to train", 1),
    "inference_flops": ("MFLOPs an image in use", 1e6),
}
_STYLES = [(marker, line) for marker, line in zip("osD^vPX", ("-", "--", ":", "-.") * 2, strict=False)]
_BARS = {
    "within_task_accuracy": "right within the task",
    "task_identification": "task identified",
    "average_accuracy": "right",
}


def curves_figure(measured: Sequence[Measured]) -> Figure:
    """Plot the average accuracy on the tasks seen so far, after each task: a line with its band for every row."""
    figure, ((panel,),) = figure_of(8.0, 3.6 + 0.12 * len(_by_row(measured)))
    for number, (label, runs) in enumerate(_by_row(measured).items()):
        curves = [seen_so_far(run.entry["accuracy_matrix"]) for run in runs]
        points = [[value for value in point if not math.isnan(value)] for point in zip(*curves, strict=True)]
        steps = [step for step, point in enumerate(points, 1) if point]
        means = [mean_of(point) for point in points if point]
        colour, marker, line = _style(number)
        middle = [mean.mean for mean in means]
        draw_curve(panel, steps, middle, line, color=colour, marker=marker, label=_plain(label))
        panel.fill_between(steps, *_limits(means), color=colour, alpha=0.15, linewidth=0)
    tasks = max(len(run.entry["accuracy_matrix"]) for run in measured)
    finish_curves(panel, tasks)
    panel.set_ylim(0, min(panel.get_ylim()[1], 102))  # an interval from two units can be far above 100
    _legend(figure)
    return figure


def cost_figure(measured: Sequence[Measured], metrics: Sequence[str]) -> Figure:
    """Plot each metric against the costs of training and of use: a point with its interval for every row."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = _by_row(measured)
    costs = {}
    for name, (text, unit) in COSTS.items():
        found = {x: [cost / unit for cost in _known([run.record()[name] for run in runs])] for x, runs in rows.items()}
        if any(found.values()):
            costs[text] = found
    size = (3.0 + 3.2 * len(costs), 2.9 * len(metrics) + 0.1)
    figure, panels = figure_of(*size, len(metrics), len(costs), sharex="col", sharey="row")
    for line, metric in zip(panels, metrics, strict=True):
        found = values(measured, metric)
        for panel, by_row in zip(line, costs.values(), strict=True):
            for number, label in enumerate(rows):
                if by_row[label] and label in found:
                    mean, x = mean_of([*found[label].values()]), fmean(by_row[label])
                    colour, marker, _ = _style(number)
                    shown = _plain(label) if panel is panels[0][0] else None
                    bar = {"yerr": 0 if math.isnan(mean.low) else mean.high - mean.mean, "capsize": 2}
                    panel.errorbar(x, mean.mean, fmt=marker, color=colour, markersize=6, label=shown, **bar)
            xs = [fmean(x) for x in by_row.values() if x]
            if min(xs) > 0 and max(xs) > 20 * min(xs):
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                panel.xaxis.set_major_formatter("{x:g}")
                panel.xaxis.set_minor_formatter(NullFormatter())
            else:
                panel.set_xlim(0, 1.1 * max(xs) or 1)
            panel.grid(alpha=0.3)
        line[0].set_ylabel(_words(metric))
    for panel, text in zip(panels[-1], costs, strict=True):
        panel.set_xlabel(text)
    _legend(figure)
    return figure


def matrices_figure(measured: Sequence[Measured]) -> Figure:
    """Draw every row's mean accuracy matrix, side by side on one colour scale; with numbers where they fit."""
    rows = _by_row(measured)
    tasks = max(len(run.entry["accuracy_matrix"]) for run in measured)
    across = min(len(rows), 3)
    down = math.ceil(len(rows) / across)
    side = min(1.2 + 0.35 * tasks, 5.0)
    figure, panels = figure_of(across * side + 1.6, down * (side + 0.4) + 0.3, down, across)
    panels = [*panels.flat]
    for panel, (label, runs) in zip(panels, rows.items(), strict=False):
        digits, sizes = None if tasks > 20 else 0, (8 if tasks <= 10 else 5, 7)
        draw_matrix(panel, _mean_matrix(runs, tasks), tasks, digits, range(0, tasks, 1 + (tasks - 1) // 10), sizes)
        panel.set_title("\n".join(_wrapped(label, int(8 * side))), fontsize=8)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    figure.supxlabel("accuracy on task", fontsize=9)
    figure.supylabel("after learning task", fontsize=9)
    figure.colorbar(
        panels[0].images[0], ax=panels, label="accuracy (%)", shrink=0.8 / down, anchor=(0, 1), fraction=0.05
    )
    return figure


def decomposition_figure(measured: Sequence[Measured]) -> Figure:
    """Plot, after the last task: images right, right within the task, task identified; and the model's confidence."""
    rows = [*_by_row(measured)]
    size = (10.0, 1.5 + 0.62 * len(rows))
    figure, ((bars, calibration),) = figure_of(*size, 1, 2, sharey=True, width_ratios=[3, 2])
    for number, (name, text) in enumerate(_BARS.items()):
        found = values(measured, name)
        means = [mean_of([*found[label].values()]) if label in found else None for label in rows]
        where = [row + 0.26 * (number - 1) for row, mean in enumerate(means) if mean]
        known = [mean for mean in means if mean]
        errors = [0 if math.isnan(mean.low) else mean.high - mean.mean for mean in known]
        middle = [mean.mean for mean in known]
        bars.barh(where, middle, 0.24, xerr=errors, color=COLOURS[number], label=text, error_kw={"lw": 0.8})
    for name, colour, marker in (("confidence", COLOURS[4], "D"), ("average_accuracy", COLOURS[2], "o")):
        found = values(measured, name)
        where = [row for row, label in enumerate(rows) if label in found]
        middle = [fmean(found[rows[row]].values()) for row in where]
        calibration.scatter(middle, where, color=colour, marker=marker, s=30, label=_words(name), zorder=3)
    for row, label in enumerate(rows):
        pair = [values(measured, name).get(label) for name in ("confidence", "average_accuracy")]
        ends = [fmean(found.values()) for found in pair if found]
        calibration.plot(ends, [row] * len(ends), color="0.6", linewidth=1.5, zorder=2)
        errors = values(measured, "calibration_error").get(label)
        if errors:
            text = f"error {fmean(errors.values()):.1f}"
            calibration.annotate(text, (max(ends), row), (7, -3), textcoords="offset points", fontsize=8)
    bars.set_yticks(range(len(rows)), ["\n".join(_wrapped(label, 30)) for label in rows], fontsize=8)
    bars.set_ylim(len(rows) - 0.5, -0.5)
    bars.set_xlabel("images after the last task (%)")
    calibration.set_xlabel("percent; calibration error in points")
    for panel in (bars, calibration):
        panel.set_xlim(0, 100)
        panel.grid(axis="x", alpha=0.3)
    calibration.set_xlim(0, 115)
    legend: Any = {"ncols": 3, "frameon": False, "fontsize": 8}
    figure.legend(*bars.get_legend_handles_labels(), loc="outside upper left", **legend)
    figure.legend(*calibration.get_legend_handles_labels(), loc="outside upper right", **legend)
    return figure


def contrasts_figure(contrasts: Sequence[Contrast], metric: str) -> Figure:
    """Plot every contrast: the difference in each unit, and their mean with its interval, filled if it survives Holm.

    The wide pale bar behind it is the interval over the classes.
    """
    figure, ((panel,),) = figure_of(9.0, 1.0 + 0.42 * len(contrasts))
    for row, contrast in enumerate(contrasts):
        mean, colour = contrast.mean, COLOURS[0] if contrast.proven else "0.35"
        differences = [*contrast.differences.values()]
        panel.scatter(differences, [row] * len(differences), color="0.65", s=12, zorder=2)
        if contrast.over_classes is not None:
            limits = [contrast.over_classes.low, contrast.over_classes.high]
            panel.plot(limits, [row, row], color=colour, alpha=0.25, linewidth=6, solid_capstyle="butt", zorder=1)
        error = None if math.isnan(mean.low) else mean.high - mean.mean
        face = colour if contrast.proven else "white"
        panel.errorbar(mean.mean, row, xerr=error, fmt="o", color=colour, mfc=face, capsize=3, markersize=7, zorder=3)
    panel.axvline(0, color="black", linewidth=0.8)
    names = [f"{contrast.first} − {contrast.second}" for contrast in contrasts]
    panel.set_yticks(range(len(names)), ["\n".join(_wrapped(name, 46)) for name in names], fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel(f"difference in {_words(metric)} (points)")
    panel.grid(axis="x", alpha=0.3)
    return figure


def training_figure(panels: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Plot accuracy over training: a panel per label, a line per path, with a band of ± one standard deviation here.

    `panels`: label -> unit -> log entries of a role's phases in order, made with `eval_strategy`. Raises ValueError
    if a panel's logs contain no accuracies.
    """
    figure, (axes,) = figure_of(0.8 + 4.2 * len(panels), 4.0, 1, len(panels), sharey=True)
    for axis, (label, logs) in zip(axes, panels.items(), strict=True):
        units = [[entry for entry in log if "eval_accuracy" in entry] for log in logs]
        if not all(units):
            raise ValueError(f"The logs of {label!r} hold no accuracies; it needs train.eval_strategy: epoch.")
        for colour, (name, text) in zip(COLOURS, CURVES.items(), strict=False):
            lines = [[entry[name] for entry in unit if name in entry] for unit in units]
            if not lines[0]:
                continue
            points = list(zip(*lines, strict=True))
            mean, steps = [fmean(point) for point in points], range(1, len(points) + 1)
            spread = [stdev(point) if len(point) > 1 else 0.0 for point in points]
            axis.plot(steps, mean, color=colour, label=text)
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_title(_plain(label), fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy (%)")
    axes[-1].legend(loc="lower right", fontsize=9)
    return figure


def _by_row(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    return {
        label: [run for run in measured if run.label == label] for label in dict.fromkeys(r.label for r in measured)
    }


def _mean_matrix(runs: Sequence[Measured], tasks: int) -> list[list[float | None]]:
    """Each entry's mean over the runs that measured it; None if none did."""
    found = [
        [_known([_cell(run.entry["accuracy_matrix"], t, i) for run in runs]) for i in range(t + 1)]
        for t in range(tasks)
    ]
    return [[fmean(values) if values else None for values in row] for row in found]


def _cell(matrix: Sequence[Sequence[float | None]], t: int, i: int) -> float | None:
    return matrix[t][i] if t < len(matrix) else None


def _known(numbers: Sequence[float | None]) -> list[float]:
    return [number for number in numbers if number is not None]


def _limits(means: Sequence[Any]) -> tuple[list[float], list[float]]:
    return [mean.low for mean in means], [mean.high for mean in means]


def _style(number: int) -> tuple[str, str, str]:
    """Colour, marker and line style of a row; the combination repeats only after dozens of rows."""
    marker, line = _STYLES[number // len(COLOURS) % len(_STYLES)]
    return COLOURS[number % len(COLOURS)], marker, line


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # an unescaped $ would start a formula


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(_plain(text), width, break_on_hyphens=False) or [""]
