"""Parts that the parsers of the commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def verb_parser(verb: str, usage: str, about: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"hf-cdl {verb}",
        usage=f"hf-cdl {verb} {usage}",
        description=about,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


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
