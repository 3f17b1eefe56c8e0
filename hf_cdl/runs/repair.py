"""Checking whether a run's stored files are still intact, and restoring them from a copy where possible."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_cdl.runs.files import RunError, copy_whole, damage, fingerprint, first_line, saving
from hf_cdl.runs.ledger import stored_tasks

_REQUIRED = ("config.json", "model.safetensors", "preprocessor_config.json")
"""The files of a checkpoint for which an older version stored no fingerprints."""


@dataclass
class Findings:
    """Result of `examine`.

    `copies`: pairs of an intact file and the one it must replace. `said`: messages on what was found. `lost`: damaged
    paths without a copy, and why.
    """

    copies: list[tuple[Path, Path]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def examine(folder: Path, ledger: Mapping[str, Any]) -> Findings:
    """Examine a run's checkpoints and the other files it needs, without writing anything.

    The newest checkpoint of a role and its copy in ROLE/ can restore each other. Older checkpoints are read only if
    a file's size or modification time changed. Raises RunError, naming what is lost, if a file has no intact copy.
    """
    found, files = Findings(), ledger.get("files", {})
    for role in ledger["entries"]:
        for name in (names := stored_tasks(ledger, role)):
            newest = name == names[-1]
            bad = dict(_broken(folder, ledger, f"{role}/{name}/", newest))
            copies = {path: folder / role / path.split("/", 2)[2] for path in bad}
            if not newest or not all(_is_copy(folder, ledger, path, copy) for path, copy in copies.items()):
                found.lost += [f"{path} {problem}" for path, problem in bad.items()]
                continue
            for path, copy in copies.items():
                found.copies.append((copy, folder / path))
                found.said.append(f"{folder / path} {bad[path]}; it is restored from {copy}.")
            unpublished = dict(_unpublished(folder, ledger, role, {*bad}))
            found.copies += unpublished.values()
            if unpublished:
                listed = ", ".join(unpublished)
                found.said.append(f"{folder / role}/ was not what {name} is ({listed}); it is made so.")
    found.lost += _scaffolds(folder, ledger)
    for path, stored in files.items():
        if path.startswith("logs/") and (problem := damage(folder / path, stored, thorough=False)):
            found.said.append(f"{folder / path} {problem}: this loss curve is lost, nothing else is.")
    if found.lost:
        _refuse(folder, ledger, found.lost)
    return found


def mend(folder: Path, ledger: dict[str, Any], found: Findings) -> None:
    """Restore what can be restored, replacing each file atomically; the ledger gets the new fingerprints."""
    for source, target in found.copies:
        with saving(f"restore {target}"):
            copy_whole(source, target)
        if (path := target.relative_to(folder).as_posix()) in ledger.get("files", {}):
            ledger["files"][path] = fingerprint(target)


def publish(folder: Path, ledger: Mapping[str, Any], role: str) -> None:
    """Make ROLE/ a copy of the role's newest checkpoint, replacing each file atomically, weights last."""
    for _, (source, target) in _unpublished(folder, ledger, role):
        copy_whole(source, target)


def unreadable(file: Path) -> str | None:
    """Why a stored file is damaged, as far as can be seen without a fingerprint; None if it may be intact."""
    try:
        if not file.is_file():
            return "is no file" if file.exists() else "is missing"
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return None
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return f"cannot be read ({first_line(error)})"


def _broken(folder: Path, ledger: Mapping[str, Any], start: str, thorough: bool) -> Iterator[tuple[str, str]]:
    """Yield the paths below `start` that are not as the run stored them, and why."""
    known = {path: stored for path, stored in ledger.get("files", {}).items() if path.startswith(start)}
    for path in known or [start + name for name in _REQUIRED]:
        problem = damage(folder / path, known[path], thorough) if known else unreadable(folder / path)
        if problem:
            yield path, problem


def _is_copy(folder: Path, ledger: Mapping[str, Any], path: str, copy: Path) -> bool:
    """Whether a file in ROLE/ is a copy of what was stored at `path`."""
    stored = ledger.get("files", {}).get(path)
    if stored is not None:
        return damage(copy, stored) is None
    return ledger["finished"] and unreadable(copy) is None  # before that it may be from an earlier task


def _unpublished(
    folder: Path, ledger: Mapping[str, Any], role: str, but: set[str] | frozenset[str] = frozenset()
) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Yield each problem with a file in ROLE/, with the intact file and the one it must replace; weights last."""
    for name in stored_tasks(ledger, role)[-1:]:
        newest, files = folder / role / name, ledger.get("files", {})
        there = {path.relative_to(folder).as_posix(): path for path in newest.rglob("*") if path.is_file()}
        known = [path for path in files if path.startswith(f"{role}/{name}/")] or there
        for path in sorted(known, key=lambda path: path.endswith(".safetensors")):
            source, target = folder / path, folder / role / (folder / path).relative_to(newest)
            if path in but:
                continue
            if problem := damage(target, files[path] if path in files else fingerprint(source)):
                yield f"{target.name} {problem}", (source, target)


def _scaffolds(folder: Path, ledger: Mapping[str, Any]) -> Iterator[str]:
    """Yield damaged files of the terms' own layers, for roles that still need them to continue."""
    for path, stored in ledger.get("files", {}).items():
        role = path.removeprefix("work/scaffold/").partition("-task-")[0]
        goes_on = len(ledger["entries"].get(role, ())) < len(ledger["class_names"])
        if path.startswith("work/scaffold/") and goes_on and (problem := damage(folder / path, stored)):
            yield f"{path} {problem}"


def _refuse(folder: Path, ledger: Mapping[str, Any], lost: list[str]) -> None:
    states = [f"{role}/{name}" for role in ledger["entries"] for name in stored_tasks(ledger, role)]
    bad = [state for state in states if any(line.startswith(f"{state}/") for line in lost)]
    more = f" (and {len(lost) - 2} more files)" if len(lost) > 2 else ""
    raise RunError(
        f"Files of the run in {folder} are lost, and nothing else there holds them. Nothing was changed; whole are "
        f"{len(states) - len(bad)} of {len(states)} checkpoints.\n"
        + "\n".join(f"  {line}" for line in lost[:2])
        + f"{more}\nPut them back from a copy of yours (or from the Hub, if they were pushed), or train again in "
        "another folder (hf-cdl train --output_dir FOLDER)."
    )
