"""Console report of a run: its table and its accuracy matrices. pictures.py draws them.

Everything is computed from `results`, the content of a run's results.json, also of an unfinished run:
`{"name", "seed", "finished", "recipe", "class_names": [[...] per task], "roles": {role: {"accuracy_matrix", "counts",
"train_seconds", "images_per_second", "peak_memory_bytes" (lists, one entry per learned task), "label"}}}`. A role
needs only the accuracy matrix; None in it means not measured. Metrics are computed from it, not read. With
`protocol: cdl` in the recipe the CDL authors' forgetting comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from textwrap import shorten, wrap
from typing import Any

from hf_cdl.counted import counted
from hf_cdl.escape import visible
from hf_cdl.runs.metrics import average_accuracy, continual_metrics
from hf_cdl.runs.verdict import baselines, verdict

Results = Mapping[str, Any]

WIDTH = 119
# The table's columns: group -> heading of two lines -> metric.
_METRICS: dict[str, dict[str, str]] = {
    "accuracy (%)": {
        "mean over\ntasks": "average_accuracy",
        "over\nimages": "sample_average_accuracy",
        "mean over\ntime": "average_incremental_accuracy",
    },
    "forgotten": {"since\nbest": "forgetting", "since\nlearnt": "official_forgetting"},
    "transfer": {"\nbackward": "backward_transfer"},
}
_CDL_METRICS = {**_METRICS, "forgotten": dict(reversed(_METRICS["forgotten"].items()))}
_TRAINING = ("\nseconds", "\nimages/s", "\nmemory")


def table(results: Results) -> str:
    """Summarise a run as plain text, at most 119 columns wide: the student's matrix, a line per role, the verdict.

    Accuracies are in percent, forgetting and transfer in percentage points; `-` means not measured. Without a student
    the first role's matrix is shown. Its entry in row t and column i is the accuracy on task i after task t.
    """
    roles, planned = measured(results), planned_tasks(results)
    lines = [f"{title_of(results)}: {counted(planned, 'task')}"]
    if not results.get("finished", True):
        learned = [f"{_spaced(role)} {len(entry['accuracy_matrix'])}" for role, entry in roles.items()]
        lines.append(f"Not finished; tasks learned so far: {', '.join(learned) or 'none'}")
    if roles:
        shown = "student" if "student" in roles else next(iter(roles))
        lines += ["", *_matrix_lines(label_of(shown, roles[shown], 60), roles[shown]["accuracy_matrix"], results)]
        headings, rows = cells(results)
        body = [*zip(*(heading.split("\n") for heading in headings), strict=True), *rows]
        widths = [max(map(len, column)) for column in zip(*body, strict=True)]
        lines += ["", _group_line(widths)]
        for name, *values in body:
            padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *padded]))
        for said in ("", *conclusion(results)):
            kept = said.replace(" %", "\u00a0%")  # no line begins with the sign
            lines += [line.replace("\u00a0", " ") for line in wrap(kept, WIDTH)] or [""]
    return "\n".join(line.rstrip()[:WIDTH] for line in lines).rstrip("\n") + "\n"


def cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table of roles: its headings, of two lines each, and for each role its label and numbers."""
    columns = _CDL_METRICS if follows_cdl(results) else _METRICS
    headings = ["\nrole", *(heading for group in (*columns.values(), _TRAINING) for heading in group)]
    return headings, [
        [label_of(role, entry, 28), *_cells(entry, columns)] for role, entry in measured(results).items()
    ]


def conclusion(results: Results) -> list[str]:
    """What to take from a finished run: which baselines are ahead of its student, and, last, which model to use."""
    found = verdict(results)
    if found is None:
        return []
    means = {role: average_accuracy(entry["accuracy_matrix"]) for role, entry in measured(results).items()}
    above = sorted((r for r in baselines(means) if means[r] > means["student"]), key=lambda role: -means[role])
    ahead = ", ".join(f"{_spaced(role)} {number(means[role])} %" for role in above)
    return [*([f"Ahead of the student ({number(means['student'])} %): {ahead}."] if ahead else []), found.said]


def follows_cdl(results: Results) -> bool:
    """Whether a run follows the CDL authors' protocol, so that their forgetting comes first."""
    return results.get("recipe", {}).get("protocol") == "cdl"


def measured(results: Results) -> dict[str, Any]:
    """The roles that have finished a task."""
    return {role: entry for role, entry in results.get("roles", {}).items() if entry.get("accuracy_matrix")}


def planned_tasks(results: Results) -> int:
    learned = [len(entry["accuracy_matrix"]) for entry in measured(results).values()]
    return max([len(results.get("class_names", ())), *learned])


def title_of(results: Results) -> str:
    seed = results.get("seed")
    return visible(results.get("name", "run")) + ("" if seed is None else f", seed {visible(seed)}")


def _spaced(role: str) -> str:
    return visible(role).replace("_", " ")


def label_of(role: str, entry: Mapping[str, Any], width: int) -> str:
    return _shorten(visible(entry.get("label") or role.replace("_", " ")), width)


def classes_of(results: Results, task: int, width: int) -> str:
    tasks = results.get("class_names", ())
    return _shorten(", ".join(map(visible, tasks[task])), width) if task < len(tasks) else ""


def _shorten(text: str, width: int) -> str:
    """As many words as fit on one line; a single longer word is cut."""
    return shorten(text, width, placeholder=" ...") if " " in text[:width] else text[:width]


def number(value: float | None, digits: int = 1) -> str:
    """Format a value; `-` if it was not measured."""
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
    """The accuracy matrix as text, in whole percents if the columns would not fit otherwise."""
    planned = planned_tasks(results)
    left, right = "after    mean", "  classes of the task"
    room = WIDTH - len(left + right)
    digits, width = (1, 7) if 7 * planned <= room else (0, 4)
    if width * planned > room:
        return [f"{counted(planned, 'task')} are too many to print their accuracy matrix; it is in results.json"]
    lines = [
        f"{label}: accuracy (%) on each task, after each task",
        left + "".join(f"{i + 1:{width}d}" for i in range(planned)) + right,
    ]
    for t, row in enumerate(matrix):
        cells = "".join(f"{number(value, digits):>{width}}" for value in row[: t + 1]).ljust(width * planned)
        line = f"{t + 1:5d}  {number(average_accuracy(matrix[: t + 1])):>6}{cells}  "
        lines.append(line + classes_of(results, t, WIDTH - len(line)))
    return lines


def difference_lines(rows: Sequence[tuple[int, Sequence[str], int, float, float]]) -> list[str]:
    """Text table of (task, classes, images, accuracy before, accuracy after), with differences and means."""
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


def unknown_images(known: Mapping[str, float], model: str = "it") -> str:
    """How a model recognises images of none of its classes, in words; `known`: as in results.json, of one task."""
    kept = f"asked for `unknown`, {model} still answers {known['kept']:.0f} % of the images of its classes"
    if "foreign_passing" in known:
        kept = f"{kept}, {known['foreign_passing']:.0f} % of the foreign ones"
    if "unlearnt_passing" in known:
        return f"{kept}, and {known['unlearnt_passing']:.0f} % of those of classes not learnt yet, which it should not"
    if "unlearnt_passing_expected" in known:
        passing = f"{known['unlearnt_passing_expected']:.0f} %"
        return f"{kept}, and would answer about {passing} of those of a class like these that it never learnt"
    return kept
