"""Going on from the Hub: what a published model knows, so that another run can learn the next task with it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hf_cdl.hub.content import DOCUMENTS, finished_tasks
from hf_cdl.hub.repository import HubError


@dataclass(frozen=True)
class Origin:
    """A published model at the commit after its newest task, or after `tasks` tasks."""

    api: HfApi
    repository: str
    role: str
    tasks: int
    commit: str
    tags: dict[str, str]
    """Commits of the tags up to it."""
    results: dict[str, Any]
    """The content of its results.json."""

    def download(self, folder: Path) -> None:
        """Put the checkpoint into a folder: weights, config and image processor."""
        self.api.snapshot_download(
            self.repository, revision=self.commit, local_dir=folder, ignore_patterns=[*DOCUMENTS]
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)

    def as_dict(self) -> dict[str, Any]:
        return {"repository": self.repository, "commit": self.commit, "tags": self.tags}


def read_origin(api: HfApi, repository: str, role: str, tag: str | None = None) -> Origin:
    """What a repository that a run was pushed to knows; `tag` chooses an earlier state, task-NN.

    Raises HubError if it cannot be read or was not pushed by a run.
    """
    try:
        refs = api.list_repo_refs(repository)
        commits = {ref.name: ref.target_commit for ref in refs.tags if re.fullmatch(r"task-\d+", ref.name)}
        if not commits or tag not in (None, *commits):
            listed = ", ".join(sorted(commits)) or "none"
            raise HubError(f"{repository} has no tag {tag or 'task-NN'} to go on from; its tags: {listed}.")
        tag = tag or max(commits, key=lambda name: int(name[5:]))
        with TemporaryDirectory() as folder:
            file = api.hf_hub_download(repository, "results.json", revision=commits[tag], local_dir=folder)
            results = json.loads(Path(file).read_text())
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        what = "no results.json" if isinstance(error, EntryNotFoundError) else "no such repository"
        raise HubError(
            f"{repository}: {what}, or this token may not see it. A model that was pushed by hf_cdl is needed, as "
            "OWNER/NAME; for a private one log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{repository} cannot be read now ({type(error).__name__}). Try again.") from error
    tasks = int(tag[5:])
    if results.get("role", role) != role or finished_tasks(results, role) < tasks:
        raise HubError(f"{repository} at {tag} is no {role} of {tasks} tasks, by its results.json.")
    known = {name: commit for name, commit in commits.items() if int(name[5:]) <= tasks}
    return Origin(api, repository, role, tasks, commits[tag], known, results)
