"""The icons in this repository match their data cards."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Features
from helpers import ROOT

SPLITS = ("train", "validation", "test")
QUICKSTART, LONGER = ROOT / "recipes/quickstart/icons", ROOT / "recipes/icons100"
FOLDERS = [QUICKSTART, LONGER, ROOT / "recipes/offline_kd/icons"]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Split -> its columns, without the images."""
    columns = ["label", "family", "source"]
    return {split: pq.read_table(folder / f"{split}.parquet", columns=columns).to_pydict() for split in SPLITS}


def names(folder: Path) -> list[str]:
    """Class names, the same in all splits."""
    schemas = [pq.read_schema(folder / f"{split}.parquet") for split in SPLITS]
    [found] = {tuple(Features.from_arrow_schema(schema)["label"].names) for schema in schemas}
    return list(found)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT / "recipes").as_posix())
def test_the_card_says_what_is_there(folder: Path):
    card, splits, classes = (folder / "README.md").read_text(), read(folder), names(folder)
    assert f"Classes: {', '.join(classes)}." in card and classes == sorted(classes)
    for split, rows in splits.items():
        each = np.bincount(rows["label"], minlength=len(classes))
        span = f"{each.min()}–{each.max()}" if each.min() < each.max() else f"{each.min()}"
        size = (folder / f"{split}.parquet").stat().st_size
        line = f"| {split} | {len(rows['label']):,} | {span} | {len({*rows['family']})} | {size:,} |"
        assert each.min() > 0 and line in card
    families = [{*rows["family"]} for rows in splits.values()]
    assert sum(map(len, families)) == len(set.union(*families)), "a family in two splits"
    sources = [source for rows in splits.values() for source in rows["source"]]
    assert len({*sources}) == len(sources)
    with open(folder / "LICENCES.tsv", newline="") as file:
        licences = {row["set"]: int(row["images"]) for row in csv.DictReader(file, delimiter="\t")}
    assert licences == Counter(source.split(":")[0] for source in sources)


def test_the_longer_stream_has_ten_tasks_of_ten_and_the_quickstarts_classes():
    """For a class in both, the images are a subset of the quickstart's, in the same split."""
    longer, quickstart, (all_names, some_names) = read(LONGER), read(QUICKSTART), map(names, (LONGER, QUICKSTART))
    assert len(all_names) == 100 and {*some_names} < {*all_names}
    card = (LONGER / "README.md").read_text()
    [known] = re.findall(r"also in \[the quickstart\].*?: (.*?)\. ", card, re.DOTALL)
    assert known.split(", ") == some_names
    for split, cap in {"train": 16, "validation": 6, "test": 10}.items():
        here, there = longer[split], quickstart[split]
        assert np.bincount(here["label"]).max() == cap
        label = {i: some_names.index(name) for i, name in enumerate(all_names) if name in some_names}
        shared = {(label[i], source) for i, source in zip(here["label"], here["source"], strict=True) if i in label}
        assert shared < {*zip(there["label"], there["source"], strict=True)}
    assert sum(file.stat().st_size for file in LONGER.iterdir()) < 2.5e6
