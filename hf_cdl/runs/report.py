"""What a run looks like to a reader: console tables, plots of the accuracy matrix. Several runs: hf_cdl/compare.

Everything works from `results`, the content of a run's results.json, and on a run that is still going on:
`{"name", "seed", "finished", "recipe", "class_names": [[...] per task], "roles": {role: {"accuracy_matrix", "counts",
"train_seconds", "images_per_second", "peak_memory_bytes" (lists, one entry per learned task), "label"}}}`. Of a role
only the accuracy matrix is required; None in it was not measured. The metrics are computed from it, not read. With
`protocol: cdl` in the recipe the CDL authors' forgetting comes first. Plots need the extra `report`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from hf_cdl.escape import visible
from hf_cdl.runs.metrics import average_accuracy, continual_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]

WIDTH = 119
# The table's columns: group -> heading -> metric.
_METRICS: dict[str, dict[str, str]] = {
    "accuracy (%)": {
        "average": "average_accuracy",
        "by image": "sample_average_accuracy",
        "incremental": "average_incremental_accuracy",
    },
    "forgetting": {"standard": "forgetting", "authors'": "official_forgetting"},
    "transfer": {"backward": "backward_transfer"},
}
_CDL_METRICS = {**_METRICS, "forgetting": dict(reversed(_METRICS["forgetting"].items()))}
_TRAINING = ("seconds", "images/s", "memory")
# Okabe & Ito's palette, told apart with any colour vision. Teacher, student, then the baselines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def table(results: Results) -> str:
    """The plain-text summary of a run, at most 119 columns wide: a line per role, then the student's accuracy matrix.

    Accuracies in percent, forgetting and transfer in percent points; `-` for what was not measured. Without a student
    the matrix shown is the first role's. Its entry in row t and column i is the accuracy on task i after task t.
    """
    roles, planned = _measured(results), _planned(results)
    lines = [f"{_title(results)}: {planned} task{'s' * (planned != 1)}"]
    if not results.get("finished", True):
        learned = [f"{_spaced(role)} {len(entry['accuracy_matrix'])}" for role, entry in roles.items()]
        lines.append(f"Not finished; tasks learned so far: {', '.join(learned) or 'none'}")
    if roles:
        columns = _CDL_METRICS if follows_cdl(results) else _METRICS
        headings = [heading for group in (*columns.values(), _TRAINING) for heading in group]
        rows = ([_label(role, entry, 28), *_cells(entry, columns)] for role, entry in roles.items())
        body = [["role", *headings], *rows]
        widths = [max(map(len, column)) for column in zip(*body, strict=True)]
        lines += ["", _group_line(widths)]
        for name, *cells in body:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *padded]))
        shown = "student" if "student" in roles else next(iter(roles))
        lines += ["", *_matrix_lines(_label(shown, roles[shown], 60), roles[shown]["accuracy_matrix"], results)]
    return "\n".join(line.rstrip()[:WIDTH] for line in lines) + "\n"


def follows_cdl(results: Results) -> bool:
    """Whether a run follows the protocol of CDL's authors, so that their forgetting comes first."""
    return results.get("recipe", {}).get("protocol") == "cdl"


def plotting_available() -> bool:
    """Whether matplotlib, the optional extra `report`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_plots(results: Results, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes accuracy_matrix.png and accuracy_curve.png into `folder`, made if needed, and returns their paths.

    Returns an empty list as long as no task is finished. A reader of the folder never sees half a file. Raises
    ImportError without matplotlib: see `plotting_available`.
    """
    if not plotting_available():
        raise ImportError('plots need matplotlib; install it with: pip install "hf_cdl[report]"')
    paths = []
    if _measured(results):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, draw in (("accuracy_matrix", _matrix_figure), ("accuracy_curve", _curve_figure)):
            path = Path(folder, f"{name}.png")
            partial = path.with_name(f".{path.name}.partial")
            draw(results).savefig(partial, format="png", bbox_inches="tight")
            paths.append(partial.replace(path))
    return paths


def _measured(results: Results) -> dict[str, Any]:
    """The roles that have finished a task."""
    return {role: entry for role, entry in results.get("roles", {}).items() if entry.get("accuracy_matrix")}


def _planned(results: Results) -> int:
    learned = [len(entry["accuracy_matrix"]) for entry in _measured(results).values()]
    return max([len(results.get("class_names", ())), *learned])


def _title(results: Results) -> str:
    seed = results.get("seed")
    return visible(results.get("name", "run")) + ("" if seed is None else f", seed {visible(seed)}")


def _spaced(role: str) -> str:
    return visible(role).replace("_", " ")


def _label(role: str, entry: Mapping[str, Any], width: int) -> str:
    return _shorten(visible(entry.get("label") or role.replace("_", " ")), width)


def _classes(results: Results, task: int, width: int) -> str:
    tasks = results.get("class_names", ())
    return _shorten(", ".join(map(visible, tasks[task])), width) if task < len(tasks) else ""


def _shorten(text: str, width: int) -> str:
    """As many words as fit, on one line; of a longer word its beginning."""
    return shorten(text, width, placeholder=" ...") if " " in text[:width] else text[:width]


def number(value: float | None, digits: int = 1) -> str:
    """A value as text; `-` for what was not measured."""
    if value is None or math.isnan(value):
        return "-"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _group_line(widths: Sequence[int]) -> str:
    groups, start = [" " * widths[0]], 1
    for title, headings in {**_METRICS, "training": _TRAINING}.items():
        span = sum(widths[start : start + len(headings)]) + 2 * (len(headings) - 1)
        groups.append((f" {title} " if len(headings) > 1 else title).center(span, "-"))
        start += len(headings)
    return "  ".join(groups)


def _cells(entry: Mapping[str, Any], columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One role's cells, in the order of the headings."""
    matrix, counts = entry["accuracy_matrix"], entry.get("counts")
    values = continual_metrics(matrix, counts[: len(matrix)] if counts else None)
    shown = [name for group in columns.values() for name in group.values()]
    durations, speeds = entry.get("train_seconds") or [], entry.get("images_per_second") or []
    seconds = sum(durations)
    images = sum(duration * speed for duration, speed in zip(durations, speeds, strict=False))
    memory = max(entry.get("peak_memory_bytes") or [0])
    return [
        *(number(values[name]) if name in values else "-" for name in shown),
        number(seconds, digits=0 if seconds >= 100 else 1) if seconds else "-",
        number(images / seconds, digits=0 if images >= 100 * seconds else 1) if images else "-",
        (f"{memory / 2**30:.1f} GiB" if memory >= 2**30 else f"{memory / 2**20:.0f} MiB") if memory else "-",
    ]


def _matrix_lines(label: str, matrix: Sequence[Sequence[float | None]], results: Results) -> list[str]:
    """The accuracy matrix as text; whole percents if the columns would not fit otherwise."""
    planned = _planned(results)
    left, right = "after    mean", "  classes of the task"
    room = WIDTH - len(left + right)
    digits, width = (1, 7) if 7 * planned <= room else (0, 4)
    if width * planned > room:
        return [f"{planned} tasks are too many to print their accuracy matrix; it is in results.json"]
    lines = [
        f"{label}: accuracy (%) on each task, after each task",
        left + "".join(f"{i + 1:{width}d}" for i in range(planned)) + right,
    ]
    for t, row in enumerate(matrix):
        cells = "".join(f"{number(value, digits):>{width}}" for value in row[: t + 1]).ljust(width * planned)
        line = f"{t + 1:5d}  {number(average_accuracy(matrix[: t + 1])):>6}{cells}  "
        lines.append(line + _classes(results, t, WIDTH - len(line)))
    return lines


def difference_lines(rows: Sequence[tuple[int, Sequence[str], int, float, float]]) -> list[str]:
    """A text table of (task, classes, images, accuracy before, accuracy after), with the difference and the means."""
    numbers = [
        [str(task), str(images), number(was), number(now), number(now - was)] for task, _, images, was, now in rows
    ]
    means = [fmean(column) for column in zip(*((was, now, now - was) for *_, was, now in rows), strict=True)]
    numbers.append(["mean", "", *map(number, means)])
    heading = f"{'task':>4}  {'images':>6}  {'before':>6}  {'after':>6}  {'difference':>10}  "
    lines = [heading + "classes of the task"]
    for (task, images, was, now, change), names in zip(numbers, [*(names for _, names, *_ in rows), ()], strict=True):
        line = f"{task:>4}  {images:>6}  {was:>6}  {now:>6}  {change:>10}  "
        lines.append((line + _shorten(", ".join(map(visible, names)), WIDTH - len(line))).rstrip())
    return lines


def _matrix_figure(results: Results) -> Figure:
    """The lower triangles of teacher and student side by side, on one colour scale; numbers where they fit."""
    from matplotlib.figure import Figure

    roles, planned = _measured(results), _planned(results)
    shown = [role for role in ("teacher", "student") if role in roles] or [next(iter(roles))]
    side = min(max(planned * (0.55 if planned <= 10 else 0.37), 2.0), 11.0)
    ticks = range(0, planned, 1 + (planned - 1) // (50 if planned < 100 else 25))  # as many as there is room for
    digits = None if planned > 30 else int(planned <= 10)  # no room, and their number grows with the square
    figure = Figure(figsize=(len(shown) * side + 3.5, side + 1.5), dpi=150, layout="compressed")
    figure.suptitle(_title(results), parse_math=False)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, role in zip(panels, shown, strict=True):
        draw_matrix(panel, roles[role]["accuracy_matrix"], planned, digits, ticks)
        panel.set_title(_label(role, roles[role], int(14 * side)), fontsize=9, parse_math=False)
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

    `digits` of the numbers in it (None: no numbers), `ticks`: the tasks that are numbered, from 0, `sizes`: of both.
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
    """After each task the average accuracy on the tasks until then; NaN where it was not measured."""
    return [average_accuracy(matrix[: t + 1]) for t in range(len(matrix))]


def draw_curve(panel: Any, steps: Sequence[int], values: Sequence[float], line: str, **options: Any) -> None:
    """Draw accuracies after `steps` tasks; `options` as matplotlib's: colour, marker, label."""
    panel.plot(steps, values, line, markersize=4, **options)


def finish_curves(panel: Any, tasks: int) -> None:
    """Name the axes of a panel of curves over `tasks` tasks."""
    panel.set_xticks(range(1, tasks + 1, 1 + (tasks - 1) // 20))
    panel.set(xlabel="tasks learned", ylabel="average accuracy on them (%)")
    panel.grid(alpha=0.3)


def _task_names(results: Results) -> list[str]:
    """Axis labels: the number of each task and its classes, if they are Latin letters, which every font can show."""
    texts = [_classes(results, task, 24) for task in range(_planned(results))]
    return [f"{i + 1}: {text}" if text and max(text) < "\u0250" else f"task {i + 1}" for i, text in enumerate(texts)]


def _curve_figure(results: Results) -> Figure:
    """Average accuracy over the tasks seen so far after each task: a line per role, baselines dashed, and chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.set_title(_title(results), parse_math=False)
    roles = _measured(results)
    order = sorted(roles, key=lambda role: {"teacher": 0, "student": 1}.get(role, 2))
    for place, role in enumerate(order):
        curve = seen_so_far(roles[role]["accuracy_matrix"])
        style = "-" if role in ("teacher", "student") else "--"
        colour = COLOURS[place % len(COLOURS)]
        label = _label(role, roles[role], 32)
        draw_curve(panel, range(1, len(curve) + 1), curve, style, color=colour, marker="o", label=label)
    sizes = [len(names) for names in results.get("class_names", ())]
    chance = [100 / sum(sizes[: t + 1]) for t in range(len(sizes))]
    if chance:
        panel.plot(range(1, len(chance) + 1), chance, color="0.5", linestyle=":", marker=".", label="chance")
    planned = _planned(results)
    panel.set(xlim=(0.5, planned + 0.5), ylim=(0, 102))
    finish_curves(panel, planned)
    for text in figure.legend(loc="outside right center", frameon=False).get_texts():
        text.set_parse_math(False)
    return figure
