"""hf-cdl train --example NAME: write one of the package's recipes into the current folder as a starting point."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hf_cdl.commands import stopping
from hf_cdl.recipe import RecipeError
from hf_cdl.runs.files import RunError, write_whole

_FOLDER = files("hf_cdl.commands") / "examples"
NAMES = sorted(Path(file.name).stem for file in _FOLDER.iterdir())
"""Names of the available recipes."""
_NEEDED = {
    "path": "the Hub id of an image data set, or a folder: FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png",
    "backbone": "the Hub id of a vision transformer, such as {size}, or its folder",
}
_SIZES = {"teacher": "google/vit-base-patch16-224", "student": "WinKawaks/vit-small-patch16-224"}


def write_example(words: list[str]) -> str:
    """Write the recipe that `--example NAME` asks for; returns a text that says what it needs and how to start it.

    Raises RecipeError for any other arguments, and RunError if the file already exists or cannot be written.
    """
    parts = [part for word in words for part in word.split("=", 1)]
    name = parts[1] if len(parts) == 2 and parts[0] == "--example" else None
    if name not in NAMES:
        raise RecipeError(f"--example is given alone and with a name; allowed: {', '.join(NAMES)}.")
    file, content = Path(f"{name}.yaml"), (_FOLDER / f"{name}.yaml").read_bytes()
    if file.exists() or file.is_symlink():
        raise RunError(f"{file} is here already, so nothing was written. Move it away, or go to another folder.")
    write_whole(file, lambda path: path.write_bytes(content))
    missing = [*_missing(yaml.safe_load(content))]
    said = [f"Wrote {file}."]
    if missing:
        said.append("It names files of hf_cdl's repository, which are not here. Run it in a clone, or write")
        said.append(f"others into {file}:")
        said += [f"  {field}: {value} -> {what}" for field, value, what in missing]
    else:
        said.append("Its data and backbones are in this folder.")
    said.append(f"Start it: {stopping.command('train', file)}")
    return "\n".join(said)


def _missing(recipe: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Files that a recipe names and this folder lacks: the field, its value, and what to put there instead."""
    for section, content in recipe.items():
        for key, value in content.items() if isinstance(content, dict) else ():
            if isinstance(value, str) and value.startswith("recipes/") and not Path(value).exists():
                what = _NEEDED.get(key, "a file of yours, or leave it out").format(size=_SIZES.get(section, ""))
                yield f"{section}.{key}", value, what
