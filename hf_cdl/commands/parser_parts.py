"""Parts that the parsers of the commands share."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path


def verb_parser(verb: str, usage: str, about: str | None, example: str) -> argparse.ArgumentParser:
    """The parser of a verb; `about`: what it does, the docstring of the function that makes it."""
    return argparse.ArgumentParser(
        prog=f"hf-cdl {verb}",
        usage=f"hf-cdl {verb} {usage}",
        description=inspect.cleandoc(about or ""),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def student(parser: argparse.ArgumentParser) -> None:
    """Add STUDENT."""
    text = "a run's folder (runs/quickstart), a checkpoint's (its student/task-03), or OWNER/NAME on the Hub"
    parser.add_argument("student", metavar="STUDENT", help=text)


def plugins(parser: argparse.ArgumentParser) -> None:
    """Add --plugins: Python files with methods that a run's recipe uses. No other files are run."""
    text = "your Python files with methods that the run's recipe uses; no other file is run (default: none)"
    parser.add_argument("--plugins", nargs="+", default=[], metavar="FILE", help=text)


def path(text: str) -> Path:
    """Parse a path; an empty one, which would be the current folder, raises an error."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, but takes a file or a folder (for this one: .)")
    return Path(text)


def true_or_false(text: str) -> bool:
    """Parse a boolean as a recipe does; anything else raises an error that says so."""
    import yaml

    try:
        if isinstance(value := yaml.safe_load(text), bool):
            return value
    except yaml.YAMLError:
        pass
    raise argparse.ArgumentTypeError(f"it is {text!r}, but takes true or false")
