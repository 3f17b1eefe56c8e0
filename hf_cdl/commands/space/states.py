"""Access to a model's states: revisions task-01, task-02, ... of a Hub repository, or folders of a run."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import pipeline

if find_spec("hf_cdl") is not None:
    import hf_cdl  # noqa: F401  # registers the model type with transformers


LARGEST = 64 * 2**20
"""Maximum size in bytes of a results.json."""


class StatesError(RuntimeError):
    """Nothing can be shown; the message says why, and what to do."""


class Results(NamedTuple):
    """Results of a model after some tasks; `accuracy_matrix` in percent, None where it was not measured.

    `change`: what was done to it last, if it was changed after its tasks; the accuracies are those from before.
    """

    name: str
    class_names: list[list[str]]
    accuracy_matrix: list[list[float | None]]
    change: str | None = None


class States:
    """The states of a model: `tasks`, and for each task its classifier and results. A few classifiers stay loaded.

    `where`: OWNER/NAME on the Hub, a run's folder (its student), or a model's in it. With `trust_remote_code`, the
    code found there is run; `reject`: of the pipelines, see hf_cdl.serving. Raises StatesError if there are no states
    or they cannot be read.
    """

    def __init__(self, where: str, trust_remote_code: bool = False, reject: float | bool | None = None):
        self.where, self.trust_remote_code, self.reject = where.rstrip("/"), trust_remote_code, reject
        self.folder = Path(where).resolve() if Path(where).is_dir() else None
        if self.folder is not None and (self.folder / "results.json").exists():
            self.folder /= "student"
        names = _tags(self.where) if self.folder is None else [path.name for path in self.folder.glob("*")]
        self._names = {int(name[5:]): name for name in names if re.fullmatch(r"task-\d{2,4}", name)}
        finished = self._finished()
        self.tasks = [number for number in sorted(self._names) if number <= finished]
        if not self.tasks:
            raise StatesError(
                f"{where} has no {'tags' if self.folder is None else 'folders'} task-01, task-02, ... Name a "
                "repository that a run was pushed to (push_to_hub: true), or the folder of a finished run such as "
                "runs/quickstart."
            )
        self.classifier = lru_cache(maxsize=4)(self._classifier)
        self.results = lru_cache(maxsize=100)(self._results)

    def earlier(self, name: str) -> int:
        """The task of an earlier state, task-NN. Raises StatesError if there is none of that name."""
        *earlier, newest = self.tasks
        found = {self._names[task]: task for task in earlier}
        if name not in found:
            raise StatesError(
                f"{self.where} has no {name} to compare with its newest state, {self._names[newest]}; earlier ones: "
                f"{', '.join(found) or 'none'}. Give one of these, or leave the comparison out."
            )
        return found[name]

    def _finished(self) -> float:
        """Number of states that a run has finished; a kill may have left another folder there."""
        file = None if self.folder is None else self.folder.parent / "results.json"
        try:
            if file is not None and file.is_file() and file.stat().st_size <= LARGEST:
                found = json.loads(file.read_text(encoding="utf-8"))
                return len(found["class_names"]) + len(found.get("changes", []))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # reported when its results are read
        return math.inf

    def _classifier(self, task: int) -> Any:
        """The model after a task, as a pipeline that returns its five most likely classes."""
        name = self._names[task]
        place, revision = (self.where, name) if self.folder is None else (str(self.folder / name), None)
        trust, safe = self.trust_remote_code, {"use_safetensors": True}  # nothing pickled
        options: dict[str, Any] = {"top_k": 5, "trust_remote_code": trust, "model_kwargs": safe}
        options |= {} if self.reject is None else {"reject": self.reject}
        try:
            return pipeline("image-classification", model=place, revision=revision, **options)
        except Exception as error:  # whatever the reason, the user has to see it
            advice = ""
            if find_spec("hf_cdl") is None and not trust:
                advice = (
                    "hf_cdl is not installed here; install it or, if the model's code lies beside its weights "
                    "(save_code: true) and you trust it, use --trust_remote_code (in a Space "
                    "HF_CDL_TRUST_REMOTE_CODE=1). "
                )
            if self.reject is not None and isinstance(error, TypeError):  # transformers' own pipeline
                advice = "Only a model of hf_cdl can tell which images are of none of its classes; leave reject out. "
            raise StatesError(f"{self.where} after task {task} cannot be loaded. {advice}{_reason(error)}") from error

    def _results(self, task: int) -> Results:
        try:
            if self.folder is None:
                entries = HfApi().list_repo_tree(self.where, revision=self._names[task])
                if any(entry.path == "results.json" and getattr(entry, "size", 0) > LARGEST for entry in entries):
                    raise ValueError(f"more than {LARGEST:,} bytes")  # before it is downloaded
                file = Path(hf_hub_download(self.where, "results.json", revision=self._names[task]))
            else:
                file = self.folder.parent / "results.json"
                if not file.is_file() and file.exists():
                    raise ValueError("no regular file")
            if file.stat().st_size > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            found = json.loads(file.read_text(encoding="utf-8"))
            place = self.folder.name if self.folder else self.where  # a role's folder, NAME or NAME-teacher
            role = found.get("role") or next((role for role in found["roles"] if place.endswith(role)), "student")
            names, matrix, said = found["class_names"], found["roles"][role]["accuracy_matrix"], None
            if task > len(names):
                change = next(change for change in found.get("changes", []) if change["revision"] == task)
                now, said = change["class_names"], str(change["said"])
                return _checked(found["name"], names, matrix, len(names))._replace(
                    class_names=_texts(now), change=said
                )
            return _checked(found["name"], names, matrix, task)
        except Exception as error:
            raise StatesError(
                f"The results.json of {self.where} after task {task} cannot be read ({type(error).__name__}: {error})."
                " A run of hf_cdl keeps it beside its models, and pushes it with each state."
            ) from error


def _reason(error: Exception) -> str:
    """An error's message; of the tracebacks that transformers' pipelines put into theirs, the end of the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    ends = [line for line in lines if re.match(r"(\w+\.)*\w+(Error|Exception): ", line)]
    return ends[0] if ends and any(line.startswith("Traceback") for line in lines) else str(error)


def _checked(name: Any, class_names: Any, matrix: Any, task: int) -> Results:
    """The results after a task. Raises ValueError if they are not hf_cdl's: the file may be anybody's."""
    names, rows = class_names[:task], [row[: number + 1] for number, row in enumerate(matrix[:task])]
    texts = [name, *(name for group in names for name in group)]
    numbers = [value for row in rows for value in row if value is not None]
    if len(names) < task or [len(row) for row in rows] != [*range(1, task + 1)]:
        raise ValueError(
            f"{len(names)} tasks with {[len(row) for row in rows][:10]} accuracies, but {task} are learnt"
        )
    if not all(isinstance(group, list) and group for group in names) or not all(isinstance(t, str) for t in texts):
        raise ValueError("a class's name is not text")
    if not all(isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 100 for value in numbers):
        raise ValueError("an accuracy is not a percentage")
    return Results(name, names, rows)


def _texts(class_names: Any) -> list[list[str]]:
    if not all(isinstance(group, list) and all(isinstance(t, str) for t in group) for group in class_names):
        raise ValueError("a class's name is not text")
    return class_names


def _tags(repository: str) -> list[str]:
    try:
        return [tag.name for tag in HfApi().list_repo_refs(repository).tags]
    except HFValidationError as error:
        raise StatesError(f"{repository} is neither a folder here nor a repository's name, OWNER/NAME.") from error
    except RepositoryNotFoundError as error:
        raise StatesError(
            f"{repository} is not a folder here, and on the Hub it does not exist or is private. For a private "
            "repository log in with `hf auth login`, or set HF_TOKEN (in a Space: a secret of that name) to a token "
            "that may read it."
        ) from error
    except Exception as error:  # a missing network raises many kinds of errors
        raise StatesError(f"The Hub cannot be asked for {repository} ({type(error).__name__}: {error}).") from error
