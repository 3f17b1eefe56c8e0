"""Run variants of a recipe over seeds and class orders, and say what differs: tables, tests, a report.

python recipes/compare.py SPEC.yaml [SPEC.yaml ...] [--jobs 2]
python recipes/compare.py SPEC.yaml [SPEC.yaml ...] --test [--jobs 2]      (once, at the very end)

SPEC (recipes/comparisons/, fields in recipes/README.md) names a recipe, seeds, and variants: fields that differ, and
which roles of a run fill which rows. Every run is a `recipes/train.py` of its own below runs/comparisons/NAME/, so the
same command goes on where it stopped, also after a kill. There it writes table.parquet and table.csv (every run with
its recipe's hash), table.md, report.html and the report's pictures in plots/.

Accuracy is measured on validation images. `--test` measures the stored checkpoints of the finished runs on the test
images, writes the same files to runs/comparisons/NAME/test/, and records in runs/comparisons/test_split.json that they
were read; it does so once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import stopping

if __name__ == "__main__":
    stopping.listen()  # before imports that take seconds

import torch
from filelock import FileLock, Timeout
from final_test import measured_on_test, reading
from plan import measure, read_tasks
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from tqdm.auto import tqdm
from transformers.utils import logging as hf_logging

from hf_cdl.compare.page import save_report
from hf_cdl.compare.spec import Comparison, PlannedRun, read_comparison
from hf_cdl.compare.table import Measured
from hf_cdl.escape import visible, visible_lines
from hf_cdl.recipe import RecipeError
from hf_cdl.recipe.build import load_plugins
from hf_cdl.runs.files import RunError, make_folder, read_json, saving, write_json

HERE = Path(__file__).parent
ROOT = Path("runs", "comparisons")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", type=Path, nargs="+", metavar="SPEC")
    parser.add_argument("--jobs", type=int, help="runs at the same time; default: GPUs, or cores where there are none")
    parser.add_argument("--test", action="store_true", help="measure the finished runs on the test images, once")
    options = parser.parse_args()
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, but it takes one run at a time at least")
    try:
        stopping.ready()
        if missing := [name for name in ("matplotlib", "scipy", "statsmodels") if not find_spec(name)]:
            raise RecipeError(f"It needs {', '.join(missing)}; install the extra: pip install 'hf-cdl[report]'")
        comparisons = [read_comparison(file, HERE, ROOT) for file in options.specs]
        with contextlib.ExitStack() as locks:
            for comparison in comparisons:
                locks.enter_context(alone(comparison))
            if options.test:
                return test(dict(zip(options.specs, comparisons, strict=True)), options.jobs)
            return compare(comparisons, options.jobs)
    except (OSError, RecipeError, RunError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        stopping.say_goes_on()
        return getattr(stop, "code", 130)


@contextlib.contextmanager
def alone(comparison: Comparison) -> Iterator[None]:
    """Raises RecipeError if another process is at work on the comparison."""
    if comparison.root.exists() and not comparison.root.is_dir():
        raise RecipeError(
            f"{comparison.root} is a file, but the comparison's runs go into a folder of that name. Move the file "
            "away, or rename the comparison: it is called as its spec."
        )
    with saving(f"open the comparison in {comparison.root}"):
        make_folder(comparison.root)
    try:
        with FileLock(comparison.root / ".lock", timeout=0):
            yield
    except Timeout:
        raise RecipeError(
            f"Another process is comparing in {comparison.root}; wait for it or stop it first."
        ) from None


def compare(comparisons: list[Comparison], jobs: int | None) -> int:
    """Make the runs that are missing, then write what all have given; 1 if some failed."""
    runs = [run for comparison in comparisons for run in comparison.runs]
    failed = make(runs, jobs, lambda run: ["train.py", *run.arguments], PlannedRun.results)
    for comparison in comparisons:
        measured = collect(comparison, PlannedRun.results, comparison.spec.split)
        if measured:
            print(f"\n{visible(comparison.name)}\n\n{save_report(comparison, measured, comparison.root)}", flush=True)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed:")
        print("\n".join(f"  {visible(run.folder)}: {visible(why)}" for run, why in failed))
    return 1 if failed else 0


def test(comparisons: dict[Path, Comparison], jobs: int | None) -> int:
    """Measure finished comparisons, by spec file, on the test images, each once. Raises RunError if that fails."""
    for file, comparison in comparisons.items():
        results_of = functools.partial(measured_on_test, comparison)
        with reading(comparison, ROOT / "test_split.json") as reads:
            runs = [dataclasses.replace(run, teacher_from=None) for run in comparison.runs]  # any order is fine
            failed = make(runs, jobs, functools.partial(test_command, file), results_of)
            if failed:
                raise RunError(
                    f"{len(failed)} of {len(runs)} runs of {comparison.name} could not be measured, as "
                    f"{failed[0][0].folder}: {failed[0][1]}. The same command goes on with those that are missing."
                )
            measured = collect(comparison, results_of, "test")
            text = save_report(comparison, measured, comparison.root / "test", reads)
            read = "\n".join(f"- {visible(line)}" for line in reads)
            print(f"\n{visible(comparison.name)}: these test images were read\n{read}")
            print(f"\n{text}", flush=True)
    return 0


def test_command(file: Path, run: PlannedRun) -> list[str]:
    return ["final_test.py", str(file), run.variant, run.folder.name]


def make(
    runs: list[PlannedRun],
    jobs: int | None,
    command: Callable[[PlannedRun], list[str]],
    results_of: Callable[[PlannedRun], dict[str, Any] | None],
) -> list[tuple[PlannedRun, str]]:
    """Make what `results_of` lacks, as many runs at a time as there are workers; those that failed, and why.

    `command`: a run's script, beside this one, and its arguments.
    """
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    free = workers(jobs, devices.split(",") if torch.cuda.device_count() else [], os.cpu_count() or 1)
    done = {run.folder for run in runs if results_of(run) is not None}
    waiting = [run for run in runs if run.folder not in done]
    working: list[tuple[PlannedRun, subprocess.Popen[bytes], dict[str, str]]] = []
    failed: list[tuple[PlannedRun, str]] = []
    with tqdm(total=len(runs), initial=len(done), unit="run", disable=None) as bar:
        while waiting or working:
            for run in [run for run in waiting if run.teacher_from in [other.folder for other, _ in failed]]:
                waiting.remove(run)
                failed.append((run, "the run that trains its teacher failed"))
            ready = [r for r in waiting if (r.teacher_from is None or r.teacher_from in done) and not in_use(r.folder)]
            for run in ready[: len(free)]:
                worker = free.pop(0)
                working.append((run, start(command(run), log_of(run), worker), worker))
                waiting.remove(run)
            time.sleep(0.1)
            for entry in [entry for entry in working if entry[1].poll() is not None]:
                run, process, worker = entry
                working.remove(entry)
                free.append(worker)
                if process.returncode == 0 and results_of(run) is not None:
                    done.add(run.folder)
                    bar.update()
                else:
                    failed.append((run, f"exit code {process.returncode}, see {log_of(run)}"))
    return failed


def workers(jobs: int | None, gpus: list[str], cores: int) -> list[dict[str, str]]:
    """The environment of each worker: its GPU, if there are some, and its share of the cores."""
    count = jobs or len(gpus) or cores
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count))}
    return [{**threads, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(count)]


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A script beside this one as a process of its own, which ends with this one."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = command
    whole = [sys.executable, str(HERE / "watched.py"), str(HERE / script), *arguments]
    env = {**os.environ, **environment}
    with open(log, "a") as output:
        return subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=env)


def in_use(folder: Path) -> bool:
    """Whether another process is at work in a run's folder: one that was started by hand, or is just ending."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def log_of(run: PlannedRun) -> Path:
    return run.folder.parent.parent / "logs" / f"{run.folder.parent.name}-{run.folder.name}.log"


def collect(
    comparison: Comparison, results_of: Callable[[PlannedRun], dict[str, Any] | None], split: str
) -> list[Measured]:
    """What the finished runs gave: row by row as in the spec, unit by unit."""
    measured = []
    flops = count_flops(comparison)
    for label, variant, role in comparison.rows:
        for run in comparison.runs:
            results = results_of(run) if run.variant == variant else None
            if results is not None:
                entry = results["roles"][role]
                unit = (run.seed, run.class_order)
                fields = (label, variant, role, unit, run.recipe_hash, split, results["stream"])
                measured.append(Measured(*fields, entry, flops[variant].get(role, {})))
    return measured


def count_flops(comparison: Comparison) -> dict[str, dict[str, dict[str, float]]]:
    """Variant -> role -> multiply-adds, as `--plan` counts those of its first run; kept in flops.json."""
    file = comparison.root / "flops.json"
    known = read_flops(file)
    found = {}
    for name in comparison.spec.variants:
        first = next(run for run in comparison.runs if run.variant == name)
        if not known.get(first.recipe_hash) and first.results() is not None:
            load_plugins(first.recipe.plugins)
            try:
                _, costs = measure(first.recipe, read_tasks(first.recipe))
            except (ValueError, NotImplementedError) as error:
                print(f"No FLOPs of {visible(name)}, which cannot be counted: {visible(error)}")
                costs = {}
            known[first.recipe_hash] = {
                role: {"training_flops": cost.total_flops, "inference_flops": cost.inference_flops}
                for role, cost in costs.items()
            }
            write_json(file, known)
        found[name] = known.get(first.recipe_hash, {})
    return found


def read_flops(file: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What flops.json holds; nothing, in words, if it is damaged: all of it can be counted again."""
    if not file.exists():
        return {}
    try:
        return TypeAdapter(dict[str, dict[str, dict[str, FiniteFloat]]]).validate_python(read_json(file), strict=True)
    except (ValidationError, RunError):
        print(f"{file} is damaged; its FLOPs are counted again.")
        return {}


if __name__ == "__main__":
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    stopping.leave(main())
