"""Draw the README's picture: accuracy over the tasks of the quickstart's models, from its stored results.

python benchmarks/readme_picture.py [RESULTS] [--out docs/readme_curves.png]; RESULTS is a results.json, by default the
one that model_cards/quickstart keeps of `make quickstart` (runs/quickstart/results.json is a run of your own).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_cdl.runs.pictures import COLOURS, seen_so_far

LINES = {
    "ridge_head": "ridge head, recommended",
    "nearest_class_mean": "class means, nothing trained",
    "teacher": "teacher, CODA-Prompt",
    "student": "its student, CODA-Prompt + KDP",
}


def picture(roles: dict[str, Any]) -> Figure:
    """A line for each role, with its name and last accuracy (%) where it ends."""
    figure = Figure(figsize=(8.0, 3.8), dpi=150, layout="constrained")
    panel = figure.subplots()
    tasks = len(roles["student"]["accuracy_matrix"])
    for (role, name), colour, style in zip(LINES.items(), COLOURS, ("-", ":", "-", "-"), strict=False):
        accuracies = seen_so_far(roles[role]["accuracy_matrix"])
        panel.plot(range(1, tasks + 1), accuracies, style, marker="o", color=colour, linewidth=2.2, markersize=5)
        label = f"  {accuracies[-1]:.0f} %  {name}"
        panel.annotate(
            label,
            (tasks, accuracies[-1]),
            color=colour,
            fontsize=11,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )
    panel.set(xlim=(0.9, tasks + 0.1), ylim=(0, 80), xticks=range(1, tasks + 1))
    panel.set_xlabel("tasks of 10 classes learnt so far", fontsize=11, loc="left")
    panel.set_ylabel("right among all their classes (%)", fontsize=11)
    panel.tick_params(labelsize=11)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stored = Path(__file__).parent.parent / "model_cards" / "quickstart" / "results.json"
    parser.add_argument("results", type=Path, nargs="?", default=stored)
    parser.add_argument("--out", type=Path, default=Path("docs/readme_curves.png"))
    options = parser.parse_args()
    picture(json.loads(options.results.read_text())["roles"]).savefig(options.out)


if __name__ == "__main__":
    main()
