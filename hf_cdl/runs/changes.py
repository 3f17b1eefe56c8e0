"""Changes of a finished run's student: each makes a new revision, and no revision is ever overwritten."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_cdl.counted import counted
from hf_cdl.runs.files import RunError, fingerprint, first_line, link, saving, write_json
from hf_cdl.runs.learnt import Moves, moves_file
from hf_cdl.runs.ledger import (
    CHANGED,
    LONGEST_NAME,
    LONGEST_SAID,
    read_ledger,
    revision_name,
    revisions,
    state_before,
    stored_tasks,
)
from hf_cdl.runs.page import save_page
from hf_cdl.runs.repair import examine, restore
from hf_cdl.runs.run import RESULTS, Run
from hf_cdl.runs.sharing import publish, put_revision


class ChangingRun(Run):
    """The finished run in `folder`, to change its student.

    Raises RunError if it is not finished, or holds no run.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], Any] = print):
        super().__init__(folder, read_ledger(Path(folder))["recipe"], say=say)
        self._known = len(self.changes)
        if not self.finished:
            self.close()
            raise RunError(
                f"The run in {self.folder} is not finished, and its next tasks build on the student as it is. Finish "
                "it first: the command that started it resumes it."
            )

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the run's lock while its student is changed. Raises RunError if another process uses it."""
        self._acquire()
        try:
            self._open()  # another process may have changed it before we got the lock
            self._known = len(self.changes)
            found = examine(self.folder, self.ledger)
            restore(self.folder, self.ledger, found)
            for line in found.said:
                self.say(line)
            yield
        finally:
            self._lock.release(force=True)

    def save_change(self, change: dict[str, Any], write: Callable[[Path], None], moves: Moves = ()) -> str:
        """Store the changed student as the next revision (by `write(folder)`), within `changing`; returns its name.

        `change`: as in the ledger, without revision and time; `moves`: the images that it moved. Raises RunError if
        writing fails; what was stored before stays intact, also after a kill.
        """
        for name in (name for task in change["class_names"] for name in task if len(name) > LONGEST_NAME):
            raise RunError(
                f"A class name has {counted(len(name), 'character')}; at most {LONGEST_NAME:,} can be stored. Shorten "
                "it."
            )
        if len(change["said"]) > LONGEST_SAID:
            change = {**change, "said": f"{change['said'][:LONGEST_SAID]} ..."}
        number, before = revisions(self.ledger, CHANGED) + 1, json.loads(json.dumps(self.ledger))
        name, results = revision_name(number), self.folder / RESULTS
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.ledger.setdefault("changes", []).append({"revision": number, **change, "time": now})
        try:
            with saving(f"save the student as {name} in {self.folder}"):
                put_revision(self.folder, self.ledger, CHANGED, write)
                write_json(moves_file(self.folder, number), moves)
                write_json(results, self.results())
                self.ledger["files"][RESULTS] = fingerprint(results)
                self._write_ledger()
        except BaseException:  # Ctrl-C too: the ledger in memory must not know more than the one in the file
            self.ledger = before
            raise
        try:
            publish(self.folder, self.ledger, CHANGED)
            save_page(self.results(), self.folder)
        except (OSError, RunError) as error:
            raise RunError(
                f"The change is stored as {name}, so do not make it again; but {self.folder / CHANGED}/ could not be "
                f"updated: {first_line(error)}. Make room or fix the folder; the next command that changes "
                "this run, or trains it, repairs that."
            ) from error
        return name

    def stored(self) -> dict[str, Any] | None:
        """The change stored since the run's lock was taken, also by a command that was then stopped."""
        return next(iter(read_ledger(self.folder).get("changes", [])[self._known :]), None)

    def undo(self, get: Callable[[int, Path], Any]) -> None:
        """Go back, with a new revision, to the student before its last change that is not undone; within `changing`.

        `get(revision, folder)` puts an earlier revision that is not in this run into a folder. Raises RunError if
        there is no change to undo.
        """
        last = revisions(self.ledger, CHANGED)
        back = state_before(self.ledger, last)
        if back is None:
            raise RunError(f"There is no change to undo in {self.folder}: its student is as it was after its tasks.")
        source, change = self.folder / CHANGED / revision_name(back), self._change_of(back)
        undone = next(c for c in self.changes if c["revision"] == back + 1)

        def copy(folder: Path) -> None:
            if source.name in stored_tasks(self.ledger, CHANGED):
                shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=lambda a, b: link(Path(a), Path(b)))
            else:
                get(back, folder)

        names = self.ledger["class_names"] if change is None else change["class_names"]
        self.save_change(
            {
                "kind": "undo",
                "said": f"Undone: {undone['said']} The student is that of {revision_name(back)} again.",
                "class_names": names,
                "images": {name: -count for name, count in undone["images"].items()},
                "choices": {} if change is None else change["choices"],
                "state": back,
            },
            copy,
        )

    @property
    def changes(self) -> list[dict[str, Any]]:
        """All changes so far, oldest first."""
        return self.ledger.get("changes", [])

    def _change_of(self, number: int) -> dict[str, Any] | None:
        return next((change for change in self.changes if change["revision"] == number), None)
