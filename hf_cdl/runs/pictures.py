"""Plots of a run: the accuracy matrix of each role, and the accuracy over the tasks.

They are drawn from `results`, described in report.py, and need the extra `report`. Comparisons of several runs use the
same `draw_matrix` and `draw_curve` (hf_cdl/compare/figures.py).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cdl.runs.metrics import average_accuracy
from hf_cdl.runs.report import Results, classes_of, label_of, measured, number, planned_tasks, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's colour-blind-safe palette. Teacher, student, then the baselines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def plotting_available() -> bool:
    """Whether matplotlib, the optional extra `report`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_plots(results: Results, folder: str | os.PathLike[str]) -> list[Path]:
    """Write accuracy_matrix.png and accuracy_curve.png into `folder`, created if needed, and return their paths.

    Returns an empty list until a task is finished. Readers of the folder never see a partial file. Raises ImportError
    without matplotlib: see `plotting_available`.
    """
    if not plotting_available():
        raise ImportError('plots need matplotlib; install it with: pip install "hf_cdl[report]"')
    paths = []
    if measured(results):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, draw in (("accuracy_matrix", _matrix_figure), ("accuracy_curve", _curve_figure)):
            path = Path(folder, f"{name}.png")
            partial = path.with_name(f".{path.name}.partial")
            draw(results).savefig(partial, format="png", bbox_inches="tight")
            paths.append(partial.replace(path))
    return paths


def figure_of(width: float, height: float, down: int = 1, across: int = 1, **shared: Any) -> tuple[Figure, Any]:
    """A figure of so many inches and its panels, an array (down, across)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False, **shared)


def _matrix_figure(results: Results) -> Figure:
    """The lower triangles of teacher and student side by side on one colour scale, with numbers where they fit."""
    from matplotlib.figure import Figure

    roles, planned = measured(results), planned_tasks(results)
    shown = [role for role in ("teacher", "student") if role in roles] or [next(iter(roles))]
    side = min(max(planned * (0.55 if planned <= 10 else 0.37), 2.0), 11.0)
    ticks = range(0, planned, 1 + (planned - 1) // (50 if planned < 100 else 25))  # as many as fit
    digits = None if planned > 30 else int(planned <= 10)  # cells get too small and too many
    figure = Figure(figsize=(len(shown) * side + 3.5, side + 1.5), dpi=150, layout="compressed")
    figure.suptitle(title_of(results), parse_math=False)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, role in zip(panels, shown, strict=True):
        draw_matrix(panel, roles[role]["accuracy_matrix"], planned, digits, ticks)
        panel.set_title(label_of(role, roles[role], int(14 * side)), fontsize=9, parse_math=False)
        panel.set_xlabel("accuracy on task")
    names = _task_names(results)
    panels[0].set_yticks(ticks, [names[place] for place in ticks], fontsize=8, parse_math=False)
    panels[0].set_ylabel("after learning task")
    figure.colorbar(panels[0].images[0], ax=list(panels), label="accuracy (%)")
    return figure


def draw_matrix(
    panel: Any,
    matrix: Sequence[Sequence[float | None]],
    tasks: int,
    digits: int | None,
    ticks: Sequence[int],
    sizes: tuple[float, float] = (8, 8),
) -> None:
    """Draw the lower triangle of an accuracy matrix of `tasks` tasks; NaN and None were not measured.

    `digits`: decimals of the numbers in the cells (None: no numbers); `ticks`: the tasks to label, from 0; `sizes`:
    font sizes of numbers and tick labels.
    """
    cells = [[math.nan] * tasks for _ in range(tasks)]
    for t, row in enumerate(matrix):
        for i, value in enumerate(row[: t + 1]):
            if value is None:
                continue
            cells[t][i] = value
            if digits is not None:
                colour = "white" if value < 42 else "black"
                panel.text(i, t, number(value, digits), ha="center", va="center", color=colour, fontsize=sizes[0])
    panel.imshow(cells, vmin=0, vmax=100, cmap="viridis")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks(ticks, [place + 1 for place in ticks], fontsize=sizes[1])
    panel.spines[["top", "right"]].set_visible(False)


def seen_so_far(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    """Average accuracy, after each task, on the tasks learned so far; NaN where it was not measured."""
    return [average_accuracy(matrix[: t + 1]) for t in range(len(matrix))]


def draw_curve(panel: Any, steps: Sequence[int], values: Sequence[float], line: str, **options: Any) -> None:
    """Draw accuracies after `steps` tasks; `options` are matplotlib's: colour, marker, label."""
    panel.plot(steps, values, line, markersize=4, **options)


def label_ends(panel: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Label the ends of curves without overlaps; ends are (x, y, text, colour).

    The panel's limits must be set, and its height be about four inches.
    """
    low, high = panel.get_ylim()
    ends, apart, right = sorted(ends, key=lambda end: end[1]), 0.062 * (high - low), panel.get_xlim()[1]
    places: list[float] = []
    for _, y, *_ in ends:
        places.append(max([y, *(place + apart for place in places[-1:])]))
    for i in reversed(range(len(places))):  # back below the top
        places[i] = min([places[i], high, *(place - apart for place in places[i + 1 : i + 2])])
    for (x, y, text, colour), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 4}
        options: Any = {"va": "center", "annotation_clip": False, "parse_math": False, "arrowprops": line}
        panel.annotate(f" {text}", (x, y), (right, place), **options)


def finish_curves(panel: Any, tasks: int) -> None:
    """Label the axes of a panel of curves over `tasks` tasks."""
    panel.set_xticks(range(1, tasks + 1, 1 + (tasks - 1) // 20))
    panel.set(xlabel="tasks learned", ylabel="average accuracy on them (%)")
    panel.grid(alpha=0.3)


def _task_names(results: Results) -> list[str]:
    """Axis labels: the number of each task and, if in Latin letters, which every font can show, its classes."""
    texts = [classes_of(results, task, 24) for task in range(planned_tasks(results))]
    return [f"{i + 1}: {text}" if text and max(text) < "\u0250" else f"task {i + 1}" for i, text in enumerate(texts)]


def _curve_figure(results: Results) -> Figure:
    """Average accuracy on the tasks seen so far, after each task: a line per role, baselines dashed, and chance."""
    figure, ((panel,),) = figure_of(8.0, 4.2)
    panel.set_title(title_of(results), parse_math=False)
    roles = measured(results)
    order = sorted(roles, key=lambda role: {"teacher": 0, "student": 1}.get(role, 2))
    ends = []
    for place, role in enumerate(order):
        curve = seen_so_far(roles[role]["accuracy_matrix"])
        style = "-" if role in ("teacher", "student") else "--"
        colour = COLOURS[place % len(COLOURS)]
        draw_curve(panel, range(1, len(curve) + 1), curve, style, color=colour, marker="o")
        ends.append((len(curve), curve[-1], label_of(role, roles[role], 32), colour))
    sizes = [len(names) for names in results.get("class_names", ())]
    chance = [100 / sum(sizes[: t + 1]) for t in range(len(sizes))]
    if chance:
        panel.plot(range(1, len(chance) + 1), chance, color="0.5", linestyle=":", marker=".")
        ends.append((len(chance), chance[-1], "chance", "0.4"))
    planned = planned_tasks(results)
    panel.set(xlim=(0.5, planned + 0.5), ylim=(0, 102))
    finish_curves(panel, planned)
    label_ends(panel, [end for end in ends if not math.isnan(end[1])])
    return figure
