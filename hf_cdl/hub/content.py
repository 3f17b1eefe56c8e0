"""What goes with a checkpoint: the results up to its task, the commit's message; the card is card.py's."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from hf_cdl.escape import visible
from hf_cdl.hub.card import shared
from hf_cdl.runs.metrics import continual_metrics
from hf_cdl.runs.report import number

Results = Mapping[str, Any]

DOCUMENTS = ("README.md", "accuracy_matrix.png", "results.json", ".gitattributes")
"""Files of a repository that do not say whose its checkpoint is: the card, the results and the Hub's own."""


def results_after(results: Results, count: int) -> dict[str, Any]:
    """The results of a run as they were when `count` tasks were finished, without the paths of this machine."""
    roles = {}
    for role, entry in results["roles"].items():
        cut = {key: value[:count] if isinstance(value, list) else value for key, value in entry.items()}
        if count < len(entry["accuracy_matrix"]):
            cut.pop("cost", None)  # that of the newest state
        metrics = continual_metrics(cut["accuracy_matrix"], cut["counts"])
        roles[role] = {**cut, "metrics": {name: metrics[name] for name in entry["metrics"]}}
    return {**shared(results), "roles": roles, "finished": count == len(results["class_names"])}


def finished_tasks(results: Results, role: str) -> int:
    """How many tasks a role has learnt and was measured on."""
    return len(results["roles"].get(role, {}).get("accuracy_matrix", ()))


def commit_message(results: Results, role: str, count: int) -> tuple[str, str]:
    """Title and text of the commit after `count` tasks."""
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
