"""Continuing from a published model, so that another run can learn the next task with it.

The model is untrusted: only files matching CHECKPOINT are taken, none of which contains code or pickles, and nothing
is run. folder.py does the same for a local folder.
"""

from __future__ import annotations

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open
from typing_extensions import Self

from hf_cdl.counted import counted
from hf_cdl.escape import visible
from hf_cdl.hub.content import classes_of, finished_revisions
from hf_cdl.hub.repository import HubError, digests
from hf_cdl.runs.files import CHECKPOINT, LARGEST, RunError, read_json
from hf_cdl.runs.ledger import CHANGED, last_learnt
from hf_cdl.runs.results import checked_results
from hf_cdl.types import is_ours


@dataclass(frozen=True)
class Origin(ABC):
    """A stored model, from which a run can continue."""

    role: str
    revision: int
    """Number of tasks learnt, and of changes of a student after them."""
    results: dict[str, Any]
    """The checked content of its results.json."""

    @property
    def changes(self) -> list[dict[str, Any]]:
        """The changes of the student after its tasks, oldest first."""
        kept = self.results.get("changes", []) if self.role == CHANGED else []
        return [change for change in kept if change["revision"] <= self.revision]

    @property
    def tasks(self) -> int:
        """Number of tasks learnt before any changes."""
        return self.revision - len(self.changes)

    def with_present_classes(self) -> Self:
        """The same model with its present classes as tasks, for a run that continues from a changed student.

        Its accuracies since the changes were not measured.
        """
        if not self.changes:
            return self
        names, state = classes_of(self.results, self.revision), last_learnt(self.changes, self.revision)
        rest = {key: value for key, value in self.results.items() if key != "changes"}
        if state is None:
            rest |= {"class_names": names, "roles": {self.role: unmeasured(len(names))}}
        count = len(names) if state is None else state
        more = {"tags": {}} if "tags" in {field.name for field in fields(self)} else {}  # those of other states
        return replace(self, revision=count, results=rest, **more)

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the model is, for messages."""

    @abstractmethod
    def put(self, folder: Path) -> None:
        """Put the checkpoint into a folder: weights, config and image processor."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """What the continuing run records about it."""

    @abstractmethod
    def same(self, folder: Path) -> bool:
        """Whether a local folder holds this very checkpoint, by the bytes of its files."""

    def copy(self, folder: Path) -> None:
        """Put the checkpoint into a folder and check it. Raises HubError if it does not match the results."""
        self.put(folder)
        self._check(folder)

    def _check(self, folder: Path) -> None:
        try:
            config = read_json(folder / "config.json")
            if not is_ours(config):
                raise RunError("its config.json is not of a model of hf_cdl (model_type: cdl).")
            known, ours = config.get("tasks"), classes_of(self.results, self.revision)
            if known != ours:
                raise RunError(
                    f"its config.json has {_counted(known)}, but its results {_counted(ours)}, or others of that "
                    "number. They are not of the same state."
                )
            _check_weights([*folder.glob("*.safetensors")])
            if (index := folder / "model.safetensors.index.json").exists():
                _check_index(read_json(index), folder)
            read_json(folder / "preprocessor_config.json")  # its content is checked when it is loaded
        except RunError as error:
            said = str(error).replace(f"{visible(folder)}/", "its ")
            raise HubError(
                f"The {self.role} in {self.place} cannot be used: {said} Name another state with --revision "
                "task-NN, or another model."
            ) from error


@dataclass(frozen=True)
class HubOrigin(Origin):
    """A model on the Hub, at the commit of its tag."""

    api: HfApi
    repository: str
    commit: str
    tags: dict[str, str]
    """Tag -> commit, for all tags up to this one."""

    @property
    def place(self) -> str:
        return f"{self.repository} (commit {self.commit[:8]})"

    def put(self, folder: Path) -> None:
        with hub_errors(self.repository):
            files = _files(self.api, self.repository, self.commit)
            chosen = [path for path in files if CHECKPOINT.fullmatch(path)]
            self.api.snapshot_download(
                self.repository, revision=self.commit, local_dir=folder, allow_patterns=chosen or ["config.json"]
            )
        shutil.rmtree(folder / ".cache", ignore_errors=True)

    def same(self, folder: Path) -> bool:
        with hub_errors(self.repository):
            entries: Iterable[Any] = self.api.list_repo_tree(self.repository, recursive=True, revision=self.commit)
            theirs = {
                entry.path: (entry.lfs.sha256 if entry.lfs else entry.blob_id)
                for entry in entries
                if isinstance(entry, RepoFile) and CHECKPOINT.fullmatch(entry.path)
            }
        ours = checkpoint_files(folder)
        return ours.keys() == theirs.keys() and all(theirs[path] in digests(file) for path, file in ours.items())

    def as_dict(self) -> dict[str, Any]:
        return {"repository": self.repository, "commit": self.commit, "tags": self.tags}


def read_origin(api: HfApi, repository: str, role: str, tag: str | None = None) -> HubOrigin:
    """Read the model in a repository that a run was pushed to; `tag` selects an earlier state, task-NN.

    Raises HubError if it cannot be read or was not pushed by a run.
    """
    with hub_errors(repository):
        refs = api.list_repo_refs(repository)
        commits = {ref.name: ref.target_commit for ref in refs.tags if re.fullmatch(r"task-\d{2,4}", ref.name)}
        if not commits or tag not in (None, *commits):
            listed = ", ".join(sorted(commits)) or "none"
            raise HubError(
                f"{repository} has no tag {tag or 'task-NN'} to continue from; its tags: {listed}. Name one of them "
                "with --revision, or another repository."
            )
        tag = tag or max(commits, key=lambda name: int(name[5:]))
        size = _files(api, repository, commits[tag]).get("results.json", 0)
        if size > LARGEST:
            raise HubError(
                f"The results.json of {repository} has {counted(size, 'byte')}; hf_cdl's have less than {LARGEST:,}."
            )
        with TemporaryDirectory() as folder:
            file = api.hf_hub_download(repository, "results.json", revision=commits[tag], local_dir=folder)
            results = checked_results(read_json(Path(file)), f"{repository} at {tag}: results.json")
    revision = int(tag[5:])
    check_role(results, role, revision, f"{repository} at {tag}")
    known = {name: commit for name, commit in commits.items() if int(name[5:]) <= revision}
    return HubOrigin(role, revision, results, api, repository, commits[tag], known)


def unmeasured(count: int) -> dict[str, Any]:
    """A role's results for `count` tasks of which nothing was measured."""
    nothing: dict[str, Any] = {name: [0] * count for name in ("train_seconds", "peak_memory_bytes", "counts")}
    rows = [[None] * (task + 1) for task in range(count)]
    return {"accuracy_matrix": rows, "correct": [[0] * len(row) for row in rows], **nothing}


def check_role(results: dict[str, Any], role: str, revision: int, where: str) -> None:
    if results.get("role", role) != role or finished_revisions(results, role) < revision:
        raise HubError(
            f"By its results.json, {where} is not a {role} of {counted(revision, 'task')}. Name where a {role} is, "
            "and with --revision task-NN a state that it has been in."
        )


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint in a folder, by their path in it."""
    files = {path.relative_to(folder).as_posix(): path for path in (*folder.glob("*"), *folder.glob("adapter/*"))}
    return {name: path for name, path in sorted(files.items()) if CHECKPOINT.fullmatch(name)}


def _files(api: HfApi, repository: str, commit: str) -> dict[str, int]:
    """Path -> size in bytes."""
    entries: Iterable[Any] = api.list_repo_tree(repository, recursive=True, revision=commit)
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _check_weights(files: list[Path]) -> None:
    if not files:
        raise RunError("it has no weights in model.safetensors; pickled ones are not read.")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise RunError(f"its {file.name} is cut short or damaged ({visible(error)[:200]}).") from error


def _check_index(index: Any, folder: Path) -> None:
    files = index.get("weight_map") if isinstance(index, dict) else None
    wrong = (
        [file for file in files.values() if not isinstance(file, str) or not CHECKPOINT.fullmatch(file)]
        if (isinstance(files, dict))
        else ["no weight_map"]
    )
    if wrong:
        raise RunError(f"its model.safetensors.index.json names {visible(wrong[0])[:60]}, no weights beside it.")
    if absent := sorted(file for file in {*(files or {}).values()} if not (folder / file).is_file()):
        raise RunError(f"its model.safetensors.index.json names {absent[0]}, which is not beside it.")


def _counted(tasks: Any) -> str:
    if not isinstance(tasks, list) or not all(isinstance(task, list) for task in tasks):
        return "no list of tasks"
    return f"{counted(len(tasks), 'task')} of {counted(sum(map(len, tasks)), 'class')}"


@contextmanager
def hub_errors(place: str) -> Iterator[None]:
    """Turn any error while reading `place` into a HubError."""
    try:
        yield
    except RunError as error:
        raise HubError(str(error)) from error
    except HFValidationError as error:
        raise HubError(
            f"{visible(place)} is neither a folder here nor a repository. Give a run's folder, or OWNER/NAME."
        ) from error
    except Exception as error:  # a missing network raises many kinds of errors
        absent = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
        if not isinstance(error, absent) or isinstance(error, LocalEntryNotFoundError):
            raise HubError(
                f"{place} cannot be read now ({type(error).__name__}). Try again, with a network if it is on the Hub."
            ) from error
        what = "no results.json" if isinstance(error, EntryNotFoundError) else "no such repository"
        raise HubError(
            f"{place}: {what}, or this token may not see it. A model that was pushed by hf_cdl is needed, as "
            "OWNER/NAME, or a run's folder; for a private one log in with `hf auth login`, or set HF_TOKEN."
        ) from error
