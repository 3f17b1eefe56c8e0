"""Use of a trained student: students, images, outputs and figures that hf-cdl predict, evaluate and demo refuse."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs.changes import ask
from bad_inputs.parts import change_weights, cut
from bad_inputs.runner import rows

STUDENT = "fitted/student/task-01"
PROCESSOR = "preprocessor_config.json"


def put(name: str, content: bytes = b"x") -> Callable[[], Any]:
    """Write a file, and the folders above it."""

    def write() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)

    return write


def nan() -> None:
    change_weights(Path(STUDENT), {"head": lambda tensor: tensor * math.nan if tensor.is_floating_point() else tensor})


def of_both(name: str, student: str, *says: str, **options: Any) -> list[Any]:
    """A student that neither command can use."""
    return [
        ask(f"{verb} with {name}", verb, *student.split(), "photos", says=says, **options)
        for verb in ("predict", "evaluate")
    ]


STUDENTS = [
    *of_both("a missing folder", "./gone", "./gone"),
    *of_both("a name that nothing has", "gone", "no folder gone"),
    *of_both("a file for a student", "photos/train/ant/0.png", "0.png is a file"),
    *of_both("a folder of images for a student", "photos", "photos is neither"),
    *of_both("a backbone for a student", "student", "student", "classifier.weight"),
    *of_both("a folder of the run that holds no model", "fitted/logs", "no logs"),
    *of_both("cut weights", STUDENT, STUDENT, before=lambda: cut(Path(STUDENT, "model.safetensors"))),
    *of_both("weights that are NaN", STUDENT, "NaN", before=nan),
    *of_both(
        "no image processor", STUDENT, STUDENT, before=lambda: Path(STUDENT, "preprocessor_config.json").unlink()
    ),
    *of_both("a cut ledger", "fitted", "run.json", before=lambda: cut(Path("fitted/run.json"))),
    *of_both("a run without its students", "fitted", "none", before=lambda: shutil.rmtree("fitted/student/task-01")),
    *of_both("a plugin that is not there", "fitted --plugins gone.py --workers 0", "gone.py"),
    ask("predict with an unknown revision", "predict", "done", "photos", "--revision", "task-07", says=("task-02",)),
    ask("evaluate of an unknown revision", "evaluate", "done", "photos", "--revision", "7", says=("no student 7",)),
    ask("predict with a revision of one", "predict", "ridge", "photos", "--revision", "task-01", says=("one",)),
    ask(
        "evaluate of several of one",
        *("evaluate", STUDENT, "photos", "--revision", "task-01", "--revision", "task-02"),
        says=("one checkpoint",),
    ),
    ask("a repository that is not there", "predict", "me/nothing", "photos", says=("me/nothing",), hub=True),
    ask("a repository of something else", "evaluate", "me/foreign", "photos", says=("me/foreign",), hub=True),
    ask(
        "a repository's unknown revision",
        *("predict", "me/tiny", "photos", "--revision", "task-09"),
        says=("me/tiny at task-09",),
        hub=True,
    ),
]


def predict(name: str, *words: Any, says: tuple[str, ...], **options: Any) -> Any:
    return ask(f"predict {name}", "predict", "fitted", *words, says=says, **options)


PREDICT = [
    predict("without images", says=("IMAGES",)),
    predict("of a missing folder", "gone", says=("no gone",)),
    predict("of nothing", "", says=("empty",)),
    predict("of an empty folder", "empty", says=("empty has no image files",), before=lambda: Path("empty").mkdir()),
    predict("of a folder of texts", "texts", says=("texts has no image files",), before=put("texts/a.txt")),
    predict("of tables", "data", says=("data has no image files", "evaluate"), before=put("data/train.parquet")),
    predict("of a text file", "notes.txt", says=("None of 1", "notes.txt"), before=put("notes.txt")),
    predict("of an empty file", "a.png", says=("a.png", "0 bytes"), before=put("a.png", b"")),
    predict("of files that are no images", "odd", says=("None of 1", "odd/a.bin"), before=put("odd/a.bin")),
    predict(
        "with --strict", "photos", "--strict", says=("x.png",), way="without --strict", before=put("photos/x.png")
    ),
    predict("with no answers", "photos", "--top-k", 0, says=("--top-k", "at least 1")),
    predict("with half an answer", "photos", "--top-k", 0.5, says=("--top-k", "whole number")),
    predict("with more answers than classes", "photos", "--top-k", 4, says=("--top-k is 4", "3 classes")),
    predict("with no workers at all", "photos", "--workers", "-1", says=("--workers",)),
    predict("in batches of none", "photos", "--batch-size", 0, says=("--batch-size", "at least 1")),
    predict("that rejects without telling", "photos", "--reject", says=("cannot tell", "known: 0.95")),
    predict("that keeps all", "photos", "--reject", 1, says=("--reject", "between 0 and 1")),
    predict("that keeps most", "photos", "--reject", "most", says=("--reject", "'most'", "share")),
    predict("into a spreadsheet", "photos", "--out", "a.xlsx", says=("a.xlsx", ".parquet")),
    predict("into a file without an ending", "photos", "--out", "csv", says=("csv", ".jsonl")),
    predict("into nothing", "photos", "--out", "", says=("--out", "empty")),
    predict("over a file", "photos", "--out", "a.csv", says=("a.csv exists",), before=put("a.csv")),
    predict("over a folder", "photos", "--out", "a.html", says=("a.html exists",), before=Path("a.html").mkdir),
    predict("below a file", "photos", "--out", "a/b/c.csv", says=("a is a file",), before=put("a")),
    predict(
        "over one of two", "photos", "--out", "b.html", "--out", "a.csv", says=("a.csv exists",), before=put("a.csv")
    ),
    predict("into a file twice", "photos", "--out", "a.csv", "--out", "./a.csv", says=("a.csv", "twice")),
]


def evaluate(name: str, *words: Any, says: tuple[str, ...], **options: Any) -> Any:
    return ask(f"evaluate {name}", "evaluate", "fitted", *words, says=says, **options)


def unreadable() -> None:
    for file in Path("photos/test").rglob("*.png"):
        file.write_bytes(b"x")


EVALUATE = [
    ask(
        "evaluate without images, outside a run",
        "evaluate",
        "alone",
        says=("not in a run's folder",),
        before=lambda: shutil.copytree("fitted/student/task-01", "alone"),
    ),
    evaluate("of the run's images with a split", "--split", "test", says=("--split", "IMAGES")),
    evaluate("of a missing folder", "./gone", says=("no images at ./gone",)),
    evaluate("of a data set that is not there", "gone", says=("'gone'",), way="local copy"),
    evaluate("of an empty folder", "empty", says=("empty", "class folders"), before=lambda: Path("empty").mkdir()),
    evaluate("of one image", "photos/train/ant/0.png", says=("0.png is a file",)),
    evaluate("of a run", "fitted", says=("fitted is a run",), way="folder of images"),
    evaluate("of images without classes", "photos/train/ant", says=("ant",)),
    evaluate("of images that cannot be read", "photos", says=("None of the 9", "photos/test"), before=unreadable),
    evaluate("that rejects without telling", "photos", "--reject", says=("cannot tell", "known: 0.95")),
    evaluate("of an unknown split", "photos", "--split", "dev", says=("--split", "'dev'", "train")),
    evaluate(
        "of a revision twice", "photos", *("--revision", "task-01") * 2, says=("task-01 is given more than once",)
    ),
    evaluate("into a folder in use", "photos", "--out", "fitted", says=("fitted is not empty",)),
    evaluate("into a file", "photos", "--out", "a", says=("a is not empty",), before=put("a")),
    ask("evaluate of none of its classes", "evaluate", "done", "photos", says=("class a", "ant"), way="rename"),
]

DEMO = [
    ask("the demo that rejects without telling", "demo", "fitted", "--reject", says=("cannot tell", "known: 0.95")),
    ask("the demo that keeps all", "demo", "fitted", "--reject", 1, says=("--reject", "between 0 and 1")),
    ask("the demo beside a missing state", "demo", "done", "--compare", "task-07", says=("no task-07", "task-01")),
    ask("the demo beside its newest state", "demo", "done", "--compare", "task-02", says=("task-02", "task-01")),
    ask("the demo beside the only state", "demo", "fitted", "--compare", "task-01", says=("task-01", "none")),
]

ROWS = rows("in use", STUDENTS, PREDICT, EVALUATE, DEMO)
