"""Data that give no task stream: wrong folders, files, columns, labels, classes, and objects of the wrong type."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from helpers import make_table, picture, png
from transformers import AutoImageProcessor

from bad_inputs.parts import Parts
from bad_inputs.runner import WAY, Command, Row, command, rows
from hf_cdl.data import StreamConfig, TaskStream

CLASSES = ClassLabel(names=["ant", "bee"])


def data(name: str, build: Callable[[Parts], Any], /, *says: str, way: str = WAY, **fields: Any) -> Row:
    """A run on the folder `bad`, which a callable creates; `fields` are those of the recipe's section `data`."""

    def make(parts: Parts) -> Command:
        build(parts)
        section = {"path": "bad", "classes_per_task": None, **fields}
        recipe = parts.write({f"data.{key}": value for key, value in section.items()})
        return command("train", recipe, "--output_dir", "run")

    return Row(name, make, says or ("bad",), way)


def foreign(name: str, make: Callable[[], Any], *says: str, way: str = WAY) -> Row:
    """A run that measures foreign images in the folder `more`, which a callable creates."""

    def act(parts: Parts) -> Command:
        make()
        recipe = parts.write({"data.foreign": "./more", "baselines": ["ridge_head"]})
        return command("train", recipe, "--output_dir", "run")

    return Row(f"foreign images: {name}", act, says, way)


def beside(name: str, build: Callable[[Parts], Any], *says: str, way: str = WAY, **fields: Any) -> Row:
    """A run on good data with unlabelled images in the folder `more`, which a callable creates."""

    def make(parts: Parts) -> Command:
        build(parts)
        recipe = parts.write({f"data.{key}": value for key, value in {"unlabelled": "more", **fields}.items()})
        return command("train", recipe, "--output_dir", "run")

    return Row(f"unlabelled images: {name}", make, says, way)


def test_images(folder: str, *names: str) -> None:
    """The good data's test images, as parquet files of these names."""
    os.mkdir(folder)
    for name in names or ("train",):
        labels = [label for label in range(4) for _ in range(2)]
        make_table(labels, 4, 10_000).to_parquet(f"{folder}/{name}.parquet")


def texts(folder: str) -> None:
    os.mkdir(folder)
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(f"{folder}/train.parquet")


def photos(*changes: Callable[[Path], Any]) -> Callable[[Parts], None]:
    """Make class folders of ant, bee and cat, then apply changes to them."""

    def build(parts: Parts) -> None:
        folder = parts.copy("photos", "bad")
        for change in changes:
            change(folder)

    return build


def gone(name: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.rmtree(folder / name)


def new(name: str, content: bytes = b"") -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def flat(parts: Parts) -> None:
    for split in ("train", "test"):
        os.makedirs(f"bad/{split}")
        for number in range(4):
            picture(number % 2, number).save(f"bad/{split}/ant{number}.png")


def table(labels: list[Any], kind: Any = CLASSES, without: str = "", **columns: Any) -> Callable[[], Dataset]:
    """A table with an image per label and the labels as a column of type `kind`, plus further `columns`."""

    def make() -> Dataset:
        count = len(labels)
        cells = [{"bytes": png(picture(0, number)), "path": None} for number in range(count)]
        every = {"image": (ImageFeature(), cells), "label": (kind, labels)}
        every |= {name: (feature, [value] * count) for name, (feature, value) in columns.items()}
        every.pop(without, None)
        features = Features({name: feature for name, (feature, _) in every.items()})
        return Dataset.from_dict({name: values for name, (_, values) in every.items()}, features=features)

    return make


def parquet(
    train: Callable[[], Dataset], test: Callable[[], Dataset] | None = None, both: bool = True
) -> Callable[[Parts], None]:
    """Make train.parquet and test.parquet; without `test`, both are equal."""

    def build(parts: Parts) -> None:
        os.mkdir("bad")
        train().to_parquet("bad/train.parquet")
        if both:
            (test or train)().to_parquet("bad/test.parquet")

    return build


def files(**contents: bytes) -> Callable[[Parts], None]:
    return files_in("bad", **contents)


def files_in(folder: str, **contents: bytes) -> Callable[[Parts], None]:
    def build(parts: Parts) -> None:
        os.mkdir(folder)
        for name, content in contents.items():
            Path(folder, name.replace("_", ".")).write_bytes(content)

    return build


def cut_parquet(parts: Parts) -> None:
    file = parts.copy("data", "bad") / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])


RIGHT = [0, 0, 1, 1]

PLACES = [
    data("no folder", lambda parts: None, "./gone", way="data.path", path="./gone"),
    data("no folder at an absolute path", lambda parts: None, "/gone/away", way="data.path", path="/gone/away"),
    data("nothing on the Hub", lambda parts: None, "nobody/nothing", way="local", path="nobody/nothing"),
    beside("no folder", lambda parts: None, "./gone", way="data.unlabelled", unlabelled="./gone"),
    foreign("no folder", lambda: None, "./more", way="data.foreign"),
    foreign("an empty folder", lambda: os.mkdir("more"), "more", way="data.foreign"),
    foreign("a text", lambda: (os.mkdir("more"), Path("more/a.png").write_text("x")), "a.png"),
    foreign("several splits", lambda: test_images("more", "a", "b"), "a, b", way="data.foreign"),
    beside("nothing on the Hub", lambda parts: None, "nobody/none", way="local", unlabelled="nobody/none"),
    beside("an empty folder", lambda parts: os.mkdir("more"), "more", way="data.unlabelled"),
    beside("a file that is no image", files_in("more", x_png=b"x"), "more/x.png", way="repair"),
    beside("a damaged table", files_in("more", train_parquet=b"x"), "more/train.parquet", way="Repair"),
    beside("test images alone", lambda parts: test_images("more"), "more", "no images", way="data.unlabelled"),
    beside(
        "no such split", lambda parts: test_images("more"), "none", way="unlabelled_split", unlabelled_split="none"
    ),
    beside("several splits", lambda parts: test_images("more", "a", "b"), "a, b", way="data.unlabelled_split"),
    beside("no column of images", lambda parts: texts("more"), "text", way="image_column"),
    data("an empty path", lambda parts: None, "path", path=""),
    data("a file for a folder", lambda parts: None, "recipe.yaml", way="data.path|folder", path="./recipe.yaml"),
    data("an empty folder", lambda parts: os.mkdir("bad")),
    data("empty class folders", lambda parts: [os.makedirs(f"bad/{s}/ant") for s in ("train", "test")]),
    data("hidden files alone", files(**{"/.DS_Store".replace("/", ""): b"x"})),
    data("texts alone", files(notes_txt=b"x", labels_csv=b"file,label\na.png,0\n")),
    data("an archive alone", files(photos_zip=b"PK\5\6" + bytes(18)), way="unpack|class folders|parquet"),
    data("pictures without class folders", flat, "bad|train", way="class|CLASS"),
    data("a parquet file that is cut off", cut_parquet, "train.parquet"),
    data("an empty file as parquet", files(train_parquet=b"", test_parquet=b""), "parquet"),
    data(
        "a text as parquet",
        files(train_parquet=b"a,b\n1,2\n" * 99, test_parquet=b"a,b\n" * 99),
        "train.parquet|test.parquet",
    ),
    data("no rows", parquet(table([])), "train|class|label|images"),
    data("no test images", photos(gone("test")), "test", way="test_fraction|test_split|test/"),
    data("no training images", photos(gone("train")), "train"),
    data("train.parquet alone", parquet(table(RIGHT), both=False), "test", way="test_fraction"),
    data("no validation images", photos(), "validation", eval_split="validation"),
    data("a split that is not there", photos(), "trian", "train_split", way="splits are", train_split="trian"),
    data("a configuration of a folder", photos(), "name", name="plain_text"),
    data("a class without test images", photos(gone("test/cat")), "cat", "test"),
    data("a class without training images", photos(gone("train/cat")), "cat", "train"),
    data("a class folder of texts", photos(gone("train/cat"), new("train/cat/a.txt", b"x")), "cat"),
    data("classes of other names in test", photos(lambda f: (f / "test/cat").rename(f / "test/Cat")), "cat"),
    data(
        "one image of a class to hold out",
        photos(gone("test"), lambda f: [(f / f"train/cat/{n}.png").unlink() for n in (0, 1)]),
        "cat",
        test_fraction=0.2,
    ),
    data("a pipe among the images", photos(lambda f: os.mkfifo(f / "train/ant/9.png")), "9.png"),
    data("a dangling link among the images", photos(lambda f: (f / "train/ant/9.png").symlink_to("gone")), "9.png"),
    data("a device among the images", photos(lambda f: (f / "train/ant/9.png").symlink_to("/dev/zero")), "9.png"),
    data(
        "a file name that is not UTF-8",
        photos(lambda f: (f / "train/ant/0.png").rename(os.fsdecode(os.fsencode(f / "train/ant") + b"/\xff.png"))),
        r"\xff|\udcff|\ufffd",
        way="UTF-8|rename",
    ),
    data(
        "a class name that is not UTF-8",
        photos(
            lambda f: [(f / s / "ant").rename(os.fsdecode(os.fsencode(f / s) + b"/\xff")) for s in ("train", "test")]
        ),
        r"\xff|\udcff|\ufffd",
        way="UTF-8|rename",
    ),
]

TABLES = [
    data("no images in the table", parquet(table(RIGHT, without="image")), "image"),
    data("no labels in the table", parquet(table(RIGHT, without="label")), "label"),
    data("two columns of images", parquet(table(RIGHT, mask=(ImageFeature(), None))), "image", "mask"),
    data("two columns of classes", parquet(table(RIGHT, coarse=(CLASSES, 0))), "label", "coarse"),
    data("an image column that is not there", parquet(table(RIGHT)), "pic", "image", image_column="pic"),
    data("a label column that is not there", parquet(table(RIGHT)), "wnid", "label", label_column="wnid"),
    data(
        "an image column of text",
        parquet(table(RIGHT, note=(Value("string"), "x"))),
        "note",
        way="with images",
        image_column="note",
    ),
    data("a label column of images", parquet(table(RIGHT)), "label", label_column="image"),
    data("a test table with fewer columns", parquet(table(RIGHT), table(RIGHT, without="label")), "label", "test"),
    data("a null label", parquet(table([0, None, 1, 1])), "null|missing"),
    data("a null name", parquet(table(["a", None, "b"], Value("string"))), "null|missing"),
    data("an empty name", parquet(table(["", "", "b", "b"], Value("string"))), "empty|''"),
    data("an empty class", parquet(table(RIGHT, ClassLabel(names=["", "bee"]))), "empty|''"),
    data("negative labels", parquet(table([0, 0, -1, -1], Value("int64"))), "-1"),
    data("labels with a gap", parquet(table([0, 0, 5, 5], Value("int64"))), "5"),
    data("labels of halves", parquet(table([0.0, 0.5, 1.0, 1.0], Value("float32"))), "float"),
    data("lists of labels", parquet(table([[0], [0, 1], [1], [1]], Sequence(Value("int64")))), "list"),
    data("labels of truth", parquet(table([True, False, True, False], Value("bool"))), "bool"),
    data("splits with other classes", parquet(table(RIGHT), table(RIGHT, ClassLabel(names=["ant", "cat"]))), "cat"),
    data(
        "splits in another order", parquet(table(RIGHT), table(RIGHT, ClassLabel(names=["bee", "ant"]))), "bee", "ant"
    ),
    data("splits of names and numbers", parquet(table(RIGHT), table(["ant", "bee"], Value("string"))), "string"),
    data("a class without images", parquet(table(RIGHT, ClassLabel(names=["ant", "bee", "yak"]))), "yak"),
]

CUTS = [
    data("more classes a task than there are", photos(), "classes_per_task", "3 classes", classes_per_task=9),
    data("sizes that add up to more", photos(), "classes_per_task", "3 classes", classes_per_task=[2, 2]),
    data("a class that is not there", photos(), "bea", way="bee", classes_per_task=[["ant", "bea"]]),
    data("more classes than there are", photos(), "max_classes", "3 classes", max_classes=9),
    data("known classes alone", photos(), "known", known_classes=[["ant", "bee", "cat"]], known_train="ignore"),
    data("known classes of a new model", photos(), "known_classes", known_classes=[["yak"]], classes_per_task=3),
]


def wrong_kind(name: str, dataset: Callable[[], Any], /, *says: str, **fields: Any) -> Row:
    """Create a TaskStream from a wrong object."""

    def make(parts: Parts) -> Callable[[], Any]:
        processor = AutoImageProcessor.from_pretrained(parts.student)
        return lambda: TaskStream(StreamConfig(classes_per_task=1, **fields), processor, dataset=dataset())

    return Row(name, make, says, WAY)


class Pictures:
    """A data set as in torch."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index >= len(self):
            raise IndexError(index)
        return picture(index % 2, index), index % 2


def small() -> Dataset:
    return make_table([0, 0, 1, 1], 2)


def both() -> Any:
    return DatasetDict({"train": small(), "test": small()})


KINDS = [
    wrong_kind("a Dataset without test images", small, "test_fraction"),
    wrong_kind("an IterableDataset", lambda: small().to_iterable_dataset(), "Iterable"),
    wrong_kind(
        "an IterableDataset of a split", lambda: {"train": small().to_iterable_dataset(), "test": small()}, "Iterable"
    ),
    wrong_kind("a list of pairs", lambda: [(picture(0, 0), 0)], "list"),
    wrong_kind("an empty list", list, "list|dataset|data.path"),
    wrong_kind("a dict of lists", lambda: {"train": [1, 2], "test": [3]}, "list"),
    wrong_kind("a dict of columns", lambda: {"image": [picture(0, 0)], "label": [0]}, "list|train"),
    wrong_kind("a torch data set", Pictures, "Pictures"),
    wrong_kind("a generator", lambda: (x for x in Pictures()), "generator"),
    wrong_kind("a path", lambda: "recipes/quickstart/icons", "str|path"),
    wrong_kind("a number", lambda: 3, "int"),
    wrong_kind("an empty DatasetDict", DatasetDict, "train|empty|data.path"),
    wrong_kind("a DatasetDict of a test split", lambda: DatasetDict({"test": small()}), "train"),
    wrong_kind("a data frame", lambda: small().remove_columns("image").to_pandas(), "DataFrame"),
    wrong_kind("neither data nor path", lambda: None, "path"),
    wrong_kind("data and a path", both, "path", path="somewhere"),
    wrong_kind("data and a revision", both, "revision", revision="main"),
]


def call(name: str, act: Callable[[Any], Any], *says: str) -> Row:
    """Another mistaken call, which is given an image processor."""
    return Row(name, lambda parts: lambda: act(AutoImageProcessor.from_pretrained(parts.student)), says, WAY)


WORD: Any = "vit"
NOTHING: Any = None
FIELDS: Any = {"path": "x"}
ONE_EACH = StreamConfig(classes_per_task=1)
TWICE = StreamConfig(classes_per_task=1, unlabelled="more")
SHARE = StreamConfig(classes_per_task=1, unlabelled_ratio=2)
PATHS: Any = ["x.png"]
KNOWN = StreamConfig(classes_per_task=1, known_classes=[["class b"]])
ALL_KNOWN = StreamConfig(known_classes=[["class a", "class b"]], known_train="ignore")
CALLS = [
    call("unlabelled paths", lambda p: TaskStream(ONE_EACH, {}, dataset=both(), unlabelled=PATHS), "unlabelled"),
    call(
        "unlabelled images twice", lambda p: TaskStream(TWICE, {}, dataset=both(), unlabelled=both()["train"]), "leave"
    ),
    call("unlabelled images of a share", lambda p: TaskStream(SHARE, {}, dataset=both()), "unlabelled_ratio"),
    call("no processor", lambda p: TaskStream(ONE_EACH, NOTHING, dataset=both()), "processor"),
    call("a processor's name", lambda p: TaskStream(ONE_EACH, WORD, dataset=both()), "processor"),
    call(
        "tables with a transform that would not be used",
        lambda p: TaskStream(ONE_EACH, {}, dataset=both().with_transform(dict)),
        "with_transform",
    ),
    call("an image without processors", lambda p: TaskStream(ONE_EACH, {}, dataset=both())[0].train[0], "processor"),
    call("images of known classes", lambda p: TaskStream(KNOWN, p, dataset=both()), "class b (task 1)"),
    call("known classes alone", lambda p: TaskStream(ALL_KNOWN, p, dataset=both()), "known_classes"),
    call("a dict for a config", lambda p: TaskStream(FIELDS, p), "StreamConfig"),
    call("a path for a config", lambda p: TaskStream(WORD, p), "StreamConfig"),
]

ROWS = rows("data", PLACES, TABLES, CUTS) + rows("stream", KINDS, CALLS)
