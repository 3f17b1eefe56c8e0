"""Writing a run's files so that a kill or a full disk at any moment leaves the old ones or the new ones, whole."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import Timeout

PACKAGES = ("hf-cdl", "torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "huggingface-hub")


class RunError(RuntimeError):
    """A run's folder cannot be used as asked; the message says why and what to do."""


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn whatever goes wrong while writing (a full disk, say) into a RunError that says what to do."""
    try:
        yield
    except (RunError, Timeout):
        raise
    except Exception as error:  # torch, safetensors and transformers raise many kinds
        reason = str(error).strip().split("\n")[0]
        raise RunError(
            f"Could not {what}: {reason}. Everything stored before is whole. Make room or fix the folder, then run "
            "the same command again."
        ) from error


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Have `write(path)` make a file that appears under its name only when it is whole."""
    with saving(f"write {file}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        write(partial)
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, file)


def write_json(file: Path, content: Any) -> None:
    """Write so that the file is either the old one or the new one, whole."""
    write_whole(file, lambda path: path.write_text(json.dumps(content, indent=1)))


def sync(folder: Path) -> None:
    """Have the files of a folder on the disk before its name says that they are."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
