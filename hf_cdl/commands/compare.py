"""hf-cdl compare: run variants of a recipe over seeds and class orders, and report the differences."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from hf_cdl.commands.parsers import read
from hf_cdl.compare.collect import collect
from hf_cdl.compare.page import save_report
from hf_cdl.compare.schedule import make
from hf_cdl.compare.spec import Comparison, PlannedRun, read_comparison
from hf_cdl.compare.test_split import measured_on_test, reading
from hf_cdl.escape import visible, visible_lines
from hf_cdl.recipe import RecipeError
from hf_cdl.runs.files import RunError, make_folder, saving


def main(arguments: list[str]) -> int:
    """Run what is missing and report everything; 1 if runs failed, 2 if nothing can be compared."""
    options, _ = read("compare", arguments)
    try:
        return run(options)
    except (OSError, RecipeError, RunError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Do the work of `main`. Raises RecipeError and RunError if it is not possible."""
    if missing := [name for name in ("matplotlib", "scipy", "statsmodels") if not find_spec(name)]:
        raise RecipeError(f"It needs {', '.join(missing)}; install the extra: pip install 'hf-cdl[report]'")
    comparisons = [read_comparison(file) for file in options.specs]
    with contextlib.ExitStack() as locks:
        for comparison in comparisons:
            locks.enter_context(locked(comparison))
        if options.test:
            return test(dict(zip(options.specs, comparisons, strict=True)), options.jobs)
        return compare(comparisons, options.jobs)


@contextlib.contextmanager
def locked(comparison: Comparison) -> Iterator[None]:
    """Lock the comparison. Raises RecipeError if another process is working on it."""
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
    """Make the missing runs, then report the results of all; 1 if some failed."""
    runs = [run for comparison in comparisons for run in comparison.runs]
    for cache in dict.fromkeys(run.recipe.cache for run in runs if run.recipe.cache):
        print(f"what frozen models say of images is kept in {visible(cache)} for all variants; it may be deleted")
    failed = make(runs, jobs, lambda run: ["hf_cdl", "train", *run.arguments], PlannedRun.results)
    for comparison in comparisons:
        measured = collect(comparison, PlannedRun.results, comparison.spec.split)
        if measured:
            print(f"\n{visible(comparison.name)}\n\n{save_report(comparison, measured, comparison.root)}", flush=True)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed:")
        print("\n".join(f"  {visible(run.folder)}: {visible(why)}" for run, why in failed))
    return 1 if failed else 0


def test(comparisons: dict[Path, Comparison], jobs: int | None) -> int:
    """Measure finished comparisons, by spec file, on the test images, once each. Raises RunError if that fails."""
    for file, comparison in comparisons.items():
        results_of = functools.partial(measured_on_test, comparison)
        with reading(comparison, comparison.root.with_name("test_split.json")) as reads:
            runs = [dataclasses.replace(run, teacher_from=None) for run in comparison.runs]  # any order is fine
            failed = make(runs, jobs, functools.partial(test_command, file), results_of)
            if failed:
                raise RunError(
                    f"{len(failed)} of {len(runs)} runs of {comparison.name} could not be measured, as "
                    f"{failed[0][0].folder}: {failed[0][1]}. The same command makes the runs that are missing."
                )
            measured = collect(comparison, results_of, "test")
            text = save_report(comparison, measured, comparison.root / "test", reads)
            read = "\n".join(f"- {visible(line)}" for line in reads)
            print(f"\n{visible(comparison.name)}: these test images were read\n{read}")
            print(f"\n{text}", flush=True)
    return 0


def test_command(file: Path, run: PlannedRun) -> list[str]:
    """The command that measures a run: a module and its arguments."""
    return ["hf_cdl.compare.test_split", str(file), run.variant, run.folder.name]
