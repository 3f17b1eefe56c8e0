"""Writing a run's files so that a kill, a full disk or a power cut at any moment leaves old or new ones, whole.

A file is on the disk before its name says so, and so are the names themselves: whatever renames also syncs the folder.
`fingerprint` and `damage` tell later whether a file still is what was written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import Timeout

from hf_cdl.escape import visible

LARGEST = 64 * 2**20
"""Bytes of a JSON file that is read."""
CHECKPOINT = re.compile(
    r"config\.json|preprocessor_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter/adapter_config\.json|adapter/adapter_model\.safetensors"
)
"""The files of a checkpoint, none of which holds code or pickles."""
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
        raise RunError(
            f"Could not {what}: {first_line(error)}. Everything stored before is whole. Make room or fix the "
            "folder, then run the same command again."
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- writing ----


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Have `write(path)` make a file that appears under its name only when it is whole."""
    with saving(f"write {file}"):
        make_folder(file.parent)
        make_way(file)
        partial = file.with_name(f".{file.name}.partial")
        try:
            write(partial)
            sync(partial)
            replace(partial, file)
        except OSError:
            with suppress(OSError):  # a half would take what little room a full disk has
                partial.unlink()
            raise


def write_json(file: Path, content: Any) -> None:
    """Write so that the file is either the old one or the new one, whole."""
    write_whole(file, lambda path: path.write_text(json.dumps(content, indent=1)))


PARTIAL = ".partial"
"""Where in a new folder its files lie until all of them are whole."""


def check_new(folder: Path) -> None:
    """Raises RunError for a folder with something in it, or a file in its place."""
    with saving(f"write into {folder}"):  # a name that is too long, say
        taken = folder.exists() and (not folder.is_dir() or any(path.name != PARTIAL for path in folder.iterdir()))
    if taken:
        raise RunError(f"{folder} is not empty; choose another folder.")


def fill_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Have `write(path)` make the files of a folder that is new or empty; they appear in it when all are whole.

    Raises RunError if there is something in it, or if writing fails; then nothing is left of the try.
    """
    check_new(folder)
    made: list[Path] = []
    partial = folder / PARTIAL
    try:
        with saving(f"write into {folder}"):
            made = make_folder(folder)
            shutil.rmtree(partial, ignore_errors=True)  # of a kill
            partial.mkdir()
            write(partial)
            sync_tree(partial)
            for path in sorted(partial.iterdir()):
                os.replace(path, folder / path.name)
            partial.rmdir()
            sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # a folder that holds something else stays
                path.rmdir()
        raise


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that the target is either the old one or the new one, whole; with its time of change, by which a
    fingerprint of the one stands for the other too."""
    write_whole(target, lambda path: _copy(source, path))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    found = source.stat()
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def replace(source: Path, target: Path) -> None:
    """os.replace of a file or folder that is on the disk already, and the new name with it."""
    os.replace(source, target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def make_way(file: Path) -> None:
    """Remove an empty folder in a file's place; a full one is somebody's, and an error."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and what is missing above it, their names on the disk; those that are new, innermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)
    return new


def sync(path: Path) -> None:
    """Have a file's content on the disk, or the names in a folder."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # Windows opens no folders, and has their names on the disk by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems have no such call for a folder
        if not is_folder or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have a folder and everything below it on the disk, before its name says that it is there."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


# ---- telling whether a file is what was written ----


def fingerprint(file: Path) -> list[Any]:
    """[bytes, time of its last change in ns, SHA-256 of its content] of a file."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, _sha256(file)]


def fingerprints(folder: Path, root: Path) -> dict[str, list[Any]]:
    """Of every file in a folder and below, by its path from `root`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): fingerprint(path) for path in files}


def damage(file: Path, known: Sequence[Any], thorough: bool = True) -> str | None:
    """Why a file is not the one with this fingerprint, in words; None if it is.

    Unless `thorough`, size and time of change stand for the content: it is read only if the time is another one.
    """
    size, time, digest = known
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is no file"
        if found.st_size != size:
            return f"has {found.st_size:,} bytes instead of {size:,}"
        if (thorough or found.st_mtime_ns != time) and _sha256(file) != digest:
            return "has another content than was written"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


# ---- reading ----


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises RunError for what is none."""
    try:
        check_readable(file)
        return read_numbers(file.read_bytes())
    except OSError as error:
        raise RunError(f"{visible(file)} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits
        reason = "it is nested too deep" if isinstance(error, RecursionError) else visible(error)[:200]
        raise RunError(
            f"{visible(file)} is cut short, or was not written by hf_cdl: {reason}. Get it again."
        ) from error


def read_numbers(text: str | bytes) -> Any:
    """The content of a JSON text. Raises ValueError for none, and for a whole number of more than 64 bits."""

    def whole(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"it has a whole number of {len(digits)} digits; allowed are those of 64 bits")
        return int(digits)

    return json.loads(text, parse_int=whole)


def check_readable(file: Path) -> None:
    """Raises RunError for a pipe or a device, reading which may never end, and for more than LARGEST bytes."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{visible(file)} is no regular file, so it was not read. Put the file itself there.")
    if found.st_size > LARGEST:
        raise RunError(
            f"{visible(file)} has {found.st_size:,} bytes; hf_cdl's files of results have less than {LARGEST:,}."
        )
