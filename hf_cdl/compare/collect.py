"""Collect what the finished runs of a comparison gave, as records: their results and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from hf_cdl.commands.costs import measure, read_tasks
from hf_cdl.compare.records import Measured
from hf_cdl.compare.spec import Comparison, PlannedRun
from hf_cdl.escape import visible
from hf_cdl.runs.files import RunError, read_json, write_json


def collect(
    comparison: Comparison, results_of: Callable[[PlannedRun], dict[str, Any] | None], split: str
) -> list[Measured]:
    """Collect the results of the finished runs: row by row as in the spec, unit by unit."""
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
    """Variant -> role -> multiply-adds of its first run, counted as by `--plan`; cached in flops.json."""
    file = comparison.root / "flops.json"
    known = read_flops(file)
    found = {}
    for name in comparison.spec.variants:
        first = next(run for run in comparison.runs if run.variant == name)
        if not known.get(first.recipe_hash) and first.results() is not None:
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
    """Read flops.json; if it is damaged, print so and return nothing: all of it can be counted again."""
    if not file.exists():
        return {}
    try:
        return TypeAdapter(dict[str, dict[str, dict[str, FiniteFloat]]]).validate_python(read_json(file), strict=True)
    except (ValidationError, RunError):
        print(f"{file} is damaged; its FLOPs are counted again.")
        return {}
