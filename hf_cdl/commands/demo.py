"""hf-cdl demo: the page of a Space, run locally.

The folder space/ is pushed unchanged as a Space, where hf_cdl may be missing; so its files do not need the package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from hf_cdl.commands.parsers import read

SPACE = Path(__file__).with_name("space")


def main(arguments: list[str]) -> int:
    """Show the page until it is stopped; 2 if there is nothing to show."""
    options, _ = read("demo", arguments)
    sys.path.insert(0, str(SPACE))  # app.py imports its neighbours, as in a Space
    return import_module("app").show(options.where, options.trust_remote_code)
