"""Strangers' files are read, not run: malicious repositories and folders, oversized files, invalid results."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, make_backbone, make_data, make_recipe, write_recipe
from hub_server import TOKEN, Failure, HubServer, environment
from huggingface_hub import CommitOperationAdd, HfApi
from states import States, StatesError

from hf_cdl.commands import add, card, push, verify
from hf_cdl.commands.train import main as train_main
from hf_cdl.hub import HubError, Repository, read_folder, read_origin
from hf_cdl.recipe import RecipeError, build_recipe, described, inherited_recipe, load_recipe
from hf_cdl.runs.files import RunError
from hf_cdl.runs.results import checked_results, run_results

FOOTPRINT = "footprint"


class Steps:
    """Leaves a footprint file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two tasks whose student has class means: nothing is trained."""
    folder = tmp_path_factory.mktemp("honest")
    recipe = {
        "name": "tiny",
        "data": {"path": str(make_data(folder / "data", classes=4)), "classes_per_task": 2},
        "student": {"backbone": str(make_backbone(folder / "backbone")), "head": {"type": "ncm"}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    assert train_main([str(write_recipe(folder / "r.yaml", recipe)), "--output_dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def evil(honest: Path, tmp_path: Path) -> Path:
    """The same run with malicious code wherever it might be run; it would leave a footprint file."""
    folder, footprint = tmp_path / "evil", tmp_path / FOOTPRINT
    shutil.copytree(honest / "run", folder)
    code = f"import pathlib\npathlib.Path({str(footprint)!r}).touch()\n\nclass Evil:\n    pass\n"
    for place in (folder, folder / "student", *folder.glob("student/task-*")):
        for name in ("evil.py", "hf_cdl_models_modeling_cdl.py", "sitecustomize.py"):
            (place / name).write_text(code)
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (place / name).write_bytes(pickle.dumps(Steps(footprint)))
    for checkpoint in (folder / "student", *folder.glob("student/task-*")):
        for name, classes in (
            ("config.json", ("AutoConfig", "AutoModelForImageClassification")),
            ("preprocessor_config.json", ("AutoImageProcessor",)),
        ):
            content = json.loads((checkpoint / name).read_text())
            content["auto_map"] = dict.fromkeys(classes, "evil.Evil")
            (checkpoint / name).write_text(json.dumps(content))
    for name in ("run.json", "results.json"):
        content = json.loads((folder / name).read_text())
        content["recipe"]["plugins"] = ["evil.py", str(folder / "evil.py")]
        content["recipe"]["train"] |= {"deepspeed": str(folder / "evil.py"), "report_to": ["evil"]}
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


def publish(hub: HubServer, run: Path, results: Any = None, content: bytes | None = None) -> HfApi:
    """Put the newest state of a run on the Hub, as anybody could, with everything else in its folder."""
    api, name = HfApi(hub.url, token=TOKEN), "me/tiny"
    api.create_repo(name)
    files = {path.name: path.read_bytes() for path in (run / "student" / "task-02").iterdir() if path.is_file()}
    stored = json.dumps(results).encode() if results else (run / "results.json").read_bytes()
    files["results.json"] = stored if content is None else content
    operations = [CommitOperationAdd(path, file) for path, file in files.items()]
    commit = api.create_commit(name, operations, commit_message="task-02")
    api.create_tag(name, tag="task-02", revision=commit.oid)
    return api


def took(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


CHECKPOINT = {"config.json", "preprocessor_config.json", "model.safetensors"}


# ---- code of strangers ----


def test_a_repository_s_plugins_are_named_and_not_run(
    evil: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = publish(hub, evil)
    monkeypatch.setattr(add, "HfApi", lambda: api)
    monkeypatch.chdir(evil)  # evil.py is even here
    with pytest.raises(HubError, match=r"'evil\.py'.* read them, then name them yourself: --plugins '\[FILE\.py\]'"):
        add.create_run(tmp_path / "new", "me/tiny", None, None)
    assert not (tmp_path / "new").exists() and not (tmp_path / FOOTPRINT).exists()


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_only_a_checkpoint_s_files_and_fields_are_taken(
    evil: Path, hub: HubServer, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if where == "hub":
        api = publish(hub, evil)
        monkeypatch.setattr(add, "HfApi", lambda: api)
    add.create_run(tmp_path / "new", "me/tiny" if where == "hub" else str(evil), None, None, plugins=True)
    checkpoint = {f"student/{place}{name}" for place in ("", "task-02/") for name in CHECKPOINT}
    assert took(tmp_path / "new") == {"run.json", "recipe.yaml", *checkpoint}
    recipe = yaml.safe_load((tmp_path / "new" / "recipe.yaml").read_text())
    assert recipe["plugins"] == [] and recipe["train"] == {"use_cpu": True} and "path" not in recipe["data"]
    assert str(tmp_path) not in (tmp_path / "new" / "recipe.yaml").read_text().replace(str(tmp_path / "new"), "")
    assert "train.deepspeed, train.report_to" in capsys.readouterr().out
    assert not (tmp_path / FOOTPRINT).exists()


def test_a_run_that_somebody_put_in_place_brings_no_plugins(
    evil: Path, honest: Path, tmp_path: Path, capsys: Any
) -> None:
    add.create_run(tmp_path / "out", str(honest / "run"), None, None)
    file = tmp_path / "out" / "recipe.yaml"
    own = yaml.safe_load(file.read_text())
    words = [str(honest / "run"), str(honest / "data"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "base.yaml").write_text(f"plugins: [{evil / 'evil.py'}]\n")
    for more in ({"plugins": [str(evil / "evil.py")]}, {"base": "../base.yaml"}):
        kept = {key: value for key, value in own.items() if key != "plugins"}
        file.write_text(yaml.safe_dump({**kept, **more}))
        assert add.main(words) == 2
        assert add.main([*words, "--plugins", "[]"]) == 2
        assert "names plugins, which nobody asked for here" in capsys.readouterr().err
    assert not (tmp_path / FOOTPRINT).exists()


def test_reading_numbers_runs_nothing(
    evil: Path, honest: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(evil)
    assert card.main([str(evil), "--output", str(tmp_path / "cards")]) == 0
    assert str(honest) not in "".join(file.read_text() for file in (tmp_path / "cards").rglob("*.[mj]*"))
    monkeypatch.setattr("hf_cdl.hub.push.HfApi", lambda: HfApi(hub.url, token=TOKEN))
    assert push.main([str(evil), "--hub_model_id", "me/tiny"]) in (2, 4)  # its pickles are not pushed
    with pytest.raises(Failure, match="not found"):  # none was made for them
        hub.repository("me/tiny")
    assert verify.main([str(evil)]) in (0, 1)
    assert "plugins that are not run here: evil.py" in capsys.readouterr().err
    states = States(str(evil / "student"))
    assert states.results(2).name == "tiny"
    assert len(states.classifier(2)(picture_file(tmp_path))) == 4
    assert not (tmp_path / FOOTPRINT).exists()
    assert verify.main([str(evil), "--plugins", "evil.py"]) in (0, 1)  # the check itself: this is how code is run
    assert (tmp_path / FOOTPRINT).exists()


def test_plugins_that_a_user_names_are_run_and_no_others(
    evil: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user names one file on the command line: only that is run, though the repository names and has others."""
    data = make_data(tmp_path / "data", classes=6)
    api = publish(hub, evil)
    monkeypatch.setattr(add, "HfApi", lambda: api)
    monkeypatch.chdir(evil)
    mine = tmp_path / "mine.py"
    mine.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'mine')!r}).touch()\n")
    words = ["me/tiny", str(data), "--data.known_train", "ignore", "--output_dir", str(tmp_path / "out")]
    assert add.main(words) == 2, "it has plugins, which nobody has named"
    assert not (tmp_path / "out").exists() and not (tmp_path / "mine").exists()
    words += ["--data.classes_per_task", "[[class e, class f]]"]
    assert add.main([*words, "--plugins", f"[{mine}]"]) == 0
    assert (tmp_path / "mine").exists() and not (tmp_path / FOOTPRINT).exists()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["recipe"]["plugins"] == [str(mine)] and len(results["class_names"]) == 3
    assert not [*(tmp_path / "out").rglob("evil.py"), *(tmp_path / "out").rglob("sitecustomize.py")]


def test_a_file_of_the_repository_is_run_if_the_user_names_it(
    evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the test above: its plugin would have left its footprint."""
    data = make_data(tmp_path / "data", classes=6)
    words = [str(evil), str(data), "--data.known_train", "ignore", "--output_dir", str(tmp_path / "out")]
    monkeypatch.chdir(evil)
    assert add.main([*words, "--plugins", "[evil.py]"]) == 0
    assert (tmp_path / FOOTPRINT).exists()


@pytest.fixture
def only_safe(evil: Path) -> Path:
    """The malicious folder without anything that a push refuses."""
    for file in [*evil.rglob("*.bin"), *evil.rglob("*.pt"), *evil.glob("*/task-*/*.py")]:
        file.unlink()
    ledger = json.loads((evil / "run.json").read_text())
    ledger["files"] = {}  # as of a version without fingerprints: nothing is found damaged
    (evil / "run.json").write_text(json.dumps(ledger))
    return evil


def test_pushing_a_folder_runs_nothing_of_it(
    only_safe: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(only_safe)
    monkeypatch.setattr("hf_cdl.hub.push.HfApi", lambda: HfApi(hub.url, token=TOKEN))
    assert push.main([str(only_safe), "--hub_model_id", "me/tiny"]) == 0
    assert [*hub.repository("me/tiny").refs("tags")] == ["task-01", "task-02"], "it was pushed, all of it"
    assert not (tmp_path / FOOTPRINT).exists()


def test_a_teacher_of_a_stranger_s_run_runs_nothing_of_it(
    evil: Path, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """train.py --teacher_from: refused for a different recipe; with the same one, reused without its code."""
    data = str(honest / "data")
    head = {"type": "ncm"}
    recipe = {
        "name": "tiny",
        "data": {"path": data, "classes_per_task": 2},
        "teacher": {"backbone": str(honest / "backbone"), "head": head},
        "student": {
            "backbone": str(honest / "backbone"),
            "head": {"type": "ridge", "strength": 10.0, "soft_targets": 0.5},
        },
        "baselines": [],
        "train": {"use_cpu": True},
    }
    file = str(write_recipe(tmp_path / "taught.yaml", recipe))
    assert train_main([file, "--output_dir", str(tmp_path / "theirs")]) == 0
    for place in (tmp_path / "theirs", *(tmp_path / "theirs").glob("teacher/task-*")):
        for source in evil.glob("*.py"):
            shutil.copy(source, place)
        for source in [*evil.glob("*.bin"), *evil.glob("*.pt")]:
            shutil.copy(source, place)
    ledger = json.loads((tmp_path / "theirs" / "run.json").read_text())
    ledger["recipe"]["plugins"] = ["evil.py", str(evil / "evil.py")]
    (tmp_path / "theirs" / "run.json").write_text(json.dumps(ledger))
    monkeypatch.chdir(tmp_path / "theirs")
    taken = [file, "--output_dir", str(tmp_path / "mine"), "--teacher_from", str(tmp_path / "theirs")]
    assert train_main(taken) == 0
    assert (tmp_path / "mine" / "results.json").exists() and not (tmp_path / FOOTPRINT).exists()
    ledger["recipe"]["train"]["deepspeed"] = str(evil / "evil.py")
    (tmp_path / "theirs" / "run.json").write_text(json.dumps(ledger))
    capsys.readouterr()
    assert train_main([*taken[:2], str(tmp_path / "other"), *taken[3:]]) == 2
    assert "its teacher learns something else" in capsys.readouterr().err
    for words in (["--teacher_from", str(evil)], ["--teacher.head.type", "linear", "--teacher_from", str(evil)]):
        assert train_main([file, "--output_dir", str(tmp_path / "other"), *words]) == 2
    assert not (tmp_path / FOOTPRINT).exists() and not (tmp_path / "other").exists()


_DEMO = """
import sys
sys.path.insert(0, sys.argv[1])
from states import States, StatesError
states = States("me/tiny")
print(states.tasks, states.results(2).name)
print(len(states.classifier(2)(sys.argv[2])))
"""


@pytest.mark.slow
def test_the_demo_of_a_repository_runs_nothing_of_it(evil: Path, hub: HubServer, tmp_path: Path) -> None:
    """In a process started in the user's folder, with a Hub that has code, pickles and auto_map."""
    publish(hub, evil)
    demo = [sys.executable, "-c", _DEMO, str(ROOT / "hf_cdl" / "commands" / "space"), picture_file(tmp_path)]
    env = {**os.environ, **environment(hub, tmp_path / "home")}
    done = subprocess.run(demo, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[-3:] == ["[2] tiny", "4", ""], done.stdout + done.stderr
    assert not (tmp_path / FOOTPRINT).exists()
    assert not [*(tmp_path / "home").rglob("*.py"), *(tmp_path / "home").rglob("*.bin")], "nothing of it came here"


def picture_file(folder: Path) -> str:
    from helpers import picture

    picture(0, 0).save(folder / "image.png")
    return str(folder / "image.png")


def test_a_model_of_unknown_type_with_code_is_refused_unread(evil: Path, tmp_path: Path) -> None:
    for name in ("task-01", "task-02"):
        file = evil / "student" / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "evil"}))
    with pytest.raises(StatesError, match="cannot be loaded"):
        States(str(evil / "student")).classifier(2)
    with pytest.raises(HubError, match="not of a model of hf_cdl"):
        read_folder(evil, "student").copy(tmp_path / "copy")
    assert not (tmp_path / FOOTPRINT).exists()


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_links_and_pipes_are_not_followed(honest: Path, tmp_path: Path, part: str) -> None:
    run = shutil.copytree(honest / "run", tmp_path / "run")
    (secret := tmp_path / "secret.json").write_bytes((run / "student" / "task-02" / part).read_bytes())
    file = run / "student" / "task-02" / part
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(HubError, match="is a link or not a regular file"):
        read_folder(run, "student").copy(tmp_path / "copy")
    repository = Repository(HfApi(), "me/tiny", "student", run, True)
    with pytest.raises(HubError, match="is not pushed: it is a link"):
        repository._checkpoint(2)
    with pytest.raises(RunError, match="is a link; nothing was written through it"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "student").symlink_to(tmp_path)
        card.put(tmp_path / "out" / "student" / "README.md", b"")
    file.unlink()
    os.mkfifo(file)
    began = time.monotonic()
    with pytest.raises(HubError, match="not a regular file"):
        read_folder(run, "student").copy(tmp_path / "copy")
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")
    for command in (card.main, push.main):
        assert command([str(run)]) == 2
    assert verify.main([str(run)]) == 2 and time.monotonic() - began < 5


def test_an_index_that_reaches_out_is_refused(honest: Path, tmp_path: Path) -> None:
    run = shutil.copytree(honest / "run", tmp_path / "run")
    index = {"weight_map": {"w": "../../secret.safetensors"}}
    (run / "student" / "task-02" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match="no weights beside it"):
        read_folder(run, "student").copy(run / "copy")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_checkpoint_that_is_not_whole_is_not_taken(honest: Path, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(honest / "run", tmp_path / "run")
    file = run / "student" / "task-02" / name
    for content in (file.read_bytes()[: file.stat().st_size // 2], None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(HubError, match=name) as raised:
            add.create_run(tmp_path / "runs" / "new", str(run), None, None)
        assert str(raised.value).count("\n") < 6 and not (tmp_path / "runs").exists()


# ---- invalid results ----


def changed(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda results: results | fields


def in_role(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda results: results | {"roles": {"student": results["roles"]["student"] | fields}}


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda results: {key: value for key, value in results.items() if key != name}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda results: [results], "the whole is"),
    "no recipe": (without("recipe"), "recipe is missing"),
    "no classes": (without("class_names"), "class_names is missing"),
    "no roles": (without("roles"), "roles is missing"),
    "classes that are numbers": (changed(class_names=[[1, 2]]), r"class_names\.0\.0 is 1"),
    "classes without tasks": (changed(class_names=["a", "b"]), r"class_names\.0 is 'a'"),
    "a class twice": (changed(class_names=[["a"], ["a"]]), "a class twice"),
    "fewer tasks than measured": (changed(class_names=[["a"]]), "has 2 tasks, but class_names has 1"),
    "a matrix that is none": (in_role(accuracy_matrix="high"), "accuracy_matrix is 'high'"),
    "an accuracy in words": (in_role(accuracy_matrix=[["good"]]), r"accuracy_matrix\.0\.0 is 'good'"),
    "not a number": (in_role(accuracy_matrix=[[float("nan")]]), r"accuracy_matrix\.0\.0 is nan"),
    "more than all": (in_role(accuracy_matrix=[[101.0]]), r"accuracy_matrix\.0\.0 is 101"),
    "a short row": (in_role(accuracy_matrix=[[1.0], [1.0]]), "has 1 accuracy, but after task 2 there are 2"),
    "too few counts": (in_role(counts=[1]), "counts has 1 entry for 2 tasks"),
    "no counts": (in_role(counts=None), "counts is None"),
    "an enormous count": (in_role(counts=[10**30, 1]), r"counts\.0 is 1000"),
    "a role that is a path": (lambda r: r | {"roles": {"../up": r["roles"]["student"]}}, "roles"),
    "an origin without an end": (changed(origin={"tasks": 7, "roles": {}}), "origin.tasks is 7"),
    "an origin elsewhere": (
        changed(origin={"tasks": 1, "roles": {"student": {"repository": "x](http://evil)"}}}),
        "repository",
    ),
    "a name that is none": (changed(name=["x"]), r"name is \['x'\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_results_that_are_none_are_told_apart(honest: Path, hub: HubServer, case: str) -> None:
    change, said = BROKEN[case]
    results = change(json.loads((honest / "run" / "results.json").read_text()))
    began = time.monotonic()
    with pytest.raises(RunError, match=said) as raised:
        checked_results(copy.deepcopy(results), "results.json")
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value) and time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b'{"name": "tiny", "rec', "cut short"),
        (b"\xff\xfe\x00", "cut short"),
        (b"[" * 100_000, "nested too deep|cut short"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "nested more than 50 deep|the whole"),
        (b"1" * 10_000, "cut short"),
        (b"null", "the whole is None"),
    ],
)
def test_files_that_hold_no_results(honest: Path, hub: HubServer, tmp_path: Path, content: bytes, said: str) -> None:
    api = publish(hub, honest / "run", content=content)
    with pytest.raises(HubError, match=said):
        read_origin(api, "me/tiny", "student")
    run = shutil.copytree(honest / "run", tmp_path / "run")
    (run / "run.json").unlink()
    (run / "results.json").write_bytes(content)
    with pytest.raises(HubError, match=said):
        read_folder(run, "student")
    with pytest.raises(StatesError, match=r"results\.json of .* cannot be read"):
        States(str(run / "student")).results(1)
    (run / "run.json").write_bytes(content)
    codes = [card.main([str(run)]), push.main([str(run), "--hub_model_id", "me/x"]), verify.main([str(run)])]
    assert codes == [2, 2, 2]


def test_results_of_another_state_are_refused(honest: Path, hub: HubServer, tmp_path: Path) -> None:
    """The task count of the tag, of the results and of the weights must be the same."""
    results = json.loads((honest / "run" / "results.json").read_text())
    api = publish(hub, honest / "run", {**results, "class_names": [["x", "y"], ["z", "w"]]})
    with pytest.raises(HubError, match="They are not of the same state"):
        read_origin(api, "me/tiny", "student").copy(tmp_path / "copy")
    api.create_tag("me/tiny", tag="task-09", revision="task-02")
    with pytest.raises(HubError, match="is not a student of 9 tasks"):
        read_origin(api, "me/tiny", "student")


# ---- a stranger's recipe ----


def test_what_is_taken_of_a_recipe(tmp_path: Path) -> None:
    own = make_recipe(tmp_path)
    stored = json.loads(json.dumps(build_recipe(own).as_dict()))
    recipe, left = inherited_recipe(stored, build_recipe)
    assert left == [] and recipe.distill == [{"type": "kdp", "weight": 0.5}]
    assert recipe.student.backbone == "./student" and recipe.teacher and recipe.teacher.backbone == "./teacher"
    outside = {"logging_dir": "/x", "deepspeed": "/x", "fsdp_config": "/x", "resume_from_checkpoint": "/x"}
    more = {**stored, "base": "/etc/passwd", "output_dir": "/x", "teacher_from": "/x", "hub_model_id": "me/other"}
    more |= {"train": {**stored["train"], **outside, "push_to_hub": True}, "plugins": ["x.py"]}
    more["student"] = {**stored["student"], "head": {"type": "linear", "standardise": "/x/y.safetensors"}}
    recipe, left = inherited_recipe(more, build_recipe)
    assert {*left} >= {"base", *(f"train.{name}" for name in outside), "train.push_to_hub"}
    assert any(field.startswith("student.head.standardise (a file") for field in left)
    assert "/x" not in json.dumps(recipe.as_dict()) and recipe.plugins == [] and recipe.teacher_from is None


def test_unlabelled_images_are_taken_from_the_hub_or_from_the_folder_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name may be here, but with other images."""
    monkeypatch.chdir(tmp_path)
    own = make_recipe(tmp_path)
    for name, taken in {
        "org/images": "org/images",
        "photos": "./photos of its author",
        "photos/mine": "./mine of its author",
        "/srv/me/photos": "./photos of its author",
    }.items():
        if taken != name:
            (tmp_path / "photos" / "mine").mkdir(parents=True, exist_ok=True)
        own["data"] |= {"unlabelled": name, "unlabelled_ratio": 3}
        recipe, left = inherited_recipe(json.loads(json.dumps(build_recipe(own).as_dict())), build_recipe)
        assert (recipe.data.unlabelled, recipe.data.unlabelled_ratio) == (taken, 3)
        assert any(field.startswith("data.unlabelled (a folder") for field in left) == (taken != name)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -1},
        {"seed": 10**400},
        {"seed": "0"},
        {"student": None},
        {"student": {"backbone": "a\x1b[2J"}},
        {"student": {"backbone": ["a"]}},
        {"student": {"backbone": "a", "prompt": [1]}},
        {"student": {"backbone": "a", "head": {"type": ["ridge"]}}},
        {"distill": {"type": "kd"}},
        {"distill": [{"type": "kd", "weight": "much"}]},
        {"distill": [[]]},
        {"train": {"learning_rate": "high"}},
        {"data": {"flip": 7}},
        {"protocol": ["cdl"]},
    ],
    ids=str,
)
def test_a_stranger_s_recipe_that_cannot_be(fields: dict[str, Any], tmp_path: Path) -> None:
    stored = {"student": {"backbone": "org/small"}, "teacher": None, "data": {}, "seed": 0}
    assert inherited_recipe(stored, build_recipe)[0].student.backbone == "org/small"
    with pytest.raises(RecipeError) as raised:
        inherited_recipe(stored | fields, build_recipe)
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_numbers_are_read_without_opening_what_training_arguments_name(honest: Path, tmp_path: Path) -> None:
    run = shutil.copytree(honest / "run", tmp_path / "run")
    ledger = json.loads((run / "run.json").read_text())
    os.mkfifo(pipe := tmp_path / "pipe.json")
    for train in ({"deepspeed": str(pipe)}, {"fsdp_config": str(pipe)}, {"of_a_later_version": 1}):
        ledger["recipe"]["train"] = train
        (run / "run.json").write_text(json.dumps(ledger))
        assert run_results(run, described)["recipe"]["train"] == train
        assert verify.stored_recipe(run).train == {}


# ---- recipes that exhaust memory ----

LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
BOMBS = {
    "a billion laughs": (LAUGHS, "with its aliases written out"),
    "of mappings": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}}}\n" for i in range(1, 60)),
        "with its aliases written out",
    ),
    "merged": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
        "with its aliases written out",
    ),
    "an alias of itself": ("a: &a [*a]", "alias of what it lies in"),
    "deep": ("a: " + "[" * 10_000, "nested more than 50 deep"),
    "deep by aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
        "nested more than 50 deep",
    ),
    "a long number": ("a: " + "1" * 5000, "a number of 5,000 characters"),
    "too many": ("a: [" + "1," * 60_000 + "]", "more than 50,000 values"),
    "a date that is none": ("a: 2001-99-99", "a value that cannot be read"),
    "an object": ("a: !!python/object/apply:os.system [touch footprint]", "could not determine a constructor"),
    "long": ("a: " + "x" * 1_000_001, "has 1,000,004 characters"),
}


@pytest.mark.parametrize("case", BOMBS)
@pytest.mark.parametrize("where", ["file", "command line"])
def test_a_recipe_that_explodes_is_refused_at_once(case: str, where: str, tmp_path: Path) -> None:
    text, said = BOMBS[case]
    (file := tmp_path / "r.yaml").write_text(text if where == "file" else "name: x")
    words = [str(file), *(("--data.path", text) if where == "command line" else ())]
    began = time.process_time()
    with pytest.raises(RecipeError) as raised:
        load_recipe(words, file)
    assert time.process_time() - began < 2 and len(str(raised.value)) < 1000 and str(raised.value).count("\n") < 6
    assert (said if where == "file" else "is not valid YAML") in str(raised.value)
    assert not (tmp_path / FOOTPRINT).exists()


def test_a_long_value_is_shown_short(tmp_path: Path) -> None:
    (file := tmp_path / "r.yaml").write_text("name: x\nteacher: [" + "1:" * 5000 + "1]\n")
    with pytest.raises(RecipeError, match=r"'data.path' is \{'a': '1:1:1.*\.\.\., but should be") as raised:
        load_recipe([str(file), "--data.path", "a: " + "1:" * 5000 + "1"], file)
    assert len(str(raised.value)) < 1500


def test_a_large_recipe_is_read(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(21_841)]
    (file := tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "x", "data": {"known_classes": [names]}}))
    with pytest.raises(RecipeError, match="'data.path' is missing"):
        load_recipe([str(file)], file)


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="not a regular file"):
        load_recipe([str(tmp_path / "pipe")], tmp_path)
