"""hf-cdl card: write the model cards of a run, each with its picture."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_cdl.commands.console import exit_code_of
from hf_cdl.commands.parsers import read
from hf_cdl.commands.plugin_files import load_named
from hf_cdl.escape import visible
from hf_cdl.hub.card import card_files, shared
from hf_cdl.recipe import described
from hf_cdl.runs.files import RunError, write_whole
from hf_cdl.runs.page import RESULTS, save_page
from hf_cdl.runs.results import run_results


def main(arguments: list[str]) -> int:
    return exit_code_of(lambda: card(read("card", arguments)[0]))


def card(options: argparse.Namespace) -> None:
    """Write the cards. Raises RunError if the folder holds no run, or the name is none."""
    output = options.output or options.run
    check_name(options.repo_id)
    load_named(options.run, options.plugins)
    results = run_results(options.run, described)
    names = {"student": options.repo_id, "teacher": options.repo_id and f"{options.repo_id}-teacher"}
    for role in [role for role in names if role in results["roles"]]:
        other = names["teacher" if role == "student" else "student"]
        for name, content in made(results, role, names[role], other).items():
            put(output / role / name, content)
    if options.output is not None:
        put(output / RESULTS, f"{json.dumps(shared(results), indent=1)}\n".encode())
    else:
        save_page(results, output)
    print(f"Wrote the cards to {visible(output)}/")


def check_name(name: str | None) -> None:
    """Raise RunError unless the student and its teacher can have a repository of this name."""
    try:
        if name is not None:
            validate_repo_id(name)
            validate_repo_id(f"{name}-teacher")
    except HFValidationError as error:
        raise RunError(f"--repo_id cannot name a repository on the Hub: {error} Give OWNER/NAME.") from error


def made(results: dict[str, Any], role: str, name: str | None, other: str | None) -> dict[str, bytes]:
    """The files of a role's card. The picture is drawn in the folder for temporary files."""
    try:
        return card_files(results, role, name, other)
    except OSError as error:
        raise RunError(
            f"Could not draw the picture of the {role} in {tempfile.gettempdir()}: {error}. Make room there, or set "
            "TMPDIR to another folder; then run the same command again."
        ) from error


def put(file: Path, content: bytes) -> None:
    """Write a file. Raises RunError if a link is in its place, because it would lead somewhere else."""
    for path in (file.parent, file):
        if path.is_symlink():
            raise RunError(f"{visible(path)} is a link; nothing was written through it. Name another --output FOLDER.")
    write_whole(file, lambda path: path.write_bytes(content))
