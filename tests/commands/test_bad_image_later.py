"""A bad image that no check ahead has found stops a run, which goes on once the image is mended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import make_recipe, picture, write_recipe
from safetensors.torch import load_file

from hf_cdl.commands import train as training

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student on 2 tasks of 2 classes in folders, none of whose images is checked ahead."""
    folder = tmp_path_factory.mktemp("recipe")
    for split, count, first in (("train", 6, 0), ("test", 2, 100)):
        for label in range(4):
            place = folder / "photos" / split / f"class {label}"
            place.mkdir(parents=True)
            for number in range(first, first + count):
                picture(label, number).save(place / f"{number}.png")
    made = make_recipe(folder, teacher=None, distill=[], ce_weight=1.0)
    made["train"]["num_train_epochs"] = 1
    made["data"] = {"path": str(folder / "photos"), "classes_per_task": 2, "check": "none"}
    return write_recipe(folder / "recipe.yaml", made)


@pytest.fixture
def run(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Train on a copy of the photos, `photos` in tmp_path; returns the exit code and what was said."""
    shutil.copytree(recipe.parent / "photos", tmp_path / "photos")

    def call(out: str, *words: Any) -> tuple[int, str]:
        fields = ("--data.path", tmp_path / "photos", "--output_dir", tmp_path / out, *words)
        code = training.main([str(recipe), *map(str, fields)])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_goes_on_once_the_image_that_stopped_it_is_mended(
    run: Run, split: str, workers: int, tmp_path: Path
) -> None:
    """Of the second task, so that the first is learnt; the run is that of whole data, to the bit."""
    words = ("--train.dataloader_num_workers", workers)
    code, said = run("whole", *words)
    assert code == 0 and "none of the 32 images is checked before it is used (data.check: none)" in said, said
    bad = sorted((tmp_path / "photos" / split / "class 3").iterdir())[1]
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # if nothing was mended, it says the same again
        code, said = run("out", *words)
        error = said[said.index("error: ") :]
        assert code == 2 and len(error.strip().splitlines()) == 3, said
        row = 19 if split == "train" else 7
        assert error.startswith(f"error: split {split!r}, row {row}: {bad}: cannot be read as an image"), error
        assert "Repair it in place" in error and "the same command resumes from there" in error
    assert len(json.loads((tmp_path / "out" / "run.json").read_text())["entries"]["student"]) >= 1
    other = bad.with_name(sorted(place.name for place in bad.parent.iterdir())[0])
    kept = other.read_bytes()
    other.write_bytes(kept + b"\0")
    bad.write_bytes(whole)
    code, said = run("out", *words)
    assert code == 2 and "The data changed since" in said, "another image changed, too"
    other.write_bytes(kept)
    code, said = run("out", *words)
    assert code == 0, said
    ours, theirs = (load_file(tmp_path / out / "student" / "model.safetensors") for out in ("out", "whole"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    ledgers = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("out", "whole")]
    assert ledgers[0]["stream"] == ledgers[1]["stream"] and "bad_image" not in ledgers[0]
    code, said = run("out", *words)
    assert code == 0 and "This run is finished" in said, "it is the run of the mended data now"


def test_how_images_are_checked_may_change_while_a_run_goes_on(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "photos" / "train" / "class 2" / "3.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    code, said = run("out")
    assert code == 2 and f"row 15: {bad}: the image is empty (0 bytes)" in said, said
    assert "Repair it in place" in said and "the same command resumes from there" in said
    bad.write_bytes(whole)
    code, said = run("out", "--data.check", "all")
    assert code == 0, said


def test_every_way_of_checking_but_none_finds_it_ahead(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "photos" / "train" / "class 2" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    for how in ("headers", "all"):
        code, said = run(how, "--data.check", how)
        assert code == 2 and f"1 image cannot be used:\n- split 'train', row 15: {bad}" in said, said
        assert not (tmp_path / how / "run.json").exists(), "nothing was learnt"
