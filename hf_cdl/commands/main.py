"""hf-cdl VERB ...: one command for each thing to do with a recipe, its run and the student.

Nothing slow is imported here: a command reacts to Ctrl-C, shows its help and rejects wrong arguments before
transformers and torch are imported.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

import hf_cdl
from hf_cdl.commands import stopping
from hf_cdl.commands.parsers import VERBS, main_parser, read
from hf_cdl.escape import visible


def main() -> NoReturn:
    """Run the command given on the command line."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in VERBS:
        start(arguments[0], arguments[1:])
    main_parser(hf_cdl.__version__).parse_args(arguments)
    raise AssertionError("help, the version, or a wrong verb end the process")


def start(verb: str, words: Sequence[str], **more: Any) -> NoReturn:
    """Run a verb with its arguments and end the process; `more`: further keyword arguments of its `main`."""
    stopping.listen(resumes=VERBS[verb].resumes)
    read(verb, words)
    hf_cdl.register()
    command = import_module(f"hf_cdl.commands.{verb}")
    if VERBS[verb].quiet:
        import_module("hf_cdl.commands.console").quiet()
    stopping.end_with(lambda: _without_exit(lambda: command.main([*words], **more)))


def _without_exit(run: Callable[[], int]) -> int:
    """Run a command that returns its exit code. Code of a plugin or package that ends the process is an error."""
    try:
        return run()
    except SystemExit as end:
        place = traceback.extract_tb(end.__traceback__)[-1]
        where = visible(f"{place.filename}, line {place.lineno} ({place.line})")
        print(
            f"error: {where} ended the process before the command was done. Make it raise an error in place of that.",
            file=sys.stderr,
        )
        return 2
