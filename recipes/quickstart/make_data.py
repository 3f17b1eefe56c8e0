"""Cuts this repository's icons out of the full icon data set: `python recipes/quickstart/make_data.py FULL_FOLDER`.

The full folder holds {stream,base}-{train,validation,test}.parquet and LICENCES.tsv. Of its stream classes the
quickstart gets 50 (recipes/quickstart/icons) and a longer stream all 100, with fewer images each (recipes/icons100)
or with all training images (recipes/icons_all). Of its base classes, on which the quickstart's backbones were
pre-trained, offline distillation gets 50 (recipes/offline_kd/icons). It takes the classes with the most test images
(ties: most training images, then by name), at most `caps` images per split of each, chosen with a fixed seed, and
sorts the classes alphabetically. Images are recompressed losslessly. It writes the three Parquet files, the licences
of the icon sets used, and the data card README.md.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from PIL import Image as PIL

SEED = 20261122
SPLITS = ("train", "validation", "test")
HERE = Path(__file__).parent


def smaller(png: bytes) -> bytes:
    """Recompress a PNG: the same pixels in fewer bytes."""
    before, out = PIL.open(io.BytesIO(png)), io.BytesIO()
    before.save(out, "PNG", optimize=True)
    after = PIL.open(io.BytesIO(out.getvalue()))
    assert after.mode == before.mode and after.tobytes() == before.tobytes()
    return min(png, out.getvalue(), key=len)


def choose(full: dict[str, Dataset], classes: int) -> list[str]:
    names = full["test"].features["label"].names
    count = {split: np.bincount(rows["label"], minlength=len(names)) for split, rows in full.items()}
    order = sorted(range(len(names)), key=lambda c: (-count["test"][c], -count["train"][c], names[c]))
    return sorted(names[c] for c in order[:classes])


def cut(rows: Dataset, classes: list[str], cap: int | None) -> Dataset:
    """Keep at most `cap` images of each class, sorted by class and source; each class's choice is independent."""
    names, labels = rows.features["label"].names, np.array(rows["label"])
    columns: dict[str, list] = {"image": [], "label": [], "family": [], "source": []}
    for label, name in enumerate(classes):
        old = names.index(name)
        kept = np.random.default_rng([SEED, old]).permutation(np.flatnonzero(labels == old))[:cap]
        for row in sorted((rows[int(i)] for i in kept), key=lambda row: row["source"]):
            image = {"bytes": smaller(row["image"]["bytes"]), "path": None}
            for column, value in zip(columns.values(), (image, label, row["family"], row["source"]), strict=True):
                column.append(value)
    text = Value("string")
    features = Features({"image": Image(), "label": ClassLabel(names=classes), "family": text, "source": text})
    return Dataset.from_dict(columns, features=features)


CARD = """---
license: other
license_name: permissive-icon-sets
license_link: LICENCES.tsv
task_categories:
- image-classification
pretty_name: Icons-R {title}
size_categories:
- 1K<n<10K
configs:
- config_name: default
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: validation.parquet
  - split: test
    path: test.parquet
---
# Icons-R {title}: {classes} concepts drawn by {families} icon families

A small, real image data set for {purpose} without a download. A class is a concept ("home", "heart", "bell"), an image is one icon
family's drawing of it. As in ImageNet-R, the test images show known concepts in styles never seen in training.

| split | images | images per class | icon families | bytes |
|---|---|---|---|---|
{table}

Images are 48×48 greyscale PNG, dark on white. Columns: `image`, `label` (ClassLabel with names), `family` (the icon
sets of one maker or of one origin), `source` ("set:icon"). **No family is in two splits**, so tune on validation, never on test.

```python
from datasets import load_dataset

icons = load_dataset("{folder}")  # splits train, validation, test
```
Classes: {names}.{also}

## How it was made
The icons come from the npm package `@iconify/json` 2.2.535, rendered with PyPI `resvg-py` 0.5.0 and Pillow. Labels are the icons' own
names and **some are wrong** (a few "link" images are paper clips). Forks of one set count as one family; near-duplicates of training
images were dropped from test. Of the {total} {part} classes of that full data set (which is not in this repository),
[make_data.py]({script}) took {chosen}, and of each {caps}. PNGs were recompressed without loss. {backbones}; base and stream share no name, no word of a name and no listed synonym. Both were drawn by the same
families in the same splits, so test families are new to the backbones as well.

## Licence and attribution
Every icon belongs to its makers and has the licence of its set (MIT, Apache-2.0, ISC, CC0, CC-BY, OFL and the like): [LICENCES.tsv](LICENCES.tsv)
lists the {sets} sets used, with licence, author and number of images here. CC-BY asks for attribution: keep that file with the images.
"""  # noqa: E501

# True because a class's images are drawn with the same seed for every folder: a smaller draw is a larger one's start.
ALSO = """

{classes} of these classes are also in [the quickstart](../quickstart/icons/README.md), which has {shared}, in
the same splits: {names}. What was tuned on the quickstart's stream was therefore tuned on half of this one's classes."""  # noqa: E501


@dataclass(frozen=True)
class Subset:
    """Contents of one folder: a number of classes from a `part` of the full data, and texts for their card."""

    out: Path
    part: str
    classes: int
    caps: dict[str, int]
    words: dict[str, str]


MOST = "with the most test images (ties: most training images, then by name)"
QUICKSTART = Subset(
    HERE / "icons",
    "stream",
    50,
    {"train": 32, "validation": 12, "test": 20},
    {
        "title": "quickstart",
        "purpose": "continual learning",
        "folder": "recipes/quickstart/icons",
        "script": "../make_data.py",
        "chosen": f"the 50 {MOST}",
        "backbones": "The two backbones beside this folder were\npre-trained on other concepts",
    },
)
LONGER = Subset(
    HERE.parent / "icons100",
    "stream",
    100,
    {"train": 16, "validation": 6, "test": 10},
    {
        "title": "100",
        "purpose": "continual learning over 10 tasks of 10",
        "shared": "these images of them and more",
        "folder": "recipes/icons100",
        "script": "../quickstart/make_data.py",
        "chosen": "all",
        "backbones": "The two backbones of the quickstart were\npre-trained on other concepts",
    },
)
EVERY = Subset(
    HERE.parent / "icons_all",
    "stream",
    100,
    {"validation": LONGER.caps["validation"], "test": LONGER.caps["test"]},
    {
        "title": "100, all training images",
        "purpose": "continual learning over 10 tasks of 10",
        "shared": "fewer training images of them and more of the others",
        "folder": "recipes/icons_all",
        "script": "../quickstart/make_data.py",
        "chosen": "all",
        "backbones": LONGER.words["backbones"],
    },
)
BASE = Subset(
    HERE.parent / "offline_kd" / "icons",
    "base",
    50,
    {},
    {
        "title": "base",
        "purpose": "distillation",
        "folder": "recipes/offline_kd/icons",
        "script": "../../quickstart/make_data.py",
        "chosen": f"the 50 {MOST}",
        "backbones": "The two backbones of the quickstart were\npre-trained on these and the other base concepts",
    },
)


def read(folder: Path, part: str) -> dict[str, Dataset]:
    files = {split: str(folder / f"{part}-{split}.parquet") for split in SPLITS}
    full = {split: load_dataset("parquet", data_files=file, split="train") for split, file in files.items()}
    return {split: rows.cast_column("image", Image(decode=False)) for split, rows in full.items()}


def make(folder: Path, subset: Subset) -> None:
    full, out, caps = read(folder, subset.part), subset.out, subset.caps
    classes = choose(full, subset.classes)
    out.mkdir(exist_ok=True)

    table, used, families = [], {}, set()
    for split in SPLITS:
        rows = cut(full[split], classes, caps.get(split))
        file = out / f"{split}.parquet"
        pq.write_table(rows.with_format("arrow")[:], file, compression="zstd", compression_level=19)
        count, drawn_by = np.bincount(rows["label"]), set(rows["family"])
        each = f"{count.min()}–{count.max()}" if count.min() < count.max() else str(count.min())
        table.append(f"| {split} | {len(rows):,} | {each} | {len(drawn_by)} | {file.stat().st_size:,} |")
        families |= drawn_by
        for source in rows["source"]:
            used[source.split(":")[0]] = used.get(source.split(":")[0], 0) + 1

    licences = [line.split("\t") for line in (folder / "LICENCES.tsv").read_text().splitlines()]
    lines = ["\t".join([*row[:-1], str(used[row[0]])]) for row in licences if row[0] in used]
    assert len(lines) == len(used), "a set without a licence"
    (out / "LICENCES.tsv").write_text("\n".join(["set\tname\tlicence\tauthor\timages", *lines]) + "\n")
    known = choose(full, QUICKSTART.classes) if subset in (LONGER, EVERY) else []
    most = ", ".join(f"{cap} {split}" for split, cap in caps.items())
    whole = "" if "train" in caps or not caps else "all training images and "
    (out / "README.md").write_text(
        CARD.format(
            **subset.words,
            part=subset.part,
            total=len(full["test"].features["label"].names),
            classes=len(classes),
            families=len(families),
            table="\n".join(table),
            names=", ".join(classes),
            also=ALSO.format(classes=len(known), names=", ".join(known), **subset.words) if known else "",
            caps=f"{whole}at most\n{most} images, chosen with seed {SEED}" if most else "all\nimages",
            sets=len(used),
        )
    )


if __name__ == "__main__":
    for each in (QUICKSTART, LONGER, EVERY, BASE):
        make(Path(sys.argv[1]), each)
