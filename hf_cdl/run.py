"""The ledger of a run: which phase of which task is finished, where its checkpoint is, and what was measured.

Layout of a run's folder: `run.json` the ledger; `ROLE/task-01`, ... one loadable checkpoint per task, and in `ROLE/`
itself a copy of the newest; `logs/` the loss curves; `work/` the state of the phase in progress; at the end
`results.json` and the pictures. Whatever is written appears under its name only when it is whole, so a kill or a full
disk at any moment leaves the last state intact, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_cdl import report
from hf_cdl.metrics import continual_metrics
from hf_cdl.storing import RunError, saving, sync, versions, write_json
from hf_cdl.types import Task, TaskResult

_LISTED = ("within_task", "task_identification", "confidence", "calibration_error", "class_accuracy")
_LISTED += ("train_seconds", "eval_seconds", "images_per_second", "peak_memory_bytes")
"""What results.json lists for each task beside the accuracies."""


class Run:
    """Ledger of the run in `folder`, for the recipe given as a plain dict; opens a run that exists, or starts one.

    Only the process with `writer` writes and locks; the others follow in memory. Raises RunError if the folder belongs
    to another recipe or to something else, or if another process is at work in it. As long as nothing was learnt in a
    folder, it takes any recipe. `complete` fills in a stored recipe what the version that wrote it did not know, so
    that a new field with its default is no difference.

    A run may go on from models that learnt their first tasks elsewhere: see adopt.py.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe: dict[str, Any],
        writer: bool = True,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda recipe: recipe,
    ):
        self.folder = Path(folder)
        self.recipe = json.loads(json.dumps(recipe))  # as it will read back
        self.writer, self.complete = writer, complete
        self.ledger: dict[str, Any] = {
            "recipe": self.recipe,
            "versions": versions(),
            "stream": None,
            "class_names": [],
            "entries": {},
            "finished": False,
        }
        self._lock = FileLock(self.folder / ".lock", is_singleton=True)  # one for this process
        self._open()
        if self.recipe.get("teacher_from") is not None:
            source, ledger = self._source("teacher")
            ours, theirs = _makes(self.recipe, "teacher"), _makes(self._completed(ledger["recipe"]), "teacher")
            self._refuse("teacher", source, _differences(theirs, ours))
        if writer and not self.finished:
            try:
                with saving(f"open the run in {self.folder}"):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"Another process is running in {self.folder}; wait for it or stop it first.") from None
            self._open()  # again: the process that held the lock may have gone on
            for role in self.ledger["entries"]:  # a kill between checkpoint and copy
                with saving(f"repair {self.folder / role}"):
                    self._publish(role)

    def _open(self) -> None:
        """Take over the ledger in the folder, if there is one."""
        file = self.folder / "run.json"
        if not file.exists():
            ours = {".lock", ".run.json.partial"}  # of a kill before the ledger was there
            used = self.folder.exists() and (
                not self.folder.is_dir() or any(path.name not in ours for path in self.folder.iterdir())
            )
            if used and self.writer:
                raise RunError(
                    f"{self.folder} is not empty and holds no run (no run.json). Nothing in it was touched; choose "
                    "another folder with --output_dir FOLDER."
                )
            return
        try:
            ledger = json.loads(file.read_text())
            known, entries, _ = ledger["recipe"], ledger["entries"], ledger["finished"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{file} is not a readable ledger ({type(error).__name__}: {error}). Nothing in the folder was "
                "touched; restore run.json or choose another folder with --output_dir FOLDER."
            ) from error
        old, new = ({**recipe, "card": None} for recipe in (self._completed(known), self.recipe))
        changes = list(_differences(old, new))
        learnt = any(len(of_role) > ledger.get("origin", {}).get("tasks", 0) for of_role in entries.values())
        if changes and (learnt or any(self.folder.glob("work/*/checkpoint-*"))):
            raise RunError(
                f"{self.folder} holds a run of a different recipe; nothing was touched. Differences (there -> "
                f"asked):\n"
                + "\n".join(f"  {change}" for change in changes)
                + "\nAsk for the same recipe to go on with it, or choose another folder with --output_dir FOLDER."
            )
        if not changes:
            self.ledger = {**ledger, "recipe": {**known, "card": self.recipe.get("card")}}
        elif "origin" in ledger:
            self.ledger = {**ledger, "recipe": self.recipe, "stream": None}

    def _completed(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A stored recipe in today's terms; as it is if it cannot be read as one."""
        try:
            return json.loads(json.dumps(self.complete(recipe)))
        except (ValueError, KeyError, TypeError):
            return recipe

    @property
    def finished(self) -> bool:
        """Whether every task is done and the results are written."""
        return self.ledger["finished"]

    @property
    def started(self) -> bool:
        """Whether the run has seen its stream already."""
        return self.ledger["stream"] is not None

    def bind(self, fingerprint: str, class_names: list[list[str]]) -> None:
        """Tie the run to its stream. Raises RunError if it was started on other data."""
        if self.started and self.ledger["stream"] != fingerprint:
            raise RunError(
                f"The data changed since {self.folder} was started (stream {self.ledger['stream']}, now "
                f"{fingerprint}). Restore the data, or start again in another folder with --output_dir FOLDER."
            )
        self.ledger.update(stream=fingerprint, class_names=class_names)
        self._write_ledger()

    # ---- tasks that were learnt elsewhere ----

    @property
    def origin(self) -> dict[str, Any]:
        """Where tasks are from that were learnt elsewhere; empty if there are none."""
        return self.ledger.get("origin", {})

    def to_learn(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of the stream's tasks that are learnt in this run."""
        return [task for task in tasks if task.index >= self.origin.get("tasks", 0)]

    # ---- phases ----

    def result(self, role: str, task: Task) -> TaskResult | None:
        """What a finished (role, task) left behind; None if it is not finished."""
        entries = self.ledger["entries"].get(role, [])
        return TaskResult(**entries[task.index]) if task.index < len(entries) else None

    def checkpoint(self, role: str) -> Path | None:
        """Folder of the newest finished checkpoint of a role; None before its first task is finished."""
        count = len(self.ledger["entries"].get(role, []))
        return self.folder / role / f"task-{count:02d}" if count else None

    def work_folder(self, role: str, task: Task) -> Path:
        """Where the phase in progress keeps the state it can resume from."""
        return self.folder / "work" / f"{role}-{task.name}"

    def scaffold_file(self, role: str, index: int) -> Path:
        """Where the layers that only training needs are kept after a task: outside the model's files."""
        return self.folder / "work" / "scaffold" / f"{role}-task-{index + 1:02d}.safetensors"

    def save_task(
        self, result: TaskResult, task: Task, write: Callable[[Path], None], history: list[dict[str, Any]]
    ) -> None:
        """Store a learnt task: its checkpoint (by `write(folder)`), its loss curve, its ledger entry; in this order.

        Raises RunError if writing fails (a full disk): what was stored before stays whole.
        """
        entries = self.ledger["entries"].setdefault(result.role, [])
        entries.append(dataclasses.asdict(result))
        if not self.writer:
            return
        target = self.folder / result.role / task.name
        partial = target.with_name(f".{task.name}.partial")
        try:
            with saving(f"save {result.role} after {task.name} in {self.folder}"):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write(partial)
                sync(partial)
                shutil.rmtree(target, ignore_errors=True)  # of a kill before the ledger knew of it
                os.replace(partial, target)
                write_json(self.folder / "logs" / f"{result.role}-{task.name}.json", history)
                self._write_ledger()
                self._publish(result.role)
        except RunError:
            shutil.rmtree(partial, ignore_errors=True)
            entries.pop()
            raise
        shutil.rmtree(self.work_folder(result.role, task), ignore_errors=True)
        if task.index > 0:
            self.scaffold_file(result.role, task.index - 1).unlink(missing_ok=True)

    def take_over(self, role: str, task: Task) -> Path | None:
        """Make a phase of the run that the recipe's `ROLE_from` names a phase of this one; its checkpoint, or None.

        Raises RunError if that run has other data, or is not that far.
        """
        if self.recipe.get(f"{role}_from") is None:
            return None
        source, ledger = self._source(role)
        self._refuse(role, source, _differences(ledger["stream"], self.ledger["stream"], "stream"))
        entries = ledger["entries"].get(role, [])
        if task.index >= len(entries):
            raise RunError(
                f"'{role}_from' is {source}, which has learnt {len(entries)} tasks so far, not yet {task.name}. "
                "Finish that run first."
            )
        checkpoint = source / role / task.name
        history = json.loads((source / "logs" / f"{role}-{task.name}.json").read_text())
        result = TaskResult(**entries[task.index])
        self.save_task(result, task, lambda folder: _copy(checkpoint, folder), history)
        return checkpoint

    def _source(self, role: str) -> tuple[Path, dict[str, Any]]:
        """The run that a role is taken from: its folder and ledger."""
        source = Path(self.recipe[f"{role}_from"])
        try:
            return source, json.loads((source / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"'{role}_from' is {source}, which holds no readable run.json: {error}") from error

    def _refuse(self, role: str, source: Path, differences: Iterable[str]) -> None:
        if differences := list(differences):
            raise RunError(
                f"'{role}_from' is {source}, but its {role} learns something else. Differences (there -> asked):\n"
                + "\n".join(f"  {difference}" for difference in differences)
            )

    def save_result(self, result: TaskResult) -> None:
        """Add the measured accuracies to the ledger entry of a learnt task."""
        self.ledger["entries"][result.role][result.task] = dataclasses.asdict(result)
        self._write_ledger()

    # ---- results ----

    def results(self) -> dict[str, Any]:
        """Everything measured so far, as it is written to results.json."""
        roles = {}
        for role, entries in self.ledger["entries"].items():
            done = [entry for entry in entries if entry["row"]]
            if not done:
                continue
            matrix = [entry["row"] for entry in done]
            counts = [_latest(entry["counts"][i] for entry in done[i:]) for i in range(len(done))]
            metrics = continual_metrics(matrix, counts)
            leading = ("average_accuracy", "official_forgetting") if report.follows_cdl(self.ledger) else ()
            roles[role] = {
                "label": self.ledger.get("labels", {}).get(role, role),
                "accuracy_matrix": matrix,
                "correct": [entry["correct"] for entry in done],
                "counts": counts,
                "metrics": {**{name: metrics[name] for name in leading}, **metrics},
                **{key: [entry.get(key) for entry in done] for key in _LISTED},
            }
            if role in self.ledger.get("costs", {}):
                roles[role]["cost"] = self.ledger["costs"][role]
        return {
            "name": self.recipe.get("name", self.folder.name),
            "seed": self.recipe.get("seed"),
            "finished": self.finished,
            "recipe": self.recipe,
            "versions": self.ledger["versions"],
            "stream": self.ledger["stream"],
            "class_names": self.ledger["class_names"],
            **({"origin": self.origin} if self.origin else {}),
            "roles": roles,
        }

    def set_labels(self, labels: dict[str, str]) -> None:
        """Readable names of the roles, for tables and pictures."""
        self.ledger["labels"] = labels

    def set_costs(self, costs: dict[str, dict[str, Any]]) -> None:
        """What each role's model costs in use; the bytes of its weights are added here."""
        for role, cost in costs.items():
            files = [*(self.checkpoint(role) or self.folder).glob("*.safetensors")]
            self.ledger.setdefault("costs", {})[role] = {**cost, "bytes": sum(file.stat().st_size for file in files)}

    def set_hub(self, fields: dict[str, Any]) -> None:
        """Where the run is pushed to, for a push at another time; written at once."""
        if self.ledger.get("hub") != fields:
            self.ledger["hub"] = fields
            self._write_ledger()

    def finish(self) -> str:
        """Draw the pictures, write results.json, mark the run as finished and return the table for the console."""
        results = {**self.results(), "finished": True}
        if self.writer:
            if report.plotting_available():
                with saving(f"draw the pictures in {self.folder}"):
                    report.save_plots(results, self.folder)
            shutil.rmtree(self.folder / "work", ignore_errors=True)
            write_json(self.folder / "results.json", results)  # last: who finds it finished need not ask the ledger
        self.ledger["finished"] = True
        self._write_ledger()
        self._lock.release(force=True)
        return report.table(results)

    # ---- files ----

    def _publish(self, role: str) -> None:
        """Copy the newest checkpoint of a role to ROLE/, file by file, each replaced at once; the weights last."""
        newest = self.checkpoint(role)
        if newest is None:
            return
        files = [path for path in newest.rglob("*") if path.is_file()]
        for source in sorted(files, key=lambda path: path.suffix == ".safetensors"):
            target = newest.parent / source.relative_to(newest)
            target.parent.mkdir(exist_ok=True)
            if not target.exists() or target.read_bytes() != source.read_bytes():
                partial = target.with_name(f".{target.name}.partial")
                shutil.copyfile(source, partial)
                os.replace(partial, target)

    def _write_ledger(self) -> None:
        if self.writer:
            write_json(self.folder / "run.json", self.ledger)


def _latest(counts: Iterable[int]) -> int:
    """How many test images a task had when it was last measured."""
    return next((count for count in reversed([*counts]) if count), 0)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _makes(recipe: dict[str, Any], role: str) -> dict[str, Any]:
    """What a role's phases depend on in a recipe."""
    student = recipe["student"]
    return {
        **{key: recipe[key] for key in (role, "data", "train", "seed", "normalise")},
        "student": {key: student[key] for key in ("backbone", "revision")},
    }


def _differences(old: Any, new: Any, path: str = "") -> Any:
    """The places where two recipes differ, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old!r} -> {new!r}"
