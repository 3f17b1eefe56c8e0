"""Plugins: the user's own Python files, named by a recipe and run before it is checked."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from zlib import crc32

from hf_cdl.escape import visible
from hf_cdl.recipe.files import RecipeError

_CONTENT = "__hf_cdl_content__"
"""Where a plugin's module keeps the bytes of the file that was run."""


def load_plugins(files: Any) -> None:
    """Run Python files that the user named, never those that a stranger's recipe names: once, and again once edited.

    They register methods (`PROMPTS.register` and the like) and models (with transformers' Auto classes). Raises
    RecipeError if `files` is not a list of paths, and for a file that is missing, fails or ends the process.
    """
    if not isinstance(files, list | tuple) or not all(isinstance(file, str | Path) for file in files):
        raise RecipeError(
            f"'plugins' is {visible(repr(files))[:200]}, but takes a list of Python files; nothing was run. Write it "
            "in brackets, also for one: --plugins '[FILE.py]', or plugins: [FILE.py] in a recipe."
        )
    for file in map(Path, files):
        name = f"hf_cdl_plugins.of_{crc32(bytes(file.resolve())):08x}.{file.stem}"  # names may repeat between folders
        spec = importlib.util.spec_from_file_location(name, file.resolve())
        content = file.read_bytes() if file.is_file() and os.access(file, os.R_OK) else None
        if content is None or spec is None:
            raise RecipeError(
                f"'plugins' names '{file}', which is not a Python file that can be read (seen from {Path.cwd()}). "
                "Give the path of one."
            )
        if getattr(sys.modules.get(name), _CONTENT, None) == content:
            continue
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # transformers looks up its source there
        setattr(module, _CONTENT, content)
        try:  # not by its loader, whose cache may hold an earlier content
            exec(compile(content, str(file.resolve()), "exec", dont_inherit=True), vars(module))
        except BaseException as error:
            sys.modules.pop(name, None)  # so that it runs again when it is named again
            if isinstance(error, KeyboardInterrupt):
                raise
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file.resolve())]
            lines += [error.lineno] if isinstance(error, SyntaxError) else []
            where = f" at line {lines[-1]}" if lines else ""
            text = " ".join(str(error).split())[:200]
            raise RecipeError(
                f"The plugin '{file}' failed{where}: {type(error).__name__}: {text}. Fix it, or leave it out of "
                "'plugins'."
            ) from error
