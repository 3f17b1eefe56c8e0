"""The page's contents as HTML: the most likely classes, a state's tasks and its accuracy matrix."""

from __future__ import annotations

import unicodedata
from html import escape
from statistics import fmean
from typing import Any

from states import Results

CSS = """
.html-container {padding: 0 !important}
.cdl.cdl h3:first-child {margin-top: 0}
.cdl.cdl p {margin: .5em 0}
.cdl.cdl table {border-collapse: collapse; width: 100%; border: 0; margin: .5em 0}
.cdl.cdl tr, .cdl.cdl th, .cdl.cdl td {border: 0}
.cdl.cdl th, .cdl.cdl td {padding: .35em 0 .35em 1em; text-align: left; vertical-align: top}
.cdl.cdl th:first-child, .cdl.cdl td:first-child {padding-left: 0; width: 100%}
.cdl.cdl th {font-weight: 600; white-space: nowrap}
.cdl.cdl tbody tr {border-top: 1px solid var(--border-color-primary)}
.cdl.cdl .number {text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap}
.cdl .bar {height: .35em; margin-top: .3em; border-radius: .2em; background: #0072B2}
.cdl .classes {line-height: 1.4; opacity: .75}
.cdl .wide {overflow-x: auto}
.cdl.cdl table.matrix {width: auto}
.cdl.cdl .matrix tbody tr {border: 0}
.cdl.cdl .matrix th, .cdl.cdl .matrix td {padding: .35em .4em; text-align: center; font-weight: 400; width: auto}
.cdl.cdl .matrix td {font-variant-numeric: tabular-nums}
.cdl.cdl .matrix th:first-child {padding-left: 0; text-align: left}
.cdl.cdl .matrix tbody tr:last-child th {font-weight: 600}
"""


def answers_html(answers: list[dict[str, Any]], class_names: list[list[str]]) -> str:
    """The most likely classes with their scores, and the task each was learnt in."""
    learnt_in = {name: number for number, names in enumerate(class_names, 1) for name in names}
    rows = ""
    for answer in answers:
        score = f"{100 * answer['score']:.1f}"
        task = learnt_in.get(answer["label"], "–")
        rows += (
            f"<tr><td>{_text(answer['label'])}<div class=bar style='width: {score}%'></div></td>"
            f"<td class=number>{task}</td><td class=number>{score}&nbsp;%</td></tr>"
        )
    heads = "<th>Class</th><th class=number>Learnt in task</th><th class=number>Score</th>"
    return f"<div class=cdl><table class=answers><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"


def state_html(results: Results) -> str:
    """What the model knows after its tasks: their classes, accuracies when learnt and now, the accuracy matrix."""
    if results.change is not None:
        return _changed_html(results)
    matrix, names = results.accuracy_matrix, results.class_names
    rows = ""
    for task, classes in enumerate(names):
        rows += (
            f"<tr><td>Task {task + 1}<div class=classes>{_text(', '.join(classes))}</div></td>"
            f"<td class=number>{_percent(matrix[task][task])}</td>"
            f"<td class=number>{_percent(matrix[-1][task])}</td></tr>"
        )
    measured = [value for value in matrix[-1] if value is not None]
    mean = f", average accuracy {fmean(measured):.1f}&nbsp;%" if len(measured) == len(names) else ""
    heads = "<th>Accuracy (%)</th><th class=number>when learnt</th><th class=number>now</th>"
    return (
        f"<div class=cdl><h3>After task {len(names)}: {counted(sum(map(len, names)), 'class')}{mean}</h3>"
        f"{_matrix_html(matrix)}<p>Accuracy matrix. Row t, column i: accuracy in percent on the test images of task i "
        "after learning task t, always among all classes learnt so far.</p>"
        f"<table class=tasks><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _changed_html(results: Results) -> str:
    """What a model knows that was changed after its tasks."""
    names = [name for classes in results.class_names for name in classes]
    return (
        f"<div class=cdl><h3>Changed after its {counted(len(results.accuracy_matrix), 'task')}: "
        f"{counted(len(names), 'class')}</h3>"
        f"<p>{_text(results.change or '')}</p>{_matrix_html(results.accuracy_matrix)}"
        "<p>Accuracy matrix, measured before the changes. Row t, column i: accuracy in percent on the test images of "
        f"task i after learning task t.</p><p>Its classes now:</p><div class=classes>{_text(', '.join(names))}</div>"
        "</div>"
    )


def counted(number: int, thing: str) -> str:
    """`2 tasks` of 2 and `task`; hf_cdl's own may not be installed where a Space runs."""
    return f"{number:,} {thing}" + ("" if number == 1 else "es" if thing.endswith("s") else "s")


def plain(text: object) -> str:
    """A name from an untrusted source, with control characters and text direction marks escaped."""
    acting = ("Cc", "Cf", "Cs", "Zl", "Zp")
    parts = (c if unicodedata.category(c) not in acting or c in "\u200c\u200d" else repr(c)[1:-1] for c in str(text))
    return "".join(parts)


def _text(text: str) -> str:
    return escape(plain(text))


def _matrix_html(matrix: list[list[float | None]]) -> str:
    heads, digits = "".join(f"<th>{task + 1}</th>" for task in range(len(matrix))), int(len(matrix) <= 10)
    rows = ""
    for task, row in enumerate(matrix):
        cells = "".join(f"<td style='{_colour(value)}'>{_percent(value, digits)}</td>" for value in row[: task + 1])
        rows += f"<tr><th>after task {task + 1}</th>{cells}</tr>"
    heads = f"<thead><tr><th>on task</th>{heads}</tr></thead>"
    return f"<div class=wide><table class=matrix>{heads}<tbody>{rows}</tbody></table></div>"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _colour(value: float | None) -> str:
    """A cell's style: from white to blue, whatever the page's own colours are."""
    shade, text = value or 0.0, "white" if (value or 0.0) > 90 else "#111"
    return f"background: color-mix(in srgb, #0072B2 {shade:.0f}%, white); color: {text}"
