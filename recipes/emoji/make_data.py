"""Draws the emoji of this folder: `python recipes/emoji/make_data.py FOLDER`.

FOLDER holds the npm packages that SETS names, unpacked side by side (`npm pack @iconify-json/noto@1.2.9`, then
FOLDER/noto/icons.json and so on). A class is one emoji, found in every set by its name; where a set also lists code
points, they must agree. A set's drawings lie in one split, with those of all sets of its maker. Each is drawn at
84 x 84 pixels on white and stored as PNG. It writes the three Parquet files, LICENCES.tsv and the data card README.md;
the same packages and libraries give the same bytes. It needs resvg-py (0.5.0 drew what lies here).
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PIL

HERE = Path(__file__).parent
SIZE = 84  # six patches of 14 (DINOv2-small's) a side; smaller backbones' processors shrink it
SPLITS = ("train", "validation", "test")
LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "MIT": "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",  # its text names the owner
}


@dataclass(frozen=True)
class EmojiSet:
    """One package: the version drawn, who made the drawings and under which licence they are.

    `packaged`: the licence that the package states, where the makers state another one for the drawings.
    """

    version: str
    split: str
    maker: str
    title: str
    licence: str
    source: str  # on GitHub
    packaged: str | None = None


SETS = {
    "noto": EmojiSet("1.2.9", "train", "Google", "Noto Emoji", "Apache-2.0", "googlefonts/noto-emoji"),
    "noto-v1": EmojiSet("1.2.5", "train", "Google", "Noto Emoji (v1)", "Apache-2.0", "googlefonts/noto-emoji"),
    "fluent-emoji": EmojiSet("1.2.7", "train", "Microsoft", "Fluent Emoji", "MIT", "microsoft/fluentui-emoji"),
    "fluent-emoji-flat": EmojiSet(
        "1.2.6", "train", "Microsoft", "Fluent Emoji Flat", "MIT", "microsoft/fluentui-emoji"
    ),
    "emojione": EmojiSet("1.2.3", "validation", "Emoji One", "Emoji One 2", "CC-BY-4.0", "EmojiTwo/emojitwo"),
    "streamline-emojis": EmojiSet(
        "1.2.4", "validation", "Streamline", "Streamline Emojis", "CC-BY-4.0", "webalys-hq/streamline-vectors"
    ),
    "twemoji": EmojiSet("1.2.5", "test", "Twitter", "Twemoji", "CC-BY-4.0", "jdecked/twemoji"),
    # Its LICENSE.md has Apache-2.0 for the code and CC BY 4.0 "for the Visual Design"; the package states the first.
    "fxemoji": EmojiSet("1.2.2", "test", "Mozilla", "FxEmojis", "CC-BY-4.0", "mozilla/fxemoji", "Apache-2.0"),
}

# In all eight sets, and in each of them the same thing to the eye. Left out are faces, hands, people, flags, signs,
# what looks like another class (other moons, cars, buildings, heads of animals), and what the quickstart's backbones
# were pre-trained on.
CLASSES: list[str] = sorted(
    """
    ant bug chipmunk cow crocodile dolphin elephant goat honeybee horse koala lady-beetle monkey mouse octopus penguin
    rooster snail snake spiral-shell tiger turtle bouquet four-leaf-clover hibiscus palm-tree rose sunflower tulip
    cherries cooked-rice custard doughnut french-fries grapes honey-pot hot-beverage peach poultry-leg red-apple
    rice-ball spaghetti strawberry sushi tangerine tropical-drink watermelon
    airplane anchor barber-pole bus crescent-moon delivery-truck fire fire-engine fountain fuel-pump hospital
    house-with-garden railway-car rocket roller-coaster sun-with-face taxi tractor umbrella-with-rain-drops
    vertical-traffic-light watch
    artist-palette battery bell briefcase calendar christmas-tree clapper-board credit-card crown crystal-ball
    fax-machine glasses guitar jack-o-lantern jeans kimono lipstick microphone money-bag newspaper nut-and-bolt
    open-book package paperclip radio saxophone slot-machine television trumpet violin womans-hat wrench
    """.split()
)


class Drawings:
    """One unpacked package. Raises ValueError if it is of another version or licence than SETS has."""

    def __init__(self, folder: Path, name: str):
        def read(file: str) -> Any:
            return json.loads((folder / name / file).read_text())

        self.name, self.icons, known = name, read("icons.json"), SETS[name]
        found = read("package.json")["version"], read("info.json")["license"]["spdx"]
        if found != (known.version, known.packaged or known.licence):
            raise ValueError(f"{name}: version and licence are {found}; SETS describes {known}.")
        self.codes: dict[str, str] = {}  # icon -> its emoji, where the set lists code points
        for code, icon in read("chars.json").items():
            self.codes.setdefault(self.parent(icon), "".join(chr(int(part, 16)) for part in code.split("-")))

    def parent(self, icon: str) -> str:
        """The icon that an alias stands for. Raises ValueError if it would be turned or mirrored."""
        while alias := self.icons.get("aliases", {}).get(icon):
            if {*alias} != {"parent"}:
                raise ValueError(f"{self.name}: {icon} is {alias}, not another name of the same drawing.")
            icon = alias["parent"]
        return icon

    def find(self, emoji: str) -> str:
        """The icon of an emoji: its name, the first of several (NAME-1), or its name in one word."""
        for name in (emoji, f"{emoji}-1", emoji.replace("-", "")):
            if (icon := self.parent(name)) in self.icons["icons"]:
                return icon
        raise ValueError(f"{self.name} has no {emoji}.")

    def svg(self, icon: str) -> str:
        entry = {"left": 0, "top": 0, **self.icons, **self.icons["icons"][icon]}
        box = " ".join(str(entry[side]) for side in ("left", "top", "width", "height"))
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{box}">{entry["body"]}</svg>'


def on_white(png: bytes) -> bytes:
    """The drawing in the middle of a white square, without transparency, in as few bytes as PNG takes."""
    drawing, square, out = (
        PIL.open(io.BytesIO(png)).convert("RGBA"),
        PIL.new("RGBA", (SIZE, SIZE), "white"),
        io.BytesIO(),
    )
    if max(drawing.size) != SIZE:
        raise ValueError(f"A drawing has {drawing.size} pixels; its longer side should have {SIZE}.")
    square.alpha_composite(drawing, ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2))
    square.convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def draw(sets: list[Drawings], render: Callable[[str], bytes]) -> Dataset:
    """A table of every class in every one of the sets."""
    columns: dict[str, list] = {"image": [], "label": [], "maker": [], "source": []}
    for label, emoji in enumerate(CLASSES):
        for drawings in sets:
            icon = drawings.find(emoji)
            image = {"bytes": on_white(render(drawings.svg(icon))), "path": None}
            row = (image, label, SETS[drawings.name].maker, f"{drawings.name}:{icon}")
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    text = Value("string")
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES), "maker": text, "source": text})
    return Dataset.from_dict(columns, features=features)


def check_codes(sets: list[Drawings]) -> None:
    """Raise ValueError if two sets mean different emoji by one class's name."""
    for emoji in CLASSES:
        codes = {
            s.name: s.codes.get(s.find(emoji), "none").rstrip("\N{VARIATION SELECTOR-16}") for s in sets if s.codes
        }
        if len({*codes.values()}) != 1:
            raise ValueError(f"{emoji} is not one emoji: {codes}.")


CARD = """---
license: other
license_name: permissive-emoji-sets
license_link: LICENCES.tsv
task_categories:
- image-classification
pretty_name: Emoji by maker
size_categories:
- n<1K
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
# Emoji by maker: {classes} emoji drawn by {makers} makers

A small, real image data set in colour for continual learning over 10 tasks of 10, without a download: animals, plants,
food, vehicles, places and things. A class is one emoji, an image is one maker's drawing of it. Validation and test
show known things in styles never seen in training.

| split | images | images per class | makers | bytes |
|---|---|---|---|---|
{table}

Images are {size}×{size} PNG in colour, on white. Columns: `image`, `label` (ClassLabel with names), `maker`, `source`
("set:icon"). **No maker is in two splits**, so tune on validation, never on test.

| split | maker | sets |
|---|---|---|
{drawn}

```python
from datasets import load_dataset

emoji = load_dataset("recipes/emoji")  # splits train, validation, test
```
Classes: {names}.

## How it was made
[make_data.py](make_data.py) drew the npm packages `@iconify-json/SET`, in the versions of
[LICENCES.tsv](LICENCES.tsv), with PyPI `resvg-py` 0.5.0 and Pillow. The same packages and libraries give the same
bytes:
```bash
python recipes/emoji/make_data.py FOLDER  # holds the unpacked packages: FOLDER/noto, FOLDER/noto-v1 ...
```
A class is one emoji, found by its Unicode name. Three sets list code points, which the script compares; all drawings
were compared by eye. Of 211 animals, plants, foods, places and things that all eight sets have under one name, 100
were chosen. Left out were faces, people, hands, flags, signs, what some maker draws as something else, what looks like
another class (there is one moon, and no car from the front), and what the quickstart's backbones were pre-trained
on. Of several drawings of an emoji in one set, the first was taken.

There is one size: {size} pixels are 6 × 6 patches of DINOv2-small, and the image processors of smaller backbones
shrink the images (the quickstart's to 48). The drawings are transparent; the background is white, as for the icons.
Augmentation is the recipe's.

## Measured
On validation, seed 0; test has not been measured. A ridge head (λ = 100) and class means on frozen backbones:

| backbone | ridge | class means |
|---|---|---|
| DINOv2-small, 84 px | 65.5 % | 36.0 % |
| its first 8 layers, 56 px | 55.5 % | 40.0 % |
| the quickstart's teacher, 48 px | 30.5 % | 28.5 % |
| the quickstart's student, 48 px | 26.0 % | 22.0 % |

The command gives the first row. The second has the recipe's own student, the last two `recipes/emoji.yaml` with the
backbones in `recipes/quickstart` and `features: 2000` in the head.
```bash
hf-cdl train recipes/emoji_dinov2.yaml --teacher null --student.backbone backbones/dinov2-small-84 \\
  --student.prompt '{{type: none}}' --student.head '{{type: ridge, standardise: first_task, strength: 100.0}}' \\
  --distill '[]' --ce_weight 1.0 --data.eval_split validation --seed 0 --baselines '[nearest_class_mean]'
```
The recipes themselves, with `--data.eval_split validation --seed 0`: heads and prompts trained task by task are behind
heads that are fitted.

| recipe | teacher, CODA-Prompt | student, KDP | linear head | class means | ridge, recommended |
|---|---|---|---|---|---|
| [emoji.yaml](../emoji.yaml) | 13.5 % | 14.0 % | 13.0 % | 22.0 % | 31.0 % |
| [emoji_dinov2.yaml](../emoji_dinov2.yaml) | 30.0 % | 27.5 % | 12.0 % | 40.0 % | |

## Known flaws
- Fluent Emoji and Fluent Emoji Flat mostly have the same outline, with and without shading: a class has four training
  images, but hardly more than three drawings.
- Twemoji and FxEmojis, the two sets of test, are much alike in some classes (guitar, trumpet, slot-machine). They lie
  in one split, so training has no such relatives, but a class's two test images are not independent.
- An accuracy on the 200 images of validation or of test has a standard error of about 3 points, and covers two
  makers only.
- Some makers draw a whole animal and others its head (koala, mouse, penguin, tiger), and some frame a scene as a
  picture (fountain, roller-coaster). Only Streamline outlines everything in black. "bug" is the caterpillar that
  all of them draw.
- The quickstart's backbones were pre-trained on grey icons, some of them by these makers, so not all styles are new to
  them. No class has the name of one of their 493 concepts; some belong to one of them (birds were "bird", flowers
  "flower", and a drink is in a "glass"). {also} classes are also [icons100](../icons100/README.md)'s, half of which
  are the quickstart's: {also_names}.

## Licence and attribution
Every drawing belongs to its makers and has the licence of its set. [LICENCES.tsv](LICENCES.tsv) lists the version,
licence, maker, source and number of images of each set. CC BY 4.0 asks for attribution: keep that file with the
images. All drawings were changed in the same way: drawn at {size}×{size} pixels on white. The makers do not endorse
this data set or its use.

{attribution}

The package of FxEmojis states Apache-2.0, its makers' licence for the code; for the drawings they state CC BY 4.0.
"""


def table(splits: dict[str, Dataset], out: Path) -> str:
    """A line of the card's table for each split."""
    lines = []
    for split, rows in splits.items():
        count, makers = np.bincount(rows["label"], minlength=len(CLASSES)), len({*rows["maker"]})
        each = f"{count.min()}–{count.max()}" if count.min() < count.max() else str(count.min())
        size = (out / f"{split}.parquet").stat().st_size
        lines.append(f"| {split} | {len(rows):,} | {each} | {makers} | {size:,} |")
    return "\n".join(lines)


def write_card(splits: dict[str, Dataset], out: Path) -> None:
    drawn: dict[tuple[str, str], list[str]] = {}
    for known in SETS.values():
        drawn.setdefault((known.split, known.maker), []).append(known.title)
    schema = Features.from_arrow_schema(pq.read_schema(HERE.parent / "icons100" / "train.parquet"))
    also = sorted({*CLASSES} & {*schema["label"].names})
    credits = [
        f"- [{s.title}](https://github.com/{s.source}) by {s.maker}, [{s.licence}]({LICENCES[s.licence]})"
        for s in SETS.values()
    ]
    card = CARD.format(
        classes=len(CLASSES),
        makers=len(drawn),
        size=SIZE,
        table=table(splits, out),
        drawn="\n".join(f"| {split} | {maker} | {', '.join(titles)} |" for (split, maker), titles in drawn.items()),
        names=", ".join(CLASSES),
        also=len(also),
        also_names=", ".join(also),
        attribution="\n".join(credits),
    )
    (out / "README.md").write_text(card)


def write_licences(splits: dict[str, Dataset], out: Path) -> None:
    used = Counter(source.split(":")[0] for rows in splits.values() for source in rows["source"])
    lines = ["set\tname\tversion\tlicence\tlicence_url\tauthor\tsource\timages"]
    for name, s in SETS.items():
        source = f"https://github.com/{s.source}"
        row = (name, s.title, s.version, s.licence, LICENCES[s.licence], s.maker, source, str(used[name]))
        lines.append("\t".join(row))
    (out / "LICENCES.tsv").write_text("\n".join(lines) + "\n")


def make(folder: Path, out: Path = HERE) -> None:
    """Write all files of the data set. Raises ImportError without resvg-py, ValueError if the packages are others."""
    try:
        from resvg_py import svg_to_bytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("It needs resvg-py; install it: pip install resvg-py") from None
    sets = [Drawings(folder, name) for name in SETS]
    check_codes(sets)
    splits = {}
    for split in SPLITS:
        drawings = [found for found in sets if SETS[found.name].split == split]
        splits[split] = draw(drawings, lambda svg: bytes(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)))
        content = splits[split].with_format("arrow")[:]
        pq.write_table(content, out / f"{split}.parquet", compression="zstd", compression_level=19)
    write_licences(splits, out)
    write_card(splits, out)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
