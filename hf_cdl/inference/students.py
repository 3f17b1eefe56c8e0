"""Finding a trained model for use: in a run's folder, in a checkpoint's, or on the Hub, at any of its revisions.

Nothing of it is run, and nothing pickled is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from hf_cdl.backbones.loading import read_config
from hf_cdl.escape import visible
from hf_cdl.hub import HubError
from hf_cdl.hub.content import finished_revisions
from hf_cdl.hub.folder import is_run, known_states, results_of
from hf_cdl.models.classifier import ImageClassifier, labels_of
from hf_cdl.models.modeling_cdl import CDLForImageClassification
from hf_cdl.places import HUB_ID
from hf_cdl.recipe.build import load_processor
from hf_cdl.runs.files import RunError, read_json
from hf_cdl.runs.ledger import CHANGED, revision_name
from hf_cdl.runs.results import checked_results
from hf_cdl.types import is_ours


@dataclass(frozen=True)
class Student:
    """A stored model. `place`: its folder, or its Hub id, whose `revision` it is (None: the newest)."""

    place: str
    revision: str | None = None
    role: str = CHANGED
    results: Mapping[str, Any] | None = None
    """Results of the run that it is from; None if they are not beside it."""
    state: str | None = None
    """Its revision in that run, task-NN; None: its newest."""

    @property
    def name(self) -> str:
        return visible(self.place if self.revision is None else f"{self.place} at {self.revision}")

    @property
    def short(self) -> str:
        """Its revision, else the last part of its name: for tables, pictures and file names."""
        return visible(self.revision or self.state or Path(self.place).name)

    @property
    def measured(self) -> int | None:
        """Index of the task after which its accuracy was last measured; None if it never was."""
        if self.results is None or self.role not in self.results["roles"]:
            return None
        tasks = len(self.results["roles"][self.role]["accuracy_matrix"])
        number = tasks if self.state is None else int(self.state[5:])
        return min(number, tasks) - 1 if tasks else None

    @property
    def changes(self) -> int:
        """Number of changes since it was last measured."""
        tasks = len(self.results["class_names"]) if self.results is not None else 0
        finished = finished_revisions(self.results, self.role) if self.results is not None else 0
        return max(0, (finished if self.state is None else int(self.state[5:])) - tasks)


def find_student(name: str, revision: str | None = None) -> Student:
    """Find the model that a user names; in a run's folder the newest student, or its `revision` (task-NN).

    Raises RunError for a folder without a model, and HubError for a name that cannot be a repository.
    """
    place = Path(name).expanduser()
    if place.is_dir():
        return _in_folder(place, revision)
    if place.exists():
        raise RunError(f"{visible(name)} is a file. Give a run's folder, a checkpoint's, or OWNER/NAME on the Hub.")
    if not HUB_ID.fullmatch(name):
        raise HubError(
            f"There is no folder {visible(name)}, and no repository of this name. Give a run's folder "
            "(runs/quickstart), a checkpoint's, or OWNER/NAME on the Hub."
        )
    return _on_hub(Student(name, revision))


def _in_folder(place: Path, revision: str | None) -> Student:
    root = next((folder for folder in (place, *place.resolve().parents[:2]) if is_run(folder)), None)
    role, *inside = (place.resolve().relative_to(root.resolve()).parts if root is not None else ()) or ("",)
    if root is not None and not inside:
        return _in_run(place if role else place / CHANGED, root, role or CHANGED, revision)
    if revision is not None:
        raise RunError(
            f"{visible(place)} is one checkpoint, so --revision {visible(revision)} chooses nothing. Name its run's "
            "folder, or leave --revision out."
        )
    if not (place / "config.json").exists():
        raise RunError(
            f"{visible(place)} is neither a run's folder (run.json or results.json) nor a checkpoint's (config.json). "
            "Name one, such as runs/quickstart or runs/quickstart/student/task-03."
        )
    results = None if root is None else results_of(root)
    if results is None or inside[0] not in _revisions(results, role):
        return Student(str(place))
    return Student(str(place), None, role, results, inside[0])


def _in_run(folder: Path, root: Path, role: str, revision: str | None) -> Student:
    """A revision of a role of a run, in the role's folder; None: the newest."""
    known = known_states(root, role)  # a kill may have left another folder there
    states = [state for state in known if (folder / state / "config.json").exists()]
    if not states or revision not in (None, *states):
        raise RunError(
            f"{visible(root)} has no {visible(role)}{'' if revision is None else f' {visible(revision)}'}; it has "
            f"{', '.join(states) or 'none'}. "
            f"{'Name one of these with --revision' if states else 'Name another run, or a checkpoint'}."
        )
    state = revision or states[-1]
    return Student(str(folder / state), None, role, results_of(root), state)


def _revisions(results: Mapping[str, Any], role: str) -> list[str]:
    return [revision_name(number + 1) for number in range(finished_revisions(results, role))]


def _on_hub(student: Student) -> Student:
    """The same student, with the results beside it if they exist and can be read."""
    with _hub_errors(student):
        read_config(student.place, student.revision)
    try:
        file = hf_hub_download(student.place, "results.json", revision=student.revision)
        results = checked_results(read_json(Path(file)), f"results.json of {student.name}")
    except (OSError, RunError):  # another's model, or no network: all that is lost is a comparison
        return student
    return Student(student.place, student.revision, results.get("role", CHANGED), results)


def _first_line(error: Exception) -> str:
    """The first line of the underlying error: what the Hub reported."""
    return str(error.__cause__ or error).strip().split("\n")[0]


@contextmanager
def _hub_errors(student: Student) -> Iterator[None]:
    """Turn errors while a model is read from the Hub into a HubError."""
    try:
        yield
    except (OSError, HFValidationError, ValueError) as error:
        if Path(student.place).is_dir():
            raise
        raise HubError(
            f"There is no folder {visible(student.place)}, and from the Hub {student.name} cannot be loaded: "
            f"{_first_line(error)} Give a run's folder, a checkpoint's, or OWNER/NAME; for a private one log in with "
            "`hf auth login`."
        ) from error


def load(student: Student) -> tuple[nn.Module, Any]:
    """Load a model and its image processor, for evaluation.

    Raises ValueError for a checkpoint that is incomplete, damaged, has NaN weights, or knows no classes yet.
    """
    place, revision = student.place, student.revision
    with _hub_errors(student):
        if is_ours(read_config(place, revision)):
            model: Any = CDLForImageClassification.from_pretrained(place, revision=revision)
        else:
            model = ImageClassifier.from_pretrained(place, revision).model
    if not labels_of(model.config):
        raise ValueError(f"{student.name} knows no classes yet. Train it first, or name another checkpoint.")
    return model.eval().requires_grad_(False), load_processor(place, revision)
