"""Starting a run that continues from models which learnt their first tasks elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_cdl.runs.files import RunError, fingerprints, make_folder, replace, saving, sync_tree, write_json
from hf_cdl.runs.ledger import CHANGED, new_ledger, read_ledger, revisions, stored_tasks
from hf_cdl.runs.sharing import publish
from hf_cdl.types import TaskResult


def continue_elsewhere(
    folder: Path,
    origin: dict[str, Any],
    results: Mapping[str, dict[str, Any]],
    put: Callable[[str, Path], Any],
    recipe_file: str,
    finished: bool = False,
) -> Callable[[], None]:
    """Create a run that continues from models which learnt their first `origin["tasks"]` tasks elsewhere.

    `origin`: the number of tasks, and for each of its `roles` where the model is from. `results`: role -> the
    results.json from there. `put(role, folder)` puts a role's newest checkpoint into a folder. `recipe_file`: the
    text of the recipe.yaml stored next to the ledger. `finished`: no further task is to be learnt. The folder appears
    only once it is complete. Raises RunError if something is in its place, and passes on errors of `put`; nothing is
    left behind then. Returns a function that removes the run again, as long as nothing was learnt in it.
    """
    with _started(folder) as made:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} is not empty. Choose another folder with --output_dir FOLDER.")
        partial, was_there = folder.with_name(f".{folder.name}.partial"), folder.exists()
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with saving(f"start the run in {folder}"):
                _fill(partial, origin, results, put, finished)
                (partial / "recipe.yaml").write_text(recipe_file)
                sync_tree(partial)
                if folder.exists():
                    folder.rmdir()
                replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        above = [] if was_there else [folder, *made]
        return lambda: _remove_run(folder, origin, above)


def _fill(
    folder: Path,
    origin: dict[str, Any],
    results: Mapping[str, dict[str, Any]],
    put: Callable[[str, Path], Any],
    finished: bool,
) -> None:
    """Write the checkpoints and the ledger of tasks learnt elsewhere into a new folder."""
    make_folder(folder)
    count, roles, student = origin["tasks"], origin["roles"], results[CHANGED]
    ledger = {
        **new_ledger(student["recipe"] if finished else {}),  # {}: any compatible recipe is accepted until it learns
        "class_names": student["class_names"][:count],
        "entries": {role: _entries(role, results[role], count) for role in roles},
        "origin": origin,
        "finished": finished,
    }
    if changes := [c for c in student.get("changes", []) if c["revision"] <= origin.get("revision", 0)]:
        ledger["changes"] = changes
    for role in roles:
        put(role, folder / role / stored_tasks(ledger, role)[-1])
    ledger["files"] = fingerprints(folder, folder)
    for role in roles:
        publish(folder, ledger, role)
    write_json(folder / "run.json", ledger)


def _remove_run(folder: Path, origin: dict[str, Any], above: list[Path]) -> None:
    """Undo the creation of a run, unless something was learnt in it or another process is using it."""
    if not (folder / "run.json").exists():  # another process has removed it
        return
    with _alone(folder / ".lock") as alone:
        if not alone or _learnt(folder, origin):  # another process uses the run by now
            return
        for path in folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    _remove(above)


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[list[Path]]:
    """Lock out other processes creating a run in the folder; yields new parent folders, removed again on failure."""
    made: list[Path] = []
    with saving(f"start the run in {folder}"):
        made += make_folder(folder.parent)
    try:
        with _alone(folder.with_name(f".{folder.name}.lock")) as alone:
            if not alone:
                raise RunError(f"Another process is starting a run in {folder}; wait for it or stop it first.")
            yield made
    except BaseException:
        _remove(made)
        raise


def _learnt(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether a run with tasks learnt elsewhere has learnt anything since, or its student was changed."""
    ledger = read_ledger(folder)
    learnt = any(len(of_role) > origin["tasks"] for of_role in ledger["entries"].values())
    changed = revisions(ledger, CHANGED) > origin.get("revision", origin["tasks"])
    return learnt or changed or any(folder.glob("work/*/checkpoint-*"))


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[bool]:
    """Try to hold a lock; yields whether no other process holds it. Its file is removed afterwards."""
    lock = FileLock(file, is_singleton=True)  # one per process
    try:
        with saving(f"lock {file}"):
            lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # while still held, so it is never another process's
            file.unlink()
        lock.release()


def _remove(folders: list[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # keep a folder that is not empty
            path.rmdir()


def _entries(role: str, results: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The ledger entries that correspond to a role's results."""
    of_role = results["roles"][role]
    lists = ("train_seconds", "eval_seconds", "images_per_second", "peak_memory_bytes", "correct")
    return [
        dataclasses.asdict(
            TaskResult(
                role,
                task,
                row=of_role["accuracy_matrix"][task],
                counts=of_role["counts"][: task + 1],
                **{name: of_role[name][task] for name in lists if of_role.get(name)},
            )
        )
        for task in range(count)
    ]
