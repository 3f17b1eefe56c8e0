"""Runs killed at random moments: their result is bit-identical to that of an uninterrupted run.

All hundred kills: python -m pytest -m slow tests/runs/test_kills.py --kills 100
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from helpers import make_backbone, make_recipe, make_table, write_recipe
from test_classifier import write as write_classifiers

from hf_cdl.commands import console, train

pytestmark = pytest.mark.slow

SESSION = {"prompt": {"type": "none"}, "head": {"type": "ridge"}, "first_session": {"type": "linear"}}
L2P = {"type": "l2p", "pool_size": 4, "length": 2, "top_k": 2, "layers": [0, 1]}
ALONE: dict[str, Any] = {"teacher": None, "distill": [], "ce_weight": 1.0}


def several_tasks(folder: Path) -> dict[str, Any]:
    return make_recipe(folder)


def ridge_with_adapters(folder: Path) -> dict[str, Any]:
    recipe = make_recipe(folder, distill=[{"type": "similarity", "weight": 1.0}])
    recipe["teacher"]["prompt"] = {"type": "none"}
    recipe["student"] |= {**SESSION, "lora": {"r": 2}}
    return recipe


def terms_with_layers(folder: Path) -> dict[str, Any]:
    terms = [{"type": "kd"}, {"type": "fitnets"}, {"type": "review_kd"}, {"type": "dual_path", "copy_from": "all"}]
    return make_recipe(folder, distill=terms)


def fine_tuning(folder: Path) -> dict[str, Any]:
    recipe = make_recipe(folder, **ALONE)
    recipe["student"] |= {"prompt": {"type": "none"}, "train_backbone": True}
    recipe["train"]["num_train_epochs"] = 4
    return recipe


def offline_classifiers(folder: Path) -> dict[str, Any]:
    return yaml.safe_load(write_classifiers(folder).read_text())


def stored_within_epochs(folder: Path) -> dict[str, Any]:
    recipe = make_recipe(folder, distill=[{"type": "kd"}, {"type": "os_prompt"}], baselines=[])
    recipe["data"] |= {"classes_per_task": 3, "max_train_per_class": 5}
    recipe["teacher"] |= {"prompt": {"type": "apt"}, "head": {"type": "weight_normalised"}}
    recipe["student"] |= {"prompt": L2P, "query": "one_pass"}
    micro = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    recipe["train"] |= {**micro, "save_strategy": "steps", "save_steps": 2}
    return recipe


def with_unlabelled_images(folder: Path) -> dict[str, Any]:
    recipe = make_recipe(
        folder, distill=[{"type": "kdp", "threshold": 0.6}, {"type": "pseudo_labels", "threshold": 0.6}]
    )
    make_table([0, 1, 2, 3, 4], 6, first=500).to_parquet(str(folder / "more.parquet"))
    (folder / "more").mkdir()
    (folder / "more.parquet").rename(folder / "more" / "train.parquet")
    recipe["data"] |= {"unlabelled": str(folder / "more"), "unlabelled_ratio": 2}
    recipe["train"] |= {"save_strategy": "steps", "save_steps": 1}
    return recipe


def with_views_and_a_cache(folder: Path) -> dict[str, Any]:
    recipe = make_recipe(folder, cache=str(folder / "cache"))
    recipe["data"]["views"] = 1
    recipe["train"] |= {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    return recipe


def in_several_files(folder: Path) -> dict[str, Any]:
    recipe = make_recipe(folder, **ALONE)
    recipe["student"]["backbone"] = str(make_backbone(folder / "large", 128, 8, 3))
    return recipe


RECIPES = [
    several_tasks,
    ridge_with_adapters,
    terms_with_layers,
    fine_tuning,
    offline_classifiers,
    stored_within_epochs,
    with_unlabelled_images,
    in_several_files,
    with_views_and_a_cache,
]


# ---- processes ----


def run_train(words: list[str], log: Path) -> None:
    """Run recipes/train.py in its own process group."""
    os.setsid()
    gc.freeze()  # otherwise every collection scans all imported modules
    multiprocessing.set_start_method("fork", force=True)  # the usual method again, for data loader workers
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    console.quiet()
    sys.exit(train.main(words))


@pytest.fixture(scope="module")
def start(forked: ForkServerContext) -> Callable[[Path, Path], BaseProcess]:
    """Start recipes/train.py with a recipe and a folder; its output goes to FOLDER.log."""

    def begin(recipe: Path, folder: Path) -> BaseProcess:
        words, log = [str(recipe), "--output_dir", str(folder)], folder.with_name(f"{folder.name}.log")
        process = forked.Process(target=run_train, args=(words, log))
        process.start()
        return process

    return begin


def kill(process: BaseProcess) -> None:
    """Kill the process and all that it started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no process group yet, or has ended
        process.kill()
    process.join()


# ---- the files of a run ----

KEPT = ("held_bytes", "found_bytes", "read_bytes", "written_bytes")
MEASURED = ("seconds", "runtime", "per_second", "peak_memory_bytes", *KEPT, "cost", "costs")
"""Ends of the names of what depends on the machine's mood."""


def lasting(content: Any) -> Any:
    """The part that must be the same in every run of a recipe."""
    if isinstance(content, dict):
        return {key: lasting(value) for key, value in content.items() if not key.endswith(MEASURED)}
    return [lasting(value) for value in content] if isinstance(content, list) else content


TIMED = {"seconds", "images/s", "memory", "seconds to train", "peak MiB", "ms a use"}
"""Columns of a report's tables that depend on the machine's mood."""


def cells(page: str) -> list[Any]:
    """A report without its tables, and of each table the columns that are not timed."""
    found: list[Any] = [re.sub(r"<tbody>.*?</tbody>", "", page, flags=re.DOTALL)]
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        headings = re.findall(r"<th>(.*?)</th>", table)
        rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
        found += [
            [value for name, value in zip(headings, row, strict=True) if name.strip() not in TIMED]
            for row in rows
            if row
        ]
    return found


def left(folder: Path) -> dict[str, Any]:
    """Every file of a run: its bytes, or the reproducible part of its JSON.

    Of the loss curves only the steps count: an entry that spans a kill is the mean over the steps after it.
    """
    found: dict[str, Any] = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = lasting(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
        if path.parent.name == "logs":
            found[name] = [line["step"] for line in found[name]]
        elif name == "report.html":
            found[name] = cells(path.read_text())
    files = found["run.json"]["files"]  # with modification times, and files that contain times
    found["run.json"]["files"] = {
        name: None if name.startswith("logs/") or name in ("results.json", "report.html") else sha256
        for name, (_, _, sha256) in files.items()
    }
    return found


class Whole(NamedTuple):
    """An uninterrupted run."""

    recipe: Path
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(
    start: Callable[[Path, Path], BaseProcess], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[Path], dict[str, Any]]], Whole]:
    made: dict[str, Whole] = {}

    def run(make: Callable[[Path], dict[str, Any]]) -> Whole:
        if make.__name__ not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            recipe, began = write_recipe(folder / "recipe.yaml", make(folder)), time.monotonic()
            process = start(recipe, folder / "whole")
            process.join()
            seconds = time.monotonic() - began
            assert process.exitcode == 0, (folder / "whole.log").read_text()
            made[make.__name__] = Whole(recipe, folder / "whole", seconds)
        return made[make.__name__]

    return run


def test_a_kill_at_any_moment_does_not_change_a_run(
    strike: int,
    start: Callable[[Path, Path], BaseProcess],
    undisturbed: Callable[[Callable[[Path], dict[str, Any]]], Whole],
    tmp_path: Path,
) -> None:
    """Killed once, with probability 1/3 once more, and so on; then run to the end."""
    draw, whole, folder = random.Random(strike), undisturbed(RECIPES[strike % len(RECIPES)]), tmp_path / "run"
    moment, kills = draw.random(), 0
    while True:
        process = start(whole.recipe, folder)
        if kills == 0 or draw.random() < 1 / 3:
            process.join(moment * whole.seconds)
            if process.exitcode is None:
                kill(process)
                kills, moment = kills + 1, draw.random()
                continue
        process.join()
        log = folder.with_name("run.log").read_text()
        assert process.exitcode == 0 and "Traceback" not in log, log
        if kills:
            break
        shutil.rmtree(folder)  # the kill came too late: the machine was slower before
        moment *= 0.8
    ours, theirs = left(folder), left(whole.folder)
    assert ours.keys() == theirs.keys(), "no file is missing, none is left over"
    for name in theirs:
        assert ours[name] == theirs[name], name
