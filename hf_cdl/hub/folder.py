"""Continuing from a local folder: a run, one of its models, or a checkpoint without a run."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cdl.escape import visible
from hf_cdl.hub.content import finished_revisions
from hf_cdl.hub.origin import Origin, check_role, checkpoint_files, hub_errors, unmeasured
from hf_cdl.hub.repository import HubError
from hf_cdl.runs.files import RunError, content_hash, read_json
from hf_cdl.runs.ledger import CHANGED, revision_name, stored_tasks
from hf_cdl.runs.results import checked_results, run_results, stored_ledger


@dataclass(frozen=True)
class FolderOrigin(Origin):
    """A model in a local folder."""

    folder: Path
    """The folder of the checkpoint."""
    name: str
    """The name of the run, or of the checkpoint if it has no run."""

    @property
    def place(self) -> str:
        return visible(self.folder)

    def put(self, folder: Path) -> None:
        for path, source in checkpoint_files(self.folder).items():
            if source.is_symlink() or source.parent.is_symlink() or not source.is_file():
                raise HubError(
                    f"{visible(source)} is a link or not a regular file, so it is not copied: it may stand for any "
                    "file of this machine. Put a copy of the file itself there."
                )
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / path)

    def same(self, folder: Path) -> bool:
        ours, theirs = checkpoint_files(folder), checkpoint_files(self.folder)
        return ours.keys() == theirs.keys() and all(
            content_hash(file) == content_hash(theirs[path]) for path, file in ours.items()
        )

    def as_dict(self) -> dict[str, Any]:
        return {"folder": self.name, "tags": {}}


def read_folder(folder: Path, role: str, tag: str | None = None) -> FolderOrigin:
    """Read the model in a run's or a checkpoint's folder; `tag` selects an earlier state of a run, task-NN.

    Raises HubError if it is neither, or of another role.
    """
    root = next((place for place in (folder, *folder.resolve().parents[:2]) if is_run(place)), None)
    checkpoint = folder
    if not (folder / "config.json").exists():
        if root is not folder:
            raise HubError(
                f"{visible(folder)} is neither a run's folder (run.json or results.json) nor a checkpoint's "
                "(config.json). Name one, such as runs/quickstart or runs/quickstart/student."
            )
        with hub_errors(visible(folder)):
            known = known_states(folder, role)  # a kill may have left another folder there
        states = sorted(path.name for path in folder.glob(f"{role}/task-*") if path.name in known)
        if tag not in (None, *states):
            raise HubError(f"{visible(folder)} has no {role}/{tag}; it has {', '.join(states) or 'none'}.")
        checkpoint = folder / role / (tag or (max(states, key=lambda name: int(name[5:])) if states else ""))
    elif tag is not None:
        raise HubError(
            f"{visible(folder)} is one checkpoint, so --revision {tag} chooses nothing. Name its run's folder."
        )
    with hub_errors(visible(folder)):
        config = read_json(checkpoint / "config.json")
        learnt = config.get("tasks") if isinstance(config, dict) else None
        if not isinstance(learnt, list) or not learnt:
            raise RunError(
                f"{visible(checkpoint)} is not a checkpoint of hf_cdl that knows classes (tasks in config.json)."
            )
        results = _alone(config, checkpoint, role) if root is None else results_of(root)
    revision = len(learnt)
    if root is not None:
        inside = checkpoint.resolve().relative_to(root.resolve()).parts
        if inside and inside[0] != role:
            raise HubError(f"{visible(folder)} is the {visible(inside[0])} of its run, but its {role} is needed here.")
        if results.get("changes") and role == CHANGED:
            named = [name for name in inside[1:2] if re.fullmatch(r"task-\d{2,4}", name)]
            revision = int(named[0][5:]) if named else finished_revisions(results, role)
        check_role(results, role, revision, visible(folder))
    return FolderOrigin(role, revision, results, checkpoint, (root or folder).resolve().name)


def known_states(root: Path, role: str) -> list[str]:
    """Names of the states of a role that a run's ledger or results list."""
    if (root / "run.json").exists():
        return stored_tasks(stored_ledger(root), role)
    return [revision_name(number + 1) for number in range(finished_revisions(results_of(root), role))]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, by its ledger or its results."""
    return (folder / "run.json").exists() or (folder / "results.json").exists()


def results_of(root: Path) -> dict[str, Any]:
    """Checked results of a run by its folder. Raises RunError if they cannot be read."""
    if (root / "run.json").exists():
        return run_results(root)
    return checked_results(read_json(root / "results.json"), visible(root / "results.json"))


def _alone(config: dict[str, Any], folder: Path, role: str) -> dict[str, Any]:
    """Results for a checkpoint without a run: its classes, no measurements, and a recipe built from its config."""
    taught = [name for name in ("kd_prompt", "mapping", "query_config") if config.get(name) is not None]
    head = config.get("head")
    taught += ["head.soft_targets"] if isinstance(head, dict) and head.get("soft_targets") else []
    if taught:
        raise RunError(
            f"{visible(folder)} was taught ({', '.join(taught)} in config.json), but its config does not tell how. "
            "Put the results.json or run.json of its run beside it, or name its run's folder."
        )
    same = ("prompt", "head", "first_session", "later_sessions", "lora", "patch_mean", "train_backbone")
    same += ("save_backbone", "save_code")
    section = {key: config[key] for key in same if key in config and not key.startswith("save_")}
    section |= {"backbone": config.get("backbone_name") or "unknown", "revision": config.get("backbone_revision")}
    section["query"] = "one_pass" if config.get("query") == "one_pass" else "self"
    recipe = {"student": section, "teacher": None}
    recipe |= {key: config[key] for key in same if key in config and key.startswith("save_")}
    names, count = config["tasks"], len(config["tasks"])
    results = {
        "name": folder.resolve().name,
        "seed": 0,
        "recipe": recipe,
        "class_names": names,
        "roles": {role: unmeasured(count)},
    }
    return checked_results(results, visible(folder / "config.json"))
