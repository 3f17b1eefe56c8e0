"""Decoded images are kept while there is room, and nobody sees what another did with them."""

from __future__ import annotations

import gc
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import SIZE, make_table
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from hf_cdl import TaskStream
from hf_cdl.data import StreamConfig, kept_images
from hf_cdl.data.cells import Cells
from hf_cdl.data.kept_images import KeptImages
from hf_cdl.data.views import Preprocess

ONE = 3 * SIZE * SIZE


def stream(images: int = 4) -> Any:
    tables = {
        name: make_table([c for c in range(4) for _ in range(images)], 4, n)
        for n, name in enumerate(("train", "test"))
    }
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    return TaskStream(StreamConfig(classes_per_task=2), processor, dataset=tables)


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each image that is decoded from now on."""
    seen: list[int] = []
    decode = Cells.decode

    def counted(self: Cells, cell: object) -> object:
        seen.append(1)
        return decode(self, cell)  # type: ignore[arg-type]

    monkeypatch.setattr(Cells, "decode", counted)
    return seen


def test_an_image_is_decoded_once_for_all_roles_and_views(monkeypatch: pytest.MonkeyPatch) -> None:
    split, seen = stream()[0].train, decoded(monkeypatch)
    first = [split[i]["pixel_values"] for i in range(len(split))]
    again = [split.seen_by("teacher")[i]["pixel_values"] for i in range(len(split))]
    assert [split[(0, view)]["labels"] for view in range(3)] == 3 * [split[0]["labels"]]
    assert len(seen) == len(split)
    assert all(map(np.array_equal, first, again))


def test_a_view_that_follows_another_makes_its_own() -> None:
    """Also in the place of memory where the one before was."""
    split = stream()[0].train
    for flip in (0.0, 1.0) * 20:
        view = Preprocess(ViTImageProcessor(size={"height": SIZE, "width": SIZE}), crop_scale=(1.0, 1.0), flip=flip)
        found = replace(split, views={"student": view})[(0, 0)]["pixel_values"]
        assert np.array_equal(found, view.training([split.image(0)], [(0, 0, 0)])[0])
        del view, found
        gc.collect()


def test_what_somebody_does_with_an_image_stays_with_them() -> None:
    split = stream()[0].train
    for _ in range(2):
        image = split.image(0)
        before = np.asarray(split.image(0)).copy()
        image.paste((0, 0, 0), (0, 0, SIZE, SIZE))
        assert np.array_equal(np.asarray(split.image(0)), before)
        assert before.any()


def test_the_split_in_use_takes_the_room_of_others_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_images, "_MOST", 5 * ONE)
    gc.collect()
    tasks = stream()
    first, second = tasks[0].train, tasks[1].train
    for split in (first, second):
        for index in range(len(split)):
            split.image(index)
    assert (first.kept._bytes, second.kept._bytes) == (0, 5 * ONE)
    seen = decoded(monkeypatch)
    for index in range(len(second)):
        second.image(index)
    assert len(seen) == len(second) - 5


def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images that are cropped or processed together from now on."""
    seen: list[int] = []
    for name, count in (("augmented", lambda image, *sample: 1), ("evaluation", len)):
        make = getattr(Preprocess, name)

        def counted(self: Preprocess, given: Any, *more: Any, make: Any = make, count: Any = count) -> Any:
            seen.append(count(given))
            return make(self, given, *more)

        monkeypatch.setattr(Preprocess, name, counted)
    return seen


def test_what_a_model_sees_of_an_image_is_made_once_for_all_roles_and_stays_what_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split, seen = stream()[0].train, made(monkeypatch)
    batches = [[0, 1, 2], [3, 4], [(0, 5), (1, 5)], [(0, 6)]]
    first = [split.__getitems__(keys) for keys in batches]
    assert seen == [3, 2, 1, 1, 1]
    wanted = [[item["pixel_values"].clone() for item in items] for items in first]
    for items in first:
        for item in items:
            item["pixel_values"].zero_()  # what somebody does with it stays with them
    again = [split.seen_by("teacher").__getitems__(keys) for keys in batches]
    assert seen == [3, 2, 1, 1, 1]
    for items, values in zip(again, wanted, strict=True):
        assert all(np.array_equal(item["pixel_values"], value) for item, value in zip(items, values, strict=True))
    split.__getitems__([0, 5])  # one of them is new
    assert seen[5:] == [2], "together, as a processor may take them"
    fresh = stream()[0].train
    assert np.array_equal(fresh[(0, 5)]["pixel_values"], wanted[2][0]) and not np.array_equal(
        wanted[2][0], wanted[3][0]
    )


def test_what_is_made_of_images_gives_way_to_decoded_ones_and_to_the_split_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = 3 * SIZE * SIZE * 4  # float32
    monkeypatch.setattr(kept_images, "_MOST", 8 * ONE + 2 * seen)
    gc.collect()
    tasks = stream()
    first, second = tasks[0].train, tasks[1].train
    for index in range(4):
        first[index]
    assert (first.kept._bytes, first.kept._bytes_made) == (4 * ONE, 3 * seen)
    second[0]
    assert (first.kept._bytes_made, second.kept._bytes_made) == (0, seen), "first.kept's images stay"
    for index in range(1, 8):
        second.image(index)
    assert (first.kept._bytes, second.kept._bytes) == (4 * ONE, 8 * ONE)
    assert first.kept._bytes_made + second.kept._bytes_made <= kept_images._MOST - 12 * ONE


def test_workers_keep_and_are_sent_none() -> None:
    split = stream()[0].train
    split.image(0)
    assert not pickle.loads(pickle.dumps(split)).kept._images
    sizes: Any = _Sizes(split)
    keeping = DataLoader(sizes, num_workers=1, batch_size=None)
    assert [*keeping] == [1] * len(split), "the one from before"


class _Sizes:
    """How many images a split has kept once an item was read."""

    def __init__(self, split: object):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> int:
        assert isinstance(self.split.image(index), Image.Image)  # type: ignore[attr-defined]
        return len(self.split.kept._images)  # type: ignore[attr-defined]


def test_the_bytes_of_all_splits_are_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """While splits come, give way to each other, and go."""
    monkeypatch.setattr(kept_images, "_MOST", 30 * ONE)
    gc.collect()
    before, random = KeptImages._taken, np.random.default_rng(0)
    splits: list[Any] = []
    chosen = None
    for _ in range(60):
        splits = [split for split in splits if random.random() < 0.8]
        splits.append(stream()[0].train)
        for row in random.integers(0, 8, 6):
            chosen = splits[random.integers(len(splits))]
            chosen.image(row) if random.random() < 0.5 else chosen[int(row)]
        gc.collect()
        assert KeptImages._taken - before == sum(split.kept._bytes + split.kept._bytes_made for split in splits)
    assert KeptImages._taken > before
    del chosen
    splits.clear()
    gc.collect()
    assert KeptImages._taken == before
