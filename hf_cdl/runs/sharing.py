"""The revisions of a role in a run's folder: each a folder of its own, which shares unchanged files by hard links.

No file of hf_cdl is ever written in place, so a link is as good as a copy. ROLE/ shares nothing with them: it is the
copy that restores a damaged file.
"""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_cdl.runs.files import WEIGHTS, copy_whole, damage, fingerprint, link, put_folder, write_whole
from hf_cdl.runs.ledger import stored_tasks


def put_revision(root: Path, ledger: Mapping[str, Any], role: str, write: Callable[[Path], Any]) -> None:
    """Store the newest revision that the ledger lists of a role, by `write(folder)`, and note its fingerprints there.

    Files that are the same in the previous revision become links to it, whose content is known.
    """
    *earlier, name = stored_tasks(ledger, role)
    folder, before = root / role / name, root / role / earlier[-1] if earlier else None

    def fill(partial: Path) -> None:
        write(partial)
        if before is not None:
            _share(partial, before)

    put_folder(folder, fill)
    files = ledger["files"]
    known = {} if before is None else _by_identity(root, ledger, role, before.name)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(root).as_posix()] = known.get(identity(path)) or fingerprint(path)


def publish(root: Path, ledger: Mapping[str, Any], role: str) -> None:
    """Make ROLE/ a copy of the role's newest revision, replacing each file atomically, weights last.

    Files that ROLE/ already holds as a copy of the previous revision, perhaps under another name, are not copied
    again.
    """
    *earlier, name = stored_tasks(ledger, role)
    now, was = files_of(ledger, role, name), files_of(ledger, role, earlier[-1]) if earlier else {}
    held = {stored[2]: path for path, stored in was.items()}
    place = root / role
    for path in sorted(now, key=weights_last):
        source, content = place / name / path, now[path][2]
        old = path if path in was and was[path][2] == content else held.get(content)
        if old is None or damage(place / old, now[path], thorough=False):
            copy_whole(source, place / path)
        elif old != path:
            write_whole(place / path, lambda partial, old=old: link(place / old, partial))
    for path in left_over(root, ledger, role):
        path.unlink()


def left_over(root: Path, ledger: Mapping[str, Any], role: str) -> list[Path]:
    """Weights in ROLE/ from an earlier revision that the newest does not have; they would be loaded with it."""
    for name in stored_tasks(ledger, role)[-1:]:
        known = files_of(ledger, role, name)
        there = sorted((root / role).glob("model*")) if known else []
        return [path for path in there if WEIGHTS.fullmatch(path.name) and path.name not in known]
    return []


def files_of(ledger: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    """Path in a revision's folder -> fingerprint; empty for one that an older version stored."""
    start = f"{role}/{name}/"
    return {path[len(start) :]: kept for path, kept in ledger.get("files", {}).items() if path.startswith(start)}


def weights_last(path: str) -> tuple[bool, bool, str]:
    """Sort key: config and image processor, then weights, then the index of the weights."""
    return WEIGHTS.fullmatch(path) is not None, not path.endswith(".safetensors"), path


def _share(folder: Path, before: Path) -> None:
    """Replace the files of a folder that are the same in the one before by links."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        old = before / file.relative_to(folder)
        if old.is_file() and not old.is_symlink() and not old.samefile(file):
            if filecmp.cmp(old, file, shallow=False):
                link(old, file)


def identity(file: Path) -> tuple[int, int] | None:
    """Identifies a file that several folders share: its device and inode; None for any other."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_nlink > 1 else None


def _by_identity(root: Path, ledger: Mapping[str, Any], role: str, name: str) -> dict[Any, Any]:
    """Fingerprints of the files of a revision that other folders share."""
    files = {root / role / name / path: stored for path, stored in files_of(ledger, role, name).items()}
    whole = [file for file, stored in files.items() if identity(file) and not damage(file, stored, thorough=False)]
    return {identity(file): files[file] for file in whole}
