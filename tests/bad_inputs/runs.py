"""Folders of runs: damaged ledgers and checkpoints, other recipes and data, and a run in progress."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from helpers import make_data, picture

from bad_inputs.models import config, filled, put, weights
from bad_inputs.parts import GONE, Parts, cut
from bad_inputs.runner import WAY, Command, Row, command, rows

LEDGER = "run.json"
HELD: list[FileLock] = []  # held while the tests run


def run(
    name: str,
    damage: Callable[[Path], Any],
    *says: str,
    of: str = "done",
    words: Any = None,
    way: str = WAY,
    hub: bool = False,
) -> Row:
    """The same command again, or another one (`words`), on a damaged run folder."""

    def make(parts: Parts) -> Command:
        parts.put_recipe(of)
        damage(Path(of))
        script, *rest = words or ("train", "recipe.yaml", "--output_dir", of)
        return command(script, *rest)

    return Row(name, make, says, way, hub)


def ledger(changes: dict[str, Any]) -> Callable[[Path], Any]:
    return config(changes, LEDGER)


def hold(folder: Path) -> None:
    lock = FileLock(folder / ".lock")
    lock.acquire(timeout=0)
    HELD.append(lock)


def missing(*names: str) -> Callable[[Path], Any]:
    """Remove files and folders."""

    def damage(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut_off(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [cut(folder / name) for name in names]


def no_data(folder: Path) -> None:
    shutil.rmtree("data")


def other_data(folder: Path) -> None:
    shutil.rmtree("data")
    make_data(Path("data"), classes=4, train=5, test=2)


def one_class_more(folder: Path) -> None:
    shutil.rmtree("data")
    make_data(Path("data"), classes=5, train=4, test=2)


def new_classes() -> None:
    """Make photos/ with two classes that no run knows."""
    for split, first in (("train", 0), ("test", 100)):
        for label, name in enumerate(("owl", "yak")):
            place = Path("photos", split, name)
            place.mkdir(parents=True)
            for number in range(3):
                picture(10 + label, first + number).save(place / f"{number}.png")


def empty_images(folder: Path) -> None:
    (Path("data") / "test.parquet").unlink()


LEDGERS: dict[str, Callable[[Path], Any]] = {
    "cut off": cut_off(LEDGER),
    "empty": put(LEDGER, ""),
    "of no JSON": put(LEDGER, "recipe: {}\n"),
    "a list": put(LEDGER, "[]"),
    "null": put(LEDGER, "null"),
    "without entries": ledger({"entries": GONE}),
    "without a recipe": ledger({"recipe": GONE}),
    "with a word for a recipe": ledger({"recipe": "tiny"}),
    "with a list for entries": ledger({"entries": []}),
    "with words for entries": ledger({"entries": {"student": "x"}}),
    "with entries of no fields": ledger({"entries": {"student": [{}], "teacher": [{}]}}),
    "with a word for an accuracy": ledger({"entries.student.0.row": ["good"]}),
    "with a number of hundreds of digits": ledger({"recipe.seed": 10**400}),
    "binary": lambda folder: (folder / LEDGER).write_bytes(bytes(range(256))),
    "a folder": lambda folder: [(folder / LEDGER).unlink(), (folder / LEDGER).mkdir()],
}


def read_by(script: str, *names: str) -> list[Row]:
    """Other commands that read a ledger."""
    return [run(f"{script}: a ledger {name}", LEDGERS[name], "run.json", words=(script, "done")) for name in names]


HUGE = "with a number of hundreds of digits"
LEDGER_ROWS = [
    *(run(f"a ledger {name}", damage, "run.json") for name, damage in LEDGERS.items()),
    *read_by("card", "cut off", "a list", "without a recipe", "with words for entries", HUGE),
    *read_by("push", "cut off", "null", "with a word for a recipe"),
    *read_by("verify", "cut off", "empty", "a list", "without entries", "with entries of no fields", HUGE),
    run("a ledger of a newer version", ledger({"format": 99, "version": 99}), "run.json", "newer|version|format"),
    run("a ledger with a recipe of NaN", ledger({"recipe.train.learning_rate": float("nan")}), "learning_rate"),
    run("a ledger of unknown fields in the recipe", ledger({"recipe.sead": 3}), "sead"),
    run("a ledger of another stream", ledger({"stream": "0" * 16}), "data|stream", of="cut"),
    run("no ledger", missing(LEDGER), "done", "run.json", way="--output_dir"),
    run("the recipe of another run", lambda folder: change_yaml("seed: 7"), "seed", way="--output_dir"),
    run("a finished run in use", hold, "Another process", of="cut", way="wait|stop"),
    run("hf-cdl push of nowhere", lambda folder: None, "done", words=("push", "done"), way="--hub_model_id"),
    run(
        "hf-cdl push of a finished run that has lost its weights",
        missing("student/task-02"),
        "task-02",
        words=("push", "done", "--hub_model_id", "me/x"),
        hub=True,
    ),
    run(
        "hf-cdl push of a finished run whose weights are cut off",
        cut_off("student/model.safetensors", "student/task-02/model.safetensors"),
        "task-02",
        words=("push", "done", "--hub_model_id", "me/x"),
        hub=True,
    ),
    run(
        "hf-cdl push of a finished run that has lost its first task",
        missing("student/task-01/config.json"),
        "task-01",
        words=("push", "done", "--hub_model_id", "me/x"),
        hub=True,
    ),
]


def change_yaml(text: str) -> None:
    with open("recipe.yaml", "a") as stream:
        stream.write(text)


def both(damage: Callable[..., Callable[[Path], Any]], name: str) -> Callable[[Path], Any]:
    """Damage a file of the teacher's first task, and the copy that it could be restored from."""
    return damage(f"teacher/task-01/{name}", f"teacher/{name}")


def in_both(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [damage(folder / name) for name in ("teacher/task-01", "teacher")]


VERIFY = ("verify", "done")
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
CHECKPOINTS = [
    run("no checkpoint", missing("teacher"), "teacher", of="cut"),
    run("a checkpoint without weights", both(missing, WEIGHTS), WEIGHTS, of="cut"),
    run("a checkpoint with weights that are cut off", both(cut_off, WEIGHTS), WEIGHTS, of="cut"),
    run("a checkpoint without config", both(missing, CONFIG), CONFIG, of="cut"),
    run("a checkpoint with a config that is cut off", both(cut_off, CONFIG), CONFIG, of="cut"),
    run("a checkpoint without processor", both(missing, PROCESSOR), PROCESSOR, of="cut"),
    run("a checkpoint with a processor that is cut off", both(cut_off, PROCESSOR), PROCESSOR, of="cut"),
    run("a checkpoint of other classes", in_both(config({"tasks": [["x", "y"]]})), f"{CONFIG}|class", of="cut"),
    run("a checkpoint that lacks its head", in_both(weights({"head.": GONE})), f"{WEIGHTS}|head.", of="cut"),
    run(
        "a checkpoint with NaN",
        in_both(weights({"head.blocks.0.bias": filled(float("nan"))})),
        f"{WEIGHTS}|head.blocks.0.bias",
        of="cut",
    ),
    run("a finished student, all of it gone", missing("student"), "student"),
    run(
        "a finished student, its last task cut off",
        cut_off("student/model.safetensors", "student/task-02/model.safetensors"),
        "task-02",
    ),
    *(
        run(f"hf-cdl verify: {name}", damage, "task-02", words=VERIFY)
        for name, damage in {
            "no checkpoint": missing("student/task-02"),
            "weights that are cut off": cut_off("student/task-02/model.safetensors"),
            "a config that is cut off": cut_off("student/task-02/config.json"),
            "no processor": missing("student/task-02/preprocessor_config.json"),
            "a quantisation": config({"quantization_config": {"quant_method": "gptq"}}, "student/task-02/config.json"),
        }.items()
    ),
    run("hf-cdl verify: no data", no_data, "data", words=VERIFY),
    run("hf-cdl verify: other data", other_data, "data changed", "4 -> 5", words=VERIFY),
    run("hf-cdl verify: a class more", one_class_more, "data changed", "new class", words=VERIFY),
    run(
        "hf-cdl verify: a missing plugin",
        lambda folder: None,
        "gone.py",
        words=(*VERIFY, "--plugins", "gone.py"),
    ),
]

DATA = [
    run("finished, its data changed", other_data, "data"),
    run("finished, a class more in its data", one_class_more, "data|class"),
    run("finished, its test images gone", empty_images, "test"),
    run("going on, its data gone", no_data, "data", of="cut"),
    run("going on, its data changed", other_data, "data", of="cut"),
    run("going on, its backbone gone", lambda folder: shutil.rmtree("student"), "student", of="cut"),
]

TAKEN = ("train", "recipe.yaml", "--output_dir", "new", "--teacher_from")
TEACHERS = [
    run(
        "teacher_from of a run that is not that far",
        lambda folder: None,
        "teacher_from",
        of="cut",
        words=(*TAKEN, "cut"),
    ),
    run("teacher_from of another seed", lambda folder: None, "seed", words=(*TAKEN, "done", "--seed", 1)),
    run("teacher_from of other data", other_data, "stream|data", words=(*TAKEN, "done")),
    run(
        "teacher_from of a ledger that is cut off", cut_off(LEDGER), "teacher_from", "run.json", words=(*TAKEN, "done")
    ),
    run(
        "teacher_from of a ledger that is a list",
        put(LEDGER, "[]"),
        "teacher_from",
        "run.json",
        words=(*TAKEN, "done"),
    ),
    run("teacher_from of a run without its checkpoint", missing("teacher/task-01"), "task-01", words=(*TAKEN, "done")),
    run(
        "teacher_from of a run without its last checkpoint",
        missing("teacher/task-02/model.safetensors"),
        "task-02",
        words=(*TAKEN, "done"),
    ),
    run(
        "teacher_from of a checkpoint with a link",
        lambda folder: (folder / "teacher" / "task-01" / "secret.json").symlink_to("/etc/hostname"),
        "secret.json",
        "link",
        words=(*TAKEN, "done"),
    ),
    run(
        "teacher_from of itself",
        lambda folder: None,
        "teacher_from",
        words=("train", "recipe.yaml", "--output_dir", "new", "--teacher_from", "new"),
    ),
]

ADDED = [
    run(
        "hf-cdl add of a folder that is no run",
        lambda folder: None,
        "data",
        words=("add", "./data", "photos"),
    ),
    run("hf-cdl add of a missing folder", lambda folder: None, "gone", words=("add", "./gone", "photos")),
    run(
        "hf-cdl add of a ledger that is cut off",
        cut_off(LEDGER),
        "run.json",
        words=("add", "./done", "photos"),
        way="name another run's folder",
    ),
    run(
        "hf-cdl add of data that are missing",
        lambda folder: None,
        "nowhere",
        words=("add", "./done", "./nowhere"),
    ),
    run("hf-cdl add of known classes", lambda folder: None, "class a", words=("add", "./done", "./data")),
    run(
        "hf-cdl add of a student that answers in tuples",
        lambda folder: [config({"return_dict": False}, "student/task-02/config.json")(folder), new_classes()],
        "return_dict",
        words=("add", "./done", "photos", "--output_dir", "new"),
    ),
    run(
        "hf-cdl add of a student with a huge image",
        config({"size": {"height": 10**6, "width": 10**6}}, "student/task-02/preprocessor_config.json"),
        "size",
        words=("add", "./done", "photos", "--output_dir", "new"),
    ),
    run(
        "hf-cdl add of other prompts",
        lambda folder: None,
        "prompt",
        words=("add", "./done", "./data", "--student.prompt.length", 8),
    ),
]

ROWS = rows("run", LEDGER_ROWS, CHECKPOINTS, DATA, TEACHERS, ADDED)
