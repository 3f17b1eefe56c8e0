"""Reading and checking results from untrusted sources, without running anything.

After `checked_results`, readers can rely on keys and types. Nothing that such a file names is loaded, opened or run.
Raises RunError for anything that is not as hf_cdl writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from hf_cdl.counted import counted
from hf_cdl.escape import visible, visible_lines
from hf_cdl.runs import report
from hf_cdl.runs.exports import NAME as EXPORTS
from hf_cdl.runs.exports import exports_in
from hf_cdl.runs.files import RunError
from hf_cdl.runs.ledger import LONGEST_NAME, LONGEST_SAID, read_ledger
from hf_cdl.runs.metrics import continual_metrics
from hf_cdl.runs.verdict import with_verdict

_DEEPEST = 50
_LISTED = ("within_task", "task_identification", "confidence", "calibration_error", "class_accuracy")
_LISTED += ("choices", "known", "drift", "kept", "train_seconds", "eval_seconds", "images_per_second")
_LISTED += ("peak_memory_bytes",)
"""What results.json lists for each task besides the accuracies."""

Percent = Annotated[float, Field(ge=0, le=100)]
Amount = Annotated[FiniteFloat, Field(ge=0)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
RoleName = Annotated[str, Field(pattern=r"^[a-z_]{1,100}$")]
"""Also used as the name of a folder."""


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Cost(_Checked):
    parameters: Count
    bytes: Count
    latency_ms: Amount
    device: Name


class _Export(_Checked):
    """A file for a device, see runs/exports.py."""

    file: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]+\.onnx$", max_length=LONGEST_NAME)]
    revision: Name | None
    precision: Name
    height: Count
    width: Count
    bytes: Count
    images: Count
    images_of: Name
    logit_difference: Amount
    same_answers: Percent
    same_unknown: Percent | None = None
    accuracy: Percent | None
    accuracy_before: Percent | None
    latency_ms: Amount
    latency_before_ms: Amount
    machine: Name


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


class _Change(_Checked):
    revision: Count
    kind: Name
    said: Annotated[str, Field(min_length=1, max_length=2 * LONGEST_SAID)]
    time: Name
    class_names: list[Annotated[list[Name], Field(min_length=1)]]
    images: dict[Name, int]
    choices: dict[Name, FiniteFloat]
    classes: dict[Name, Name | None] = {}
    state: Annotated[int, Field(ge=1)] | None = None


class _Unlabelled(_Checked):
    images: Count
    terms: list[Name]


class _Results(_Checked):
    name: Name
    seed: int | None
    recipe: dict[str, Any]
    class_names: list[Annotated[list[Name], Field(min_length=1)]]
    roles: dict[RoleName, _Role]
    stream: Name | None = None
    unlabelled: _Unlabelled | None = None
    finished: bool = False
    versions: dict[Name, Name] = {}
    origin: _Origin | None = None
    changes: list[_Change] = []
    exports: list[_Export] = []


def stored_ledger(folder: Path) -> dict[str, Any]:
    """Read the ledger of the run in a folder given by the user. Raises RunError if there is none."""
    if not (folder / "run.json").exists():
        raise RunError(f"{visible(folder)} holds no run: it has no run.json. Name a run's folder, as runs/quickstart.")
    return read_ledger(folder, "name another run's folder")


def run_results(
    folder: Path, complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda recipe: recipe
) -> dict[str, Any]:
    """Read the results of a run, finished or not, from the ledger in its folder; `complete` fills in its recipe."""
    ledger, where = stored_ledger(folder), visible(folder / "run.json")
    try:
        found = ledger_results({**ledger, "recipe": complete(ledger["recipe"])}, folder.resolve().name)
    except ValueError as error:  # an unreadable recipe, or accuracies without images
        raise RunError(f"{where}: {visible_lines(error)}") from error
    exports = exports_in(folder / EXPORTS)
    return checked_results({**found, **({"exports": exports} if exports else {})}, where)


def checked_results(content: Any, where: str) -> dict[str, Any]:
    """Check the results of a run and return them unchanged; `where` names them in messages."""
    _check(_Results, content, where)
    problems, tasks = [], [len(names) for names in content["class_names"]]
    _check_names(content["class_names"], problems)
    for role, entry in content["roles"].items():
        path, matrix = f"roles.{visible(role)}", entry["accuracy_matrix"]
        if len(matrix) > len(tasks):
            has = counted(len(matrix), "task")
            problems.append(f"{path}.accuracy_matrix has {has}, but class_names has {len(tasks)}")
        problems += [
            f"{path}.accuracy_matrix.{t} has {counted(len(row), 'accuracy')}, but after task {t + 1} there are {t + 1}"
            for t, row in enumerate(matrix)
            if len(row) != t + 1
        ]
        lists = ("counts", "correct", "train_seconds", "eval_seconds", "images_per_second", "peak_memory_bytes")
        problems += [
            f"{path}.{name} has {counted(len(entry[name]), 'entry')} for {counted(len(matrix), 'task')}"
            for name in lists
            if name in entry and len(entry[name]) != len(matrix)
        ]
        for i, count in enumerate(entry["counts"]):
            if not count and any(row[i] is not None for row in matrix[i:] if i < len(row)):
                problems.append(f"{path}.counts.{i} is 0, but accuracies of that task were measured")
    _check_origin(content, len(tasks), problems)
    for index, change in enumerate(content.get("changes", [])):
        _check_names(change["class_names"], problems, f"changes.{index}.class_names")
        number = len(tasks) + index + 1
        if change["revision"] != number or not len(tasks) <= (change.get("state") or len(tasks)) < number:
            problems.append(f"changes.{index} is of revision {change['revision']}, but {number} comes next")
    _raise(problems, where)
    return content


def ledger_results(ledger: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Everything a run has measured so far, as written to results.json; `folder`: the name of its folder."""
    recipe, roles = ledger["recipe"], {}
    for role, entries in ledger["entries"].items():
        done = [{"correct": [], "counts": [0] * len(entry["row"]), **entry} for entry in entries if entry.get("row")]
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
    found = {
        "name": recipe.get("name", folder),
        "seed": recipe.get("seed"),
        "finished": ledger["finished"],
        "recipe": recipe,
        "versions": ledger["versions"],
        "stream": ledger["stream"],
        "class_names": ledger["class_names"],
        **({"unlabelled": ledger["unlabelled"]} if ledger.get("unlabelled") else {}),
        **({"origin": ledger["origin"]} if ledger.get("origin") else {}),
        **({"changes": ledger["changes"]} if ledger.get("changes") else {}),
        "roles": roles,
    }
    return with_verdict(found)


def _latest(counts: Iterable[int]) -> int:
    """Number of test images a task had when it was last measured."""
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
    """Whether `content` is nested too deep; goes level by level, as recursion could overflow the stack."""
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


def _check_names(class_names: list[list[str]], problems: list[str], where: str = "class_names") -> None:
    names = [name for task in class_names for name in task]
    if len({*names}) < len(names):
        problems.append(f"{where} has a class twice, but a class belongs to one task")


def _check_origin(content: Mapping[str, Any], tasks: int, problems: list[str]) -> None:
    if content.get("origin") is not None and content["origin"]["tasks"] > tasks:
        problems.append(f"origin.tasks is {content['origin']['tasks']}, but class_names has {counted(tasks, 'task')}")


def _raise(problems: list[str], where: str) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RunError(
            f"{where} is not as hf_cdl writes it: {problems[0]}{more}. Nothing was changed; restore the file from "
            "where it came, or choose another run."
        )
