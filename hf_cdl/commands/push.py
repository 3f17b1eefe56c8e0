"""hf-cdl push: push what a run has finished and the Hugging Face Hub does not have yet."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from hf_cdl.commands import stopping
from hf_cdl.commands.parsers import read
from hf_cdl.commands.plugin_files import load_named
from hf_cdl.escape import visible_lines
from hf_cdl.hub import HubError, Pusher
from hf_cdl.recipe import build_recipe, described, untrained
from hf_cdl.runs.changes import ChangingRun
from hf_cdl.runs.files import RunError
from hf_cdl.runs.repair import examine
from hf_cdl.runs.results import run_results, stored_ledger

HUB_FIELDS = ("hub_model_id", "push_teacher", "hub_private_repo")


def main(arguments: list[str]) -> int:
    given = vars(read("push", arguments)[0])
    folder, plugins = given.pop("run"), given.pop("plugins")
    try:
        load_named(folder, plugins)
        ledger = stored_ledger(folder)
        asked = {**(ledger.get("hub") or {}), **{name: value for name, value in given.items() if value is not None}}
        if not asked:
            raise RunError(f"The recipe of {folder} did not say where to push it; give --hub_model_id NAME.")
        recipe = build_recipe({**untrained(ledger["recipe"]), **asked, "push_to_hub": True})
        check_files(folder, ledger)
        results = run_results(folder, described)
        if not results["roles"].keys() >= recipe.repositories.keys():
            raise RunError(f"{folder} has not finished a task yet: there is nothing to push. Go on with its training.")
        rest = {"patience": None, "origin": results.get("origin"), "later": stopping.own_command()}
        pusher = Pusher(folder, recipe.repositories, recipe.hub_private_repo, **rest)
        pusher.check(results)
        if not pusher.finish(results):
            return 4
        remember(folder, {name: getattr(recipe, name) for name in HUB_FIELDS})
        return 0
    except (OSError, ValueError, RunError, HubError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2


def remember(folder: Path, hub: dict[str, Any]) -> None:
    """Note in a finished run where it was pushed to, so that changes of its student are pushed there, too."""
    with contextlib.suppress(RunError):  # not finished, or in use: it is pushed, and that was printed
        if stored_ledger(folder).get("hub") != hub:
            run = ChangingRun(folder, lambda line: None)
            with run.changing():
                run.set_hub(hub)


def check_files(folder: Path, ledger: dict[str, Any]) -> None:
    """Check the run's checkpoints. Raises RunError if one is missing or differs from what was stored."""
    restorable = [target for _, target in examine(folder, ledger).copies]
    if broken := [target for target in restorable if target.relative_to(folder).parts[1].startswith("task-")]:
        raise RunError(
            f"{broken[0]} is missing or damaged, so nothing was pushed. There is a whole copy: run the "
            "training's command again, which restores it, and push then."
        )
