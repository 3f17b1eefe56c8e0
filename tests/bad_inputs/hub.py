"""Hub repositories that no run can continue from, or that are not ours to push to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from bad_inputs.parts import GONE, Parts, publish, pushed
from bad_inputs.runner import WAY, Act, Row, command, rows

Files = dict[str, bytes]


def results(changes: dict[str, Any]) -> Callable[[Files], Any]:
    """Set fields of results.json by their dotted names."""

    def change(files: Files) -> None:
        content = json.loads(files["results.json"])
        for name, value in changes.items():
            *path, last = name.split(".")
            section = content
            for part in path:
                section = section[part]
            if value is GONE:
                del section[last]
            else:
                section[last] = value
        files["results.json"] = json.dumps(content).encode()

    return change


def put(name: str, content: bytes) -> Callable[[Files], Any]:
    return lambda files: files.update({name: content})


def without(name: str) -> Callable[[Files], Any]:
    return lambda files: files.pop(name)


def half(name: str) -> Callable[[Files], Any]:
    return lambda files: files.update({name: files[name][: len(files[name]) // 2]})


def add(
    name: str, damage: Callable[[Files], Any], *says: str, tag: str | None = "task-02", words: Any = (), way: str = WAY
) -> Row:
    """hf-cdl add on a student whose repository is damaged, with an intact teacher."""

    def make(parts: Parts) -> Act:
        parts.copy("photos")
        repository = "me/" + re.sub(r"\W+", "-", name)
        files = pushed(parts, "student")
        damage(files)
        publish(parts.hub, repository, files, tag)
        return command("add", repository, "photos", "--teacher", "me/tiny-teacher", *words)

    return Row(name, make, says or (re.sub(r"\W+", "-", name),), way, hub=True)


def ask(name: str, *words: Any, says: tuple[str, ...], way: str = WAY, hub: bool = True) -> Row:
    """A command line that uses the intact repositories."""

    def make(parts: Parts) -> Act:
        parts.put_recipe("done")
        parts.copy("photos")
        return command(*words)

    return Row(name, make, says, way, hub)


DEEP = b"[" * 100_000 + b"]" * 100_000
RESULTS = [
    add("no results", without("results.json"), "results.json"),
    add("results that are cut off", half("results.json"), "results.json"),
    add("empty results", put("results.json", b""), "results.json"),
    add("results that are a list", put("results.json", b"[]"), "results.json"),
    add("results that are null", put("results.json", b"null"), "results.json"),
    add("results of no fields", put("results.json", b"{}"), "results.json"),
    add("results nested too deeply", put("results.json", DEEP), "results.json"),
    add("results that are binary", put("results.json", bytes(range(256))), "results.json"),
    add("results without recipe", results({"recipe": GONE}), "recipe"),
    add("results with a list for a recipe", results({"recipe": []}), "recipe"),
    add("results with a recipe that is none", results({"recipe.student": {"backbone": 3}}), "student.backbone"),
    add("results without classes", results({"class_names": GONE}), "class_names"),
    add("results with a word for classes", results({"class_names": "ant"}), "class_names"),
    add("results with numbers for classes", results({"class_names": [[1, 2], [3, 4]]}), "class_names|class"),
    add(
        "results of fewer classes than tasks", results({"class_names": [["class a", "class b"]]}), "class_names|tasks"
    ),
    add(
        "results of other classes than the model", results({"class_names": [["x", "y"], ["z", "w"]]}), "class|teacher"
    ),
    add("results without roles", results({"roles": GONE}), "roles|results.json"),
    add("results with a list for roles", results({"roles": []}), "roles|results.json"),
    add(
        "results without accuracies", results({"roles.student.accuracy_matrix": GONE}), "accuracy_matrix|results.json"
    ),
    add(
        "results with words for accuracies",
        results({"roles.student.accuracy_matrix": ["a", "b"]}),
        "accuracy_matrix|results.json",
    ),
    add("results without seconds", results({"roles.student.train_seconds": GONE}), "train_seconds|results.json"),
    add("results of one task", results({"roles.student.accuracy_matrix": [[50.0]]}), "1 task", "results.json"),
    add("results of a teacher", results({"role": "teacher"}), "student"),
    add("results of a classifier", results({"recipe.student.model": "classifier"}), "classifier"),
]

FILES = [
    add("no tags", lambda files: None, "no tag", tag=None, way="task-NN|tags"),
    add("a tag of another name", lambda files: None, "no tag", tag="v1.0", way="task-NN|tags"),
    add("a tag far ahead", lambda files: None, "task-99|99 tasks", tag="task-99"),
    add(
        "an earlier state that is not there",
        lambda files: None,
        "task-01",
        words=("--revision", "task-01"),
        way="tags",
    ),
    add("no weights", without("model.safetensors"), "model.safetensors"),
    add("weights that are cut off", half("model.safetensors"), "model.safetensors|weights"),
    add(
        "a pickle for weights",
        lambda files: files.update({"pytorch_model.bin": files.pop("model.safetensors")}),
        "safetensors",
    ),
    add("no config", without("config.json"), "config.json"),
    add("a config that is cut off", half("config.json"), "config.json"),
    add("no processor", without("preprocessor_config.json"), "preprocessor_config.json"),
    add("a config of another model", put("config.json", b'{"model_type": "bert"}'), "bert|config"),
    add(
        "an image classifier of somebody",
        lambda files: [files.clear(), files.update({"config.json": b"{}"})],
        "results.json",
    ),
]

ASKED = [
    ask("nobody's repository", "add", "me/nothing", "photos", says=("me/nothing",)),
    ask("somebody's private name", "add", "someone/secret", "photos", says=("someone/secret",)),
    ask("a repository of three names", "add", "a/b/c", "photos", says=("a/b/c",), way="OWNER/NAME|."),
    ask(
        "an address",
        "add",
        "https://huggingface.co/me/tiny",
        "photos",
        says=("https://huggingface.co/me/tiny",),
    ),
    ask("an empty name", "add", "", "photos", says=("repository|OWNER/NAME|''|neither",)),
    ask("a name of wrong letters", "add", "me/ti ny!", "photos", says=("me/ti ny!",)),
    ask(
        "no network",
        "add",
        "me/tiny",
        "photos",
        says=("me/tiny",),
        way="offline|HF_HUB_OFFLINE|again",
        hub=False,
    ),
    ask(
        "no teacher",
        "add",
        "me/tiny",
        "photos",
        "--teacher",
        "me/no-teacher",
        says=("me/no-teacher", "teacher"),
    ),
    ask("a student for a teacher", "add", "me/tiny", "photos", "--teacher", "me/tiny", says=("teacher",)),
    ask("a teacher for a student", "add", "me/tiny-teacher", "photos", says=("student",)),
    ask("data that are missing", "add", "me/tiny", "./nowhere", says=("./nowhere",), way="data.path"),
    ask("data of known classes", "add", "me/tiny", "data", says=("class a",), way="known_train"),
    ask("other prompts", "add", "me/tiny", "photos", "--student.prompt.length", 8, says=("student.prompt",)),
    ask("a misspelt field", "add", "me/tiny", "photos", "--train.epochs", 8, says=("train.epochs",)),
    ask(
        "a folder that is in use",
        "add",
        "me/tiny",
        "photos",
        "--output_dir",
        "data",
        says=("data",),
        way="--output_dir",
    ),
    ask(
        "push to a repository of somebody",
        "push",
        "done",
        "--hub_model_id",
        "someone/x",
        says=("someone/x",),
        way="allowed|rights|write",
    ),
    ask(
        "push to a repository of another run",
        "push",
        "done",
        "--hub_model_id",
        "me/foreign",
        says=("me/foreign",),
        way="another repository|--hub_model_id",
    ),
    ask(
        "push to tags of another run",
        "push",
        "done",
        "--hub_model_id",
        "me/other-run",
        says=("me/other-run",),
        way="another repository|--hub_model_id",
    ),
    ask(
        "train and push to a repository of another run",
        "train",
        "recipe.yaml",
        "--output_dir",
        "new",
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "me/foreign",
        says=("me/foreign",),
        way="another repository|--hub_model_id",
    ),
    ask(
        "train and push to somebody",
        "train",
        "recipe.yaml",
        "--output_dir",
        "new",
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "someone/x",
        says=("someone/x",),
        way="allowed|rights|write",
    ),
    ask("the demo of nobody's repository", "demo", "me/nothing", says=("me/nothing",)),
]

ROWS = rows("repository", RESULTS, FILES, ASKED)
