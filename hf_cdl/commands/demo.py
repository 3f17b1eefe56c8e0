"""hf-cdl demo: the page of a Space, on this machine.

The folder space/ is pushed as a Space as it is, where hf_cdl may be missing; so its files know nothing of the package.
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
    sys.path.insert(0, str(SPACE))  # as for its app.py in a Space
    return import_module("app").show(options.where, options.trust_remote_code)
