"""Changes of a trained student: commands and methods, wrong words, files, classes and images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import SIZE, picture
from transformers import ViTImageProcessor

from bad_inputs.models import config, put
from bad_inputs.parts import GONE, Parts, change_json, cut
from bad_inputs.runner import WAY, Command, Row, command, rows
from bad_inputs.runs import hold
from hf_cdl import CDLForImageClassification

NOTHING: dict[str, Any] = {}


def ask(
    name: str,
    *words: Any,
    says: tuple[str, ...],
    before: Callable[[], Any] = lambda: None,
    way: str = WAY,
    hub: bool = False,
) -> Row:
    """A command beside a run with a fitted head, `fitted`, and the `photos` that it learnt."""

    def make(parts: Parts) -> Command:
        for part in ("photos", "student", "fitted"):
            parts.copy(part)
        for part in ("done", "cut", "ridge"):
            if any(str(word).startswith(part) for word in words):
                parts.copy(part)
        before()
        verb, *rest = words
        return command(verb, *rest)

    return Row(name, make, says, way, hub)


def correct(name: str, text: str | bytes, *says: str, way: str = WAY, before: Callable[[], Any] = lambda: None) -> Row:
    """Corrections with this content."""

    def write() -> None:
        Path("c.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        before()

    return ask(f"corrections {name}", "correct", "fitted", "c.csv", says=says, before=write, way=way)


def line(image: str, label: str, was: str) -> str:
    return f"image,label,was\nphotos/train/{image},{label},{was}\n"


def foreign(place: str) -> Callable[[], Any]:
    """Put three images that nobody has learnt into a folder."""

    def write() -> None:
        Path(place).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            picture(30, number).save(Path(place) / f"{number}.png")

    return write


def copied(source: str, target: str) -> Callable[[], Any]:
    def copy() -> None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    return copy


def both(*acts: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [act() for act in acts]


def changed(**fields: Any) -> Callable[[], Any]:
    """A ledger with a change that no run would have written."""
    names = [["ant", "bee", "cat"]]
    change = {"revision": 2, "kind": "rename", "said": "x", "time": "t", "class_names": names}
    content = {**change, "images": {}, "choices": {}, **fields}
    kept = {key: value for key, value in content.items() if value is not GONE}
    return lambda: change_json(Path("fitted/run.json"), {"changes": [kept]})


def damaged() -> None:
    for folder in ("fitted/student/task-01", "fitted/student"):
        cut(Path(folder, "model.safetensors"))


TRAIN = "photos/train"
RENAME = ("rename", "fitted", "ant", "emmet")
COMMANDS = [
    *(
        ask(f"{verb} of {name}", verb, student, *words, says=says)
        for verb, words in (("rename", ("ant", "emmet")), ("remove", ("ant",)), ("undo", ()))
        for name, student, says in (
            ("a missing folder", "./gone", ("gone",)),
            ("a file", "photos/train/ant/0.png", ("photos/train/ant/0.png",)),
            ("a folder of images", "photos", ("photos",)),
        )
    ),
    ask("rename of an unknown class", "rename", "fitted", "art", "emmet", says=("art", "ant")),
    ask("rename to another class's name", "rename", "fitted", "ant", "bee", says=("bee", "merge")),
    ask("rename to nothing", "rename", "fitted", "ant", " ", says=("class name",)),
    ask("rename without a new name", "rename", "fitted", "ant", says=("NEW",)),
    ask("rename of a class of a trained head that is not there", "rename", "done", "ant", "x", says=("ant",)),
    ask("merge of one class", "merge", "fitted", "ant", "--as", "insect", says=("two",)),
    ask("merge of a class with itself", "merge", "fitted", "ant", "ant", "--as", "insect", says=("two", "ant")),
    ask("merge without a name", "merge", "fitted", "ant", "bee", says=("--as",)),
    ask("merge as nothing", "merge", "fitted", "ant", "bee", "--as", "", says=("class name",)),
    ask("merge with an unknown class", "merge", "fitted", "ant", "wasp", "--as", "insect", says=("wasp",)),
    ask("merge as a class that stays", "merge", "fitted", "ant", "bee", "--as", "cat", says=("cat",)),
    ask("merge of trained classes", "merge", "done", "class a", "class b", "--as", "x", says=("trained", "ridge")),
    ask("remove of an unknown class", "remove", "fitted", "aunt", says=("aunt", "ant")),
    ask("remove of no class", "remove", "fitted", "", says=("''",), way="did you mean|one of|it has|knows"),
    ask("remove without a class", "remove", "fitted", says=("CLASS",)),
    ask("remove with a missing folder", "remove", "fitted", "ant", "--images", "gone", says=("gone",)),
    ask("remove with a file", "remove", "fitted", "ant", "--images", "photos/train/ant/0.png", says=("0.png",)),
    ask("remove with a folder twice", "remove", "fitted", "ant", "--images", TRAIN, TRAIN, says=("photos/train",)),
    ask("remove with two folders of the class", "remove", "fitted", "ant", "--images", "photos", says=("Several",)),
    ask(
        "remove with too few images",
        *("remove", "fitted", "ant", "--images", TRAIN),
        says=("1 of them",),
        before=lambda: Path(TRAIN, "ant", "0.png").unlink(),
    ),
    ask(
        "remove with too many images",
        *("remove", "fitted", "ant", "--images", TRAIN, "new"),
        says=("3 too many",),
        before=foreign("new"),
    ),
    ask(
        "remove with other images",
        *("remove", "fitted", "ant", "--images", "new"),
        says=("not the same",),
        before=foreign("new"),
    ),
    ask("remove with another class's images", "remove", "fitted", "ant", "--images", f"{TRAIN}/bee", says=("ant",)),
    ask(
        "remove with an empty folder",
        *("remove", "fitted", "ant", "--images", "new"),
        says=("new", "ant"),
        before=lambda: Path("new").mkdir(),
    ),
    ask("remove of trained images", "remove", "done", "class a", "--images", TRAIN, says=("trained|class a",)),
    ask("undo of nothing", "undo", "fitted", says=("no change",), way="as it was"),
    ask("undo of two", "undo", "fitted", "2", says=("2",)),
    ask("a change of a run in progress", "rename", "cut", "class a", "x", says=("not finished",)),
    ask(
        "a change of a run in use", *RENAME, says=("Another process",), way="wait", before=lambda: hold(Path("fitted"))
    ),
    ask("a change of a teacher", "rename", "done/teacher", "class a", "x", says=("teacher",)),
    ask("a change of an earlier state", "rename", "done/student/task-01", "class a", "x", says=("task-01", "task-02")),
    ask("a change of a run elsewhere", *RENAME, "--output_dir", "new", says=("--output_dir",)),
    ask("a change whose ledger is cut off", *RENAME, says=("run.json",), before=lambda: cut(Path("fitted/run.json"))),
    ask("a change whose student is lost", *RENAME, says=("model.safetensors",), before=damaged),
    ask("a change after a change of no revision", *RENAME, says=("revision",), before=changed(revision=7)),
    ask("a change after a change of itself", *RENAME, says=("changes.0",), before=changed(state=2)),
    ask("a change after a change of no name", *RENAME, says=("said",), before=changed(said=GONE)),
    ask("a change after a change of unknown fields", *RENAME, says=("why",), before=changed(why="x")),
    ask("a push of what was never pushed", *RENAME, "--push_to_hub", "true", says=("never pushed", "hub_model_id")),
    ask("a push perhaps", *RENAME, "--push_to_hub", "perhaps", says=("perhaps",)),
    ask("a plugin that is missing", *RENAME, "--plugins", "gone.py", says=("gone.py",)),
    ask("a backbone for a whole checkpoint", *RENAME, "--backbone", "student", says=("--backbone",)),
    ask(
        "a checkpoint into somebody's folder",
        *("rename", "ridge", "ant", "emmet", "--output_dir", "photos"),
        says=("photos",),
    ),
    ask(
        "a checkpoint into another run",
        *("rename", "ridge", "ant", "emmet", "--output_dir", "fitted"),
        says=("fitted",),
    ),
    ask(
        "a checkpoint that is cut off",
        *("rename", "ridge", "ant", "emmet"),
        says=("model.safetensors",),
        before=lambda: cut(Path("ridge/model.safetensors")),
    ),
    ask(
        "a checkpoint of no classes",
        *("rename", "ridge", "ant", "emmet"),
        says=("tasks",),
        way="knows",
        before=lambda: config({"tasks": []})(Path("ridge")),
    ),
    ask("a checkpoint and an unknown class", *("rename", "ridge", "art", "emmet"), says=("art",)),
    ask("a repository that is not there", "rename", "me/nothing", "ant", "x", says=("me/nothing",), hub=True),
    ask("a repository of something else", "rename", "me/foreign", "ant", "x", says=("me/foreign",), hub=True),
    ask("a repository's teacher", "rename", "me/tiny-teacher", "class a", "x", says=("student",), hub=True),
    ask("a repository's unknown class", "remove", "me/tiny", "ant", says=("ant",), hub=True, way=f"{WAY}|knows"),
    ask("undo of a repository's tasks", "undo", "me/tiny", says=("no change",), hub=True, way="as it was"),
    ask(
        "add of an image with two labels",
        *("add", "fitted", "new"),
        says=("two labels", "owl", "yak"),
        before=both(foreign("new/owl"), copied("new/owl/0.png", "new/yak/0.png")),
    ),
    ask(
        "add of an image that has another label",
        *("add", "fitted", "new"),
        says=("learnt before", "ant", "owl"),
        before=both(foreign("new/owl"), copied("photos/train/ant/0.png", "new/owl/9.png")),
    ),
    ask(
        "add with a field of training",
        "add",
        "fitted",
        TRAIN,
        "--train.num_train_epochs",
        2,
        says=("num_train_epochs",),
    ),
    ask("add with a teacher to a fitted head", "add", "fitted", TRAIN, "--teacher", "done", says=("teacher",)),
    ask(
        "add of an image that is none",
        *("add", "fitted", "new"),
        says=("9.png",),
        before=both(foreign("new/owl"), lambda: put("9.png", "x")(Path("new/owl"))),
    ),
]

CORRECTIONS = [
    ask("corrections that are missing", "correct", "fitted", "gone.csv", says=("gone.csv",), way="read"),
    ask("corrections that are a folder", "correct", "fitted", "photos", says=("photos",), way="read"),
    ask("corrections of no file", "correct", "fitted", says=("FILE.csv",)),
    ask("corrections of an empty name", "correct", "fitted", "", says=("empty",)),
    correct("that are empty", "", "columns"),
    correct("without labels", "image\nphotos/train/ant/0.png\n", "label"),
    correct("with another column", "image,label,why\na.png,ant,x\n", "why"),
    correct("of no lines", "image,label\n", "no corrections", way="below"),
    correct("with an empty label", line("ant/0.png", " ", "ant"), "Line 2", "label"),
    correct("with too many cells", "image,label,was\na.png,ant,bee,cat\n", "Line 2", way="more cells"),
    correct("in another encoding", "image,label\na.png,pélican\n".encode("latin-1"), "utf-8", way="read"),
    correct("of a missing image", line("ant/gone.png", "bee", "ant"), "gone.png"),
    correct(
        "of an image that is none",
        line("ant/x.png", "bee", "ant"),
        "x.png",
        before=lambda: put("x.png", "x")(Path(TRAIN, "ant")),
    ),
    correct(
        "of an image twice",
        line("ant/0.png", "bee", "ant") + "photos/train/bee/../ant/0.png,cat,ant\n",
        "0.png",
        way="once",
    ),
    correct("to the same label", line("ant/0.png", "ant", "ant"), "same label", way="before and after"),
    correct("of an unknown label before", line("ant/0.png", "bee", "wasp"), "wasp|ant"),
    correct("of another label before", line("ant/0.png", "cat", "bee"), "0.png", "ant", "bee", way="say"),
    correct(
        "that leave a class empty",
        "image,label\n" + "".join(f"{TRAIN}/ant/{n}.png,bee\n" for n in range(3)),
        "ant",
        "0 images",
    ),
    correct(
        "of an image that was not learnt",
        "image,label,was\nnew/0.png,bee,ant\n",
        "cannot have been learnt",
        before=foreign("new"),
    ),
    ask(
        "corrections of a trained head",
        *("correct", "done", "c.csv"),
        says=("trained", "ridge"),
        before=lambda: Path("c.csv").write_text("image,label,was\nphotos/train/ant/0.png,class a,class b\n"),
    ),
]


# ---- methods ----


def method(name: str, act: Callable[[Any], Any], *says: str, way: str = WAY, fields: dict[str, Any] = NOTHING) -> Row:
    """A method of a model with a ridge head that has learnt ant, bee and cat."""

    def make(parts: Parts) -> Callable[[], Any]:
        options = {"head": {"type": "ridge"}, **fields}
        model = CDLForImageClassification.from_backbone(str(parts.student), **options)
        if model.fitted:
            model.add(pixels(6), ["ant", "ant", "bee", "bee", "cat", "cat"])
        else:
            model.begin_task(["ant", "bee", "cat"])
        return lambda: act(model)

    return Row(name, make, says, way)


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": SIZE, "width": SIZE})


LINEAR = {"head": {"type": "linear"}}
METHODS = [
    method("model.add of fewer labels than images", lambda m: m.add(pixels(2), ["ant"]), "2 images", "labels has 1"),
    method("model.add of numbers for labels", lambda m: m.add(pixels(2), [0, 1]), "class name"),
    method("model.add of a text for labels", lambda m: m.add(pixels(1), "ant"), "class names"),
    method("model.add of nothing", lambda m: m.add([], []), "at least one"),
    method("model.add of a path for images", lambda m: m.add("photos", ["ant"]), "images is a str"),
    method("model.add of an image without channels", lambda m: m.add(pixels(1)[:, 0], ["ant"]), "shape"),
    method("model.add of whole numbers", lambda m: m.add(pixels(1).long(), ["ant"]), "dtype"),
    method("model.add of NaN", lambda m: m.add(pixels(1) * float("nan"), ["ant"]), "NaN", way="."),
    method("model.add of files without a processor", lambda m: m.add(["a.png"], ["ant"]), "processor"),
    method("model.add of a missing file", lambda m: m.add(["gone.png"], ["ant"], processor()), "gone.png"),
    method("model.add of None", lambda m: m.add([None], ["ant"], processor()), "None|NoneType|image"),
    method("model.add to a trained head", lambda m: m.add(pixels(1), ["ant"]), "trained", fields=LINEAR),
    method(
        "model.correct to what it was", lambda m: m.correct(pixels(1), ["ant"], ["ant"]), "same label", way="before"
    ),
    method("model.correct without labels before", lambda m: m.correct(pixels(1), ["ant"], []), "at least one"),
    method("model.correct of an unknown label", lambda m: m.correct(pixels(1), ["ant"], ["wasp"]), "wasp"),
    method(
        "model.correct of strangers", lambda m: m.correct(pixels(1, 9), ["ant"], ["bee"]), "cannot have been learnt"
    ),
    method("model.correct of a whole class", lambda m: m.correct(pixels(6)[:2], ["bee"] * 2, ["ant"] * 2), "0 images"),
    method(
        "model.correct of a trained head", lambda m: m.correct(pixels(1), ["ant"], ["bee"]), "trained", fields=LINEAR
    ),
    method("model.remove of an unknown class", lambda m: m.remove("art"), "art", "ant"),
    method("model.remove of a number", lambda m: m.remove(0), "0", way="knows|."),
    method("model.remove with too few images", lambda m: m.remove("ant", pixels(1)), "1 of them"),
    method("model.remove with other images", lambda m: m.remove("ant", pixels(2, 9)), "not the same"),
    method(
        "model.remove of the only class",
        lambda m: [m.remove(name) for name in ("ant", "bee", "cat")],
        "only class",
        way=".",
    ),
    method("model.rename to a known class", lambda m: m.rename("ant", "bee"), "bee", "merge"),
    method("model.rename to None", lambda m: m.rename("ant", None), "class name"),
    method("model.merge of one", lambda m: m.merge(["ant"], "x"), "two"),
    method("model.merge of a text", lambda m: m.merge("ant", "x"), "list"),
    method("model.merge to a third class", lambda m: m.merge(["ant", "bee"], "cat"), "cat"),
    method("model.undo twice", lambda m: [m.undo(), m.undo()], "no change", way="only"),
]

ROWS = rows("changes", COMMANDS, CORRECTIONS, METHODS)
