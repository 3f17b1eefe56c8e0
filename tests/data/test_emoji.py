"""The emoji in this repository match their data card and their makers' licences, and the script that drew them."""

from __future__ import annotations

import csv
import io
import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Features
from helpers import ROOT, png
from PIL import Image

from hf_cdl.data.stream import TaskStream
from hf_cdl.recipe import load_recipe

EMOJI = ROOT / "recipes/emoji"
SPLITS = {"train": 4, "validation": 2, "test": 2}  # images of each class
PERMISSIVE = {"Apache-2.0", "MIT", "CC-BY-4.0"}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(EMOJI / "make_data.py"))


@pytest.fixture(scope="module")
def splits() -> dict[str, dict[str, Any]]:
    return {split: pq.read_table(EMOJI / f"{split}.parquet").to_pydict() for split in SPLITS}


def names(file: Path) -> list[str]:
    return Features.from_arrow_schema(pq.read_schema(file))["label"].names


def licences() -> list[dict[str, str]]:
    with open(EMOJI / "LICENCES.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_card_says_what_is_there(script: dict[str, Any], splits: dict[str, dict[str, Any]]):
    card, classes = (EMOJI / "README.md").read_text(), script["CLASSES"]
    assert all(names(EMOJI / f"{split}.parquet") == classes for split in SPLITS)
    assert len({*classes}) == 100 and classes == sorted(classes) and f"Classes: {', '.join(classes)}." in card
    for split, each in SPLITS.items():
        rows, size = splits[split], (EMOJI / f"{split}.parquet").stat().st_size
        assert np.bincount(rows["label"]).tolist() == [each] * 100
        assert f"| {split} | {100 * each} | {each} | {len({*rows['maker']})} | {size:,} |" in card
    assert sum(file.stat().st_size for file in EMOJI.iterdir() if file.is_file()) < 6e6


def test_a_maker_is_in_one_split(script: dict[str, Any], splits: dict[str, dict[str, Any]]):
    makers = [{*rows["maker"]} for rows in splits.values()]
    assert sum(map(len, makers)) == len(set.union(*makers)) == 6
    for split, rows in splits.items():
        for source, maker in zip(rows["source"], rows["maker"], strict=True):
            known = script["SETS"][source.split(":")[0]]
            assert (known.split, known.maker) == (split, maker)


def test_every_set_draws_every_emoji_once(script: dict[str, Any], splits: dict[str, dict[str, Any]]):
    sources = [source for rows in splits.values() for source in rows["source"]]
    labels = [label for rows in splits.values() for label in rows["label"]]
    drawn = Counter((source.split(":")[0], label) for source, label in zip(sources, labels, strict=True))
    assert drawn == {(name, label): 1 for name in script["SETS"] for label in range(100)}
    assert len({*sources}) == len(sources)


def test_images_are_in_colour_on_white_and_all_different(splits: dict[str, dict[str, Any]]):
    seen = set()
    for image in (image for rows in splits.values() for image in rows["image"]):
        with Image.open(io.BytesIO(image["bytes"])) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (84, 84))
            pixels = np.asarray(picture)
        assert 0.02 < (pixels < 250).any(axis=2).mean()  # something is drawn
        seen.add(pixels.tobytes())
    assert len(seen) == 800


def test_every_set_has_a_permissive_licence_and_is_credited(script: dict[str, Any], splits: dict[str, dict[str, Any]]):
    rows, card = licences(), (EMOJI / "README.md").read_text()
    counted = Counter(source.split(":")[0] for rows in splits.values() for source in rows["source"])
    assert {row["set"]: int(row["images"]) for row in rows} == counted
    for row in rows:
        assert row["licence"] in PERMISSIVE and all(row.values())
        assert (
            f"- [{row['name']}]({row['source']}) by {row['author']}, [{row['licence']}]({row['licence_url']})" in card
        )
        known = script["SETS"][row["set"]]
        assert (row["version"], row["licence"], row["author"]) == (known.version, known.licence, known.maker)


def test_no_class_is_one_that_the_small_backbones_were_pre_trained_on(script: dict[str, Any]):
    """Of those, the 50 that are in this repository."""
    assert not {*script["CLASSES"]} & {*names(ROOT / "recipes/offline_kd/icons/train.parquet")}


@pytest.mark.parametrize("name", ["emoji", "emoji_dinov2"])
def test_the_recipes_have_ten_tasks_of_ten(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe([f"recipes/{name}.yaml"], "unused.yaml")
    assert [len(task.class_names) for task in TaskStream(recipe.data, processors={})] == [10] * 10


# ---- the script ----


def package(folder: Path, name: str, emoji: str, **changed: Any) -> None:
    """An unpacked package with one icon, one alias of it, and whatever is `changed`."""
    (folder / name).mkdir(exist_ok=True)
    icons = {
        "icons": {emoji: {"body": "<path/>", "left": 1, "width": 9}},
        "aliases": {"other": {"parent": emoji}},
        "width": 16,
        "height": 12,
    }
    files = {
        "icons.json": {**icons, **changed.get("icons", {})},
        "package.json": {"version": changed.get("version", "1.2.9")},
        "info.json": {"license": {"spdx": changed.get("licence", "Apache-2.0")}},
        "chars.json": changed.get("chars", {}),
    }
    for file, content in files.items():
        (folder / name / file).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["rice-ball", "rice-ball-1", "riceball"])
def test_an_emoji_is_found_by_the_names_that_sets_give_it(script: dict[str, Any], tmp_path: Path, name: str):
    package(tmp_path, "noto", name)
    drawings = script["Drawings"](tmp_path, "noto")
    assert drawings.find("rice-ball") == drawings.find("other") == name
    assert 'viewBox="1 0 9 12"' in drawings.svg(name) and "<path/>" in drawings.svg(name)
    with pytest.raises(ValueError, match="noto has no ball"):
        drawings.find("ball")


def test_a_turned_drawing_is_refused(script: dict[str, Any], tmp_path: Path):
    package(tmp_path, "noto", "ant", icons={"aliases": {"bee": {"parent": "ant", "hFlip": True}}})
    with pytest.raises(ValueError, match="not another name of the same drawing"):
        script["Drawings"](tmp_path, "noto").find("bee")


@pytest.mark.parametrize("changed", [{"licence": "CC-BY-SA-4.0"}, {"version": "1.3.0"}])
def test_another_version_or_licence_is_refused(script: dict[str, Any], tmp_path: Path, changed: dict[str, str]):
    package(tmp_path, "noto", "ant", **changed)
    with pytest.raises(ValueError, match="version and licence are"):
        script["Drawings"](tmp_path, "noto")


def test_two_emoji_of_one_name_are_refused(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(script["check_codes"].__globals__, "CLASSES", ["watch"])
    package(tmp_path, "noto", "watch", chars={"231a-fe0f": "other"})  # the selector asks for colour
    package(tmp_path, "twemoji", "watch", version="1.2.5", licence="CC-BY-4.0", chars={"231a": "watch"})
    sets = [script["Drawings"](tmp_path, name) for name in ("noto", "twemoji")]
    script["check_codes"](sets)
    sets[1].codes["watch"] = "\N{ANT}"
    with pytest.raises(ValueError, match="watch is not one emoji"):
        script["check_codes"](sets)


def test_a_drawing_lies_in_the_middle_of_white(script: dict[str, Any]):
    drawing = np.zeros((84, 80, 4), np.uint8)
    drawing[:, 40:, 3] = 255  # left half transparent, right half black
    with Image.open(io.BytesIO(script["on_white"](png(Image.fromarray(drawing))))) as picture:
        columns = np.asarray(picture)[:, :, 0]
    assert (columns == columns[0]).all() and columns[0].tolist() == [255] * 42 + [0] * 40 + [255] * 2
    with pytest.raises(ValueError, match="its longer side should have 84"):
        script["on_white"](png(Image.new("RGBA", (84, 85))))
