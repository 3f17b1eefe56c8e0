"""The commands: help, odd arguments, and a failed first attempt leaves nothing behind."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, make_backbone, make_data, make_recipe, run_script, script, write_recipe

import hf_cdl
from hf_cdl.commands import console
from hf_cdl.commands import train as train_recipe
from hf_cdl.commands.parsers import VERBS, read

SCRIPTS = sorted({*(ROOT / "recipes").glob("*.py")} - {ROOT / "recipes" / "own_methods.py"})  # which is a plugin


# ---- help ----


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_help_of_a_script(
    file: Path, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run_script(file, [word], monkeypatch)
    said = capfd.readouterr()
    assert not code and len(said.out.splitlines()) > 3 and not said.err
    assert "python recipes/" in said.out or "accelerate launch" in said.out, "how it is called"
    assert not list(tmp_path.iterdir())


def run(*words: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run python -m hf_cdl; returns the process and the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "hf_cdl", *words], cwd=cwd, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_takes_no_time_and_shows_how(verb: str | None, tmp_path: Path) -> None:
    """Usage, every option with its default, and an example that the command accepts."""
    words = ["--help"] if verb is None else [verb, "--help"]
    done, seconds = run(*words, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and seconds < 0.5, (done.stderr, seconds)
    assert done.stdout.startswith(f"usage: hf-cdl {verb or 'VERB'} ") and not list(tmp_path.iterdir())
    if verb is None:
        assert all(f"  {name} " in done.stdout and each.about in done.stdout for name, each in VERBS.items())
        return
    parser = VERBS[verb].parser(verb)
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            assert action.help is not None and ("(default: " in action.help or action.dest == "example"), action.dest
    example = shlex.split(done.stdout.split("example:\n")[1])
    assert example[:2] == ["hf-cdl", verb]
    read(verb, example[2:])


def test_words_before_a_verb(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path)[0].stdout == f"hf-cdl {hf_cdl.__version__}\n"
    for words, said in (([], "required: VERB"), (["trian"], "invalid choice: 'trian'")):
        done, seconds = run(*words, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and seconds < 0.5


def test_training_without_a_recipe_says_what_to_do(tmp_path: Path) -> None:
    for words in ((), ("--seed", "3")):
        code, said = script("train", *words, env={}, cwd=tmp_path)
        assert code == 2 and said.startswith("error: No recipe was named") and "RECIPE.yaml" in said, said
    assert not list(tmp_path.iterdir())


BROKEN = {
    "a full disk": ('"$@" > /dev/full', "Standard output cannot be written (No space left on device)"),
    "a reader that ends": ('{ "$@"; echo "code $?" >&2; } | true', "Standard output cannot be written (Broken pipe)"),
    "a folder that is gone": ('mkdir gone; cd gone; rmdir "$PWD"; "$@"', "The current folder is gone. Go to another"),
}


VERBS_OF = {
    "train": ("train", "--example", "quickstart"),
    "help": ("compare", "--help"),
    "plan": ("plan", "gone.yaml"),
}


@pytest.mark.parametrize(
    ("what", "verb"),
    [  # what imports everything before it speaks takes seconds
        pytest.param(what, verb, marks=() if verb == "help" else pytest.mark.slow)
        for what in BROKEN
        for verb in VERBS_OF
    ],
)
def test_a_command_that_cannot_speak_ends_without_a_traceback(what: str, verb: str, tmp_path: Path) -> None:
    line, said = BROKEN[what]
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "hf_cdl", *VERBS_OF[verb]]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if verb == "train" or "folder" in what:  # the others print nothing, or only their help, on standard output
        assert f"error: {said}" in done.stderr, done.stderr
        assert done.returncode == 2 or "code 2" in done.stderr


def test_code_that_ends_the_process_is_an_error_of_the_command(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "made", plugins=[str(tmp_path / "mine.py")])
    text = (ROOT / "recipes" / "own_methods.py").read_text()
    (tmp_path / "mine.py").write_text(
        f"{text}\n\ndef leave(self, *args):\n    raise SystemExit(0)\n\n\nPrefix.__init__ = leave\n"
    )
    recipe["student"]["prompt"] = {"type": "prefix", "length": 2, "layers": [0]}
    file = write_recipe(tmp_path / "own.yaml", recipe)
    code, said = script("train", file, env={}, cwd=tmp_path)
    assert code == 2 and "Traceback" not in said
    assert "mine.py, line" in said and "(raise SystemExit(0)) ended the process before the command was done" in said


# ---- the example recipe ----


@pytest.mark.parametrize("clone", [False, True])
def test_the_example_is_the_recipe_of_the_repository(
    clone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if clone:
        (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert train_recipe.main(["--example", "quickstart"]) == 0
    said, file = capfd.readouterr().out, tmp_path / "quickstart.yaml"
    assert file.read_bytes() == (ROOT / "recipes" / "quickstart.yaml").read_bytes()
    assert ("are in this folder" in said) == clone
    file.unlink()
    assert train_recipe.main(["--example=quickstart"]) == 0 and capfd.readouterr().out == said
    fields = ("data.path", "teacher.backbone", "student.backbone", "card.data_card")
    assert [field in said for field in fields] == [not clone] * 4, said
    file.write_text("mine")
    assert train_recipe.main(["--example", "quickstart"]) == 2
    assert "is here already" in capfd.readouterr().err and file.read_text() == "mine"
    for words in (["--example"], ["--example", "nothing"], ["--example="], ["--example", "quickstart", "--seed", "1"]):
        assert train_recipe.main(words) == 2
        assert "allowed: quickstart" in capfd.readouterr().err


def test_the_example_trains_with_other_data_and_backbones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It reports everything that is missing, and nothing else."""
    monkeypatch.chdir(tmp_path)
    assert train_recipe.main(["--example", "quickstart"]) == 0
    assert call("quickstart.yaml", "--plan") == 2
    make_data(tmp_path / "data", classes=20, train=4, test=2)
    for role, depth in (("teacher", 5), ("student", 4)):
        make_backbone(tmp_path / role, depth=depth)
    words = ("--data.path", "data", "--teacher.backbone", "./teacher", "--student.backbone", "./student")
    capfd.readouterr()
    assert call("quickstart.yaml", *words, "--card.data_card", "null", "--plan") == 0, capfd.readouterr().err
    assert "quickstart: 2 tasks, 20 classes" in capfd.readouterr().out


# ---- a failed first attempt ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    recipe = make_recipe(folder, baselines=[])
    recipe["data"] = {"path": str(make_data(folder / "few", classes=2, train=4, test=2)), "classes_per_task": 2}
    return write_recipe(folder / "recipe.yaml", recipe)


def call(*words: Any) -> int:
    return train_recipe.main([str(word) for word in words])


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def broken_image(tmp_path: Path) -> list[Any]:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            (tmp_path / "images" / split / name / "0.png").write_bytes(b"no image")
    return ["--data.path", tmp_path / "images"]


BATCH = ("--train.per_device_train_batch_size",)
FAILURES: dict[str, Any] = {
    "data that are not there": lambda at: ["--data.path", at / "nowhere"],
    "too few classes": lambda at: ["--data.classes_per_task", 9],
    "images that cannot be read": broken_image,
    "a backbone that is not there": lambda at: ["--student.backbone", at / "nowhere"],
    "prompts that do not fit": lambda at: ["--student.prompt.layers", "[0, 7]"],
    "a batch that no task fills": lambda at: [*BATCH, 9, "--train.dataloader_drop_last", "true"],
    "no way to the Hub": lambda at: ["--push_to_hub", "true", "--hub_model_id", "someone/something"],
    "a plugin that is not there": lambda at: ["--plugins", "[nowhere.py]"],
    "a loss that is not a number": lambda at: [*BATCH, 2, "--train.learning_rate", "1e38"],
    "a teacher that is not there": lambda at: ["--teacher_from", at / "nowhere"],
}


@pytest.mark.parametrize("before", ["no folder", "an empty folder", "other runs beside it"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_first_try_that_fails_leaves_nothing_behind(
    name: str, before: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    monkeypatch.setattr("hf_cdl.hub.Pusher.check", refuse if "Hub" in name else lambda *_: None)
    words = FAILURES[name](tmp_path)
    folder = tmp_path / "runs" / "mine"
    if before != "no folder":
        (folder if before == "an empty folder" else folder.with_name("other")).mkdir(parents=True)
    found = tree(tmp_path)
    assert call(tiny, "--output_dir", folder, *words) in (2, 3)
    assert tree(tmp_path) == found


def refuse(*_: Any) -> None:
    raise train_recipe.HubError("The token is wrong.")


def test_what_was_there_before_stays(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger that an older version left after a failure, and a folder that others put files into meanwhile."""
    folder = tmp_path / "mine"
    nan = ("--train.learning_rate", "1e38", *BATCH, 2)  # in the first epoch: no state is stored
    with monkeypatch.context() as patch:
        patch.setattr("hf_cdl.runs.run.Run.close", lambda run: run._lock.release(force=True))
        assert call(tiny, "--output_dir", folder, *nan) == 3
    assert "run.json" in tree(folder)
    assert call(tiny, "--output_dir", folder, *nan) == 3
    assert {"run.json", ".lock"} <= tree(folder).keys()

    other = tmp_path / "other"

    def meanwhile(*_: Any) -> None:
        (other / "notes.txt").write_text("mine")
        refuse()

    monkeypatch.setattr("hf_cdl.hub.Pusher.check", meanwhile)
    assert call(tiny, "--output_dir", other) == 2
    assert tree(other) == {"notes.txt": b"mine"}
    assert call(tiny, "--output_dir", other) == 2, "and now it is not empty"


def test_what_was_learnt_stays(tiny: Path, tmp_path: Path) -> None:
    student = ("--student.train.learning_rate", "1e38", *BATCH, 2)
    assert call(tiny, "--output_dir", tmp_path / "mine", *student) == 3
    assert {"run.json", "teacher/task-01/model.safetensors"} <= tree(tmp_path / "mine").keys()


# ---- odd arguments ----


def odd(tiny: Path, tmp_path: Path) -> Iterator[tuple[str, list[Any], str]]:
    (tmp_path / "thesis.txt").write_text("important")
    (tmp_path / "empty.yaml").write_text("")
    out = ("--output_dir", tmp_path / "out")
    yield "a folder without images", [tmp_path, *out], "cannot be read as a data set; in it lie empty.yaml"
    yield "a text as recipe", [tmp_path / "thesis.txt", *out], "thesis.txt is a file. Give the folder of the images"
    yield "nothing as recipe", [tmp_path / "empty.yaml", *out], "must hold fields like 'name: ...'"
    yield "a file as folder", [tiny, "--output_dir", tmp_path / "thesis.txt"], "is a file; choose another folder"
    yield "below a file", [tiny, "--output_dir", tmp_path / "thesis.txt" / "run"], "Could not open the run in"
    yield "nowhere to write", [tiny, "--output_dir", "/proc/nowhere/run"], "Could not open the run in /proc/nowhere"
    yield "too long a name", [tiny, "--output_dir", tmp_path / ("x" * 300)], "File name too long"
    yield "a null byte", [tiny, "--output_dir", '"a\\0b"'], "null byte"
    yield "no number", [tiny, *out, "--train.learning_rate", ".nan"], "'train.learning_rate' is nan, but must be a"
    yield "infinite", [tiny, *out, "--distill.0.weight", ".inf"], "'distill.0.weight' is inf, but must be a finite"
    yield "negative infinite", [tiny, *out, "--ce_weight", "-.inf"], "'ce_weight' is -inf, but must be a finite"
    yield "no value", [tiny, *out, "--seed"], "--seed has no value"


def test_odd_words(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, words, message in odd(tiny, tmp_path):
        before = tree(tmp_path)
        assert call(*words) == 2, name
        said = capfd.readouterr()
        assert message in said.err, (name, said.err)
        assert not said.out and len(said.err.splitlines()) <= 6 and said.err.startswith("error: "), said.err
        assert tree(tmp_path) == before, name


@pytest.mark.parametrize("name", ['it\'s "a" $HOME `b` \\b! *[x]? zwölf 犬\nlines', "-dash", os.fsdecode(b"\xff")])
def test_a_folder_of_any_name(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run ends and is found again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_cdl.runs.pictures.plotting_available", lambda: False)
    words = [str(tiny), f"--output_dir={as_yaml(name)}", "--train.num_train_epochs", "1"]
    console.quiet()
    code = train_recipe.main(words)
    said = capfd.readouterr()
    if "\udcff" in name:  # safetensors takes names in UTF-8 alone
        assert code == 2 and "Traceback" not in said.err and len(said.err.splitlines()) <= 6
        return
    assert code == 0, said.err
    assert train_recipe.main(words) == 0 and capfd.readouterr().out.startswith("This run is finished.")
    assert (tmp_path / name / "student" / "model.safetensors").is_file()


def as_yaml(name: str) -> str:
    """A string of YAML for any name."""
    return '"' + "".join(f"\\U{ord(c):08x}" if ord(c) < 0xD800 or ord(c) > 0xDFFF else c for c in name) + '"'
