"""recipes/make_digits.py: scikit-learn's digits as a folder that a stream is made of."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import TRAIN, little_room
from transformers import ViTImageProcessor

from hf_cdl.data import StreamConfig, TaskStream
from hf_cdl.data.loading import load_splits

sklearn_data = pytest.importorskip("sklearn.datasets")
script = runpy.run_path(str(TRAIN.with_name("make_digits.py")))
make, NAMES = script["main"], script["NAMES"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "some" / "digits"
    assert make([str(folder)]) == 0
    return folder


def test_every_digit_is_in_one_split_with_its_label(folder: Path):
    """Pixels and labels of the three splits together are scikit-learn's, none twice and none left out."""
    splits = load_splits(str(folder), None, None, ())
    pairs = [pair for rows in splits.values() for pair in zip(rows["image"], rows["label"], strict=True)]
    found = Counter((tuple(np.array(image).ravel().tolist()), label) for image, label in pairs)
    ink, labels = sklearn_data.load_digits(return_X_y=True)
    grey = np.round(255 - ink * 255 / 16).astype(int)
    assert len(np.unique(grey)) == 17, "each level of ink has its own grey"
    assert found == Counter((tuple(row.tolist()), int(label)) for row, label in zip(grey, labels, strict=True))
    assert all(rows.features["label"].names == NAMES for rows in splits.values())
    assert NAMES[0] == "zero" and NAMES[9] == "nine"


def test_the_splits_are_stratified_and_the_same_every_time(folder: Path, tmp_path: Path):
    splits = load_splits(str(folder), None, None, ())
    count = {split: np.bincount(rows["label"], minlength=10) for split, rows in splits.items()}
    total = sum(count.values())
    for split, share in {"train": 0.6, "validation": 0.2, "test": 0.2}.items():
        assert (np.abs(count[split] - share * total) <= 1).all()
    assert make([str(tmp_path / "again")]) == 0
    for split in splits:
        assert (tmp_path / "again" / f"{split}.parquet").read_bytes() == (folder / f"{split}.parquet").read_bytes()


def test_a_stream_of_five_tasks(folder: Path):
    config = StreamConfig(path=str(folder), classes_per_task=2, flip=0.0, eval_split="validation")
    tasks = list(TaskStream(config, ViTImageProcessor(size={"height": 48, "width": 48})))
    assert [task.class_names for task in tasks] == [tuple(NAMES[i : i + 2]) for i in range(0, 10, 2)]
    assert all(task.train[0]["pixel_values"].shape == (3, 48, 48) for task in tasks)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "notes.txt").write_text("mine")
    assert make([str(tmp_path)]) == 2
    assert f"error: {tmp_path} is not empty; choose another folder." in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    for folder in ("new/digits", "empty"):
        with little_room(20_000):
            assert make([str(tmp_path / folder)]) == 2
        assert f"error: Could not write into {tmp_path / folder}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    (tmp_path / "empty" / ".partial").mkdir()  # left by a kill
    assert make([str(tmp_path / "empty")]) == 0
    assert sorted(path.stem for path in (tmp_path / "empty").iterdir()) == ["test", "train", "validation"]


def test_without_scikit_learn_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # as if it were not installed
    assert make([str(tmp_path / "new")]) == 2
    assert "error: It needs scikit-learn; install it: pip install scikit-learn" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
