"""hf-cdl compare --test: measure a finished comparison's stored checkpoints on the test images, once.

python -m hf_cdl.compare.test_split SPEC VARIANT UNIT measures one run; the comparison starts it for each run.

Choices were made on validation images; looking at test images repeatedly would mean choosing on them. So a ledger
records each reading before it happens: when, by whom, for which comparison and recipes. A comparison that has been
read is refused, even if runs were added to it; an interrupted one resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging as hf_logging

from hf_cdl.commands.verify import measure_again
from hf_cdl.compare.spec import Comparison, PlannedRun, read_comparison
from hf_cdl.counted import counted
from hf_cdl.data import ImageError, TaskStream
from hf_cdl.escape import visible_lines
from hf_cdl.recipe import RecipeError
from hf_cdl.recipe.build import build_processors
from hf_cdl.runs.files import RunError, write_json
from hf_cdl.runs.metrics import continual_metrics


@contextlib.contextmanager
def reading(comparison: Comparison, ledger: Path) -> Iterator[list[str]]:
    """Record in the ledger that the test images are read, and on exit that it is done; yields all readings of them.

    Raises RecipeError if runs are missing, if they measured on test images themselves, or if those were read before.
    """
    missing = [run.folder for run in comparison.runs if run.results() is None]
    if comparison.spec.split == "test":
        raise RecipeError(f"{comparison.name} has split: test: its own report is on test images. Leave out --test.")
    if missing:
        raise RecipeError(
            f"{len(missing)} of {len(comparison.runs)} runs of {comparison.name} are not finished, as {missing[0]}. "
            "Run the comparison without --test first; the test images were not touched."
        )
    with FileLock(ledger.with_name(f".{ledger.name}.lock")):
        entries = json.loads(ledger.read_text()) if ledger.exists() else []
        images, recipes = _fingerprints(comparison), sorted({run.recipe_hash for run in comparison.runs})
        ours = [entry for entry in entries if entry["comparison"] == comparison.name]
        if ours and (ours[0]["finished"] or ours[0]["recipes"] != recipes):
            new = len({*recipes} - {*ours[0]["recipes"]})
            added = f" {new} of its {counted(len(recipes), 'recipe')} were not among them." if new else ""
            raise RecipeError(
                f"The test images were read for {comparison.name} before: {_described(ours[0])}.{added} They are read "
                f"once; what they gave is in {comparison.root / 'test'}. Nothing was read or written now."
            )
        if not ours:
            who = {"user": _user(), "host": platform.node()}
            entry = {"comparison": comparison.name, **who, "started": _now(), "finished": None}
            ours = [{**entry, "test_images": images, "recipes": recipes}]
            entries += ours
            write_json(ledger, entries)
        others = [entry for entry in entries if entry not in ours and {*entry["test_images"]} & {*images}]
        yield [
            *map(_described, others),
            f"{ours[0]['started']}, by {ours[0]['user']} on {ours[0]['host']}, for this report",
        ]
        ours[0]["finished"] = _now()
        write_json(ledger, entries)


def measured_on_test(comparison: Comparison, run: PlannedRun) -> dict[str, Any] | None:
    """A run's results with all measurements repeated on the test images; None if they are missing."""
    return run.read(_file(comparison, run))


def _file(comparison: Comparison, run: PlannedRun) -> Path:
    return comparison.root / "test" / run.variant / f"{run.folder.name}.json"


def measure_on_test(comparison: Comparison, run: PlannedRun) -> None:
    """Measure a finished run on the test images and store its results."""
    roles: dict[str, list[Any]] = {}
    chosen = comparison.spec.variants[run.variant].rows
    for _, _, result in measure_again(run.folder, run.recipe, "test", *chosen, others=True):
        roles.setdefault(result.role, []).append(result)
    results: Any = run.results()
    for role, found in roles.items():
        matrix, counts = [result.row for result in found], found[-1].counts
        lists = ("within_task", "task_identification", "confidence", "calibration_error", "class_accuracy", "known")
        results["roles"][role] |= {
            "accuracy_matrix": matrix,
            "correct": [result.correct for result in found],
            "counts": counts,
            "metrics": continual_metrics(matrix, counts),
            **{name: [getattr(result, name) for result in found] for name in lists},
        }
    write_json(_file(comparison, run), results)


def _fingerprints(comparison: Comparison) -> list[str]:
    """Fingerprints (16 hex digits) of the test images: of their classes and sizes, not their order or folder.

    There are several if the runs have different classes.
    """
    found = set()
    for recipe in {repr(run.recipe.data): run.recipe for run in comparison.runs}.values():
        images = []
        for task in TaskStream(recipe.data.labelled, build_processors(recipe)):
            split: Any = task.test
            sizes = split.cells.sizes(split.data)[split.rows].tolist()
            images += [
                f"{task.class_names[x - task.first_class]} {s}" for x, s in zip(split.labels, sizes, strict=True)
            ]
        found.add(hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest()[:16])
    return sorted(found)


def _described(entry: dict[str, Any]) -> str:
    end = f"to {entry['finished']}" if entry["finished"] else "not finished"
    return f"{entry['started']} {end}, by {entry['user']} on {entry['host']}, for the comparison {entry['comparison']}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def main(arguments: list[str]) -> int:
    """Measure the run that the arguments name; 2 if that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_cdl.compare.test_split",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("spec", type=Path)
    parser.add_argument("variant")
    parser.add_argument("unit", help="name of the run's folder")
    options = parser.parse_args(arguments)
    try:
        whole = read_comparison(options.spec)
        runs = {(run.variant, run.folder.name): run for run in whole.runs}
        if (chosen := runs.get((options.variant, options.unit))) is None:
            known = ", ".join(map(" ".join, runs))
            raise RecipeError(f"{options.spec} has no run '{options.variant} {options.unit}'; it has {known[:300]}.")
        if chosen.results() is None:
            raise RecipeError(f"{chosen.folder} is not finished. Run the comparison without --test first.")
        measure_on_test(whole, chosen)
    except (ValueError, RunError, ImageError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
