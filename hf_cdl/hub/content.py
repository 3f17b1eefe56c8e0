"""What is pushed with a checkpoint: the results up to its task and the commit message; the card is in card/."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from hf_cdl.escape import visible
from hf_cdl.hub.card import shared
from hf_cdl.runs.metrics import continual_metrics
from hf_cdl.runs.report import number
from hf_cdl.runs.verdict import with_verdict

Results = Mapping[str, Any]

DOCUMENTS = ("README.md", "accuracy_matrix.png", "results.json", ".gitattributes")
"""Files that do not identify a repository's checkpoint: the card, the results and the Hub's own file."""


def results_after(results: Results, count: int) -> dict[str, Any]:
    """The results of a run as of `count` finished tasks, without local paths."""
    roles = {}
    for role, entry in results["roles"].items():
        cut = {key: value[:count] if isinstance(value, list) else value for key, value in entry.items()}
        if count < len(entry["accuracy_matrix"]):
            cut.pop("cost", None)  # only known for the newest state
        metrics = continual_metrics(cut["accuracy_matrix"], cut["counts"])
        roles[role] = {**cut, "metrics": {name: metrics[name] for name in entry["metrics"]}}
    return with_verdict({**shared(results), "roles": roles, "finished": count == len(results["class_names"])})


def finished_tasks(results: Results, role: str) -> int:
    """Number of tasks a role has learnt and been measured on."""
    return len(results["roles"].get(role, {}).get("accuracy_matrix", ()))


def commit_message(results: Results, role: str, count: int) -> tuple[str, str]:
    """Title and description of the commit after `count` tasks."""
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
