"""hf-cdl export: wrong words, students that cannot be had, files in the way, images and processors that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs.changes import ask
from bad_inputs.parts import change_json, cut
from bad_inputs.runner import Row, rows


def export(name: str, *words: Any, says: tuple[str, ...], **more: Any) -> Row:
    """An export of the run `fitted`, or of the student that the words begin with."""
    student, rest = ("fitted", words) if not words or str(words[0]).startswith("--") else (words[0], words[1:])
    return ask(name, "export", student, *rest, says=says, **more)


def written(file: str, text: str = "x") -> Callable[[], Any]:
    def write() -> None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text)

    return write


def processor(**fields: Any) -> Callable[[], Any]:
    """The checkpoint's image processor with other fields."""
    return lambda: change_json(Path("ridge/preprocessor_config.json"), fields)


def small(act: Callable[[Path], Any]) -> Callable[[], Any]:
    """Do something to the checkpoint `ridge`."""
    return lambda: act(Path("ridge"))


BROKEN = "new/export.json"
SWAPS = {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True, "do_center_crop": False}
EXPORTS = [
    export("of a missing folder", "./gone", says=("gone",)),
    export("of a file", "photos/train/ant/0.png", says=("photos/train/ant/0.png",)),
    export("of a folder of images", "photos", says=("photos",)),
    export("of nothing", "", says=("neither a run",)),
    export("of a task that is not there", "--revision", "task-09", says=("task-09", "task-01")),
    export("of a task of one checkpoint", "ridge", "--revision", "task-01", says=("--revision",)),
    export("to another format", "--to", "tflite", says=("tflite", "onnx")),
    export("to 8 bits and 16", "--int8", "--fp16", says=("--int8", "--fp16")),
    export("at no size", "--size", "0", says=("--size", "0")),
    export("at a size below none", "--size", "-8", says=("--size",)),
    export("at a size of letters", "--size", "small", says=("small",)),
    export("at a size that the patches do not fit", "--size", "20", says=("20", "patch size 8")),
    export("at a huge size", "--size", "80000000", says=("80000000",)),
    export("into no place", "--out", "", says=("empty",)),
    export("over a file", "--out", "here.onnx", says=("here.onnx",), before=written("here.onnx")),
    export("below a file", "--out", "photos/train/ant/0.png", says=("0.png",)),
    export(
        "beside facts that are cut off", "--out", "new", says=("export.json",), before=written("new/export.json", "[")
    ),
    export("with a missing folder of images", "--images", "gone", says=("gone",)),
    export("with an empty folder of images", "--images", "new", says=("new",), before=lambda: Path("new").mkdir()),
    export("with an image that is none", "--images", "new", says=("x.png",), before=written("new/x.png")),
    export("with a plugin that is missing", "--plugins", "gone.py", says=("gone.py",)),
    export(
        "of a checkpoint that is cut off",
        "ridge",
        says=("model",),
        before=small(lambda place: cut(place / "model.safetensors")),
    ),
    export(
        "of a checkpoint without classes",
        "ridge",
        says=("0 classes",),
        before=small(lambda place: change_json(place / "config.json", {"tasks": []})),
    ),
    export(
        "of a checkpoint without a processor",
        "ridge",
        says=("preprocessor",),
        before=small(lambda place: (place / "preprocessor_config.json").unlink()),
    ),
    export("of a processor that swaps channels", "ridge", says=("resize, crop",), before=processor(**SWAPS)),
    export("of a repository that is not there", "me/nothing", says=("me/nothing",), hub=True),
    export("of a repository of something else", "me/foreign", says=("me/foreign",), hub=True),
]
ROWS = rows("export", EXPORTS)
