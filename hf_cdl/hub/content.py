"""What is pushed with a checkpoint: the results up to its task and the commit message; the card is in card/."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from hf_cdl.escape import visible
from hf_cdl.hub.card import shared
from hf_cdl.runs.ledger import CHANGED, revision_name
from hf_cdl.runs.metrics import continual_metrics
from hf_cdl.runs.report import number
from hf_cdl.runs.verdict import with_verdict

Results = Mapping[str, Any]

DOCUMENTS = ("README.md", "accuracy_matrix.png", "results.json", ".gitattributes")
"""Files that do not identify a repository's checkpoint: the card, the results and the Hub's own file."""


def results_after(results: Results, count: int) -> dict[str, Any]:
    """The results of a run as of its revision `count`, without local paths."""
    roles, tasks = {}, len(results["class_names"])
    changes = results.get("changes", [])[: max(0, count - tasks)]
    for role, entry in results["roles"].items():
        cut = {key: value[:count] if isinstance(value, list) else value for key, value in entry.items()}
        if count < len(entry["accuracy_matrix"]):
            cut.pop("cost", None)  # only known for the newest state
        metrics = continual_metrics(cut["accuracy_matrix"], cut["counts"])
        roles[role] = {**cut, "metrics": {name: metrics[name] for name in entry["metrics"]}}
    rest = {key: value for key, value in shared(results).items() if key not in ("changes", "exports")}
    more: dict[str, Any] = {"changes": changes} if changes else {}
    if exports := [export for export in results.get("exports", []) if export["revision"] == revision_name(count)]:
        more["exports"] = exports
    return with_verdict({**rest, **more, "roles": roles, "finished": count >= tasks})


def finished_revisions(results: Results, role: str) -> int:
    """Number of states of a role that can be pushed: one after each task it was measured on, and after each change."""
    tasks = len(results["roles"].get(role, {}).get("accuracy_matrix", ()))
    return tasks + (len(results.get("changes", [])) if role == CHANGED else 0)


def classes_of(results: Results, revision: int) -> list[list[str]]:
    """Class names, by the tasks that they are stored in, of a role's revision."""
    changes = {change["revision"]: change for change in results.get("changes", [])}
    return changes[revision]["class_names"] if revision in changes else results["class_names"][:revision]


def commit_message(results: Results, role: str, count: int) -> tuple[str, str]:
    """Title and description of the commit of revision `count`."""
    for change in results.get("changes", []):
        if role == CHANGED and change["revision"] == count:
            classes = ", ".join(visible(name) for names in change["class_names"] for name in names)
            return f"Change: {shorten(visible(change['said']), 100, placeholder=' ...')}", f"Classes: {classes}"
    names, matrix = (
        [*map(visible, results["class_names"][count - 1])],
        results["roles"][role]["accuracy_matrix"][:count],
    )
    row = matrix[-1]
    shown = shorten(", ".join(names), 80, placeholder=" ...")
    title = f"Task {count} of {len(results['class_names'])}: classes {shown}"
    lines = [
        f"Classes: {', '.join(names)}",
        f"Accuracy (%) on the tasks so far: {', '.join(map(number, row))}",
        f"{visible(results['name'])}, seed {results['seed']}, stream {results['stream']}",
    ]
    average = continual_metrics(matrix)["average_accuracy"]
    return title + ("" if average is None else f"; average accuracy {average:.1f} %"), "\n".join(lines)
