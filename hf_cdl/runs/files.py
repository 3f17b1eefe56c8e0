"""Atomic, durable writing of a run's files: a kill, full disk or power cut leaves the complete old or new file.

Content is synced to disk before a file gets its name, and so are names: every rename also syncs the folder.
`fingerprint` and `damage` detect later whether a file is still what was written.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import marshal
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

from hf_cdl.counted import counted
from hf_cdl.escape import visible

LARGEST = 64 * 2**20
"""Size limit, in bytes, for JSON files that are read."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
"""A model's weights: one file, or several with an index."""
CHECKPOINT = re.compile(
    rf"config\.json|preprocessor_config\.json|{WEIGHTS.pattern}"
    r"|adapter/adapter_config\.json|adapter/adapter_model\.safetensors"
)
"""The files of a checkpoint, none of which contains code or pickles."""
_DEEPEST_LINES = 3
PACKAGES = ("hf-cdl", "torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "huggingface-hub")


class RunError(RuntimeError):
    """A run's folder cannot be used as asked; the message says why and what to do."""


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn any error while writing (such as a full disk) into a RunError that says what to do."""
    try:
        yield
    except (RunError, Timeout):
        raise
    except Exception as error:  # torch, safetensors and transformers raise many types
        raise RunError(
            f"Could not {what}: {first_line(error)}. Everything stored before is whole. Make room or fix the "
            "folder, then run the same command again."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- writing ----


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file with `write(path)`; it appears under its name only once complete."""
    with saving(f"write {file}"):
        make_folder(file.parent)
        make_way(file)
        partial = file.with_name(f".{file.name}.partial")
        try:
            partial.unlink(missing_ok=True)  # left by a kill; as a link, it would be written through
            write(partial)
            sync(partial)
            replace(partial, file)
        except OSError:
            with suppress(OSError):  # a partial file would waste space on a full disk
                partial.unlink()
            raise


def write_json(file: Path, content: Any, known: dict[bytes, str] | None = None) -> None:
    """Write a JSON file atomically; `known`: lines of it that were written before, for one that grows."""
    write_whole(file, lambda path: path.write_text(lines(content, {} if known is None else known)))


def lines(content: Any, known: dict[bytes, str], depth: int = 0) -> str:
    """JSON with a line for each entry of a container that holds others, down to the entries of a role.

    `json.dumps` with an indent does not use its encoder in C. Lines that are in `known`, by their content, are not
    encoded again: most of a ledger is what was measured after earlier tasks.
    """
    parts = [*content.values()] if isinstance(content, dict) else content
    if depth == _DEEPEST_LINES or not isinstance(content, dict | list) or not _holds_containers(parts):
        try:
            key = marshal.dumps(content, 2)  # version 2: equal bytes for equal content, however it is held in memory
        except ValueError:  # a subclass, such as NumPy's float64
            return json.dumps(content)
        return known.get(key) or known.setdefault(key, json.dumps(content))
    names = [f"{json.dumps(name)}: " for name in content] if isinstance(content, dict) else [""] * len(parts)
    each = [name + lines(part, known, depth + 1) for name, part in zip(names, parts, strict=True)]
    first, last = "{}" if isinstance(content, dict) else "[]"
    return f"{first}\n" + ",\n".join(f"{' ' * (depth + 1)}{one}" for one in each) + f"\n{' ' * depth}{last}"


def _holds_containers(parts: Any) -> bool:
    return any(isinstance(part, dict | list) for part in parts)


PARTIAL = ".partial"
"""Subfolder that holds a new folder's files until all of them are complete."""


def check_new(folder: Path, way: str = "choose another folder") -> None:
    """Raise RunError, with a way out, for a folder that is not empty, or a file in its place."""
    with saving(f"write into {folder}"):  # fails for a name that is too long, for example
        taken = folder.exists() and (not folder.is_dir() or any(path.name != PARTIAL for path in folder.iterdir()))
    if taken:
        raise RunError(f"{folder} is not empty; {way}.")


def fill_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Fill a new or empty folder with files by `write(path)`; they appear only once all are complete.

    Raises RunError if the folder is not empty or writing fails; then nothing is left behind.
    """
    check_new(folder)
    made: list[Path] = []
    partial = folder / PARTIAL
    try:
        with saving(f"write into {folder}"):
            made = make_folder(folder)
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
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
            with suppress(OSError):  # keep a folder that is not empty
                path.rmdir()
        raise


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file atomically, with its modification time, so that a fingerprint of one file fits the other too."""
    write_whole(target, lambda path: _copy(source, path))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    found = source.stat()
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def link(source: Path, target: Path) -> None:
    """Give a file a second name, replacing what has it; a copy with its modification time where that cannot be."""
    target.unlink(missing_ok=True)
    try:
        if source.is_symlink():
            return _copy(source, target)
        os.link(source, target)
    except OSError:  # a file system without links, or with too many of this file
        _copy(source, target)


def put_folder(target: Path, write: Callable[[Path], Any]) -> None:
    """Create a folder filled by `write(folder)`, which appears only once it is complete, replacing a former one."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        write(partial)
        sync_tree(partial)
        shutil.rmtree(target, ignore_errors=True)  # left by a kill before the ledger was updated
        replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace(source: Path, target: Path) -> None:
    """os.replace for a file or folder already synced to disk; the new name is synced too."""
    os.replace(source, target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def make_way(file: Path) -> None:
    """Remove an empty folder in a file's place; one that is not empty may be the user's, and is an error."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and missing parents and sync their names to disk; returns the new ones, innermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)
    return new


def sync(path: Path) -> None:
    """Sync a file's content, or the names in a folder, to disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # Windows cannot open folders, and syncs their names by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot sync folders
        if not is_folder or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything below it to disk, before it gets its final name.

    A file with another name is one that `link` shares: it was synced under that, and only the new name is new.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() or path.stat().st_nlink == 1:
            sync(path)
    sync(folder)


# ---- detecting whether a file is what was written ----


def fingerprint(file: Path) -> list[Any]:
    """Fingerprint of a file: [size in bytes, modification time in ns, SHA-256 of the content]."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, content_hash(file)]


def fingerprints(folder: Path, root: Path) -> dict[str, list[Any]]:
    """Fingerprints of every file in a folder and below, by path relative to `root`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): fingerprint(path) for path in files}


def damage(file: Path, known: Sequence[Any], thorough: bool = True) -> str | None:
    """Describe why a file does not match a fingerprint; None if it does.

    Unless `thorough`, the content is trusted if size and modification time match: it is read only if the time differs.
    """
    size, time, digest = known
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is not a file"
        if found.st_size != size:
            return f"has {counted(found.st_size, 'byte')} instead of {size:,}"
        if (thorough or found.st_mtime_ns != time) and content_hash(file) != digest:
            return "has another content than was written"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@functools.cache  # it parses a file, for every state that is stored
def _version(package: str) -> str:
    return version(package)


# ---- reading ----


def read_json(file: Path) -> Any:
    """Read a JSON file. Raises RunError for anything else."""
    try:
        check_readable(file)
        return read_numbers(file.read_bytes())
    except OSError as error:
        raise RunError(f"{visible(file)} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or a number with thousands of digits
        reason = "it is nested too deep" if isinstance(error, RecursionError) else visible(error)[:200]
        raise RunError(
            f"{visible(file)} is cut short, or was not written by hf_cdl: {reason}. Get it again."
        ) from error


def read_numbers(text: str | bytes) -> Any:
    """Parse a JSON text. Raises ValueError for anything else, and for integers of more than 64 bits."""

    def whole(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"it has a whole number of {counted(len(digits), 'digit')}; allowed are those of 64 bits")
        return int(digits)

    return json.loads(text, parse_int=whole)


def check_readable(file: Path) -> None:
    """Raise RunError for a pipe or device, which might never end, and for a file of more than LARGEST bytes."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{visible(file)} is not a regular file, so it was not read. Put the file itself there.")
    if found.st_size > LARGEST:
        raise RunError(
            f"{visible(file)} has {counted(found.st_size, 'byte')}; hf_cdl's files of results have less than "
            f"{LARGEST:,}."
        )
