"""Run variants of a recipe over several seeds and print one table: mean ± standard deviation over the seeds.

python recipes/sweep.py SPEC.yaml [--jobs 2]

SPEC names a recipe, seeds, and variants (fields that differ, and which roles of a run become which rows). A variant
with `teacher_from: VARIANT` takes the teachers that an earlier variant trained. Every run is a `recipes/train.py` of
its own below runs/sweeps/NAME/, so the same command goes on where it stopped. The table is printed and written to
runs/sweeps/NAME/table.md.
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

from hf_cdl.report import compare_table, follows_cdl

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
    parser.add_argument("spec", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    options = parser.parse_args()
    spec = yaml.safe_load(options.spec.read_text())
    root = Path("runs") / "sweeps" / options.spec.stem
    runs = [
        (root / name / f"seed-{seed}", variant, seed)
        for name, variant in spec["variants"].items()
        for seed in spec["seeds"]
    ]
    jobs = sorted(runs, key=lambda job: "teacher_from" in job[1])  # who trains a teacher, before who waits for it
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    failed, started = [], {}
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), desc=options.spec.stem, unit="run") as bar:

        def work(job: tuple[Path, dict[str, Any], int]) -> None:
            folder, variant, seed = job
            if "teacher_from" in variant:  # which stands before this one in the queue
                started[folder.parent.parent / variant["teacher_from"] / folder.name].result()
            log = root / "logs" / f"{folder.parent.name}-{folder.name}.log"
            if run(arguments_of(spec, variant, seed, folder), log, threads):
                failed.append(log)
            bar.update(1)

        for job in jobs:
            started[job[0]] = pool.submit(work, job)
        for future in started.values():
            future.result()
    rows: dict[str, list[dict[str, float]]] = {}
    cdl = False
    for folder, variant, _ in runs:
        file = folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {"roles": {}}
        cdl = cdl or follows_cdl(results)
        for role, label in variant["rows"].items():
            if role in results["roles"]:
                rows.setdefault(label, []).append(results["roles"][role]["metrics"])
    if rows:
        table = compare_table(rows, cdl)
        (root / "table.md").write_text(table + "\n")
        print(f"\n{table}\n")
    if failed:
        print(f"{len(failed)} of {len(jobs)} runs failed; see " + ", ".join(map(str, failed)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
