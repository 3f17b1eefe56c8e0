"""The stored state of a phase in progress: sealed when written, used only if complete and of the same phase."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from hf_cdl.runs.files import RunError, damage, fingerprints, first_line, saving, versions, write_json

SEAL, WEIGHTS = "phase.json", "trained.safetensors"
_NEEDED = (WEIGHTS, "optimizer.pt", "scheduler.pt", "trainer_state.json")
_MATTER = ("hf-cdl", "torch", "transformers", "accelerate", "peft")
"""Packages of which another version may store or compute something different."""


def seal(folder: Path, of: Mapping[str, Any], seconds: float) -> None:
    """Write what the state belongs to and the fingerprints of its files, last: a state without it is incomplete."""
    (folder / SEAL).unlink(missing_ok=True)
    content = {"seconds": seconds, "of": {**of, **_versions()}, "files": fingerprints(folder, folder)}
    write_json(folder / SEAL, content)


def newest_state(
    work: Path, of: Mapping[str, Any], shapes: Mapping[str, list[int]], keeps_best: bool = False
) -> tuple[Path | None, list[str]]:
    """Find the newest complete state of a phase that matches `of`; delete newer unusable ones and return why.

    `shapes`: shapes of the tensors the phase changes, by name. `keeps_best`: the phase ends with its best state, which
    must also exist and be complete.
    """
    discarded = []
    found = [
        (int(match[1]), path) for path in work.glob("*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, state in sorted(found, reverse=True):
        problem = _problem(state, {**of, **_versions()}, shapes)
        if problem is None and keeps_best:
            step = json.loads((state / "trainer_state.json").read_text(encoding="utf-8"))["best_global_step"]
            best = state.with_name(f"checkpoint-{step}")
            if step and best != state and (lost := _problem(best, {**of, **_versions()}, shapes)):
                problem = f"the best state before it, {best.name}, is no use: {lost}"
        if problem is None:
            return state, discarded
        with saving(f"delete {state}"):
            shutil.rmtree(state) if state.is_dir() and not state.is_symlink() else state.unlink()
        discarded.append(f"The stored state {state} is discarded: {problem}.")
    return None, discarded


@contextmanager
def loading(state: str | None) -> Iterator[None]:
    """Turn any error while loading a state into a RunError that says what to do."""
    try:
        yield
    except Exception as error:  # unpickling (weights only) raises many types
        foreign = isinstance(error, pickle.UnpicklingError)
        reason = "a file holds more than tensors and numbers; nothing of it was run" if foreign else first_line(error)
        raise RunError(
            f"The stored state {state} cannot be loaded ({type(error).__name__}: {reason}). Delete that "
            "folder: the same command then starts its phase again, from the last finished task."
        ) from error


def _problem(state: Path, of: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> str | None:
    """Why a phase cannot resume from a state, or None."""
    if not state.is_dir():
        return "it is not a folder"
    try:
        content = json.loads((state / SEAL).read_text(encoding="utf-8"))
        files, theirs, _ = dict(content["files"]), dict(content["of"]), float(content["seconds"])
        for name, stored in files.items():
            if ".." in name.split("/") or name.startswith("/"):
                return f"{SEAL} names {name!r}, which is not in it"
            if problem := damage(state / name, stored):
                return f"{name} {problem}"
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except KeyError as error:
        return f"{SEAL} has no {error}; it is not whole, or an older hf_cdl wrote it"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{SEAL} cannot be read ({first_line(error)})"
    for key in of.keys() | theirs.keys():
        if of.get(key) != theirs.get(key):
            return f"it was stored with {key} {theirs.get(key)}, now it is {of.get(key)}"
    random = ["rng_state.pth"] if of["processes"] == 1 else [f"rng_state_{i}.pth" for i in range(of["processes"])]
    if missing := [name for name in (*_NEEDED, *random) if name not in files]:
        return f"{', '.join(missing)} is not in it"
    return _misfit(state / WEIGHTS, shapes)


def _misfit(file: Path, shapes: Mapping[str, list[int]]) -> str | None:
    """Why the stored tensors do not fit the model, or None."""
    try:
        with safe_open(file, "pt") as stored:
            found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        return f"{file.name} cannot be read ({error})"
    odd = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
    if odd:
        return f"{file.name} does not fit the model: {odd[0]} is {found.get(odd[0])} in it, not {shapes.get(odd[0])}"
    return None


def _versions() -> dict[str, str]:
    known = versions()
    return {name: known[name] for name in _MATTER}


def load_scaffold(scaffold: nn.Module, file: Path) -> None:
    """Load the layers that the terms keep across tasks. Raises RunError if they are lost."""
    try:
        scaffold.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{file} cannot be loaded ({first_line(error)}), so the layers that the terms own are lost. Put it back "
            "from a copy, or start again in another folder with --output_dir FOLDER."
        ) from error
