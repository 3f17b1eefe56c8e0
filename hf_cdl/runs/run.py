"""A run on disk: which phases are finished, where their checkpoints are, and what was measured.

Layout of a run's folder: `run.json` the ledger; `ROLE/task-01`, ... one loadable checkpoint per task, which share the
files of what has not changed (sharing.py), and in `ROLE/` itself a copy of the newest; `logs/` the loss curves;
`work/` the state of the phase in progress; at the end `results.json` and the pictures. Every file appears under its
name only once it is complete, so a kill or a full disk at any moment leaves the last state intact, and the same
command resumes from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_cdl.runs import pictures, report
from hf_cdl.runs.files import RunError, damage, fingerprint, make_folder, make_way, read_json, saving, sync, write_json
from hf_cdl.runs.ledger import (
    FORMAT,
    check_plugins,
    data_changes,
    differences,
    lasting,
    new_ledger,
    plugin_hashes,
    read_ledger,
    revision_name,
    revisions,
    shortened,
)
from hf_cdl.runs.page import PAGE, RESULTS, is_whole, save_page
from hf_cdl.runs.repair import examine, restore, unreadable
from hf_cdl.runs.results import ledger_results
from hf_cdl.runs.sharing import publish, put_revision
from hf_cdl.runs.source import Source
from hf_cdl.types import Task, TaskResult


class Run:
    """The run in `folder`, for a recipe given as a plain dict; opens an existing run or starts a new one.

    Only the process with `writer` writes and locks; the others keep the ledger in memory. Raises RunError if the
    folder belongs to another recipe or to something else, or if another process is using it. Until something has been
    learnt in a folder, it accepts any recipe. `complete` adds to a stored recipe the fields that its version did not
    know, so a new field with its default is not a difference. `say` prints what was damaged and what was done.

    A run may continue from models that learnt their first tasks elsewhere: see continuation.py.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe: dict[str, Any],
        writer: bool = True,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda recipe: recipe,
        say: Callable[[str], Any] = print,
    ):
        self.folder = Path(folder)
        self.recipe = json.loads(json.dumps(recipe))  # as it will be read back
        self.writer, self.complete, self.say = writer, complete, say
        self.ledger: dict[str, Any] = new_ledger(self.recipe)
        self._lines: dict[bytes, str] = {}  # of run.json, as written before
        self._made: list[Path] = []  # folders and files that did not exist before
        self._lock = FileLock(self.folder / ".lock", is_singleton=True)  # one per process
        self._open()
        self._note_plugins()
        if self.recipe.get("teacher_from") is not None and not self.finished:
            Source(self.recipe, "teacher").check_recipe(self._completed)
        if writer and not self.finished:
            self._made = [path for path in (self.folder / "run.json", self.folder / ".lock") if not path.exists()]
            self._acquire()
            self._open()  # again: another process may have continued the run before we got the lock
            self._note_plugins()
            found = examine(self.folder, self.ledger)
            restore(self.folder, self.ledger, found)  # also after a kill between checkpoint and copy
            for line in found.said:
                self.say(line)

    def _acquire(self) -> None:
        try:
            with saving(f"open the run in {self.folder}"):
                self._made += make_folder(self.folder)
                self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"Another process is running in {self.folder}; wait for it or stop it first.") from None

    def close(self) -> None:
        """Release the lock. If nothing was learnt, remove what this object created, and nothing else."""
        kept = any(self.folder.glob("work/*/checkpoint-*")) or any(self.ledger["entries"].values())
        if self._lock.is_locked and not kept:
            if self.folder / "run.json" in self._made:
                for name in ("work", "logs"):  # of an interrupted phase; trackers write into logs/
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            for path in self._made:
                with contextlib.suppress(OSError):  # keep a folder that is not empty
                    path.rmdir() if path.is_dir() else path.unlink()
        self._made = []
        self._lock.release(force=True)

    def _open(self) -> None:
        """Load the ledger in the folder, if there is one."""
        with saving(f"open the run in {self.folder}"):  # fails for a name that is too long, for example
            there = (self.folder / "run.json").exists()
        if not there:
            ours = {".lock", ".run.json.partial"}  # left by a kill before the ledger was written
            if self.writer and self.folder.exists() and not self.folder.is_dir():
                raise RunError(f"{self.folder} is a file; choose another folder with --output_dir FOLDER.")
            if self.writer and self.folder.exists() and any(path.name not in ours for path in self.folder.iterdir()):
                raise RunError(
                    f"{self.folder} is not empty and holds no run (no run.json). Nothing in it was touched; choose "
                    "another folder with --output_dir FOLDER."
                )
            return
        ledger = {"files": {}, **read_ledger(self.folder), "format": FORMAT}
        known, entries = ledger["recipe"], ledger["entries"]
        old, new = (lasting(recipe) for recipe in (self._completed(known), self.recipe))
        changes = list(differences(old, new))
        learnt = any(len(of_role) > ledger.get("origin", {}).get("tasks", 0) for of_role in entries.values())
        learnt = learnt or any(self.folder.glob("work/*/checkpoint-*"))
        if changes and learnt:
            raise RunError(
                f"{self.folder} holds a run of a different recipe; nothing was touched. Differences (there -> "
                f"asked):\n"
                + shortened(changes)
                + "\nGive the same recipe to resume it, or choose another folder with --output_dir FOLDER."
            )
        if learnt:
            check_plugins(self.folder, ledger, self.recipe.get("plugins"))
        if not changes:
            self.ledger = {**ledger, "recipe": {**known, "card": self.recipe.get("card")}}
        elif "origin" in ledger:
            self.ledger = {**ledger, "recipe": self.recipe, "stream": None}

    def _note_plugins(self) -> None:
        """Note in the ledger what the recipe's plugins are, unless the run was finished without saying so."""
        now = plugin_hashes(self.recipe.get("plugins"))
        if now and not self.finished:
            self.ledger["plugins"] = {**self.ledger.get("plugins", {}), **now}

    def _completed(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A stored recipe in its current form; unchanged if it cannot be read as a recipe."""
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
        """Whether the run has already been bound to a stream."""
        return self.ledger["stream"] is not None

    def bind(
        self,
        fingerprint: str,
        class_names: list[list[str]],
        images: Mapping[str, list[int]] | None = None,
        unlabelled: Mapping[str, Any] | None = None,
        before: str | None = None,
    ) -> None:
        """Bind the run to its stream. Raises RunError, naming what changed, if it was started on other data.

        `images`: split -> image counts per class, in stream order. `unlabelled`: the number of `images` without
        labels, and the `terms` that learn from them. `before`: the stream's fingerprint before the bad image that had
        stopped the run was repaired.
        """
        if self.started and self.ledger["stream"] not in (fingerprint, before):
            changes = data_changes(self.ledger, class_names, images or {}, (unlabelled or {}).get("images", 0))
            raise RunError(
                f"The data changed since {self.folder} was started (stream {self.ledger['stream']}, now "
                f"{fingerprint}): {changes}.\nRestore the data, or start again in another folder with "
                "--output_dir FOLDER. New classes alone can be learnt on top of it: see hf-cdl add."
            )
        if not self.finished:
            if self.started and self.ledger["stream"] != fingerprint:
                self.ledger.setdefault("started_on", before)
            self.ledger.pop("bad_image", None)
            known = {"images": images, "unlabelled": unlabelled}.items()
            self.ledger.update({name: dict(value) for name, value in known if value is not None})
            self.ledger.update(stream=fingerprint, class_names=class_names)
            self._write_ledger()

    def stopped_by(self, image: tuple[str, int, int]) -> None:
        """Record a bad image (split, row, bytes), in the process that found it; once repaired, the run resumes."""
        write_json(self.folder / "run.json", {**self.ledger, "bad_image": image})

    # ---- tasks learnt elsewhere ----

    @property
    def origin(self) -> dict[str, Any]:
        """Origin of the tasks that were learnt elsewhere; empty if there are none."""
        return self.ledger.get("origin", {})

    def to_learn(self, tasks: Iterable[Task]) -> list[Task]:
        """The stream's tasks that are learnt in this run."""
        return [task for task in tasks if task.index >= self.origin.get("tasks", 0)]

    # ---- phases ----

    def result(self, role: str, task: Task) -> TaskResult | None:
        """The result of a (role, task); None if it is not finished."""
        entries = self.ledger["entries"].get(role, [])
        return TaskResult(**entries[task.index]) if task.index < len(entries) else None

    def checkpoint(self, role: str) -> Path | None:
        """Folder of a role's newest finished checkpoint; None before its first task is finished."""
        count = revisions(self.ledger, role)
        return self.folder / role / revision_name(count) if count else None

    def work_folder(self, role: str, task: Task) -> Path:
        """Folder where the phase in progress keeps the state it can resume from."""
        return self.folder / "work" / f"{role}-{task.name}"

    def history_file(self, role: str, task: Task) -> Path:
        """File of a phase's log, a list of lines with their step; written when the phase is finished."""
        return self.folder / "logs" / f"{role}-{task.name}.json"

    def scaffold_file(self, role: str, index: int) -> Path:
        """File of the layers that only training needs, kept after a task outside the model's files."""
        return self.folder / "work" / "scaffold" / f"{role}-task-{index + 1:02d}.safetensors"

    def save_task(
        self, result: TaskResult, task: Task, write: Callable[[Path], None], history: list[dict[str, Any]]
    ) -> None:
        """Store a learnt task: its checkpoint (by `write(folder)`), loss curve and ledger entry, in this order.

        Raises RunError if writing fails (a full disk), or if it is not the role's next task; what was stored before
        stays intact.
        """
        entries, files = self.ledger["entries"].setdefault(result.role, []), dict(self.ledger["files"])
        self._check_place(result, len(entries), len(entries))
        entries.append(dataclasses.asdict(result))
        if not self.writer:
            return
        try:
            with saving(f"save {result.role} after {task.name} in {self.folder}"):
                put_revision(self.folder, self.ledger, result.role, write)
                write_json(self.history_file(result.role, task), history)
                self._note_files(result.role, task)
                self._write_ledger()
                publish(self.folder, self.ledger, result.role)
        except BaseException:  # Ctrl-C too: the ledger in memory must not know more than the one in the file
            entries.pop()
            self.ledger["files"] = files
            raise
        shutil.rmtree(self.work_folder(result.role, task), ignore_errors=True)
        if task.index > 0:
            self.scaffold_file(result.role, task.index - 1).unlink(missing_ok=True)

    def _note_files(self, role: str, task: Task) -> None:
        """Add the fingerprints of a finished task's files beside its checkpoint to the ledger."""
        scaffold, before = (self.scaffold_file(role, index) for index in (task.index, task.index - 1))
        known = self.ledger["files"]
        known.pop(before.relative_to(self.folder).as_posix(), None)  # about to be deleted
        for file in (self.history_file(role, task), scaffold):
            if file.exists():
                known[file.relative_to(self.folder).as_posix()] = fingerprint(file)

    def check_source(self, fingerprint: str, tasks: Sequence[Task]) -> None:
        """Check, before training, that the run named by `teacher_from` has learnt all these tasks of this stream.

        Raises RunError if it has other data, has not reached a task, or lacks files.
        """
        if self.recipe.get("teacher_from") is None or self.finished:
            return
        source = Source(self.recipe, "teacher")
        source.check_stream(fingerprint)
        for task in tasks:
            if self.result("teacher", task) is None:
                source.files(task, thorough=False)

    def taken(self, role: str, task: Task) -> tuple[Path, TaskResult, list[dict[str, Any]]] | None:
        """Checkpoint, result and loss curve of a phase of the run named by the recipe's `ROLE_from`.

        None without that field. Load the checkpoint but do not copy it: it may contain any file. Raises RunError if
        that run has other data or has not reached the task.
        """
        if self.recipe.get(f"{role}_from") is None:
            return None
        source = Source(self.recipe, role)
        source.check_stream(self.ledger["stream"])
        checkpoint, curve = source.files(task)
        return checkpoint, source.result(task), read_json(curve)

    def save_result(self, result: TaskResult) -> None:
        """Add the measured accuracies to the ledger entry of a learnt task. Raises RunError if there is none."""
        entries = self.ledger["entries"].get(result.role, [])
        self._check_place(result, 0, len(entries) - 1)
        entries[result.task] = dataclasses.asdict(result)
        self._write_ledger()

    def _check_place(self, result: TaskResult, first: int, last: int) -> None:
        """Raise RunError unless the number of a result's task lies in first .. last; its ledger could not be read."""
        if not first <= result.task <= last:
            count = len(self.ledger["entries"].get(result.role, []))
            raise RunError(
                f"The run in {self.folder} holds {count} learnt tasks of the role {result.role!r}, so a result of "
                f"task {result.task + 1} has no place in it. Nothing was stored; learn and measure the tasks in order."
            )

    # ---- results ----

    def results(self) -> dict[str, Any]:
        """Everything measured so far, as written to results.json."""
        return ledger_results({**self.ledger, "recipe": self.recipe}, self.folder.name)

    def set_labels(self, labels: dict[str, str]) -> None:
        """Set readable names of the roles, for tables and pictures."""
        self.ledger["labels"] = labels

    def set_costs(self, costs: dict[str, dict[str, Any]]) -> None:
        """Set the inference cost of each role's model; the size of its weights in bytes is added here."""
        for role, cost in costs.items():
            files = [*(self.checkpoint(role) or self.folder).glob("*.safetensors")]
            self.ledger.setdefault("costs", {})[role] = {**cost, "bytes": sum(file.stat().st_size for file in files)}

    def set_settings(self, role: str, settings: dict[str, Any]) -> None:
        """Store the settings with which a role learns; written at once."""
        if self.ledger.get("settings", {}).get(role) != settings:
            self.ledger["settings"] = {**self.ledger.get("settings", {}), role: settings}
            self._write_ledger()

    def set_hub(self, fields: dict[str, Any]) -> None:
        """Store where the run is pushed to, for a later push; written at once."""
        if self.ledger.get("hub") != fields:
            self.ledger["hub"] = fields
            self._write_ledger()

    def finish(self) -> str:
        """Draw the pictures, write results.json, mark the run as finished and return the table for the console."""
        results = ledger_results({**self.ledger, "recipe": self.recipe, "finished": True}, self.folder.name)
        if self.writer:
            files = {path: stored for path, stored in self.ledger["files"].items() if not path.startswith("work/")}
            files |= self._draw(results)
            shutil.rmtree(self.folder / "work", ignore_errors=True)
            write_json(self.folder / RESULTS, results)  # last: whoever finds it need not check the ledger
            self.ledger["files"] = {**files, RESULTS: fingerprint(self.folder / RESULTS)}
        self.ledger["finished"] = True
        self._write_ledger()
        self._lock.release(force=True)
        return report.table(results)

    def _draw(self, results: dict[str, Any]) -> dict[str, list[Any]]:
        """Draw the pictures, if matplotlib is available, and make the page; returns the fingerprints of the former."""
        with saving(f"draw the pictures in {self.folder}"):
            drawn = pictures.save_plots(results, self.folder) if pictures.plotting_available() else []
            for picture in drawn:
                sync(picture)
            save_page(results, self.folder)
        return {picture.name: fingerprint(picture) for picture in drawn}

    def check(self) -> None:
        """Check that a finished run has all its files, restore what can be restored, and report what was done.

        Sizes and modification times of all files are compared with what was stored, for the newest checkpoint and its
        copy in ROLE/ also the content. Raises RunError, naming what is lost, if something cannot be restored.
        """
        if not self.writer:
            return
        found, files, results = examine(self.folder, self.ledger), self.ledger["files"], self.folder / RESULTS
        problem = damage(results, files[RESULTS]) if RESULTS in files else unreadable(results)
        pictures = [path for path in files if path.endswith(".png") and "/" not in path]
        pictures = [path for path in pictures if damage(self.folder / path, files[path], thorough=False)]
        pictures += [] if is_whole(self.folder / PAGE) else [PAGE]
        if found.copies or found.gone or problem or pictures:
            self._acquire()
            try:
                restore(self.folder, self.ledger, found)
                if problem:
                    write_json(results, self.results())
                    files[RESULTS] = fingerprint(results)
                    found.said.append(f"{results} {problem}; it is written again from run.json.")
                if pictures:
                    for path in pictures:
                        with saving(f"restore {self.folder / path}"):
                            make_way(self.folder / path)
                    files |= (drawn := self._draw(self.results()))
                    how = "are" if drawn or pictures == [PAGE] else "can, after: pip install 'hf-cdl[report]', be"
                    lost = f"{', '.join(pictures)} in {self.folder} were missing or damaged"
                    found.said.append(f"{lost}; they {how} made again.")
                self._write_ledger()
            finally:
                self._lock.release(force=True)
        for line in found.said:
            self.say(line)

    # ---- files ----

    def _write_ledger(self) -> None:
        if self.writer:
            write_json(self.folder / "run.json", self.ledger, self._lines)
