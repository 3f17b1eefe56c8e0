"""Run variants of a recipe over several seeds and print tables: mean ± standard deviation, paired differences.

python recipes/sweep.py SPEC.yaml [SPEC.yaml ...] [--jobs 2]

SPEC names a recipe, seeds, and variants (fields that differ, and which roles of a run become which rows). A variant
with `teacher_from: VARIANT` takes the teachers that an earlier variant trained. `contrasts` are pairs of rows whose
difference is taken seed by seed; `curves` the variants whose accuracies over training are drawn, with a title each.
Every run is a `recipes/train.py` of its own below runs/sweeps/NAME/, so the same command goes on where it stopped. The
tables are printed and written to runs/sweeps/NAME/table.md, the curves to curves.png beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from hf_cdl.compare import CDL, DEFAULT, ONE_TASK, compare_table, difference_table, save_curves
from hf_cdl.report import follows_cdl, plotting_available

HERE = Path(__file__).parent


def arguments_of(spec: dict[str, Any], variant: dict[str, Any], seed: int, folder: Path) -> list[str]:
    """Command line of one run; `set` holds dotted fields, `seed_fields` get the seed."""
    fields = {**variant.get("set", {}), **dict.fromkeys(spec.get("seed_fields", ["seed"]), seed)}
    if "teacher_from" in variant:
        fields["teacher_from"] = str(folder.parent.parent / variant["teacher_from"] / folder.name)
    command = [sys.executable, str(HERE / "train.py"), str(HERE / spec["recipe"]), "--output_dir", str(folder)]
    for name, value in fields.items():
        command += [f"--{name}", yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("\n...")]
    return command


def run(command: list[str], log: Path, threads: int) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", type=Path, nargs="+", metavar="SPEC")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    options = parser.parse_args()
    specs = {Path("runs/sweeps", file.stem): yaml.safe_load(file.read_text()) for file in options.specs}
    jobs = [
        (spec, root / name / f"seed-{seed}", variant, seed)
        for root, spec in specs.items()
        for name, variant in spec["variants"].items()
        for seed in spec["seeds"]
    ]
    jobs.sort(key=lambda job: "teacher_from" in job[2])  # who trains a teacher, before who waits for it
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    failed, started = [], {}
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:

        def work(spec: dict[str, Any], folder: Path, variant: dict[str, Any], seed: int) -> None:
            if "teacher_from" in variant:  # which stands before this one in the queue
                started[folder.parent.parent / variant["teacher_from"] / folder.name].result()
            log = folder.parent.parent / "logs" / f"{folder.parent.name}-{folder.name}.log"
            if run(arguments_of(spec, variant, seed, folder), log, threads):
                failed.append(log)
            bar.update(1)

        for job in jobs:
            started[job[1]] = pool.submit(work, *job)
        for future in started.values():
            future.result()
    for root, spec in specs.items():
        report(root, spec)
    if failed:
        print(f"{len(failed)} of {len(jobs)} runs failed; see " + ", ".join(map(str, failed)))
    return 1 if failed else 0


def report(root: Path, spec: dict[str, Any]) -> None:
    """Print and write what a spec's runs gave, as far as they are finished."""
    rows: dict[str, dict[int, dict[str, float]]] = {}
    columns = DEFAULT
    for name, variant in spec["variants"].items():
        for seed in spec["seeds"]:
            file = root / name / f"seed-{seed}" / "results.json"
            results = json.loads(file.read_text()) if file.exists() else {"roles": {}}
            for role, label in variant["rows"].items():
                if role in results["roles"]:
                    entry = results["roles"][role]
                    columns = (
                        ONE_TASK if len(entry["accuracy_matrix"]) == 1 else CDL if follows_cdl(results) else columns
                    )
                    rows.setdefault(label, {})[seed] = entry["metrics"]
    if not rows:
        return
    tables = [compare_table(rows, columns)]
    contrasts = [pair for pair in spec.get("contrasts", ()) if all(rows.get(label) for label in pair)]
    if contrasts:
        tables.append(difference_table(rows, contrasts))
    (root / "table.md").write_text("\n".join(tables))
    print(f"\n{root.name}\n\n" + "\n".join(tables))
    panels = {
        title: [log for seed in spec["seeds"] if (log := log_of(root / name / f"seed-{seed}"))]
        for name, title in spec.get("curves", {}).items()
    }
    if panels and all(panels.values()) and plotting_available():
        save_curves(panels, root / "curves.png", root.name)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What the student's phases logged, one task after the other; nothing of a run that is not finished."""
    if not (folder / "results.json").exists():
        return []
    return [
        entry for file in sorted(folder.glob("logs/student-task-*.json")) for entry in json.loads(file.read_text())
    ]


if __name__ == "__main__":
    sys.exit(main())
