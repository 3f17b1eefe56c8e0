"""Valid parts that bad inputs are made from: tiny backbones, data, checkpoints and runs, created once."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from helpers import make_backbone, make_data, picture
from hub_server import Entry, Repository, git_oid, lfs_entry, write
from safetensors.torch import load_file, save_file

from hf_cdl import CDLForImageClassification
from hf_cdl.commands import console, train
from hf_cdl.hub.content import results_after
from hf_cdl.training.task_trainer import TaskTrainer

GONE = object()
"""In place of a field's value: the field is left out."""
COMPONENTS = {"type": "coda", "components": 2, "length": 4, "layers": [0, 1]}


@dataclass(frozen=True)
class Parts:
    """Folders in `root` that no row may change, and the address of a Hub with the repositories in `root`/hub."""

    root: Path
    hub_url: str = ""

    def __getattr__(self, name: str) -> Path:
        """`parts.student`: the folder of that name."""
        return self.root / name

    def copy(self, name: str, to: str | None = None) -> Path:
        """Make a copy in the current folder that may be changed."""
        return Path(shutil.copytree(self.root / name, Path(to or name).absolute()))

    def put_recipe(self, *runs: str) -> None:
        """Put recipe.yaml, everything it names, and its runs into the current folder."""
        shutil.copy(self.root / "recipe.yaml", ".")
        for name in ("data", "teacher", "student", *runs):
            self.copy(name)

    def recipe(self, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        """A valid recipe with fields set by their dotted names; fields that are GONE are removed."""
        recipe: Any = copy.deepcopy(
            {
                "name": "tiny",
                "data": {"path": str(self.data), "classes_per_task": 2},
                "teacher": {"backbone": str(self.teacher), "prompt": COMPONENTS},
                "student": {"backbone": str(self.student), "prompt": COMPONENTS},
                "distill": [{"type": "kdp", "weight": 0.5}],
                "ce_weight": 0.5,
                "train": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True},
                "baselines": [],
            }
        )
        for name, value in (fields or {}).items():
            *path, last = name.split(".")
            section = recipe
            for part in path:
                section = section[int(part)] if isinstance(section, list) else section.setdefault(part, {})
            if value is GONE:
                del section[last]
            else:
                section[int(last) if isinstance(section, list) else last] = value
        return recipe

    def write(self, fields: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        """Write such a recipe to a file in the current folder."""
        file = Path(name)
        file.write_text(yaml.safe_dump(self.recipe(fields)))
        return file


def make_parts(root: Path) -> Parts:
    """Make everything except the Hub's server; the runs are really trained, in forked children."""
    parts = Parts(root)
    make_backbone(parts.teacher, 48, 3, 1)
    make_backbone(parts.student, 32, 2, 2)
    make_data(parts.data, classes=4, train=4, test=2)
    for split, first in (("train", 0), ("test", 100)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = parts.photos / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                picture(10 + label, first + number).save(folder / f"{number}.png")
    checkpoints(parts)
    places = {"data.path": "data", "teacher.backbone": "teacher", "student.backbone": "student"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(parts.recipe({**places, "train.num_train_epochs": 3})))
    _train(root, "done")
    _train(root, "cut", stop_at=5)
    fitted = {"student.prompt": GONE, "student.head": {"type": "ridge"}, "data.path": "photos", "teacher": None}
    fitted |= {"student.backbone": "student", "distill": [], "ce_weight": 1.0, "data.classes_per_task": None}
    (root / "fitted.yaml").write_text(yaml.safe_dump(parts.recipe(fitted)))
    _train(root, "fitted", recipe="fitted.yaml")
    for role, repository in (("student", "me/tiny"), ("teacher", "me/tiny-teacher")):
        publish(root / "hub", repository, pushed(parts, role))
    publish(root / "hub", "me/foreign", {"notes.txt": b"mine"}, None)
    others = pushed(parts, "student")
    publish(root / "hub", "me/other-run", {**others, "config.json": others["config.json"] + b"\n"}, "task-01")
    return parts


def checkpoints(parts: Parts) -> None:
    """Save models of two tasks: complete, small, with a ridge head, with adapters."""
    kinds: dict[str, dict[str, Any]] = {
        "checkpoint": {"prompt": COMPONENTS, "kd_prompt": {}},
        "small": {"prompt": COMPONENTS, "save_backbone": False},
        "ridge": {"head": {"type": "ridge"}},
        "adapted": {"head": {"type": "ridge"}, "first_session": {"type": "linear"}, "lora": {"r": 2}},
    }
    for name, fields in kinds.items():
        model = CDLForImageClassification.from_backbone(str(parts.student), **fields)
        for task in (["ant", "bee"], ["cat", "dog"]):
            model.begin_task(task)
            model.end_session()
        model.save_pretrained(parts.root / name)
        shutil.copy(parts.student / "preprocessor_config.json", parts.root / name)


def _train(root: Path, name: str, stop_at: int | None = None, recipe: str = "recipe.yaml") -> None:
    """Run a recipe in `root`; stop it as by Ctrl-C after it stored `stop_at` checkpoints."""
    child = os.fork()
    if child == 0:
        try:
            os.chdir(root)
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            stored, store = [], TaskTrainer._save_checkpoint

            def stop(self: Any, *arguments: Any) -> None:
                store(self, *arguments)
                stored.append(self)
                if len(stored) == stop_at:
                    raise KeyboardInterrupt

            TaskTrainer._save_checkpoint = stop  # type: ignore[method-assign]
            console.quiet()
            os._exit(train.main([recipe, "--output_dir", name]))
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    wanted = 0 if stop_at is None else 130
    assert os.waitstatus_to_exitcode(status) == wanted, f"{name}: exit code {os.waitstatus_to_exitcode(status)}"


# ---- repositories ----


def pushed(parts: Parts, role: str, count: int = 2) -> dict[str, bytes]:
    """Write the files of a repository as after a push of the finished run."""
    results = results_after(json.loads((parts.done / "results.json").read_text()), count)
    folder = parts.done / role / f"task-{count:02d}"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "results.json": json.dumps({**results, "role": role}).encode()}


def publish(hub: Path, repository: str, files: dict[str, bytes], tag: str | None = "task-02") -> None:
    """Put a repository with a single commit into the Hub's folder."""
    there, entries = Repository(hub, repository), {}
    for path, content in files.items():
        entry = Entry(len(content), git_oid(content), hashlib.sha256(content).hexdigest(), False)
        write(hub / "objects" / entry.sha256, content)
        entries[path] = lfs_entry(entry.sha256, entry.size) if path.endswith(".safetensors") else entry
    write(there.folder / "repo.json", json.dumps({"private": False}).encode())
    commit = there.add_commit(entries, None, "Task 2", "", "main")
    if tag is not None:
        write(there.folder / "refs" / "tags" / tag, commit.encode())


# ---- changes of files ----


def change_json(file: Path, changes: dict[str, Any]) -> Path:
    """Set fields of a JSON file by their dotted names; remove those that are GONE."""
    content = json.loads(file.read_text())
    for name, value in changes.items():
        *path, last = name.split(".")
        section = content
        for part in path:
            section = section[int(part)] if isinstance(section, list) else section[part]
        key: Any = int(last) if isinstance(section, list) else last
        if value is GONE:
            del section[key]
        else:
            section[key] = value
    file.write_text(json.dumps(content))
    return file


def change_weights(folder: Path, changes: dict[str, Any]) -> Path:
    """Change tensors of model.safetensors by functions; remove those that are GONE."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for part, value in changes.items():
        names = [name for name in tensors if part in name]
        assert names, f"no {part} among {sorted(tensors)}"
        for name in names:
            if value is GONE:
                del tensors[name]
            else:
                tensors[name] = value(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def cut(file: Path, share: float = 0.5) -> Path:
    """Truncate a file to a fraction of it."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    return file
