"""Draw the README's picture: accuracy over the tasks, of the runs of recipes/comparisons/readme.yaml.

python benchmarks/readme_picture.py [FOLDER] [--out docs/readme_curves.png]; FOLDER holds the comparison's runs. It
also prints the numbers as a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import yaml
from matplotlib.figure import Figure

from hf_cdl.runs.pictures import COLOURS, seen_so_far

SPEC = Path(__file__).parent.parent / "recipes" / "comparisons" / "readme.yaml"
ORDER = ("teacher", "student, taught", "student, untaught", "student, CODA-Prompt + KDP")


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Row -> for each seed its average accuracies (%) on the tasks so far, after each task."""
    spec = yaml.safe_load(SPEC.read_text())
    found: dict[str, list[list[float]]] = {}
    for name, variant in spec["variants"].items():
        for seed in spec["seeds"]:
            roles = json.loads((folder / name / f"seed-{seed}" / "results.json").read_text())["roles"]
            for role, row in variant["rows"].items():
                found.setdefault(row, []).append(seen_so_far(roles[role]["accuracy_matrix"]))
    return {row: found[row] for row in ORDER}


def picture(rows: dict[str, list[list[float]]]) -> Figure:
    """Mean over the seeds as lines that are labelled where they end, lowest to highest as bands."""
    figure = Figure(figsize=(8.0, 3.8), dpi=150, layout="constrained")
    panel = figure.subplots()
    tasks = len(rows["teacher"][0])
    for (row, runs), colour in zip(rows.items(), COLOURS, strict=False):
        points = [*zip(*runs, strict=True)]
        steps, means = range(1, tasks + 1), [fmean(point) for point in points]
        panel.plot(steps, means, "-o", color=colour, linewidth=2.2, markersize=5)
        panel.fill_between(steps, [*map(min, points)], [*map(max, points)], color=colour, alpha=0.15, linewidth=0)
        text = f" {row}  {means[-1]:.0f} %"
        panel.annotate(text, (tasks, means[-1]), color=colour, fontsize=11, va="center", fontweight="bold")
    panel.set_xlim(0.9, tasks + 2.1)
    panel.set_xticks(range(1, tasks + 1))
    panel.set_ylim(0, 100)
    panel.set_xlabel("tasks learned", fontsize=11)
    panel.set_ylabel("accuracy on all classes so far (%)", fontsize=11)
    panel.tick_params(labelsize=11)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/comparisons/readme"))
    parser.add_argument("--out", type=Path, default=Path("docs/readme_curves.png"))
    options = parser.parse_args()
    rows = curves(options.folder)
    picture(rows).savefig(options.out)
    print("| | after task 1 | after the last, mean | lowest to highest |\n|---|---:|---:|---:|")
    for row, runs in rows.items():
        last = [run[-1] for run in runs]
        print(f"| {row} | {fmean(r[0] for r in runs):.1f} | {fmean(last):.1f} | {min(last):.1f} to {max(last):.1f} |")


if __name__ == "__main__":
    main()
