"""hf-cdl demo: the page of a Space, run locally, with examples from the run's own images.

The folder space/ is pushed unchanged as a Space, where hf_cdl may be missing; so its files do not need the package.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_cdl.commands.console import exit_code_of, say
from hf_cdl.commands.parsers import read
from hf_cdl.commands.plugin_files import say_differences
from hf_cdl.commands.run_images import images_of_run
from hf_cdl.recipe import load_plugins
from hf_cdl.runs.files import RunError
from hf_cdl.runs.ledger import CHANGED

SPACE = Path(__file__).with_name("space")
_EXAMPLES = 6


def main(arguments: list[str]) -> int:
    """Show the page until it is stopped; 2 if there is nothing to show."""
    return exit_code_of(lambda: demo(read("demo", arguments)[0]))


def demo(options: argparse.Namespace) -> int:
    load_plugins(options.plugins)
    place = Path(options.where).resolve()
    run = next((folder for folder in (place, place.parent) if (folder / "run.json").is_file()), None)
    own = None if run is None else partial(examples, run, role=CHANGED if run == place else place.name)
    sys.path.insert(0, str(SPACE))  # app.py imports its neighbours, as in a Space
    show = import_module("app").show
    code = show(options.where, options.trust_remote_code, options.reject, options.compare, own)
    if code and run is not None:
        with contextlib.suppress(RunError):  # the reason has been printed
            say_differences(run, options.plugins)
    return code


def examples(run: Path, class_names: Sequence[str], role: str = CHANGED) -> list[Any]:
    """A few of the run's own images of these classes of a role; none, with a note, if they cannot be read."""
    try:
        found = images_of_run(run, class_names, _EXAMPLES, role)
        return [] if found is None else [found.decode(index) for index in range(len(found.labels))]
    except (OSError, ValueError, RunError) as error:
        say(f"note: no example images of the run: {error}")
        return []
