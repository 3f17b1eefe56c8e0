"""Another run, whose trained role is used instead of training it again (`teacher_from` in a recipe)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_cdl.counted import counted
from hf_cdl.runs.files import RunError, damage
from hf_cdl.runs.ledger import differences, edited_plugins, labelled_part, plugin_hashes, read_ledger, shortened
from hf_cdl.runs.repair import unreadable
from hf_cdl.types import Task, TaskResult


class Source:
    """The run that `ROLE_from` in a recipe names; nothing is written there.

    Raises RunError if it is not a run; its checks raise RunError if the role learns something else there or its files
    are damaged.
    """

    def __init__(self, recipe: dict[str, Any], role: str):
        self.recipe, self.role = recipe, role
        self.folder = Path(recipe[f"{role}_from"])
        try:
            self.ledger = read_ledger(self.folder)
        except RunError as error:
            raise RunError(f"'{role}_from' is {self.folder}, which holds no readable run.json: {error}") from error

    def check_recipe(self, complete: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Check that the role learns the same there as here; `complete` updates a stored recipe to today's form.

        A plugin of the same path, or else of the same file name, must have the same content.
        """
        if edited := edited_plugins(self._plugins(), self.recipe.get("plugins")):
            raise RunError(
                f"'{self.role}_from' is {self.folder}, where {', '.join(edited)} in 'plugins' had other content: its "
                f"{self.role} may be of another method. Nothing was touched. Put the old content back, or leave "
                f"'{self.role}_from' out: then the {self.role} is trained."
            )
        theirs = _makes(complete(self.ledger["recipe"]), self.role)
        self._refuse(differences(theirs, _makes(self.recipe, self.role)))

    def _plugins(self) -> dict[str, dict[str, str]]:
        """What the other run's ledger records of the plugins that are named here."""
        stored = self.ledger.get("plugins", {})
        found = {}
        for file, now in plugin_hashes(self.recipe.get("plugins")).items():
            same = [known for path, known in stored.items() if path == file]
            same = same or [known for path, known in stored.items() if Path(path).name == Path(file).name]
            found |= {file: now if now in same else same[0]} if same else {}
        return {"plugins": found}

    def check_stream(self, fingerprint: str | None) -> None:
        """Check that both runs have the same stream; what is taken over has not learnt from unlabelled images."""
        self._refuse(differences(labelled_part(self.ledger["stream"]), labelled_part(fingerprint), "stream"))

    def result(self, task: Task) -> TaskResult:
        """The results measured after a task."""
        return TaskResult(**self.ledger["entries"][self.role][task.index])

    def files(self, task: Task, thorough: bool = True) -> tuple[Path, Path]:
        """Checkpoint and loss curve of a task.

        Raises RunError if the run has not reached the task, or the files changed (if `thorough`, by their content).
        """
        role, source, ledger = self.role, self.folder, self.ledger
        count = len(ledger["entries"].get(role, []))
        if task.index >= count:
            raise RunError(
                f"'{role}_from' is {source}, which has learnt {counted(count, 'task')} so far, not yet {task.name}. "
                f"Finish that run first, or leave '{role}_from' out: then the {role} is trained."
            )
        checkpoint, curve = source / role / task.name, source / "logs" / f"{role}-{task.name}.json"
        if links := [path for path in (checkpoint, *sorted(checkpoint.rglob("*")), curve) if path.is_symlink()]:
            raise RunError(
                f"'{role}_from' is {source}, but {links[0]} is a link, which may stand for any file. Put a copy of "
                f"the file itself there, or leave out '{role}_from': then the {role} is trained."
            )
        known = ledger.get("files", {})
        for file in (curve, *(source / path for path in known if path.startswith(f"{role}/{task.name}/"))):
            stored = known.get(file.relative_to(source).as_posix())
            if problem := unreadable(file) if stored is None else damage(file, stored, thorough):
                raise RunError(
                    f"'{role}_from' is {source}, but {file} {problem}. Run its own command again, which restores what "
                    "can be restored, or leave out this field: then the role is trained."
                )
        return checkpoint, curve

    def _refuse(self, differences: Iterable[str]) -> None:
        if found := list(differences):
            raise RunError(
                f"'{self.role}_from' is {self.folder}, but its {self.role} learns something else. Differences (there "
                "-> asked):\n"
                + shortened(found)
                + f"\nAsk for the same as there, or leave '{self.role}_from' out: then the {self.role} is trained."
            )


def _makes(recipe: dict[str, Any], role: str) -> dict[str, Any]:
    """The parts of a recipe that a role's phases depend on."""
    student, own = recipe["student"], recipe[role]
    if own is not None:
        own = {**own, "train": _learns(own.get("train"))}
    return {
        **{role: own, "train": _learns(recipe["train"])},
        **{key: recipe[key] for key in ("seed", "normalise")},
        "data": {key: value for key, value in recipe["data"].items() if not key.startswith(("unlabelled", "foreign"))},
        "student": {key: student[key] for key in ("backbone", "revision")},
    }


def _learns(train: dict[str, Any] | None) -> dict[str, Any] | None:
    """Training arguments without the one that says only where a teacher's weights are."""
    return train and {key: value for key, value in train.items() if key != "shard_teacher"}
