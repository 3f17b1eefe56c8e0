"""run.json, the ledger of a run: its schema, and reading one that may be damaged, newer or foreign."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from hf_cdl.counted import counted
from hf_cdl.runs.files import RunError, check_readable, content_hash, read_numbers, versions

CHANGED = "student"
"""The role that can be changed after its tasks."""
LONGEST_NAME, LONGEST_SAID = 1000, 5000
"""Characters of a name in results, and of what a change says that it did."""
FORMAT = 1
"""Incremented when an older hf_cdl would misread the ledger. Ledgers without a format are read as 1."""


@with_config(ConfigDict(strict=True, extra="forbid"))
class _Entry(TypedDict):
    """A TaskResult; older versions stored fewer of its fields."""

    role: str
    task: int
    row: NotRequired[list[float | None]]
    correct: NotRequired[list[int]]
    counts: NotRequired[list[int]]
    within_task: NotRequired[list[float | None]]
    task_identification: NotRequired[list[float | None]]
    confidence: NotRequired[float | None]
    calibration_error: NotRequired[float | None]
    class_accuracy: NotRequired[dict[str, float]]
    choices: NotRequired[dict[str, float]]
    known: NotRequired[dict[str, float]]
    drift: NotRequired[dict[str, float]]
    kept: NotRequired[dict[str, int]]
    train_seconds: NotRequired[float]
    eval_seconds: NotRequired[float]
    images_per_second: NotRequired[float]
    peak_memory_bytes: NotRequired[int]


class _Origin(TypedDict):
    """`revision`: of the student taken over, if changes came after its tasks."""

    tasks: int
    roles: dict[str, dict[str, Any]]
    revision: NotRequired[int]


@with_config(ConfigDict(strict=True, extra="forbid"))
class _Change(TypedDict):
    """A change of the student after its tasks.

    `images`: number of images added by class name, below 0 if taken away. `choices`: what the head chose. `classes`:
    new name of a class that was renamed or merged; None of one removed. `state`: the revision an undo went back to.
    """

    revision: int
    kind: str
    said: str
    time: str
    class_names: list[list[str]]
    images: dict[str, int]
    choices: dict[str, float]
    classes: NotRequired[dict[str, str | None]]
    state: NotRequired[int]


@with_config(ConfigDict(strict=True))
class _Unlabelled(TypedDict):
    images: int
    terms: list[str]


@with_config(ConfigDict(strict=True))
class _Ledger(TypedDict):
    """Schema of run.json.

    `files`: fingerprints of stored files, by path in the folder. `images`: split -> image counts per class, in stream
    order. `unlabelled`: number of images without labels, and the terms that learn from them. `plugins`: SHA-256 of the
    recipe's plugins, by their path there; older versions did not store it. `settings`: by role, what its learning
    depends on (see settings.py). `bad_image`: (split, row, bytes) of the one that stopped the run, until
    it goes on; `started_on`: the stream's fingerprint at the start, if such an image was mended since.
    """

    recipe: dict[str, Any]
    entries: dict[str, list[_Entry]]
    finished: bool
    class_names: list[list[str]]
    stream: str | None
    versions: dict[str, Any]
    files: NotRequired[dict[str, Annotated[tuple[int, int, str], Strict(False)]]]
    images: NotRequired[dict[str, list[int]]]
    unlabelled: NotRequired[_Unlabelled]
    plugins: NotRequired[dict[str, str]]
    labels: NotRequired[dict[str, str]]
    costs: NotRequired[dict[str, dict[str, Any]]]
    hub: NotRequired[dict[str, Any]]
    origin: NotRequired[_Origin]
    changes: NotRequired[list[_Change]]
    settings: NotRequired[dict[str, dict[str, Any]]]
    bad_image: NotRequired[Annotated[tuple[str, int, int], Strict(False)]]
    started_on: NotRequired[str]


_LEDGER = TypeAdapter(_Ledger)


def new_ledger(recipe: dict[str, Any]) -> dict[str, Any]:
    """The ledger of a run that has learnt nothing yet."""
    start = {"stream": None, "class_names": [], "entries": {}, "finished": False, "files": {}}
    return {"format": FORMAT, "recipe": recipe, "versions": versions(), **start}


def lasting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a stored recipe that must not change when a run resumes: all but card and image check."""
    kept, data = {key: value for key, value in recipe.items() if key != "card"}, recipe.get("data")
    if isinstance(data, Mapping):
        kept["data"] = {key: value for key, value in data.items() if key != "check"}
    return kept


def plugin_hashes(files: Any) -> dict[str, str]:
    """SHA-256 of plugin files that exist, by path."""
    return {file: content_hash(Path(file)) for file in files or [] if Path(file).is_file()}


def edited_plugins(ledger: Mapping[str, Any], files: Any) -> list[str]:
    """Plugin files, by the paths in `files`, whose content differs from the ledger."""
    stored = ledger.get("plugins", {})
    return [file for file, now in plugin_hashes(files).items() if stored.get(file, now) != now]


def check_plugins(folder: Path, ledger: Mapping[str, Any], files: Any) -> None:
    """Raise RunError if plugins were edited since the run in a folder was started."""
    if edited := edited_plugins(ledger, files):
        raise RunError(
            f"'plugins' names {', '.join(edited)}, which was edited since the run in {folder} was started: "
            "resuming would mix two methods. Nothing was touched. Put the old content back, or choose another "
            "folder with --output_dir FOLDER."
        )


def read_ledger(
    folder: Path, way: str = "choose another folder to train in (hf-cdl train --output_dir FOLDER)"
) -> dict[str, Any]:
    """Read the ledger in a run's folder. Raises RunError if it is missing, newer, or not as a run writes it.

    `way`: the alternative to restoring it, for the message.
    """
    file = folder / "run.json"
    advice = f"Nothing in the folder was touched; restore run.json, or {way}."
    try:
        check_readable(file)
        ledger = read_numbers(file.read_text(encoding="utf-8"))
    except RunError as error:  # not a regular file, or too large
        raise RunError(f"{error} {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise RunError(f"{file} is not a readable ledger ({reason}). {advice}") from error
    found = ledger.get("format", 1) if isinstance(ledger, dict) else 1
    if type(found) is int and found > FORMAT:
        written = ledger.get("versions")
        by = written.get("hf-cdl", "of unknown version") if isinstance(written, dict) else "of unknown version"
        raise RunError(
            f"{file} was written by hf_cdl {by}, in format {found}; this is hf_cdl {versions()['hf-cdl']}, which "
            f"reads up to format {FORMAT}. Nothing was touched. Update hf_cdl, or {way}."
        )
    if problem := _problem(ledger):
        raise RunError(f"{file} is not a readable ledger ({problem}). {advice}")
    return ledger


def revisions(ledger: Mapping[str, Any], role: str) -> int:
    """Number of states that a role has been in: one after each task, and for the student one after each change."""
    changes = ledger.get("changes", []) if role == CHANGED else []
    return len(ledger["entries"].get(role, [])) + len(changes)


def stored_tasks(ledger: Mapping[str, Any], role: str) -> list[str]:
    """Names of the revisions whose checkpoint of a role is in the run's folder, oldest first."""
    origin = ledger.get("origin", {})
    elsewhere = origin.get("revision" if role == CHANGED and "revision" in origin else "tasks", 0)
    first = max(0, elsewhere - 1)  # of those learnt elsewhere, only the last
    return [revision_name(index + 1) for index in range(first, revisions(ledger, role))]


def revision_name(number: int) -> str:
    """Name of a revision: of its folder in a run, and of its tag on the Hub."""
    return f"task-{number:02d}"


def last_learnt(changes: Sequence[Mapping[str, Any]], number: int) -> int | None:
    """The revision after a task that revision `number` equals, as all changes were undone; None if it is changed."""
    by_number = {change["revision"]: change for change in changes}
    while (change := by_number.get(number)) is not None and change.get("state") is not None:
        number = change["state"]
    return number if change is None else None


def state_before(ledger: Mapping[str, Any], number: int) -> int | None:
    """The revision that undoing revision `number` goes back to; None for a state after a task."""
    changes = {change["revision"]: change for change in ledger.get("changes", [])}
    while (change := changes.get(number)) is not None and "state" in change:
        number = change["state"]
    return None if change is None else number - 1


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield the differences between two recipes, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old!r} -> {new!r}"


def shortened(changes: Sequence[str], limit: int = 3) -> str:
    """The first `limit` changes, one per line, and the number of remaining ones."""
    more = [f"and {len(changes) - limit} more"] if len(changes) > limit else []
    return "\n".join(f"  {change}" for change in [*changes[:limit], *more])


def labelled_part(stream: str | None) -> str | None:
    """The part of a stream's fingerprint about its labelled images."""
    return stream and stream.partition("+")[0]


def data_changes(
    ledger: Mapping[str, Any],
    class_names: list[list[str]],
    images: Mapping[str, list[int]],
    unlabelled: int | None = None,
    limit: int = 3,
) -> str:
    """Describe what changed in the data since a run was started; `unlabelled`: number of images without labels."""
    old, new = ([name for task in tasks for name in task] for tasks in (ledger["class_names"], class_names))
    changes = [f"new class {name!r}" for name in new if name not in {*old}]
    changes += [f"class {name!r} is gone" for name in old if name not in {*new}]
    for split, counts in ledger.get("images", {}).items():
        now = dict(zip(new, images.get(split, []), strict=False))
        for name, count in zip(old, counts, strict=False):
            if name in now and now[name] != count:
                changes.append(f"{split} images of {name!r}: {count} -> {now[name]}")
    known = ledger.get("unlabelled", {}).get("images", 0)
    if unlabelled not in (None, known):
        changes.append(f"unlabelled images: {known} -> {unlabelled}")
    if not changes:
        reordered = ledger["class_names"] != class_names
        changes = ["classes in another order or other tasks" if reordered else "as many images, but other ones"]
    more = f" and {counted(len(changes) - limit, 'more change')}" if len(changes) > limit else ""
    return ", ".join(changes[:limit]) + more


def _problem(ledger: Any) -> str | None:
    """Describe the first thing that a run would not have written, or None."""
    try:
        _LEDGER.validate_python(ledger)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        return f"{where}: {first['msg']}"
    if type(ledger.get("format", 1)) is not int or ledger.get("format", 1) < 1:
        return f"format: {ledger['format']!r} is not the number of a format"
    return next(_contradictions(ledger), None)


def _contradictions(ledger: dict[str, Any]) -> Iterator[str]:
    """Yield contradictions within a ledger."""
    entries, planned = ledger["entries"], len(ledger["class_names"])
    if any(entries.values()) and ledger["stream"] is None and "origin" not in ledger:
        yield "entries of tasks, but no stream"
    for path in ledger.get("files", {}):
        if PurePosixPath(path).is_absolute() or {"..", "."} & {*path.split("/")} or "\\" in path or "\0" in path:
            yield f"files: {path!r} is not a path in the folder"
    for role, of_role in entries.items():
        if not re.fullmatch(r"[A-Za-z]\w*", role):
            yield f"entries: {role!r} is not a role"
        if len(of_role) > planned:
            yield f"entries: {len(of_role)} of {role}, but the stream has {counted(planned, 'task')}"
        for index, entry in enumerate(of_role):
            if (entry["role"], entry["task"]) != (role, index):
                yield f"entries.{role}.{index} is of {entry['role']}, task {entry['task']}"
            row = entry.get("row", [])
            if len(row) != index + 1 and (row or index + 1 < len(of_role)):  # the newest may not be measured yet
                has = counted(len(row), "accuracy")
                yield f"entries.{role}.{index}.row has {has}, but task {index + 1} needs {index + 1}"
            if any(not 0 <= value <= 100 for value in row if value is not None):
                yield f"entries.{role}.{index}.row is {row}, but accuracies lie between 0 and 100"
            if any(len(entry.get(key, row)) != len(row) for key in ("correct", "counts")):
                yield f"entries.{role}.{index}: row, correct and counts are not of the same length"
    for index, change in enumerate(ledger.get("changes", [])):
        expected = len(entries.get(CHANGED, [])) + index + 1
        first = len(entries.get(CHANGED, []))
        if change["revision"] != expected or not first <= change.get("state", first) < expected:
            yield f"changes.{index} is revision {change['revision']}, but {expected} comes next"
    if ledger.get("changes") and not ledger["finished"]:
        yield "changes of the student, but the run is not finished"
    short = [role for role, of_role in entries.items() if len(of_role) < planned or not of_role[-1].get("row")]
    if ledger["finished"] and (not entries or short):
        yield f"finished, but {short[0] if short else 'every role'} lacks tasks"
