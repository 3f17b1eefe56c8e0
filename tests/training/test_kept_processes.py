"""One cache of processes that train together: they learn what they would without it, and find what was kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import train, write_recipe
from test_sharding import TWO, assert_same, recipe_of

HALVES = ("--train.per_device_train_batch_size", 4)
RIDGE = {"type": "ridge", "standardise": "first_task", "strength": 1.0}


def run(file: Path, folder: Path, *options: Any, port: int | None = None) -> str:
    """Train a recipe into a folder, with a port in two processes; returns what it said."""
    launcher = () if port is None else (*TWO, str(port))
    code, output = train(file, "--output_dir", folder, *options, launcher=launcher)
    assert code == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("port", "fields"),
    [
        (29561, {}),  # queries and teacher's answers
        (29563, {"teacher": None, "distill": [], "ce_weight": 1.0}),  # features of a fitted head
    ],
    ids=["taught", "fitted"],
)
def test_two_processes_with_a_cache_learn_what_one_does_without(
    port: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, **fields)
    if fields:
        recipe["student"] = {"backbone": recipe["student"]["backbone"], "head": RIDGE}
    file, cache = write_recipe(tmp_path / "recipe.yaml", recipe), ("--cache", tmp_path / "cache")
    run(file, tmp_path / "one")
    run(file, tmp_path / "one-kept", *cache)
    run(file, tmp_path / "two", *HALVES, port=port)
    filled = run(file, tmp_path / "two-kept", *HALVES, *cache, port=port + 1)
    again = run(file, tmp_path / "two-again", *HALVES, *cache, port=port + 2)
    roles = ("student",) if fields else ("teacher", "student")
    assert_same(tmp_path / "one", tmp_path / "one-kept", exact=True, roles=roles)
    assert_same(tmp_path / "one", tmp_path / "two", roles=roles)
    for kept in ("two-kept", "two-again"):
        assert_same(tmp_path / "two", tmp_path / kept, exact=True, roles=roles)
    use = [re.search(r"cache: ([\d.,]+) MiB read from .*?, ([\d.,]+) MiB written", text) for text in (filled, again)]
    assert all(use), (filled, again)
    assert float(use[1][2]) == 0 < min(float(use[0][2]), float(use[1][1])), "all was written once, and found again"  # type: ignore[index]
    assert not [*(tmp_path / "cache").rglob("*.partial")] and not [*(tmp_path / "cache").rglob("*.damaged")]
