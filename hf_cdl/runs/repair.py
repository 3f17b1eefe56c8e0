"""Checking whether a run's stored files are still intact, and restoring them from a copy where possible."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_cdl.counted import counted
from hf_cdl.runs.files import RunError, copy_whole, damage, fingerprint, first_line, link, saving, write_whole
from hf_cdl.runs.ledger import stored_tasks
from hf_cdl.runs.sharing import identity, left_over, weights_last

_REQUIRED = ("config.json", "model.safetensors", "preprocessor_config.json")
"""The files of a checkpoint for which an older version stored no fingerprints."""


@dataclass
class Findings:
    """Result of `examine`.

    `copies`: pairs of an intact file and the one it must replace. `gone`: weights in ROLE/ that must go. `said`:
    messages on what was found. `lost`: damaged paths without a copy, and why.
    """

    copies: list[tuple[Path, Path]] = field(default_factory=list)
    gone: list[Path] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def examine(folder: Path, ledger: Mapping[str, Any]) -> Findings:
    """Examine a run's checkpoints and the other files it needs, without writing anything.

    The newest checkpoint of a role and its copy in ROLE/ can restore each other, and so can any other file with the
    same content. Older checkpoints are read only if a file's size or modification time changed, or if
    the newest shares it, damaged. Raises RunError, naming what is lost, if a file has no intact copy.
    """
    found, files = Findings(), ledger.get("files", {})
    for role in ledger["entries"]:
        shared: set[tuple[int, int]] = set()  # damaged files of the newest checkpoint
        for name in reversed(names := stored_tasks(ledger, role)):
            newest = name == names[-1]
            bad = dict(_broken(folder, ledger, f"{role}/{name}/", newest, shared))
            shared |= {one for path in bad if newest and (one := identity(folder / path))}
            copies = {path: _copy_of(folder, ledger, path, newest) for path in bad}
            found.lost += [f"{path} {problem}" for path, problem in bad.items() if copies[path] is None]
            for path, copy in copies.items():
                if copy is not None:
                    found.copies.append((copy, folder / path))
                    found.said.append(f"{folder / path} {bad[path]}; it is restored from {copy}.")
            if newest:
                _examine_copy(folder, ledger, role, {*bad}, found)
    found.lost += _scaffolds(folder, ledger)
    for path, stored in files.items():
        if path.startswith("logs/") and (problem := damage(folder / path, stored, thorough=False)):
            found.said.append(f"{folder / path} {problem}: this loss curve is lost, nothing else is.")
    if found.lost:
        _refuse(folder, ledger, found.lost)
    return found


def _examine_copy(folder: Path, ledger: Mapping[str, Any], role: str, bad: set[str], found: Findings) -> None:
    """Add what must be done to make ROLE/ a copy of the newest checkpoint, but for its files that are `bad`."""
    unpublished, gone = dict(_unpublished(folder, ledger, role, bad)), left_over(folder, ledger, role)
    found.copies += unpublished.values()
    found.gone += gone
    if listed := ", ".join([*unpublished, *(f"{path.name} is of another one" for path in gone)]):
        name = stored_tasks(ledger, role)[-1]
        found.said.append(f"{folder / role}/ was not what {name} is ({listed}); it is made so.")


def restore(folder: Path, ledger: dict[str, Any], found: Findings) -> None:
    """Restore what can be restored, replacing each file atomically; the ledger gets the new fingerprints.

    Checkpoints that shared a damaged file share it again.
    """
    files, restored = ledger.get("files", {}), dict[str, Path]()
    for source, target in found.copies:
        path, other = target.relative_to(folder).as_posix(), source.relative_to(folder).as_posix()
        twin = restored.get(files[path][2], source if other in files else None) if path in files else None
        with saving(f"restore {target}"):
            if twin is None:
                copy_whole(source, target)
            else:
                write_whole(target, lambda partial, twin=twin: link(twin, partial))
        if path in files:
            files[path] = fingerprint(target)
            restored[files[path][2]] = target
    for path in found.gone:
        with saving(f"remove {path}"):
            path.unlink()


def unreadable(file: Path) -> str | None:
    """Why a stored file is damaged, as far as can be seen without a fingerprint; None if it may be intact."""
    try:
        if not file.is_file():
            return "is not a file" if file.exists() else "is missing"
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return None
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return f"cannot be read ({first_line(error)})"


def _broken(
    folder: Path, ledger: Mapping[str, Any], start: str, thorough: bool, damaged: Container[Any]
) -> Iterator[tuple[str, str]]:
    """Yield the paths below `start` that are not as the run stored them, and why.

    All are read if `thorough`; else those whose size or time changed, and those that are `damaged` files.
    """
    known = {path: stored for path, stored in ledger.get("files", {}).items() if path.startswith(start)}
    for path in known or [start + name for name in _REQUIRED]:
        if known:
            problem = damage(folder / path, known[path], thorough or identity(folder / path) in damaged)
        else:
            problem = unreadable(folder / path)
        if problem:
            yield path, problem


def _copy_of(folder: Path, ledger: Mapping[str, Any], path: str, newest: bool) -> Path | None:
    """A file with the content that was stored at `path`, in ROLE/ or in another checkpoint of the role."""
    files, (role, _, name) = ledger.get("files", {}), path.split("/", 2)
    if path not in files:  # before the run is finished, ROLE/ may be from an earlier task
        return folder / role / name if newest and ledger["finished"] and not unreadable(folder / role / name) else None
    others = [other for other in files if other.startswith(f"{role}/") and files[other][2] == files[path][2]]
    copies = [folder / role / other.split("/", 2)[2] for other in [path, *others]]
    return next((copy for copy in [*copies, *(folder / o for o in others)] if damage(copy, files[path]) is None), None)


def _unpublished(
    folder: Path, ledger: Mapping[str, Any], role: str, but: set[str] | frozenset[str] = frozenset()
) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Yield each problem with a file in ROLE/, with the intact file and the one it must replace; weights last."""
    for name in stored_tasks(ledger, role)[-1:]:
        newest, files = folder / role / name, ledger.get("files", {})
        there = {path.relative_to(folder).as_posix(): path for path in newest.rglob("*") if path.is_file()}
        known = [path for path in files if path.startswith(f"{role}/{name}/")] or there
        for path in sorted(known, key=lambda path: weights_last(path.split("/", 2)[2])):
            source, target = folder / path, folder / role / (folder / path).relative_to(newest)
            if path in but and path not in files:
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
    more = f" (and {counted(len(lost) - 2, 'more file')})" if len(lost) > 2 else ""
    raise RunError(
        f"Files of the run in {folder} are lost, and nothing else there holds them. Nothing was changed; whole are "
        f"{len(states) - len(bad)} of {counted(len(states), 'checkpoint')}.\n"
        + "\n".join(f"  {line}" for line in lost[:2])
        + f"{more}\nPut them back from a copy of yours (or from the Hub, if they were pushed), or train again in "
        "another folder (hf-cdl train --output_dir FOLDER)."
    )
