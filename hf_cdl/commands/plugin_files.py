"""Plugins named on the command line, for commands that read a run: no others are executed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_cdl.escape import visible
from hf_cdl.recipe import load_plugins
from hf_cdl.runs.ledger import plugin_hashes
from hf_cdl.runs.results import stored_ledger


def load_named(folder: Path, plugins: Sequence[str]) -> None:
    """Run plugins named by the user, and say how they differ from those of the run.

    Raises RecipeError for a plugin that fails, and RunError if the folder holds no run.
    """
    load_plugins(plugins)
    say_differences(folder, plugins)


def say_differences(folder: Path, plugins: Sequence[str]) -> None:
    """Say which plugins of the run's recipe are not among those named, or were edited since the run.

    Raises RunError if the folder holds no run.
    """
    ledger = stored_ledger(folder)
    listed, stored = ledger["recipe"].get("plugins"), ledger.get("plugins", {})
    named = [Path(file).name for file in plugins]
    if unread := [str(file) for file in listed or [] if Path(str(file)).name not in named]:
        print(
            f"The run's recipe has plugins that are not run here: {visible(', '.join(unread))[:300]}. If its models "
            f"need them, read them and name them: --plugins {visible(' '.join(unread))[:300]}",
            file=sys.stderr,
        )
    for file, now in plugin_hashes(plugins).items():
        known = [content for path, content in stored.items() if Path(path).name == Path(file).name]
        if known and now not in known:
            print(
                f"The plugin {visible(file)} was edited since the run was trained, so its models may answer "
                "differently. Name the old file to compare like with like.",
                file=sys.stderr,
            )
