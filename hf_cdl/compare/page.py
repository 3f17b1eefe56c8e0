"""The report of a comparison: table.parquet, table.csv, table.md, figures, and everything in one HTML file.

The HTML file is self-contained and needs no network. Needs the extra `report`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cdl.compare import figures
from hf_cdl.compare.aa import halves, relabelled
from hf_cdl.compare.records import TOLD, Measured, class_values, save_table, values
from hf_cdl.compare.spec import Comparison, PlannedRun
from hf_cdl.compare.statistics import LEVEL, Contrast, contrasts_of, pairs_needed, smallest_p
from hf_cdl.compare.summary import (
    CDL,
    DECOMPOSITION,
    DEFAULT,
    ONE_TASK,
    Table,
    checks_table,
    contrasts_table,
    cost_table,
    metrics_table,
    p_text,
)
from hf_cdl.counted import counted
from hf_cdl.runs.files import write_whole
from hf_cdl.runs.page import PAGE, embedded, rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def save_report(comparison: Comparison, measured: Sequence[Measured], folder: Path, reads: Sequence[str] = ()) -> str:
    """Write everything into `folder` and return the tables as Markdown.

    `measured`: results of the finished runs, at least one; `reads`: when the test split of these data was read.
    """
    spec, split = comparison.spec, measured[0].split
    one_task = all(len(run.entry["accuracy_matrix"]) == 1 for run in measured)
    cdl = all(run.recipe.protocol == "cdl" for run in comparison.runs)
    metrics = ONE_TASK if one_task else CDL if cdl else DEFAULT
    if spec.metric not in metrics:
        metrics = (spec.metric, *metrics)
    found = values(measured, spec.metric)
    by_class = class_values(measured) if spec.metric == "average_accuracy" else {}
    contrasts = contrasts_of(found, spec.contrasts, by_class)
    tables = {"results": metrics_table(measured, metrics, spec.metric)}
    if contrasts:
        tables["contrasts"] = contrasts_table(contrasts, spec.metric)
    if any(run.metric("within_task_accuracy") is not None for run in measured):
        tables["decomposition"] = metrics_table(measured, DECOMPOSITION)
    if telling := [run for run in measured if run.metric("kept") is not None]:
        tables["told"] = metrics_table(telling, [name for name in TOLD if values(telling, name)])
    tables["cost"] = cost_table(measured)
    checks = [check for check in (relabelled(found, spec.contrasts), *halves(found)) if check is not None]
    if checks:
        tables["checks"] = checks_table(checks)
    pictures = _pictures(comparison, measured, contrasts, "decomposition" in tables, one_task)
    notes = _notes(comparison, measured, contrasts)
    save_table(measured, folder)
    for name, figure in pictures.items():
        write_whole(folder / "plots" / f"{name}.png", lambda file, figure=figure: figure.savefig(file, format="png"))
    text = "\n".join([f"Measured on {split} images.\n", *(table.markdown() for table in tables.values())])
    write_whole(folder / "table.md", lambda file: file.write_text(text))
    page = _page(comparison, measured, folder, tables, [*pictures], notes, split, reads)
    write_whole(folder / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    return text


def _pictures(
    comparison: Comparison,
    measured: Sequence[Measured],
    contrasts: Sequence[Contrast],
    decomposed: bool,
    one_task: bool,
) -> dict[str, Figure]:
    spec = comparison.spec
    pictures = {}
    if contrasts:
        pictures["contrasts"] = figures.contrasts_figure(contrasts, spec.metric)
    if not one_task:
        pictures["curves"] = figures.curves_figure(measured)
    if decomposed:
        pictures["decomposition"] = figures.decomposition_figure(measured)
    if not one_task:
        pictures["matrices"] = figures.matrices_figure(measured)
    pictures["cost"] = figures.cost_figure(measured, ["average_accuracy", *([] if one_task else ["forgetting"])])
    panels = {
        title: [log for run in comparison.runs if run.variant == name and (log := _log(run))]
        for name, title in spec.curves.items()
    }
    if panels and all(panels.values()):
        pictures["training"] = figures.training_figure(panels)
    return pictures


def _log(run: PlannedRun) -> list[dict[str, Any]]:
    """Log entries of the student's phases, task after task; empty for an unfinished run."""
    files = sorted(run.folder.glob("logs/student-task-*.json")) if run.results() else []
    return [entry for file in files for entry in json.loads(file.read_text())]


def _notes(comparison: Comparison, measured: Sequence[Measured], contrasts: Sequence[Contrast]) -> list[str]:
    """What a reader must know before believing a number."""
    notes, rows = [], {label for label, _, _ in comparison.rows}
    planned = len(comparison.rows) * _units(comparison)
    if len(measured) < planned:
        missing = sorted(rows - {run.label for run in measured})
        notes.append(
            f"Not finished: {len(measured)} of {counted(planned, 'result')} so far"
            + (f"; nothing yet of {', '.join(missing)}." if missing else ".")
        )
    pairs = min((contrast.mean.n for contrast in contrasts), default=0)
    if contrasts and (smallest := smallest_p(pairs, len(contrasts))) > LEVEL:
        notes.append(
            f"Too few to prove anything: {counted(pairs, 'pair')}. With {counted(len(contrasts), 'contrast')} the "
            f"smallest p (Holm) that they can give is {p_text(smallest)}. It takes "
            f"{counted(pairs_needed(len(contrasts)), 'pair')}."
        )
    return notes


def _units(comparison: Comparison) -> int:
    return len({(run.seed, run.class_order) for run in comparison.runs})


def _page(
    comparison: Comparison,
    measured: Sequence[Measured],
    folder: Path,
    tables: dict[str, Table],
    pictures: Sequence[str],
    notes: Sequence[str],
    split: str,
    reads: Sequence[str],
) -> str:
    shown = comparison.spec.metric.replace("_", " ")
    runs = Table(["row", "seed", "class order", "recipe hash", "stream", shown], [])
    for run in measured:
        seed, order = run.unit
        value = run.metric(comparison.spec.metric)
        numbers = [str(seed), "–" if order is None else str(order)]
        runs.rows.append([run.label, *numbers, run.recipe_hash, run.stream, "–" if value is None else f"{value:.2f}"])
    return rendered(
        TEMPLATE,
        name=comparison.name,
        split=split,
        chosen_by_spec=comparison.spec.split == split,
        reads=reads,
        notes=notes,
        tables=tables,
        images=embedded({name: folder / f"plots/{name}.png" for name in pictures}),
        metric=shown,
        seeds=len(comparison.spec.seeds),
        units=_units(comparison),
        crossed=comparison.spec.class_orders is not None,
        contrasts=len(tables["contrasts"].rows) if "contrasts" in tables else 0,
        over_classes="contrasts" in tables and "over classes" in tables["contrasts"].headings,
        runs=runs,
    )
