"""The class-incremental stream, on real files: folders, parquet, in memory."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import time
from datetime import date
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor, ViTImageProcessorPil

from hf_cdl.data import BENCHMARKS, ImageError, StreamConfig, TaskSplit, TaskStream

PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(*seed: int, size: int = 10, kind: str = "png") -> bytes:
    """A noise image, different for different numbers."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def table(labels: list, kind: Any = None, split: int = 0) -> Dataset:
    """A table of images with these labels; `kind`: the labels' type, by default a ClassLabel for integers."""
    if kind is None:
        kind = ClassLabel(names=[f"c{i}" for i in range(max(labels) + 1)])
    features = Features({"image": datasets.Image(), "label": kind})
    cells = [{"bytes": png(split, i), "path": None} for i in range(len(labels))]
    return Dataset.from_dict({"image": cells, "label": labels}, features=features)


def with_labels(found: Dataset, labels: list[int]) -> Dataset:
    """The table with unsigned labels, which Dataset.from_dict could not make."""
    column = pa.array(labels, pa.uint64())
    images = found.remove_columns("label")
    return Dataset(images.data.table.append_column("label", column)).cast_column("image", datasets.Image())


def data(classes: int = 5, train: int = 4, test: int = 2, kind: Any = None, **more: Dataset) -> DatasetDict:
    own = {"train": table(list(range(classes)) * train, kind), "test": table(list(range(classes)) * test, kind, 1)}
    return DatasetDict({**own, **more})


def make(dataset: Any = None, seed: int = 0, processors: Any = PROCESSOR, **config: Any) -> Any:
    config.setdefault("classes_per_task", 2)
    return TaskStream(StreamConfig(**config), processors, seed, dataset)


def write_folder(root, layout: dict[str, int]) -> None:
    """`layout`: class folder -> number of images, PNG and JPEG by turns."""
    for number, (folder, count) in enumerate(layout.items()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            kind = ("png", "jpeg")[i % 2]
            (root / folder / f"{i}.{kind}").write_bytes(png(number, i, kind=kind))


def rows(stream: Any, split: str) -> dict[str, list[int]]:
    """Class name -> the rows of its images."""
    found: dict[str, list[int]] = {name: [] for name in stream.class_names}
    for task in stream:
        part = getattr(task, split)
        for row, label in zip(part.rows, part.labels, strict=True):
            found[stream.class_names[label]].append(int(row))
    return found


# ---- tasks and classes


def test_tasks_of_equal_size_and_a_shorter_last_one():
    stream = make(data(10), classes_per_task=4)
    assert [len(task.class_names) for task in stream] == [4, 4, 2]
    assert [task.classes for task in stream] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert stream.class_names == [f"c{i}" for i in range(10)]
    assert len(stream) == 3 and stream[2].index == 2 and stream[-1] is stream[2]
    for task in stream:
        assert set(task.train.labels) == set(task.test.labels) == set(range(task.classes.start, task.classes.stop))
        assert task.validation is None


def test_unequal_and_named_tasks():
    assert [task.class_names for task in make(data(), classes_per_task=[1, 3, 1])] == [
        ("c0",),
        ("c1", "c2", "c3"),
        ("c4",),
    ]
    named = make(data(), classes_per_task=[["c3", "c0"], ["c4"]])
    assert [task.class_names for task in named] == [("c3", "c0"), ("c4",)]
    assert rows(named, "train")["c3"] == [3, 8, 13, 18]  # labels are 0 1 2 3 4 0 1 ...


def test_labels_belong_to_their_images():
    """After shuffling, every item is still the image that the data have for a row of its class."""
    source = data(6)
    stream = make(source, class_order_seed=3)
    for task in stream:
        for i, row in enumerate(task.train.rows.tolist()):
            item, want = task.train[i], source["train"][row]
            assert stream.class_names[item["labels"]] == f"c{want['label']}"
            assert torch.equal(item["pixel_values"], PROCESSOR(want["image"], return_tensors="pt")["pixel_values"][0])


def test_class_order_seed():
    orders = {seed: make(data(10), class_order_seed=seed).class_names for seed in (None, 0, 1)}
    assert orders[0] == make(data(10), class_order_seed=0, split_seed=7, seed=5).class_names
    assert len({tuple(order) for order in orders.values()}) == 3
    assert all(sorted(order) == orders[None] for order in orders.values())
    assert make(data(10), class_order_seed=0, max_classes=4).class_names == orders[0][:4]


def test_one_class_and_one_image():
    stream = make(data(1, train=1, test=1), classes_per_task=1)
    assert len(stream) == 1 and stream[0].train[(0, 0)]["pixel_values"].shape == (3, 8, 8)
    assert make(data(3, train=1, test=1), classes_per_task=1)[2].test[0]["labels"] == 2


def test_string_and_number_labels():
    words = DatasetDict({s: table(["pear", "fig", "apple", "fig"], Value("string")) for s in ("train", "test")})
    stream = make(words, classes_per_task=1)
    assert stream.class_names == ["apple", "fig", "pear"] and rows(stream, "train")["fig"] == [1, 3]
    assert make(data(3, kind=Value("int32"))).class_names == ["0", "1", "2"]


def test_columns_are_found_by_type_or_named():
    source = data().rename_columns({"image": "photo", "label": "kind"})
    assert make(source)[0].train[0]["labels"] == 0
    both = source.map(lambda row: {"class": row["kind"] % 2})
    assert make(both, label_column="class", image_column="photo").class_names == ["0", "1"]


# ---- random choices


def test_limits_keep_a_subset_that_other_classes_do_not_change():
    full = make(data(4, train=20, test=10), max_train_per_class=7, max_eval_per_class=3)
    assert {len(r) for r in rows(full, "train").values()} == {7} and {len(r) for r in rows(full, "test").values()} == {
        3
    }
    labels = data(4, train=20, test=10)["train"]["label"]
    fewer = [i for i, label in enumerate(labels) if label in (1, 3)]
    source = data(4, train=20, test=10)
    source["train"] = source["train"].select([*range(0, 80, 4), *fewer])  # class 2 gone, class 0 first
    alone = make(source, classes_per_task=[["c3"], ["c1"]], max_train_per_class=7)
    for name in ("c1", "c3"):  # a row's position among its class's rows
        own = [i for i, label in enumerate(labels) if f"c{label}" == name]
        moved = [20 + fewer.index(i) for i in own]
        assert [own.index(r) for r in rows(full, "train")[name]] == [
            moved.index(r) for r in rows(alone, "train")[name]
        ]
    words = table(list("abcd") * 20, Value("string"))
    without = words.select([i for i in range(80) if i % 4 != 1])  # a class less: the numbers of c and d change
    drawn = [rows(make({"train": t}, test_fraction=0.3, max_train_per_class=5), "train") for t in (words, without)]
    assert [row // 4 for row in drawn[0]["d"]] == [row // 3 for row in drawn[1]["d"]]
    smaller = make(data(4, train=20, test=10), max_train_per_class=4)
    assert all(set(r) < set(rows(full, "train")[name]) for name, r in rows(smaller, "train").items())
    other = make(data(4, train=20, test=10), max_train_per_class=7, split_seed=1)
    assert rows(other, "train") != rows(full, "train")


def test_fraction_is_stratified_disjoint_and_stable():
    train = table([0] * 10 + [1] * 20 + [2] * 2)
    stream = make({"train": train}, test_fraction=0.3, classes_per_task=1)
    test, rest = rows(stream, "test"), rows(stream, "train")
    assert {name: len(r) for name, r in test.items()} == {"c0": 3, "c1": 6, "c2": 1}
    assert all(not set(test[name]) & set(rest[name]) for name in test)
    assert sorted(sum(test.values(), []) + sum(rest.values(), [])) == list(range(32))
    turned = make({"train": train.select([*range(10, 32), *range(10)])}, test_fraction=0.3, classes_per_task=1)
    for name, shift in {"c0": 22, "c1": -10, "c2": -10}.items():
        assert rows(turned, "test")[name] == [row + shift for row in test[name]]
    assert rows(make({"train": train}, test_fraction=0.3, split_seed=1, classes_per_task=1), "test") != test
    assert stream[0].test.name == "train"


def test_splits_are_found_by_name_and_stay_apart():
    source = data(3, val=table([0, 1, 2], split=2), extra=table([0, 1, 2], split=3))
    stream = make(source)
    assert [part.name for part in (stream[0].train, stream[0].validation, stream[0].test)] == ["train", "val", "test"]
    assert rows(stream, "validation") == {"c0": [0], "c1": [1], "c2": [2]}
    named = make(source, test_split="extra")[0]
    assert (named.test.name, named.validation.name) == ("extra", "val")
    assert make(source, test_split="val")[0].validation is None  # a split has one role
    partial = make(data(4, validation=table([0, 1, 0], ClassLabel(names=["c0", "c1", "c2", "c3"]))))
    assert len(partial[0].validation) == 3 and partial[1].validation is None


# ---- views


def test_views_are_stateless():
    a, b = make(data(), seed=1), make(data(), seed=1)
    keys = [(0, 0), (1, 0), (0, 1), (3, 5)]
    batch = a[1].train.__getitems__(keys)
    for key, item in zip(reversed(keys), reversed(batch), strict=True):
        assert torch.equal(b[1].train[key]["pixel_values"], item["pixel_values"])
    pixels = [item["pixel_values"] for item in batch]
    assert not torch.equal(pixels[0], pixels[2])
    assert not torch.equal(pixels[0], make(data(), seed=2)[1].train[(0, 0)]["pixel_values"])
    assert torch.equal(a[1].train[0]["pixel_values"], b[1].train[0]["pixel_values"])
    limited = make(data(), seed=1, max_train_per_class=2)[1].train  # a sample is known by its row
    places = [a[1].train.rows.tolist().index(row) for row in limited.rows]
    assert places != [0, 1, 2, 3]
    for i, place in enumerate(places):
        assert torch.equal(limited[(i, 3)]["pixel_values"], a[1].train[(place, 3)]["pixel_values"])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers_give_the_same_views(tmp_path):
    write_folder(tmp_path / "data", {f"{split}/{name}": 4 for split in ("train", "test") for name in "ab"})
    split = make(path=str(tmp_path / "data"))[0].train
    keys = [(i, i % 3) for i in range(8)]

    def batches(**options):
        return list(DataLoader(split, sampler=keys, batch_size=3, **options))

    for ours, theirs in zip(batches(), batches(num_workers=2), strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["labels"], theirs["labels"])


def maps(count: int = 6) -> DatasetDict:
    """Images whose colours encode the position of each pixel: red grows to the right, green downwards."""
    y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
    cells = [Image.fromarray(np.stack([x, y, np.full_like(x, 9 * i)], axis=-1)) for i in range(count)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["c0", "c1"])})
    rows = Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(count)]}, features=features)
    return DatasetDict({"train": rows, "test": rows})


WIDE = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.1, 0.2, 0.3], image_std=[0.2, 0.3, 0.4])
NARROW = ViTImageProcessor(size={"height": 16, "width": 32}, rescale_factor=1 / 128, do_normalize=False)


def colours(pixels: torch.Tensor, processor: Any) -> torch.Tensor:
    """Convert to 0 .. 255 again."""
    if processor.do_normalize:
        mean, std = (torch.tensor(field).view(3, 1, 1) for field in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    return pixels / processor.rescale_factor


def test_both_roles_see_the_same_crop_and_flip():
    stream = make(maps(), processors={"teacher": WIDE, "student": NARROW}, crop_scale=(0.3, 0.6))
    split = stream[0].train.seen_by("student", "teacher")
    flips, lefts = set(), set()
    for view in range(4):
        for item in split.__getitems__([(i, view) for i in range(len(split))]):
            assert item.keys() == {"pixel_values", "teacher_pixel_values", "labels"}
            small, large = colours(item["pixel_values"], NARROW), colours(item["teacher_pixel_values"], WIDE)
            assert small.shape == (3, 16, 32) and large.shape == (3, 64, 64)
            halved = torch.nn.functional.avg_pool2d(large, (4, 2))
            assert (halved - small).abs().max() < 4  # rounding and the two filters
            assert (halved.flip(-1) - small).abs().max() > 40 and (halved - small.roll(2, -1)).abs().max() > 5
            flips.add(bool(small[0, 0, 0] > small[0, 0, -1]))
            lefts.add(round(float(small[0].min())))
    assert flips == {True, False} and len(lefts) > 10


def test_a_role_gets_its_own_view_whoever_looks_with_it():
    stream = make(maps(), processors={"teacher": WIDE, "student": NARROW}, seed=3)
    alone = {role: make(maps(), processors=p, seed=3)[0].train for role, p in (("t", WIDE), ("s", NARROW))}
    both = stream[0].train.seen_by("student", "teacher")
    for key in (2, (2, 0), (3, 5)):
        student, teacher = alone["s"][key]["pixel_values"], alone["t"][key]["pixel_values"]
        item = both[key]
        assert torch.equal(item["pixel_values"], student) and torch.equal(item["teacher_pixel_values"], teacher)
        for role, want in (("student", student), ("teacher", teacher), ("nearest_class_mean", teacher)):
            item = stream[0].train.seen_by(role)[key]  # an unnamed role has the first one's view
            assert item.keys() == {"pixel_values", "labels"} and torch.equal(item["pixel_values"], want), role
        assert torch.equal(stream[0].train[key]["pixel_values"], student)


class Counted(ViTImageProcessorPil):
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


class CountedSplit(TaskSplit):
    decoded: ClassVar[list[int]] = []

    def image(self, index: int) -> Image.Image:
        self.decoded.append(index)
        return super().image(index)


def test_an_image_is_decoded_once_and_equal_views_are_one(tmp_path):
    PROCESSOR.save_pretrained(tmp_path)
    equal = {"student": PROCESSOR, "teacher": ViTImageProcessor.from_pretrained(tmp_path)}
    split = make(data(), processors=equal)[0].train.seen_by("student", "teacher")
    assert split[(0, 1)].keys() == split[0].keys() == {"pixel_values", "labels"}
    assert torch.equal(split[(0, 1)]["pixel_values"], make(data())[0].train[(0, 1)]["pixel_values"])

    counted = Counted(size={"height": 8, "width": 8})
    split = make(data(), processors={"student": PROCESSOR, "teacher": counted, "linear_head": counted})[0].train
    split.views["teacher"]._levels = None  # the processor computes every view, and counts it
    split = CountedSplit(**{field.name: getattr(split, field.name) for field in dataclasses.fields(split)})
    for roles, calls, row in ((("student",), 0, 0), (("teacher",), 1, 0), (("student", "teacher"), 1, 1)):
        Counted.calls = 0
        CountedSplit.decoded.clear()
        split.seen_by(*roles).__getitems__([(row, 0), (3, 1 + row)])
        assert Counted.calls == calls and CountedSplit.decoded == [row, 3], roles
    assert split.seen_by("teacher", "linear_head")[0].keys() == {"pixel_values", "labels"}


def test_splits_of_two_views_pickle():
    split = make(maps(), processors={"student": NARROW, "teacher": WIDE})[0].train.seen_by("student", "teacher")
    ours, theirs = split[(1, 2)], pickle.loads(pickle.dumps(split))[(1, 2)]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours if k != "labels")


def test_splits_pickle():
    split = make(data())[1].train
    copy = pickle.loads(pickle.dumps(split))
    assert np.array_equal(copy.labels, split.labels)
    assert torch.equal(copy[(2, 1)]["pixel_values"], split[(2, 1)]["pixel_values"])


# ---- folders and files


def test_class_folders(tmp_path):
    root = tmp_path / "data"
    write_folder(
        root, {"train/cat": 3, "train/train": 2, "val/cat": 1, "val/train": 1, "test/cat": 2, "test/train": 2}
    )
    write_folder(root, {"new/cat": 1, "new/train": 1, "docs": 1, ".cache/x": 1, "train/cat/.checkpoints": 1})
    for name in ("notes.txt", "Thumbs.db", ".DS_Store"):  # obviously not images
        (root / "train/cat" / name).write_text("not an image")
    before = sorted(root.rglob("*"))
    stream = make(path=str(root))
    assert stream.class_names == ["cat", "train"]  # a class may have a split's name
    assert {name: len(r) for name, r in rows(stream, "train").items()} == {"cat": 3, "train": 2}
    assert len(stream[0].validation) == 2 and len(stream[0].test) == 4
    assert len(make(path=str(root), test_split="new")[0].test) == 2
    assert sorted(root.rglob("*")) == before


def test_a_file_of_an_unknown_kind_is_an_image_or_named(tmp_path):
    write_folder(tmp_path, {"train/a": 2, "test/a": 2})
    (tmp_path / "train/a/no_extension").write_bytes(png(5))
    stream = make(path=str(tmp_path), classes_per_task=1)
    stream.check_images()
    assert len(stream[0].train) == 3
    (tmp_path / "train/a/photo.heic").write_bytes(b"a format that Pillow does not read")
    with pytest.raises(ImageError, match="photo.heic: cannot be read as an image"):
        make(path=str(tmp_path), classes_per_task=1).check_images()


def test_class_folders_without_split_folders(tmp_path):
    write_folder(tmp_path, {"emu": 4, "cat": 4, "dog/young": 2, "dog/old": 2})
    stream = make(path=str(tmp_path), test_fraction=0.5, classes_per_task=3)
    assert stream.class_names == ["cat", "dog", "emu"]
    assert {name: len(r) for name, r in rows(stream, "test").items()} == {"cat": 2, "dog": 2, "emu": 2}


def test_parquet_folder(tmp_path):
    root = tmp_path / "a [1] folder"
    root.mkdir()
    source = data(4)
    source["train"].select(range(10)).to_parquet(root / "train-00000-of-00002.parquet")
    source["train"].select(range(10, 16)).to_parquet(root / "train-00001-of-00002.parquet")
    source["test"].to_parquet(root / "test_icons.parquet")
    source["test"].to_parquet(root / "other-test.parquet")
    write_folder(root, {"train/cat": 1, "test/cat": 1})  # parquet files go first
    before = sorted(root.rglob("*"))
    stream = make(path=str(root))
    assert rows(stream, "train") == rows(make(source), "train")
    assert torch.equal(stream[1].train[2]["pixel_values"], make(source)[1].train[2]["pixel_values"])
    assert sorted(root.rglob("*")) == before
    assert stream.fingerprint == make(source).fingerprint
    assert make(path=str(root), test_split="other-test")[0].test.name == "other-test"


def test_parquet_files_that_datasets_did_not_write(tmp_path):
    """Without its metadata the image is a struct and the label a plain number."""
    for split in ("train", "test"):
        cells = [{"bytes": png(i), "path": None} for i in range(4)]
        pq.write_table(pa.table({"photo": cells, "label": [0, 1, 0, 1]}), tmp_path / f"{split}.parquet")
    stream = make(path=str(tmp_path))
    assert stream.class_names == ["0", "1"] and stream[0].train[3]["labels"] == 1
    stream.check_images()


def test_a_changed_file_is_seen(tmp_path):
    for split in ("train", "test"):
        table([0, 1]).to_parquet(tmp_path / f"{split}.parquet")
    first = make(path=str(tmp_path))
    table([0, 1, 1], split=5).to_parquet(tmp_path / "train.parquet")
    second = make(path=str(tmp_path))
    assert rows(second, "train") == {"c0": [0], "c1": [1, 2]}
    assert not torch.equal(first[0].train[0]["pixel_values"], second[0].train[0]["pixel_values"])
    assert first.fingerprint != second.fingerprint


def test_fingerprint(tmp_path):
    write_folder(tmp_path / "a", {f"{split}/{name}": 3 for split in ("train", "test") for name in "abcd"})
    base = make(path=str(tmp_path / "a"))
    assert re.fullmatch("[0-9a-f]{16}", base.fingerprint)
    os.rename(tmp_path / "a", tmp_path / "b")
    path = str(tmp_path / "b")
    assert make(path=path, seed=9).fingerprint == base.fingerprint
    changes = [{"class_order_seed": 0}, {"classes_per_task": 1}, {"max_train_per_class": 2}, {"max_classes": 3}]
    others = {make(path=path, **change).fingerprint for change in changes}
    (tmp_path / "b/train/a/0.png").write_bytes(png(7, size=11))
    others.add(make(path=path).fingerprint)
    assert len(others | {base.fingerprint}) == 6


# ---- bad images


def test_check_images_names_the_bad_ones(tmp_path):
    root = tmp_path / "data"
    write_folder(root, {"train/a": 4, "train/b": 20, "test/a": 2, "test/b": 1})
    stream = make(path=str(root))
    stream.check_images()
    cut = root / "train/a/0.png"
    cut.write_bytes(cut.read_bytes()[:90])
    (root / "test/b/0.png").unlink()
    with pytest.raises(ImageError) as raised:
        stream.check_images()
    message = str(raised.value)
    assert "2 images" in message and "more" not in message
    assert f"split 'train', row 0: {cut}" in message and f"split 'test', row 2: {root}/test/b/0.png" in message
    with pytest.raises(ImageError, match=f"split 'train', row 0: {cut}"):
        stream[0].train[(0, 0)]
    for file in (root / "train/b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ImageError, match=r"22 images(.|\n)*and 12 more"):
        stream.check_images()


def test_empty_cells_and_embedded_rubbish_are_named():
    source = data(2, train=2)
    cells = [
        None,
        {"bytes": b"rubbish", "path": "x.png"},
        {"bytes": png(1), "path": None},
        {"bytes": png(2), "path": None},
    ]
    source["train"] = Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, features=source["train"].features)
    stream = make(source)
    assert len(stream.fingerprint) == 16
    with pytest.raises(ImageError, match=r"row 0: .*empty cell(.|\n)*row 1: x.png: .*unknown format"):
        stream.check_images()


def test_check_images_covers_only_the_stream():
    source = data(3)
    bad = [{"bytes": b"", "path": None} if label == 2 else {"bytes": png(0), "path": None} for label in [0, 1, 2] * 4]
    source["train"] = Dataset.from_dict({"image": bad, "label": [0, 1, 2] * 4}, features=source["train"].features)
    make(source, max_classes=2).check_images()


def of_pixels(*classes: list[np.ndarray]) -> DatasetDict:
    """Tables of images with these pixels, class by class, for training and testing."""
    cells = [array for images in classes for array in images]
    labels = [number for number, images in enumerate(classes) for _ in images]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=list("abcde"[: len(classes)]))})
    rows = Dataset.from_dict({"image": cells, "label": labels}, features=features)
    return DatasetDict({"train": rows, "test": rows})


def noise(high: int, kind: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(high).integers(0, high, (9, 9), kind)


FLAT = {
    "black": (np.zeros((9, 9, 3), np.uint8), r"is of one colour, \(0, 0, 0\)"),
    "one colour": (np.full((9, 9, 3), [9, 8, 7], np.uint8), r"is of one colour, \(9, 8, 7\)"),
    "16 bits that hold 8": (noise(256, np.uint16), r"is of one colour, \(0, 0, 0\)"),
    "16 bits that hold 12": (
        noise(4096, np.uint16),
        r"is almost black: .*below 4096 .*; multiply by 16",
    ),
}


@pytest.mark.parametrize("kind", FLAT)
def test_training_images_that_show_nothing_are_reported(kind: str) -> None:
    flat, message = FLAT[kind]
    assert make(of_pixels([noise(256), noise(255)], [noise(200)])).check_images() == []
    (note,) = make(of_pixels([noise(256), flat], [noise(200)])).check_images()
    assert re.search(
        rf"^training images that show nothing .*: 1\n- split 'train', row 1: in the table: {message}$", note
    )
    with pytest.raises(ImageError, match=rf"(?s)images of the classes b are of one colour.*row 2: .*{message}"):
        make(of_pixels([noise(256), flat], [flat, flat])).check_images()
    (note,) = make(of_pixels([noise(256)] + [flat] * 12), classes_per_task=1).check_images()
    assert ": 12\n" in note and note.count("\n") == 11 and note.endswith("and 2 more")
    only_tested = {"train": of_pixels([noise(256)])["train"], "test": of_pixels([flat])["test"]}
    assert make(only_tested, classes_per_task=1).check_images() == []


def test_dark_images_of_eight_bits_and_narrow_ones_of_sixteen_are_images() -> None:
    narrow = noise(60, np.uint16) * 64 + 5000
    assert make(of_pixels([noise(14)], [narrow])).check_images() == []


# ---- errors


def number_table(labels: list[int]) -> Dataset:
    return table(labels, Value("int64"))


ERRORS = {
    "no label column": (
        lambda: data().rename_column("label", "kind").cast_column("kind", Value("int64")),
        {},
        "No column could be the label.*columns: image, kind.*label_column",
    ),
    "two label columns": (
        lambda: DatasetDict(
            {
                s: t.add_column("fine", t["label"]).cast(Features({**t.features, "fine": t.features["label"]}))
                for s, t in data().items()
            }
        ),
        {},
        "Several columns could be the label; candidates: label, fine",
    ),
    "unknown label column": (data, {"label_column": "labl"}, "no label column 'labl'; columns: image, label"),
    "no image column": (
        lambda: data().rename_column("image", "x").cast_column("x", datasets.Image()).remove_columns("x"),
        {},
        "No column could be the image.*columns: label",
    ),
    "label as image": (data, {"image_column": "label"}, "image_column 'label' holds .*not images"),
    "other columns in test": (
        lambda: DatasetDict({**data(), "test": data()["test"].rename_column("label", "kind")}),
        {},
        "test split has no label column 'label'; columns: image, kind",
    ),
    "gaps": (
        lambda: {s: number_table([0, 1, 3, 5, 0, 1]) for s in ("train", "test")},
        {},
        "must be 0 ... 3 for 4 classes, but there are 5. Renumber",
    ),
    "huge gap": (
        lambda: {s: number_table([0, 10**12]) for s in ("train", "test")},
        {},
        "must be 0 ... 1 for 2 classes, but there are 1000000000000",
    ),
    "names without images": (
        lambda: data(2, kind=ClassLabel(names=list("abc"))),
        {},
        "without train images: c.*remove the names",
    ),
    "no training images": (
        lambda: DatasetDict(
            {**data(3, kind=ClassLabel(names=list("abc"))), "train": table([0, 2], ClassLabel(names=list("abc")))}
        ),
        {},
        "without train images: b",
    ),
    "no test images": (
        lambda: DatasetDict(
            {**data(3, kind=ClassLabel(names=list("abc"))), "test": table([0, 2], ClassLabel(names=list("abc")))}
        ),
        {},
        "without test images: b",
    ),
    "nothing to hold out": (
        lambda: {"train": table([0, 1, 1])},
        {"test_fraction": 0.5},
        "without test images: c0.*two for test_fraction",
    ),
    "no validation images": (
        lambda: data(2, validation=table([1, 1])),
        {"eval_split": "validation"},
        "without validation images: c0",
    ),
    "too many per task": (data, {"classes_per_task": 6}, "classes_per_task is 6, but the data have only 5 classes"),
    "wrong sum": (data, {"classes_per_task": [2, 2]}, "adds up to 4, but the data have 5 classes"),
    "wrong sum of fewer": (
        data,
        {"classes_per_task": [2, 3], "max_classes": 4},
        "adds up to 5, but the data have 4 classes",
    ),
    "too many classes": (data, {"max_classes": 9}, "max_classes is 9, but the data have 5 classes"),
    "unknown class": (
        lambda: data(2, kind=ClassLabel(names=["heart", "house"])),
        {"classes_per_task": [["hose"], ["heart"]]},
        "'hose', which is no class; close are house",
    ),
    "no train split": (
        lambda: {"a": table([0]), "b": table([0])},
        {},
        "no split for train .usual names: train.*the splits are a, b",
    ),
    "no test split": (lambda: {"train": table([0, 0])}, {}, "no split for test.*the splits are train.*test_fraction"),
    "named split missing": (data, {"test_split": "tset"}, "test_split is 'tset', but the splits are train, test"),
    "no validation split": (data, {"eval_split": "validation"}, "no split for validation"),
    "null labels": (
        lambda: DatasetDict({**data(kind=Value("int64")), "test": table([0, None, 1], Value("int64"))}),
        {},
        "1 label of the test split is missing .null",
    ),
    "negative labels": (
        lambda: {"train": number_table([0, 1]), "test": number_table([-1, -1])},
        {},
        "must be 0 ... .*but there are -1.*unlabelled",
    ),
    "float labels": (
        lambda: {s: table([0.0, 1.0], Value("float32")) for s in ("train", "test")},
        {},
        r"Labels are of type float.*'label' of the train split has 0.0, 1.0: make the labels texts, as dataset.map",
    ),
    "no float labels": (
        lambda: {s: table([], Value("float32")) for s in ("train", "test")},
        {},
        "Labels are of type float.*has no rows: make",
    ),
    "yes and no": (
        lambda: {s: table([True, False], Value("bool")) for s in ("train", "test")},
        {},
        r"Labels are of type bool.*'label' of the train split has (True|False), ",
    ),
    "days": (
        lambda: {s: table([date(2020, 1, 1)] * 2, Value("date32")) for s in ("train", "test")},
        {},
        r"Labels are of type date32.*has datetime.date\(2020, 1, 1\), ",
    ),
    "huge numbers": (
        lambda: {s: with_labels(table([0, 1], Value("int64")), [0, 2**63]) for s in ("train", "test")},
        {},
        r"Labels are of type uint64; allowed: .*below 2\*\*63.*has 0, 9223372036854775808",
    ),
    "disagreeing names": (
        lambda: {
            "train": table([0, 1], ClassLabel(names=["a", "b"])),
            "test": table([0, 1], ClassLabel(names=["b", "a"])),
        },
        {},
        "disagree about the classes .train: a, b; test: b, a",
    ),
    "no rows": (lambda: {s: table([], Value("int64")) for s in ("train", "test")}, {}, "only 0 classes"),
    "no path": (lambda: None, {}, "data.path is missing.*cifar100"),
    "no folder": (lambda: None, {"path": "./nowhere"}, "folder ./nowhere does not exist"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_teach(case):
    source, config, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        make(source(), **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classes_per_task": 0}, "at least one class"),
        ({"classes_per_task": []}, "at least one class"),
        ({"classes_per_task": [2, 0]}, "at least one class"),
        ({"classes_per_task": [["a"], []]}, "at least one class"),
        ({"classes_per_task": [["a", "b"], ["a"]]}, "repeats a,"),
        ({"classes_per_task": [["a"]], "class_order_seed": 1}, "leave out class_order_seed"),
        ({"train_split": "x", "test_split": "x"}, "must differ, but are x, x"),
        ({"validation_split": "test", "test_split": "test"}, "must differ"),
        ({"max_train_per_class": 0}, "max_train_per_class is 0"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale is"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio is"),
        ({"flip": 2.0, "max_classes": 0}, r"(?s)max_classes is 0.*flip is 2.0"),
        ({"classes_per_task": True}, "classes_per_task is True"),
        ({"classes_per_task": 2.5}, "classes_per_task is 2.5"),
        ({"classes_per_task": [2, True]}, "classes_per_task is 2, True"),
        ({"classes_per_task": ["a", "b"]}, "classes_per_task is a, b, but"),
        ({"classes_per_task": [["a"], 2]}, "mixes sizes, names and null"),
        ({"classes_per_task": [2, None]}, "mixes sizes, names and null"),
        ({"classes_per_task": [["a", ""]]}, "classes_per_task has '', but a class name is a text"),
        ({"classes_per_task": [["a", " \n"]]}, r"classes_per_task has ' \\n', but"),
        ({"classes_per_task": [["a", 3]]}, "classes_per_task has 3, but"),
        ({"classes_per_task": [["caf\u00e9"], ["cafe\u0301"]]}, "repeats caf\u00e9"),
        ({"known_classes": ["zebra"]}, "known_classes is zebra, but must be a list of tasks"),
        ({"known_classes": [["a"], []]}, "tasks are not empty"),
        ({"known_classes": [["a"], ["a"]]}, "a class belongs to one task"),
        ({"known_classes": [["a", None]]}, "known_classes has None"),
        ({"known_classes": [["caf\u00e9"]], "classes_per_task": [["cafe\u0301"]]}, "which known_classes has too"),
        ({"test_split": ""}, "names, but are ''"),
        ({"eval_split": "train"}, "eval_split is 'train'"),
        ({"known_train": "keep"}, "known_train is 'keep'"),
        ({"max_classes": True}, "max_classes is True"),
        ({"max_train_per_class": 2.0}, "max_train_per_class is 2.0"),
        ({"max_eval_per_class": float("nan")}, "max_eval_per_class is nan"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"max_pixels": None}, "max_pixels is None"),
        ({"max_pixels": float("inf")}, "max_pixels is inf"),
        ({"split_seed": -1}, "split_seed is -1"),
        ({"split_seed": None}, "split_seed is None"),
        ({"class_order_seed": -1}, "class_order_seed is -1"),
        ({"class_order_seed": 2**80}, "class_order_seed is .*below 2"),
        ({"class_order_seed": 1.0}, "class_order_seed is 1.0"),
        ({"test_fraction": float("nan")}, "test_fraction is nan"),
        ({"test_fraction": True}, "test_fraction is True"),
        ({"crop_scale": (float("nan"), 1.0)}, "crop_scale is"),
        ({"crop_scale": (0.5,)}, "crop_scale is"),
        ({"crop_scale": 0.5}, "crop_scale is"),
        ({"crop_ratio": (1.0, float("inf"))}, "crop_ratio is"),
        ({"crop_ratio": (float("nan"), float("nan"))}, "crop_ratio is"),
        ({"crop_ratio": (0.5, 1.0, 2.0)}, "crop_ratio is"),
        ({"crop_padding": True}, "crop_padding is True"),
        ({"crop_padding": 1.5}, "crop_padding is 1.5"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"flip": float("nan")}, "flip is nan"),
        ({"flip": "yes"}, "flip is yes"),
    ],
)
def test_config_checks_its_ranges(config, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig(**config)


class TorchData(torch.utils.data.Dataset):
    pass


WRONG_KINDS: dict[str, Any] = {
    "streamed splits": lambda: {s: t.to_iterable_dataset() for s, t in data().items()},
    "streamed": lambda: data()["train"].to_iterable_dataset(),
    "a dict of streams": lambda: datasets.IterableDatasetDict({"train": data()["train"].to_iterable_dataset()}),
    "a list": lambda: [1, 2],
    "a tuple of tables": lambda: (data()["train"], data()["test"]),
    "lists": lambda: {"train": [1], "test": [2]},
    "of torch": TorchData,
    "splits of torch": lambda: {"train": TorchData(), "test": TorchData()},
    "none in a dict": lambda: {"train": data()["train"], "test": None},
    "a path": lambda: "images",
    "a number": lambda: 3,
    "an array": lambda: np.zeros((3, 3)),
    "an empty dict": dict,
    "an empty DatasetDict": DatasetDict,
    "a table of arrow": lambda: data()["train"].data.table,
}


@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_other_kinds_of_data_are_named_in_one_line(kind: str, fraction: float | None) -> None:
    with pytest.raises(ValueError, match=r"^dataset\S* is .*type .*must be a Dataset .*(Make one|Load it)") as raised:
        make(WRONG_KINDS[kind](), test_fraction=fraction)
    assert "0x" not in str(raised.value) and "\n" not in str(raised.value)


def test_one_dataset_is_the_training_data() -> None:
    rows_of = data(4, train=10)["train"]
    for table_of in (rows_of, rows_of.with_format("torch"), {"train": rows_of}):
        stream = make(table_of, test_fraction=0.3)
        assert {name: len(r) for name, r in rows(stream, "test").items()} == dict.fromkeys(stream.class_names, 3)
        assert rows(stream, "test") == rows(make({"train": rows_of}, test_fraction=0.3), "test")
    with pytest.raises(ValueError, match="dataset is one Dataset, without test images. Set test_fraction, or give"):
        make(rows_of)


@pytest.mark.slow
def test_as_many_classes_as_imagenet_21k_take_no_time() -> None:
    """Linear time; quadratic time would take minutes."""
    names = [f"n{number:08d}" for number in range(21_841)]
    cell = {"bytes": png(0), "path": None}
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
    columns = {"image": [cell] * len(names), "label": list(range(len(names)))}
    both: Any = dict.fromkeys(("train", "test"), Dataset.from_dict(columns, features=features))
    tasks = [names[i : i + 100] for i in range(0, len(names), 100)]
    begin = time.process_time()
    config = StreamConfig(classes_per_task=tasks[1:], known_classes=tasks[:1], known_train="ignore")
    assert time.process_time() - begin < 0.2
    stream = TaskStream(config, PROCESSOR, dataset=both)
    assert time.process_time() - begin < 5 and stream.class_names == names
    assert len(make(both, classes_per_task=1)) == len(names)
    repeated = [*tasks[1:], tasks[5]]
    begin = time.process_time()
    with pytest.raises(ValueError, match="repeats n00000500, .* and 90 more"):
        StreamConfig(classes_per_task=repeated)
    assert time.process_time() - begin < 0.2


def test_folders_without_images(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be read as a data set.*train.parquet.*class folders"):
        make(path=str(tmp_path))


def test_unreachable_hub_says_how_to_use_a_copy(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hf download uoft-cs/cifar100 --repo-type dataset.*data.path"):
        make(path="cifar100")
    with pytest.raises(ValueError, match="'cifar10O' cannot be loaded.*no benchmark .cifar100"):
        make(path="cifar10O")


def test_benchmarks_fill_the_fields_left_out():
    fields = {field.name for field in dataclasses.fields(StreamConfig)}
    for preset in BENCHMARKS.values():
        assert set(preset) <= fields
        StreamConfig(**preset)


def test_a_fraction_that_holds_nothing_out_is_said() -> None:
    both = {"train": table([0, 0, 1, 1]), "test": table([0, 1])}
    stream = make(both, test_fraction=0.5, classes_per_task=2)
    assert any("test_fraction" in note and "'test'" in note for note in stream.notes)
    assert len(stream[0].train) == 4 and len(stream[0].test) == 2


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({}, ["split_seed 3 has no effect, since nothing is drawn by it"]),
        ({"max_train_per_class": 2}, []),
        ({"max_eval_per_class": 1}, []),
    ],
)
def test_a_seed_that_draws_nothing_is_said(fields: dict[str, Any], notes: list[str]) -> None:
    assert make(data(4, train=4), split_seed=3, classes_per_task=2, **fields).notes == notes


def test_a_seed_that_draws_the_test_images_is_not_said() -> None:
    train = data(4, train=8)["train"]
    assert make({"train": train}, split_seed=3, test_fraction=0.5, classes_per_task=2).notes == []
