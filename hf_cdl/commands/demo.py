"""hf-cdl demo: the page of a Space, run locally.

The folder space/ is pushed unchanged as a Space, where hf_cdl may be missing; so its files do not need the package.
"""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from pathlib import Path

from hf_cdl.commands.parsers import read
from hf_cdl.commands.plugin_files import say_differences
from hf_cdl.escape import visible_lines
from hf_cdl.recipe import RecipeError, load_plugins
from hf_cdl.runs.files import RunError

SPACE = Path(__file__).with_name("space")


def main(arguments: list[str]) -> int:
    """Show the page until it is stopped; 2 if there is nothing to show."""
    options, _ = read("demo", arguments)
    try:
        load_plugins(options.plugins)
    except RecipeError as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(SPACE))  # app.py imports its neighbours, as in a Space
    code = import_module("app").show(options.where, options.trust_remote_code)
    if code and (run := Path(options.where).resolve().parent / "run.json").is_file():
        with contextlib.suppress(RunError):  # what is wrong has been said
            say_differences(run.parent, options.plugins)
    return code
