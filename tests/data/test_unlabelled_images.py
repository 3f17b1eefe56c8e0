"""Images without labels beside a task's own: what is read, in which order, which of them are left out."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import make_data, make_table, picture
from transformers import ViTImageProcessorPil

from hf_cdl.data import ImageError, StreamConfig, TaskStream
from hf_cdl.data.sampler import Companions, ViewSampler
from hf_cdl.data.unlabelled import WithUnlabelled, join_unlabelled

PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", classes=4, train=3, test=2)


def folder_of(place: Path, numbers: dict[str, list[int]]) -> Path:
    """Images of class 0 by number, in folders."""
    for name, found in numbers.items():
        (place / name).mkdir(parents=True)
        for number in found:
            picture(0, number).save(place / name / f"{number}.png")
    return place


def make(data: Path, unlabelled: Any, processors: Any = PROCESSOR, **fields: Any) -> TaskStream:
    return TaskStream(
        StreamConfig(path=str(data), classes_per_task=2, unlabelled=str(unlabelled), **fields), processors
    )


def pixels(stream: TaskStream, view: int = 3) -> torch.Tensor:
    found: Any = stream[1].unlabelled
    return torch.stack([item["pixel_values"] for item in found.__getitems__([(i, view) for i in range(len(found))])])


def test_names_of_files_and_folders_change_nothing(data: Path, tmp_path: Path) -> None:
    """Labels would be in these names: order, views and fingerprint are those of the content alone."""
    one = make(data, folder_of(tmp_path / "one", {"class a": [50, 51, 52], "class b/deep": [53]}))
    two = make(data, folder_of(tmp_path / "two", {"x": [53], "class c": [52, 50], "class a": [51]}))
    assert one.unlabelled is not None and len(one.unlabelled) == 4
    assert one.fingerprint == two.fingerprint and torch.equal(pixels(one), pixels(two))
    assert len({tuple(image.flatten().tolist()) for image in pixels(one)}) == 4
    for task in one:
        items = [task.unlabelled[0], task.unlabelled[0, 1]]  # type: ignore[index]
        assert all({*item} == {"pixel_values"} for item in items)
    views = [task.unlabelled[0, 1]["pixel_values"] for task in one]  # type: ignore[index]
    assert not torch.equal(*views), "each task has views of its own"


def test_labels_of_a_table_are_not_read(data: Path, tmp_path: Path) -> None:
    """As many as they are, or a class more; and the stream's own part of the fingerprint is what it was."""
    found = []
    for number, labels in enumerate(([0, 1, 2, 3], [3, 3, 3, 3])):
        cells = make_table([0, 1, 2, 3], 4, 80)
        table = Dataset.from_dict({"image": cells.with_format(None)["image"], "label": labels})
        place = tmp_path / str(number)
        place.mkdir()
        table.to_parquet(str(place / "train.parquet"))
        found.append(make(data, place))
        assert any("the labels of" in note and "(column label) are not read" in note for note in found[-1].notes)
    assert found[0].fingerprint == found[1].fingerprint and torch.equal(*map(pixels, found))
    alone = TaskStream(StreamConfig(path=str(data), classes_per_task=2), PROCESSOR)
    assert found[0].fingerprint.partition("+")[0] == alone.fingerprint
    assert found[0].images == alone.images and alone.unlabelled is None


def test_the_fingerprint_changes_with_the_content(data: Path, tmp_path: Path) -> None:
    first = folder_of(tmp_path / "one", {"a": [50, 51, 52]})
    before = make(data, first).fingerprint
    picture(0, 53).save(first / "a" / "53.png")
    more = make(data, first).fingerprint
    shutil.copy(first / "a" / "51.png", first / "a" / "50.png")  # as many images, of which one is another
    other = make(data, first).fingerprint
    assert len({before, more, other}) == 3
    assert len({found.partition("+")[0] for found in (before, more, other)}) == 1


def test_images_of_the_evaluation_are_left_out_and_those_of_training_are_not(data: Path, tmp_path: Path) -> None:
    """Of the first task's tests and of those of a task to come; all classes of the stream may be among the images."""
    place = tmp_path / "more"
    place.mkdir()
    for split in ("train", "test"):
        table = Dataset.from_parquet(str(data / f"{split}.parquet"))
        for number, cell in enumerate(table.with_format("arrow")[:]["image"]):
            (place / f"{split}{number}.png").write_bytes(cell["bytes"].as_py())
    stream = make(data, place)
    assert stream.unlabelled is not None and len(stream.unlabelled) == 12
    assert f"left out of {place}, as the stream measures on the same: 8 images" in stream.notes
    fewer = make(data, place, max_eval_per_class=1, max_classes=2)
    assert len(fewer.unlabelled or ()) == 12, "test images that this stream leaves out may be measured later"
    names = {Path(stream.unlabelled.place(i).split(": ")[-1]).name for i in range(12)}
    assert names == {f"train{number}.png" for number in range(12)}
    for file in place.glob("train*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"more \(data.unlabelled\) has no images"):
        make(data, place)


def test_held_out_images_are_left_out_and_the_rest_of_their_table_is_not(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "more"
    place.mkdir()
    table = Dataset.from_parquet(str(data / "train.parquet"))
    for number, cell in enumerate(table.with_format("arrow")[:]["image"]):
        (place / f"{number}.png").write_bytes(cell["bytes"].as_py())
    (data / "test.parquet").unlink()
    stream = make(data, place, test_fraction=0.34)  # one of each class's three
    assert sum(len(task.test) for task in stream) == 4 and len(stream.unlabelled or ()) == 12 - 4


def test_a_data_set_is_read_by_its_split(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "more"
    place.mkdir()
    for number, split in enumerate(("train", "test", "unlabeled")):
        make_table([0] * (number + 1), 1, 60 + 10 * number).to_parquet(str(place / f"{split}.parquet"))

    def count(**fields: Any) -> int:
        return len(make(data, place, **fields).unlabelled or ())

    assert [count(), count(unlabelled_split="test"), count(unlabelled_split="train")] == [3, 2, 1]
    assert "not read are the splits test, train of the unlabelled images" in make(data, place).notes
    given = make_table([0, 0], 1, 90)
    found = TaskStream(StreamConfig(path=str(data), classes_per_task=2), PROCESSOR, unlabelled=given)
    assert found.unlabelled is not None and len(found.unlabelled) == 2


def test_each_role_has_its_view_and_the_same_crop(data: Path, tmp_path: Path) -> None:
    place = folder_of(tmp_path / "more", {"a": [50, 51]})
    wide = ViTImageProcessorPil(size={"height": 16, "width": 16})
    stream = make(data, place, {"student": PROCESSOR, "teacher": wide})
    found: Any = stream[0].unlabelled
    item = found.seen_by("student", "teacher")[1, 2]
    assert item["pixel_values"].shape == (3, 8, 8) and item["teacher_pixel_values"].shape == (3, 16, 16)
    assert torch.equal(item["teacher_pixel_values"], found.seen_by("teacher")[1, 2]["pixel_values"])


def test_unreadable_images_are_named_like_those_of_a_task(data: Path, tmp_path: Path) -> None:
    place = folder_of(tmp_path / "more", {"a": [50, 51]})
    (place / "a" / "bad.png").write_bytes(b"not an image")
    (place / "notes.txt").write_text("left alone, as in class folders")
    with pytest.raises(ImageError, match=r"1 image cannot be used:\n- split 'unlabelled', row .*bad.png"):
        make(data, place).check_images()
    (place / "a" / "bad.png").unlink()
    (place / "a" / "gone.png").symlink_to(place / "nowhere.png")
    with pytest.raises(ImageError, match=r"gone.png cannot be read"):
        make(data, place)


def test_all_images_are_dealt_out_equally_often_by_seed_and_place_alone() -> None:
    companions = Companions(count=5, ratio=3, seed=7)
    dealt = [key for place in range(10) for key in companions.at(place)]
    assert Counter(dealt) == {(image, view): 1 for image in range(5) for view in range(6)}
    orders = [[image for image, view in dealt if view == number] for number in range(6)]
    assert len({tuple(order) for order in orders}) > 1
    late = Companions(5, 3, 7)
    assert [key for place in (8, 9) for key in late.at(place)] == dealt[24:], "as after resuming at place 8"
    assert Companions(5, 3, 8).at(0) != companions.at(0)
    assert Companions(5, 3, 7, shuffle=False).at(1) == ((3, 0), (4, 0), (0, 1))


def test_places_count_on_from_epoch_to_epoch_and_the_own_order_stays() -> None:
    plain, paired = ViewSampler(4, 3), ViewSampler(4, 3, companions=Companions(6, 2, 1))
    both = []
    for epoch in range(3):
        plain.epoch = paired.epoch = epoch
        keys = [*paired]
        assert [key for key, _ in keys] == [*plain]
        both += [key for _, beside in keys for key in beside]
    assert Counter(both) == {(image, view): 1 for image in range(6) for view in range(4)}


class Own:
    """A user's own images, whose labels raise if anyone reads them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        class Item(dict):
            def __getitem__(self, name: str) -> Any:
                assert name == "pixel_values"
                return super().__getitem__(name)

        return Item(pixel_values=torch.full((3, 2, 2), 10.0 * key[0] + key[1]), labels=-1)


def test_a_batch_is_its_own_images_then_those_beside_them() -> None:
    class Labelled(Own):
        def __getitems__(self, keys: Any) -> list[dict[str, Any]]:
            return [{"pixel_values": torch.full((3, 2, 2), float(key[0])), "labels": key[0]} for key in keys]

    items = WithUnlabelled(Labelled(), Own()).__getitems__([((1, 0), ((2, 1), (0, 1))), ((0, 0), ((1, 1), (2, 2)))])
    batch = torch.utils.data.default_collate(items)
    assert batch["unlabelled_pixel_values"].shape == (2, 2, 3, 2, 2)
    whole = join_unlabelled({**batch, "weight": 2.0})
    assert whole["pixel_values"][:, 0, 0, 0].tolist() == [1, 0, 21, 1, 11, 22]
    assert {*whole} == {"pixel_values", "labels", "weight"} and whole["labels"].tolist() == [1, 0]
    plain = {"pixel_values": torch.zeros(1), "labels": torch.zeros(1)}
    assert join_unlabelled(plain) == plain
