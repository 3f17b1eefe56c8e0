"""Which layouts of local folders are read, as what, and which are refused."""

from __future__ import annotations

import gc
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers import picture, png
from transformers import ViTImageProcessor

from hf_cdl.data import ImageError, StreamConfig, TaskStream

pytestmark = pytest.mark.filterwarnings(  # `datasets` leaves metadata.csv open
    "ignore:unclosed file.*metadata.csv:ResourceWarning",
    "ignore:.*metadata.csv:pytest.PytestUnraisableExceptionWarning",
)
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})
CLASSES = ["cat", "dog", "emu", "fox"]
SPLITS = {"train": 4, "test": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    gc.collect()  # close what `datasets` leaves open before the next test


def make(path: Any = None, dataset: Any = None, **config: Any) -> Any:
    config.setdefault("classes_per_task", None)
    return TaskStream(StreamConfig(path=None if path is None else str(path), **config), PROCESSOR, dataset=dataset)


def images(folder: Path, count: int = 1, label: int = 0, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        (folder / f"{i}.png").write_bytes(png(picture(label, i)))


def tree(root: Path, place: str, splits: dict[str, int] = SPLITS, classes: list[str] = CLASSES) -> None:
    """Write images of all classes and splits; `place`: their folder, such as "{split}/{name}"."""
    for split, count in splits.items():
        for number, name in enumerate(classes):
            images(root / place.format(split=split, name=name), count, number, 1000 * (split != "train"))


def table(count: int, kind: Any = None, first: int = 0) -> Dataset:
    kind = kind or ClassLabel(names=CLASSES)
    labels = [i % 4 for i in range(4 * count)]
    cells = [{"bytes": png(picture(label, first + i)), "path": None} for i, label in enumerate(labels)]
    named = labels if isinstance(kind, ClassLabel) or "int" in kind.dtype else [CLASSES[label] for label in labels]
    return Dataset.from_dict({"image": cells, "label": named}, Features({"image": datasets.Image(), "label": kind}))


def both() -> DatasetDict:
    return DatasetDict({"train": table(4), "test": table(2, first=1000)})


def write_parquet(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        both()["test" if "test" in file.lower() else "train"].to_parquet(root / file)


def save_splits(root: Path) -> None:
    for split, rows in both().items():
        rows.save_to_disk(root / str(split))


def metadata(root: Path, ending: str = "csv", place: str = "images/{name}{i}.png", **columns: Any) -> None:
    """Write images and a metadata file with their class and split, as columns and as folders of `place`."""
    lines = []
    for split, count in SPLITS.items():
        for number, name in enumerate(CLASSES):
            for i in range(count):
                file = place.format(split=split, name=name, i=f"{split}{i}")
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_bytes(png(picture(number, i + 1000 * (split == "test"))))
                lines.append({"file_name": file, "label": name, "split": split})
    for line in lines:
        if columns.get("split") is False:
            del line["split"]
    if ending == "csv":
        text = "\n".join(",".join(line) for line in ([*lines[0]], *(line.values() for line in lines)))
        (root / "metadata.csv").write_text(text)
    elif ending == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        pq.write_table(pa.Table.from_pylist(lines), root / "metadata.parquet")


def metadata_in_splits(root: Path) -> None:
    for split, count in SPLITS.items():
        images(root / split, 4 * count)
        rows = [f"{i}.png,{CLASSES[i % 4]}" for i in range(4 * count)]
        (root / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))


def hidden_parquet(root: Path) -> None:
    write_parquet(root, "train.parquet", "test.parquet")
    (root / "._train.parquet").write_bytes(b"x")


def junk(root: Path) -> None:
    tree(root, "{split}/{name}")
    images(root / "__MACOSX/train/cat")
    images(root / ".ipynb_checkpoints/train/cat")
    (root / "README.md").write_text("about")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "split/CLASS": lambda root: tree(root, "{split}/{name}"),
    "Split/CLASS": lambda root: tree(root, "{split}/{name}", {"Train": 4, "Test": 2}),
    "SPLIT/CLASS": lambda root: tree(root, "{split}/{name}", {"TRAIN": 4, "TEST": 2}),
    "training, testing": lambda root: tree(root, "{split}/{name}", {"training": 4, "testing": 2}),
    "train, testing": lambda root: tree(root, "{split}/{name}", {"train": 4, "testing": 2}),
    "train, evaluation": lambda root: tree(root, "{split}/{name}", {"train": 4, "evaluation": 2}),
    "trainset, testset": lambda root: tree(root, "{split}/{name}", {"trainset": 4, "testset": 2}),
    "TrainImages, TestImages": lambda root: tree(root, "{split}/{name}", {"TrainImages": 4, "TestImages": 2}),
    "training_set, test_set": lambda root: tree(root, "{split}/{name}", {"training_set": 4, "test_set": 2}),
    "seg_train/seg_train": lambda root: tree(root, "seg_{split}/seg_{split}/{name}"),
    "training_set, test_set, single_prediction": lambda root: (
        tree(root, "{split}/{name}", {"training_set": 4, "test_set": 2}) or images(root / "single_prediction", 3)
    ),
    "train/train": lambda root: tree(root, "{split}/{split}/{name}"),
    "a zip unpacked": lambda root: tree(root, "archive/{split}/{name}"),
    "a zip of Splits": lambda root: tree(root, "flowers-main/{split}/{name}", {"Train": 4, "Test": 2}),
    "CLASS/split": lambda root: tree(root, "{name}/{split}"),
    "CLASS/Split": lambda root: tree(root, "{name}/{split}", {"Train": 4, "Test": 2}),
    "a zip of CLASS/split": lambda root: tree(root, "archive/{name}/{split}"),
    "CLASS/images as in Tiny ImageNet": lambda root: tree(root, "{split}/{name}/images"),
    "with what macOS adds": junk,
    "parquet": lambda root: write_parquet(root, "train.parquet", "test.parquet"),
    "parquet beside what macOS adds": hidden_parquet,
    "Parquet": lambda root: write_parquet(root, "Train.parquet", "Test-00000-of-00001.parquet"),
    "a cloned repository": lambda root: write_parquet(root, "data/train-0-of-1.parquet", "data/test-0-of-1.parquet"),
    "a configuration": lambda root: write_parquet(root, "plain_text/train-0.parquet", "plain_text/test-0.parquet"),
    "split/0000.parquet": lambda root: write_parquet(root, "train/0000.parquet", "test/0000.parquet"),
    "the Hub's conversion": lambda root: write_parquet(root, "default/train/0.parquet", "default/test/0.parquet"),
    "save_to_disk": lambda root: both().save_to_disk(root),
    "save_to_disk in a folder": lambda root: both().save_to_disk(root / "saved"),
    "save_to_disk of each split": save_splits,
    "metadata.csv": metadata,
    "metadata.jsonl": lambda root: metadata(root, "jsonl"),
    "metadata.parquet": lambda root: metadata(root, "parquet"),
    "metadata.csv above split folders": lambda root: metadata(root, place="{split}/{name}{i}.png", split=False),
    "metadata.csv beside CLASS folders that agree": lambda root: metadata(root, place="{split}/{name}/{i}.png"),
    "metadata.csv in split folders": metadata_in_splits,
    "metadata.csv in a folder": lambda root: metadata(root / "data"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "my data"
    root.mkdir()
    LAYOUTS[name](root)
    before = {file: file.is_dir() or file.read_bytes() for file in root.rglob("*")}
    stream = make(root)
    assert stream.class_names == CLASSES
    for split, count in (("train", 4), ("test", 2)):
        assert Counter(getattr(stream[0], split).labels) == dict.fromkeys(range(4), count)
    assert stream.check_images() == []
    means = [np.asarray(stream[0].test.image(i)).mean((0, 1)) for i in range(8)]
    for mean, label in zip(means, stream[0].test.labels, strict=True):
        if "in split folders" not in name:  # all of one colour there
            wanted = np.random.default_rng((label, 0)).integers(40, 216, 3)
            assert abs(mean - wanted).max() < 15, "a class has its own images"
    assert {file: file.is_dir() or file.read_bytes() for file in root.rglob("*")} == before
    monkeypatch.chdir(tmp_path)
    assert make(Path("my data")).fingerprint == stream.fingerprint
    held = make(root, test_fraction=0.25)
    assert held.class_names == CLASSES and Counter(held[0].test.labels) == dict.fromkeys(range(4), 2), "its own test"


def flat(root: Path) -> None:
    images(root / "train", 4)
    images(root / "test", 4)


def partly(root: Path) -> None:
    tree(root, "{name}/{split}", classes=CLASSES[:2])
    images(root / "emu", 3)


def lone(root: Path) -> None:
    for name in ("cat", "dog", "Test"):
        images(root / name, 3)


def superclasses(root: Path) -> None:
    for place in ("pets/cat", "pets/dog", "wild/emu", "wild/fox"):
        images(root / place, 3)


def disagreeing(root: Path) -> None:
    metadata(root, place="{split}{name}/{i}.png")


def evil_dict(root: Path) -> None:
    both().save_to_disk(root / "good")
    (root / "data").mkdir()
    (root / "data/dataset_dict.json").write_text('{"splits": ["../good/train", "../good/test"]}')


def evil_state(root: Path) -> None:
    both().save_to_disk(root)
    (root / "train/data-00000-of-00001.arrow").rename(root / "elsewhere.arrow")
    state = json.loads((root / "train/state.json").read_text())
    state["_data_files"] = [{"filename": "../elsewhere.arrow"}]
    (root / "train/state.json").write_text(json.dumps(state))


def pipe_state(root: Path) -> None:
    both().save_to_disk(root)
    (root / "train/data-00000-of-00001.arrow").unlink()
    os.mkfifo(root / "train/data-00000-of-00001.arrow")


def broken_state(root: Path) -> None:
    both().save_to_disk(root)
    (root / "train/state.json").write_text("{")


def missing_split(root: Path) -> None:
    both().save_to_disk(root)
    (root / "test/state.json").unlink()


def pipe_parquet(root: Path) -> None:
    os.mkfifo(root / "train.parquet")


def cut_parquet(root: Path) -> None:
    write_parquet(root, "train.parquet", "test.parquet")
    (root / "train.parquet").write_bytes((root / "train.parquet").read_bytes()[:300])


def evil_metadata(root: Path) -> None:
    images(root.parent / "secret")
    (root / "metadata.csv").write_text("file_name,label\n../secret/0.png,a\n")


def semicolons(root: Path) -> None:
    metadata(root, split=False)
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text().replace(",", ";"))


def archives(root: Path) -> None:
    (root / "flowers.zip").write_bytes(b"PK")
    (root / "labels.csv").write_text("a,b")


def loose(root: Path) -> None:
    images(root, 4)


def latin_1(root: Path) -> None:
    tree(root, "{split}/{name}")
    (root / "train/cat/0.png").rename(root / "train/cat" / os.fsdecode(b"caf\xe9.png"))


def latin_1_folder(root: Path) -> None:
    tree(root, "{split}/{name}")
    (root / "train/cat").rename(root / "train" / os.fsdecode(b"caf\xe9"))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flat splits": (flat, "called like splits, but without class folders in them: test, train.*train/CLASS/x.png"),
    "several training sets": (
        lambda root: tree(root, "{split}/{name}", {"train_a": 1, "train_b": 1, "test_a": 1}),
        "which of test_a, train_a, train_b are train and test",
    ),
    "flat sets": (
        lambda root: [images(root / name) for name in ("training_set", "test_set")] and None,
        "called like splits.*test_set, training_set",
    ),
    "flat trainset": (
        lambda root: [images(root / name) for name in ("trainset", "testset")] and None,
        "called like splits.*testset, trainset",
    ),
    "flat TrainImages": (
        lambda root: [images(root / name) for name in ("TrainImages", "ValImages")] and None,
        "called like splits.*TrainImages, ValImages",
    ),
    "a split in a class of a split": (
        lambda root: tree(root, "{split}/{name}") or images(root / "train/cat/val"),
        r"train: some class folders hold folders called like splits \(cat/val\)",
    ),
    "a split deep in a class of a split": (
        lambda root: tree(root, "{split}/{name}") or images(root / "test/dog/2024/Test"),
        r"test: some class folders hold folders called like splits \(dog/2024/Test\)",
    ),
    "splits of several folders": (
        lambda root: [tree(root / part, "data/{split}/{name}") for part in ("f1", "f2")] and None,
        "called like splits .*f1/data/test, f1/data/train",
    ),
    "splits beside each other": (
        lambda root: [tree(root / part, "{split}/{name}") for part in ("2023", "2024")] and None,
        r"called like splits \(2023/test, 2023/train, 2024/test",
    ),
    "a part of a table": (
        lambda root: write_parquet(root, "train-00000-of-00002.parquet", "test.parquet"),
        r"holds 1 of the 2 parts of train \(there are 0\)\. Get the missing ones",
    ),
    "a part of a split's table": (
        lambda root: write_parquet(root, "train/0001-of-0003.parquet", "train/train-1-of-3.parquet", "test/0.parquet"),
        r"holds 1 of the 3 parts of train \(there are 1\)",
    ),
    "metadata with semicolons": (semicolons, r"metadata.csv cannot be read"),
    "two spellings": (
        lambda root: [tree(root, f"{name}/{{name}}", {"": 1}) for name in ("train", "Train", "test")] and None,
        "Several splits could be train: Train, train. Name one with train_split",
    ),
    "splits in some classes": (partly, r"class folders hold folders called like splits \(cat/test, cat/train"),
    "a class called like a split": (lone, r"called like splits.*: Test \(beside cat, dog\).*rename it"),
    "one class with splits": (
        lambda root: tree(root, "rose/{split}", classes=["rose"]),
        r"called like splits \(rose/test, rose/train\)",
    ),
    "train/train of images": (lambda root: images(root / "train/train"), "train holds one folder, train, which is"),
    "classes in classes": (superclasses, r"has folders of folders: pets \(cat, dog\), wild \(emu, fox\)"),
    "classes in a folder": (
        lambda root: tree(root, "archive/{name}", {"": 2}),
        r"folders of folders: archive \(cat, dog, emu and 1 more\)",
    ),
    "classes in classes of splits": (
        lambda root: tree(root, "{split}/animals/{name}"),
        r"train has folders of folders: animals \(cat, dog, emu and 1 more\)|test has folders of folders",
    ),
    "several configurations": (
        lambda root: write_parquet(root, "a/train.parquet", "b/train.parquet"),
        "Several folders of .* hold parquet files: a, b. Set data.path to one",
    ),
    "splits of two kinds": (
        lambda root: write_parquet(root, "train/0.parquet") or tree(root, "{split}/{name}", {"test": 1}),
        "the split folders train hold tables, but test class folders",
    ),
    "metadata and folders that disagree": (
        disagreeing,
        r"metadata.csv and the folders beside it disagree.*label_column",
    ),
    "two metadata files": (
        lambda root: metadata(root) or metadata(root, "jsonl"),
        "has metadata.csv, metadata.jsonl; leave one",
    ),
    "metadata of files elsewhere": (evil_metadata, r"metadata.csv cannot be read: .*'\.\./secret/0.png'"),
    "a split outside the folder": (evil_dict, r"names '\.\./good/train', which is not in its folder"),
    "a table outside the folder": (evil_state, r"names '\.\./elsewhere.arrow', which is not in its folder"),
    "a pipe for a table": (pipe_state, "cannot be read: ImageError: is a named pipe"),
    "a pipe for parquet": (pipe_parquet, "train.parquet cannot be read: .*named pipe"),
    "a parquet file cut off": (cut_parquet, "train.parquet cannot be read: "),
    "a broken state.json": (broken_state, "state.json cannot be read: JSONDecodeError"),
    "a missing split": (missing_split, "dataset_dict.json names test, but there is no such split"),
    "archives": (archives, r"cannot be read as a data set; in it lie flowers.zip, labels.csv.*Unpack archives"),
    "images alone": (loose, r"in it lie 0.png, 1.png.*train/CLASS/x.png"),
    "a file name in another coding": (latin_1, r"caf\\xe9.png is not UTF-8; rename it"),
    "a class in another coding": (latin_1_folder, r"the name caf\\xe9 is not UTF-8; rename it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_is_refused(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write, message = REFUSED[name]
    write(root)
    where = root / "data" if name == "a split outside the folder" else root
    for fraction in (None, 0.25):  # the way out of a missing test split must not lead into one of these
        with pytest.raises(ValueError, match=message) as raised:
            make(where, test_fraction=fraction)
        assert str(raised.value).count("\n") < 6 and "ClassLabel" not in str(raised.value)


def test_a_folder_that_is_one_class_or_a_missing_class_is_told_in_words_of_folders(tmp_path: Path) -> None:
    tree(tmp_path, "{split}/{name}")
    (tmp_path / "train/owl").mkdir()
    with pytest.raises(ValueError, match="without train images: owl.*into their folders in train/, remove") as raised:
        make(tmp_path)
    assert "ClassLabel" not in str(raised.value)
    images(tmp_path / "train/owl")
    with pytest.raises(ValueError, match="without test images: owl.*into their folders in test/"):
        make(tmp_path)
    assert make(tmp_path, classes_per_task=[["cat"], ["emu"]]).class_names == ["cat", "emu"]


def test_a_class_is_called_like_a_split_only_inside_one(tmp_path: Path) -> None:
    classes = ["bullet_train", "test", "train"]
    tree(tmp_path, "{split}/{name}", classes=classes)
    assert make(tmp_path).class_names == classes
    for name in ("bullet_train/side", "bullet_train/front", "steam train", "val d'isere/1"):
        images(tmp_path / "alone" / name, 3)
    assert make(tmp_path / "alone", test_fraction=0.3).class_names == ["bullet_train", "steam train", "val d'isere"]


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    tree(tmp_path, "{split}/{name}")
    images(tmp_path / "extra", 2)
    images(tmp_path / "train", 2)
    notes = make(tmp_path).notes
    assert notes[0].endswith("not read are the folders extra, which are no splits with class folders.")
    assert notes[1].endswith("train: left out, being in no class folder: 2 images, 0.png, 1.png.")
    tree(tmp_path, "{split}/{name}", {"testing": 1, "dev": 1, "valid": 1})
    assert make(tmp_path).notes[-1] == "not read are the splits dev, testing of the data"
    (tmp_path / "train/cat/gone.png").symlink_to("nowhere.png")
    with pytest.raises(ImageError, match="gone.png: cannot be read"):
        make(tmp_path).check_images()


def test_what_could_be_meant_otherwise_is_said(tmp_path: Path) -> None:
    tree(tmp_path / "years", "{split}/{name}", {"2023": 3, "2024": 3}, classes=["cat", "dog"])
    stream = make(tmp_path / "years", test_fraction=0.3)
    assert stream.class_names == ["2023", "2024"]
    assert stream.notes[0].endswith("years: the classes are the folders 2023, 2024, not cat, dog in them.")
    images(tmp_path / "one/images", 4)
    (tmp_path / "one/labels.csv").write_text("file,label\n0.png,cat\n")
    stream = make(tmp_path / "one", test_fraction=0.3)
    assert stream.notes[0].endswith("one: not read is labels.csv; the only class is the folder images.")
    images(tmp_path / "two/cat", 4)
    images(tmp_path / "two", 3)
    assert (
        make(tmp_path / "two", test_fraction=0.3)
        .notes[0]
        .endswith("being in no class folder: 3 images, 0.png, 1.png, 2.png.")
    )


def test_linked_folders_of_a_class_are_read_once(tmp_path: Path) -> None:
    tree(tmp_path / "data", "{split}/{name}")
    images(tmp_path / "more", 5)
    for name in ("more", "again"):
        (tmp_path / "data/train/cat" / name).symlink_to(tmp_path / "more")
    (tmp_path / "more/round").symlink_to(tmp_path / "more")
    before = len(CLASSES) * SPLITS["train"]
    assert len(make(tmp_path / "data")[0].train) == before + 5


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_one_name_in_two_unicode_forms_is_one_class(form: Any, tmp_path: Path) -> None:
    other: Any = {"NFC": "NFD", "NFD": "NFC"}[form]
    cafe, nino = (unicodedata.normalize(form, name) for name in ("café", "niño"))
    train, test = (tmp_path / split for split in ("train", "test"))
    for number, name in enumerate((cafe, nino)):
        images(train / name, 3, number)
        images(test / unicodedata.normalize(other, name), 2, number)
    stream = make(tmp_path, classes_per_task=[[nino], [unicodedata.normalize(other, cafe)]])
    assert stream.class_names == ["niño", "café"] and len(stream[1].test) == 2
    known = make(tmp_path, known_classes=[[unicodedata.normalize("NFD", "café")]], known_train="ignore")
    assert known.class_names == [unicodedata.normalize("NFD", "café"), "niño"], "as the model knows it"
    assert len(known[0].train) == 0 and len(known[0].test) == 2
    with pytest.raises(ValueError, match="classes that the models know already: café"):
        make(tmp_path, known_classes=[[unicodedata.normalize("NFD", "café")]])
    tables: Any = {
        split: Dataset.from_dict(
            {"image": [png(picture(i, i)) for i in range(2)], "label": [unicodedata.normalize(f, n) for n in "éñ"]},
            Features({"image": datasets.Image(), "label": Value("string")}),
        )
        for split, f in zip(SPLITS, [form, other], strict=True)
    }
    assert make(dataset=tables).class_names == sorted("éñ")
    labels = [ClassLabel(names=[unicodedata.normalize(f, n) for n in "éñ"]) for f in (form, other)]
    numbers = [
        Dataset.from_dict(
            {**tables["train"].to_dict(), "label": [0, 1]}, Features({"image": datasets.Image(), "label": k})
        )
        for k in labels
    ]
    assert make(dataset=dict(zip(SPLITS, numbers, strict=True))).class_names == ["é", "ñ"]


@pytest.mark.parametrize(
    "kinds",
    [
        ("string", "large_string"),
        ("large_string", "string"),
        ("int64", "int32"),
        ("uint8", "int64"),
        ("uint64", "int64"),
    ],
)
def test_labels_of_kindred_types_are_the_same(kinds: tuple[str, str]) -> None:
    tables = {split: table(n, Value(kind)) for (split, n), kind in zip(SPLITS.items(), kinds, strict=True)}
    stream = make(dataset=tables)
    assert stream.class_names == (CLASSES if "string" in kinds[0] else list("0123"))
    assert Counter(stream[0].test.labels) == dict.fromkeys(range(4), 2)


@pytest.mark.parametrize("kinds", [("string", "int64"), ("int64", "string")])
def test_labels_of_other_types_are_not(kinds: tuple[str, str]) -> None:
    tables = {split: table(n, Value(kind)) for (split, n), kind in zip(SPLITS.items(), kinds, strict=True)}
    with pytest.raises(ValueError, match="disagree about the classes"):
        make(dataset=tables)


@pytest.mark.parametrize("empty", ["", "  ", "\n\t", "\u00a0"])
def test_a_class_without_a_name_is_refused(empty: str) -> None:
    rows = Dataset.from_dict({"image": [png(picture(0, 0))] * 2, "label": ["a", empty]})
    rows = rows.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="of the column 'label' have empty names"):
        make(dataset=rows, test_fraction=0.5)


def test_names_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "{split}/{name}")
    for field in ("name", "revision"):
        with pytest.raises(ValueError, match=f"data.{field} is of the Hub, but .* is a local folder; leave it out"):
            make(tmp_path, **{field: "x"})
        with pytest.raises(ValueError, match=f"{field} in the config would not be used beside `dataset`"):
            make(dataset=both(), **{field: "x"})
    with pytest.raises(ValueError, match="path in the config would not be used"):
        make(tmp_path, dataset=both())
    with pytest.raises(ValueError, match="0.png is a file; name a folder"):
        make(tmp_path / "train/cat/0.png")


# ---- files that cells name


def write_cells(root: Path, paths: list[str]) -> Path:
    root.mkdir(exist_ok=True)
    for split in SPLITS:
        cells = [{"bytes": None, "path": path} for path in paths]
        pq.write_table(pa.table({"image": cells, "label": ["a"] * len(cells)}), root / f"{split}.parquet")
    return root


@pytest.mark.parametrize("where", ["absolute", "above", "beside", "device", "pipe", "link to a pipe"])
def test_a_cell_names_no_file_outside_the_data(where: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    images(tmp_path / "secret", 1)
    images(tmp_path / "data2", 1)
    root.mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "link.png").symlink_to("pipe.png")
    path, message = {
        "absolute": (str(tmp_path / "secret/0.png"), "is not in the data's folder"),
        "above": ("images/../../secret/0.png", "is not in the data's folder"),
        "beside": (str(tmp_path / "data2/0.png"), "is not in the data's folder"),
        "device": ("/dev/zero", "is not in the data's folder"),
        "pipe": ("pipe.png", "is a named pipe"),
        "link to a pipe": (str(root / "link.png"), "is a named pipe"),
    }[where]
    stream = make(write_cells(root, [path]))
    gone = make(write_cells(tmp_path / "other", ["gone.png"]))
    assert stream.fingerprint == gone.fingerprint, "such a file is not looked at"
    with pytest.raises(ImageError, match=f"split 'train', row 0: {path}: .*{message}"):
        stream.check_images()
    with pytest.raises(ImageError, match=message):
        stream[0].train[0]


def test_a_cell_names_files_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    images(root / "images", 1)
    images(tmp_path / "disk", 1)
    (root / "linked").symlink_to(tmp_path / "disk")  # the user's own
    paths = [str(root / "images/0.png"), "images/0.png", "linked/0.png", "images/../images/0.png"]
    make(write_cells(root, paths)).check_images()
    (tmp_path / "alias").symlink_to(root)
    make(tmp_path / "alias").check_images()
    monkeypatch.chdir(tmp_path)
    stream = make(Path("data"))
    stream.check_images()
    assert stream.fingerprint == make(root).fingerprint
    tree(root / "folders", "{split}/{name}")
    make(Path("data/folders")).check_images()


def test_a_cell_of_the_users_own_table_names_any_file(tmp_path: Path) -> None:
    images(tmp_path, 2)
    rows = Dataset.from_dict({"image": [str(tmp_path / f"{i}.png") for i in range(2)], "label": ["a", "a"]})
    make(dataset=rows.cast_column("image", datasets.Image()), test_fraction=0.5).check_images()
