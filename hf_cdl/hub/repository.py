"""The Hub repository of one model of a run: comparing it with the run, and pushing the next tasks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoFile

from hf_cdl.counted import counted
from hf_cdl.hub.card import card_files
from hf_cdl.hub.content import DOCUMENTS, Results, commit_message, finished_revisions, results_after
from hf_cdl.runs.files import CHECKPOINT, RunError
from hf_cdl.runs.ledger import CHANGED
from hf_cdl.runs.results import stored_ledger

_CODE = re.compile(r"[\w.-]+\.py")


class HubError(RunError):
    """A problem with the Hub that a retry would not solve; the message says what was found and what to do."""


@dataclass(frozen=True)
class Comparison:
    """What the run has learnt, what its repository holds, and therefore what to do.

    `learnt`: tasks finished locally. `tagged`: the newest task with a tag in the repository. `held`: the task whose
    checkpoint main holds, tagged or not; None if it holds none yet. `head`: the commit of main; `files`: path -> hash.
    """

    learnt: int
    tagged: int
    held: int | None
    head: str
    files: Mapping[str, str]

    @property
    def to_do(self) -> range:
        """The tasks not tagged yet. The first may already be held by main: then only its tag is missing."""
        return range(self.tagged + 1, self.learnt + 1)


class Repository:
    """The repository of one role of the run in `folder`. If `name` has no owner, the token's owner is used.

    `origin`: where the first tasks were learnt, if elsewhere (`Run.origin`). The last of them is the first that can be
    pushed; tags of earlier ones are recognised by their commits.
    """

    def __init__(
        self, api: HfApi, name: str, role: str, folder: Path, private: bool, origin: Mapping[str, Any] | None = None
    ):
        self.api, self.id, self.role, self.folder, self.private = api, name, role, folder / role, private
        self.start = max(0, _revision(origin, role) - 1)
        self.known: Mapping[str, str] = origin["roles"][role]["tags"] if origin else {}
        self.other: Repository | None = None
        """The repository of the run's other model, for links in the cards."""
        self.pushed = 0
        """Tasks known to be on the Hub."""
        self._opened = False
        self._ours: set[str] = set()  # commits of tags already verified as this run's
        self._digests: dict[Any, tuple[str, str]] = {}

    def open(self) -> None:
        """Create the repository if needed and check write access. Raises HubError if there is no token."""
        if self._opened:
            return
        if self.api.token is None and get_token() is None:
            raise HubError(
                f"There is no token to push to {self.id} with. Log in with `hf auth login`, or set HF_TOKEN."
            )
        owner = self.api.whoami()["name"]
        if "/" not in self.id:
            self.id = f"{owner}/{self.id}"
        self.api.create_repo(self.id, private=self.private, exist_ok=True)
        self.api.auth_check(self.id, write=True)
        self._opened = True

    def push(self, results: Results) -> Iterator[int]:
        """Commit and tag all finished tasks not yet pushed, in order; yields the number of pushed tasks after each.

        Raises HubError if the repository holds something else.
        """
        self.open()
        found = self.compare(finished_revisions(results, self.role))
        head, files = found.head, found.files
        for number in found.to_do:
            if number != found.held:
                head = self._commit(results, number, head, files)
                files = self._files(head)
            self.api.create_tag(self.id, tag=f"task-{number:02d}", revision=head)
            self._ours.add(head)
            self.pushed = number
            yield number

    def compare(self, learnt: int) -> Comparison:
        """Compare the repository with the run, which has finished `learnt` tasks.

        Raises HubError unless everything in the repository belongs to this run.
        """
        refs = self.api.list_repo_refs(self.id)
        head = next(branch.target_commit for branch in refs.branches if branch.name == "main")
        tags = {tag.name: tag.target_commit for tag in refs.tags if re.fullmatch(r"task-\d+", tag.name)}
        self.pushed = self._tagged(tags, learnt)
        files = self._files(head)
        held = self._held(files, learnt)
        is_tagged = tags.get(f"task-{self.pushed:02d}") == head  # main as pushed; elsewhere it may hold more by now
        is_new = self.pushed == self.start and not set(files) - {".gitattributes"}
        if held is None and not (is_tagged or is_new):
            raise self._foreign(f"{counted(len(files), 'file')} in main that are not this run's", sorted(files))
        return Comparison(learnt, self.pushed, held, head, files)

    def _tagged(self, tags: Mapping[str, str], learnt: int) -> int:
        """The newest task with a tag. Raises HubError for tags that this run did not create."""
        newest = self.start
        for tag in sorted(tags, key=lambda name: int(name[5:])):
            number, commit = int(tag[5:]), tags[tag]
            learnt_here = number > self.start
            if number > learnt or tag != f"task-{number:02d}" or (learnt_here and number != newest + 1):
                raise self._foreign(f"the tag {tag}, which this run has not come to", [*tags])
            if self.known.get(tag) != commit and not (learnt_here and self._is_ours(commit, number)):
                raise self._foreign(f"the tag {tag} with another model", [*tags])
            newest = max(number, newest)
        return newest

    def _is_ours(self, commit: str, number: int) -> bool:
        """Whether a commit holds the checkpoint of a task; verified only once per commit."""
        if commit not in self._ours and self._is_task(self._files(commit), number):
            self._ours.add(commit)
        return commit in self._ours

    def _held(self, files: Mapping[str, str], learnt: int) -> int | None:
        """The newest tagged task, or the next one, if `files` are its: a push may be interrupted before its tag."""
        first, last = max(self.pushed, self.start + 1), min(self.pushed + 1, learnt)
        return next((number for number in range(first, last + 1) if self._is_task(files, number)), None)

    def _foreign(self, what: str, listed: list[str]) -> HubError:
        shown = shorten(", ".join(listed), 100, placeholder=" ...")
        return HubError(
            f"{self.id} on the Hub holds {what} ({shown}). Nothing there was touched. Choose another repository with "
            f"--hub_model_id NAME, or delete this one if you do not need it; if it is of this run, keep its folder "
            f"{self.folder.parent}."
        )

    def _commit(self, results: Results, number: int, head: str, there: Mapping[str, str]) -> str:
        """Commit a task's state on top of `head`, whose files are `there`."""
        files: dict[str, Any] = dict(self._checkpoint(number))
        after = results_after(results, number)
        written = card_files(after, self.role, self.id, None if self.other is None else self.other.id)
        card = _git_oid(written["README.md"])
        if "README.md" in there:
            last = self._card_written(head) if "results.json" in there else None
            if there["README.md"] != last:  # edited on the Hub: keep it
                card = last
                del written["README.md"]
        written["results.json"] = json.dumps({**after, "role": self.role, "card": card}, indent=1).encode()
        gone = [path for path in there if path not in files and path not in DOCUMENTS]
        new = {path: file for path, file in files.items() if there.get(path) not in self._digest(file)}
        operations = [CommitOperationAdd(path, source) for path, source in {**new, **written}.items()]
        title, text = commit_message(results, self.role, number)
        return self.api.create_commit(
            self.id,
            [*operations, *(CommitOperationDelete(path, is_folder=False) for path in gone)],
            commit_message=title,
            commit_description=text,
            parent_commit=head,
        ).oid

    def _card_written(self, commit: str) -> str | None:
        """git's sha1 of the last card this run wrote, as recorded in a commit's results.json."""
        with TemporaryDirectory() as folder:
            file = self.api.hf_hub_download(self.id, "results.json", revision=commit, local_dir=folder)
            return json.loads(Path(file).read_text()).get("card")

    def _files(self, commit: str) -> dict[str, str]:
        """Path -> sha256 for LFS files, git's sha1 for others."""
        entries = self.api.list_repo_tree(self.id, recursive=True, revision=commit)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in files}

    def _is_task(self, there: Mapping[str, str], number: int) -> bool:
        """Whether the files on the Hub are the checkpoint of a task."""
        ours = {name: self._digest(path) for name, path in self._checkpoint(number).items()}
        theirs = {path: oid for path, oid in there.items() if path not in DOCUMENTS}
        return theirs.keys() == ours.keys() and all(oid in ours[path] for path, oid in theirs.items())

    def _checkpoint(self, number: int) -> dict[str, Path]:
        """Path in the repository -> local file, for a task's checkpoint.

        Raises HubError for a file that hf_cdl did not write, and for a link, whose target may be private.
        """
        folder = self.folder / f"task-{number:02d}"
        files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        for file in (self.folder, folder, *files):
            if file.is_symlink():
                raise HubError(f"{file} is not pushed: it is a link. Put the files themselves in its place.")
        names = {file.relative_to(folder).as_posix(): file for file in files}
        ours = {name: file for name, file in names.items() if name not in DOCUMENTS}
        for name, file in ours.items():
            noted = _CODE.fullmatch(name) and file.relative_to(self.folder.parent).as_posix() in self._noted()
            if not file.is_file() or not (CHECKPOINT.fullmatch(name) or noted):
                raise HubError(
                    f"{file} is not pushed: hf_cdl wrote no such file. A checkpoint has a config, weights in "
                    "safetensors, an image processor, and the model's code if the run saved it. Move it away."
                )
        return ours

    def _noted(self) -> Mapping[str, Any]:
        """The files recorded in the run's ledger, by path in its folder."""
        run = self.folder.parent
        return stored_ledger(run).get("files", {}) if (run / "run.json").exists() else {}

    def _digest(self, file: Path) -> tuple[str, str]:
        found = file.stat()  # the tasks' folders share files, so a file has several names
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if found.st_nlink > 1 else file
        if key not in self._digests:
            self._digests[key] = digests(file)
        return self._digests[key]


def _revision(origin: Mapping[str, Any] | None, role: str) -> int:
    """The revision of a role that was taken over from elsewhere; 0 if none was."""
    found = origin or {}
    return found.get("revision" if role == CHANGED and "revision" in found else "tasks", 0)


def digests(file: Path) -> tuple[str, str]:
    """The two hashes by which the Hub may know a file: sha256, of one in LFS, and git's sha1."""
    content = file.read_bytes()
    return hashlib.sha256(content).hexdigest(), _git_oid(content)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
