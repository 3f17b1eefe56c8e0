"""hf-cdl VERB ...: what a recipe, its run and the student go through, one command each.

Nothing slow is imported here: a command stops at Ctrl-C, shows its help and refuses wrong words before transformers
and torch are there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import hf_cdl
from hf_cdl.commands import stopping
from hf_cdl.commands.parsers import VERBS, main_parser, read


def main() -> NoReturn:
    """The command of this process's command line."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in VERBS:
        start(arguments[0], arguments[1:])
    main_parser(hf_cdl.__version__).parse_args(arguments)
    raise AssertionError("help, the version, or a wrong verb end the process")


def start(verb: str, words: Sequence[str], **more: Any) -> NoReturn:
    """Do what a verb says, with `more` of what its `main` takes beside words, and end the process."""
    stopping.listen(resumes=VERBS[verb].resumes)
    read(verb, words)
    hf_cdl.register()
    command = import_module(f"hf_cdl.commands.{verb}")
    if VERBS[verb].quiet:
        import_module("hf_cdl.commands.console").quiet()
    stopping.end_with(lambda: command.main([*words], **more))
