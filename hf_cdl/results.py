"""Results and ledgers as files that somebody else may have written: read without running anything, and checked.

Readers take keys and types for granted after `checked_results` and `checked_ledger`. Nothing is loaded, opened or run
that such a file names. Raises RunError for whatever is not as hf_cdl writes it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from hf_cdl import report
from hf_cdl.escape import visible
from hf_cdl.metrics import continual_metrics
from hf_cdl.storing import RunError

LARGEST = 64 * 2**20
"""Bytes of a JSON file that is read."""
_DEEPEST = 50
_LISTED = ("within_task", "task_identification", "confidence", "calibration_error", "class_accuracy")
_LISTED += ("train_seconds", "eval_seconds", "images_per_second", "peak_memory_bytes")
"""What results.json lists for each task beside the accuracies."""

Percent = Annotated[float, Field(ge=0, le=100)]
Amount = Annotated[FiniteFloat, Field(ge=0)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
RoleName = Annotated[str, Field(pattern=r"^[a-z_]{1,100}$")]
"""It is a folder's name too."""


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Cost(_Checked):
    parameters: Count
    bytes: Count
    latency_ms: Amount
    device: Name


class _Place(_Checked):
    """Where a model learnt its first tasks: a repository on the Hub, or a folder."""

    repository: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")] | None = None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    folder: Name | None = None
    tags: dict[Name, Name] = {}


class _Origin(_Checked):
    tasks: Annotated[int, Field(ge=1)]
    roles: dict[RoleName, _Place]


class _Role(_Checked):
    accuracy_matrix: list[list[Percent | None]]
    counts: list[Count]
    label: Name | None = None
    correct: list[list[Count]] = []
    train_seconds: list[Amount]
    eval_seconds: list[Amount] = []
    images_per_second: list[Amount] = []
    peak_memory_bytes: list[Count]
    metrics: dict[Name, FiniteFloat | None] = {}
    cost: _Cost | None = None


class _Results(_Checked):
    name: Name
    seed: int | None
    recipe: dict[str, Any]
    class_names: list[Annotated[list[Name], Field(min_length=1)]]
    roles: dict[RoleName, _Role]
    stream: Name | None = None
    finished: bool = False
    versions: dict[Name, Name] = {}
    origin: _Origin | None = None


class _Entry(_Checked):
    role: RoleName
    task: Count
    row: list[Percent | None]
    correct: list[Count]
    counts: list[Count]
    train_seconds: Amount
    eval_seconds: Amount
    images_per_second: Amount
    peak_memory_bytes: Count


class _Hub(_Checked):
    hub_model_id: Name | None = None
    push_teacher: bool = False
    hub_private_repo: bool = True


class _Ledger(_Checked):
    recipe: dict[str, Any]
    class_names: list[Annotated[list[Name], Field(min_length=1)]]
    entries: dict[RoleName, list[_Entry]]
    finished: bool
    stream: Name | None = None
    versions: dict[Name, Name] = {}
    origin: _Origin | None = None
    labels: dict[Name, Name] = {}
    costs: dict[Name, _Cost] = {}
    hub: _Hub | None = None


def read_json(file: Path) -> Any:
    """The content of a JSON file of at most LARGEST bytes; a pipe, a device or a link is none."""
    try:
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise RunError(f"{visible(file)} is no regular file, so it was not read. Put the file itself there.")
        if found.st_size > LARGEST:
            raise RunError(
                f"{visible(file)} has {found.st_size:,} bytes; one that hf_cdl wrote has less than {LARGEST:,}."
            )
        return json.loads(file.read_bytes())
    except OSError as error:
        raise RunError(f"{visible(file)} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits
        reason = "it is nested too deep" if isinstance(error, RecursionError) else visible(error)[:200]
        raise RunError(
            f"{visible(file)} is not whole or was not written by hf_cdl: {reason}. Get it again."
        ) from error


def read_ledger(folder: Path) -> dict[str, Any]:
    """The ledger in a run's folder, checked."""
    if not (file := folder / "run.json").exists():
        raise RunError(f"{visible(folder)} holds no run: there is no run.json in it. Name a run's folder.")
    return checked_ledger(read_json(file), visible(file))


def checked_results(content: Any, where: str) -> dict[str, Any]:
    """`content` itself, the results of a run; `where` names it in the message."""
    _check(_Results, content, where)
    problems, tasks = [], [len(names) for names in content["class_names"]]
    _check_names(content["class_names"], problems)
    for role, entry in content["roles"].items():
        path, matrix = f"roles.{visible(role)}", entry["accuracy_matrix"]
        if len(matrix) > len(tasks):
            problems.append(f"{path}.accuracy_matrix has {len(matrix)} tasks, but class_names has {len(tasks)}")
        problems += [
            f"{path}.accuracy_matrix.{t} has {len(row)} accuracies, but after task {t + 1} there are {t + 1}"
            for t, row in enumerate(matrix)
            if len(row) != t + 1
        ]
        lists = ("counts", "correct", "train_seconds", "eval_seconds", "images_per_second", "peak_memory_bytes")
        problems += [
            f"{path}.{name} has {len(entry[name])} entries for {len(matrix)} tasks"
            for name in lists
            if name in entry and len(entry[name]) != len(matrix)
        ]
        for i, count in enumerate(entry["counts"]):
            if not count and any(row[i] is not None for row in matrix[i:] if i < len(row)):
                problems.append(f"{path}.counts.{i} is 0, but accuracies of that task were measured")
    _check_origin(content, len(tasks), problems)
    _raise(problems, where)
    return content


def checked_ledger(content: Any, where: str) -> dict[str, Any]:
    """`content` itself, the ledger of a run; `where` names it in the message."""
    _check(_Ledger, content, where)
    problems, tasks = [], len(content["class_names"])
    _check_names(content["class_names"], problems)
    for role, entries in content["entries"].items():
        path = f"entries.{visible(role)}"
        if len(entries) > tasks:
            problems.append(f"{path} has {len(entries)} tasks, but class_names has {tasks}")
        for number, entry in enumerate(entries):
            if (entry["role"], entry["task"]) != (role, number):
                problems.append(f"{path}.{number} is of {visible(entry['role'])}'s task {entry['task'] + 1}")
            sizes = {len(entry.get(name, ())) for name in ("row", "correct", "counts")}
            if sizes != {number + 1} and (sizes != {0} or number < len(entries) - 1):  # the newest may be unmeasured
                problems.append(f"{path}.{number} has rows of {sorted(sizes)} numbers, not {number + 1}")
            elif any(value is not None and not n for value, n in zip(entry["row"], entry["counts"], strict=True)):
                problems.append(f"{path}.{number} has an accuracy on a task of 0 images")
    _check_origin(content, tasks, problems)
    _raise(problems, where)
    return content


def ledger_results(ledger: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Everything measured so far by the run with this ledger, as it is written to results.json; `folder`: its name."""
    recipe, roles = ledger["recipe"], {}
    for role, entries in ledger["entries"].items():
        done = [entry for entry in entries if entry["row"]]
        if not done:
            continue
        matrix = [entry["row"] for entry in done]
        counts = [_latest(entry["counts"][i] for entry in done[i:]) for i in range(len(done))]
        metrics = continual_metrics(matrix, counts)
        leading = ("average_accuracy", "official_forgetting") if report.follows_cdl(ledger) else ()
        roles[role] = {
            "label": ledger.get("labels", {}).get(role, role),
            "accuracy_matrix": matrix,
            "correct": [entry["correct"] for entry in done],
            "counts": counts,
            "metrics": {**{name: metrics[name] for name in leading}, **metrics},
            **{key: [entry.get(key) for entry in done] for key in _LISTED},
        }
        if role in ledger.get("costs", {}):
            roles[role]["cost"] = ledger["costs"][role]
    return {
        "name": recipe.get("name", folder),
        "seed": recipe.get("seed"),
        "finished": ledger["finished"],
        "recipe": recipe,
        "versions": ledger["versions"],
        "stream": ledger["stream"],
        "class_names": ledger["class_names"],
        **({"origin": ledger["origin"]} if ledger.get("origin") else {}),
        "roles": roles,
    }


def _latest(counts: Iterable[int]) -> int:
    """How many test images a task had when it was last measured."""
    return next((count for count in reversed([*counts]) if count), 0)


def _check(kind: type[BaseModel], content: Any, where: str) -> None:
    if _too_deep(content):
        _raise([f"it is nested more than {_DEEPEST} deep"], where)
    try:
        TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        _raise(
            [
                f"{visible('.'.join(map(str, line['loc'])) or 'the whole')} is {visible(repr(line['input'])[:60])}, "
                f"but {line['msg'].replace('Input should', 'should')}"
                if line["type"] != "missing"
                else f"{visible('.'.join(map(str, line['loc'])))} is missing"
                for line in error.errors(include_url=False)
            ],
            where,
        )


def _too_deep(content: Any) -> bool:
    """Level by level, so that it needs no stack of its own."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True


def _check_names(class_names: list[list[str]], problems: list[str]) -> None:
    names = [name for task in class_names for name in task]
    if len({*names}) < len(names):
        problems.append("class_names has a class twice, but a class belongs to one task")


def _check_origin(content: Mapping[str, Any], tasks: int, problems: list[str]) -> None:
    if content.get("origin") is not None and content["origin"]["tasks"] > tasks:
        problems.append(f"origin.tasks is {content['origin']['tasks']}, but class_names has {tasks} tasks")


def _raise(problems: list[str], where: str) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RunError(f"{where} is not as hf_cdl writes it: {problems[0]}{more}. Nothing was changed.")
