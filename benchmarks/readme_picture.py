"""Draw the README's picture: accuracy over the tasks of taught, trained and untaught students, and the papers'.

python benchmarks/readme_picture.py [FOLDER] [--out docs/readme_curves.png]; FOLDER is a comparison's, by default that
of `hf-cdl compare recipes/comparisons/taught_dinov2.yaml`; its test/ folder, if there is one, is read instead. Lines
are means over the seeds for which all of them exist, with a band of one standard deviation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hf_cdl.runs.pictures import COLOURS, seen_so_far

LINES = {  # variant and role, by the name that is drawn
    "student, taught in task 1": ("first", "student", "-"),
    "its teacher": ("first", "teacher", "--"),
    "student, trained on task 1's labels": ("labels", "student", "-"),
    "student, untaught": ("none", "student", "-"),
    "the papers' student, KDP": ("papers", "student", "-"),
}
APART = 6.5
"""Percent between the names of two lines."""


def curves(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """Accuracy (%) on all classes so far, (seeds, tasks) by line, and the number of seeds."""
    name, tested = "{}/seed-{}.json", folder / "test"
    where, name = (tested, name) if tested.is_dir() else (folder, "{}/seed-{}/results.json")
    files = {line: {} for line in LINES}
    for line, (variant, _, _) in LINES.items():
        for seed in range(100):
            if (file := where / name.format(variant, seed)).is_file():
                files[line][seed] = file
    seeds = sorted(set.intersection(*map(set, files.values())))
    if not seeds:
        raise SystemExit(f"{where} has no seed of which all of these are there: {', '.join(LINES)}.")
    found = {}
    for line, (_, role, _) in LINES.items():
        matrices = [json.loads(files[line][seed].read_text())["roles"][role]["accuracy_matrix"] for seed in seeds]
        found[line] = np.array([seen_so_far(matrix) for matrix in matrices])
    return found, len(seeds)


def picture(found: dict[str, np.ndarray]) -> Figure:
    """A line for each model, with its name and last accuracy where it ends."""
    figure = Figure(figsize=(8.0, 3.8), dpi=150, layout="constrained")
    panel = figure.subplots()
    tasks = np.arange(1, next(iter(found.values())).shape[1] + 1)
    height = 100.0 + APART
    lines = sorted(
        zip(found.items(), (*COLOURS[:4], "#555555"), strict=True), key=lambda line: -line[0][1][:, -1].mean()
    )
    for (line, values), colour in lines:
        mean, spread = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
        panel.plot(tasks, mean, LINES[line][2], marker="o", color=colour, linewidth=2.2, markersize=5)
        panel.fill_between(tasks, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        below = [mean[-1] - other[:, -1].mean() for other in found.values()]
        crowded = any(0 < distance < APART for distance in below)
        height = min(height - APART, mean[-1] + crowded * APART / 2)
        style = {"color": colour, "fontsize": 11, "va": "center", "fontweight": "bold", "annotation_clip": False}
        panel.annotate(f"  {mean[-1]:.1f} %  {line}", (tasks[-1], height), **style)
    panel.set(xlim=(0.9, len(tasks) + 0.1), ylim=(0, 100), xticks=tasks)
    panel.set_xlabel("tasks of 10 classes learnt so far", fontsize=11, loc="left")
    panel.set_ylabel("accuracy on all their classes (%)", fontsize=11)
    panel.tick_params(labelsize=11)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/comparisons/taught_dinov2"))
    parser.add_argument("--out", type=Path, default=Path("docs/readme_curves.png"))
    options = parser.parse_args()
    found, seeds = curves(options.folder)
    picture(found).savefig(options.out)
    print(f"{options.out}: {seeds} seeds")


if __name__ == "__main__":
    main()
