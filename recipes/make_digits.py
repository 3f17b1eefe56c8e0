"""The handwritten digits that come with scikit-learn, as a folder that `data.path` reads: nothing is downloaded.

python recipes/make_digits.py data/digits
Its 1,797 grey images of 8x8 pixels show the 10 digits (classes zero .. nine). They are written dark on white, each of
the 17 levels of ink as its own grey. Of each digit a fifth goes to validation.parquet, a fifth to test.parquet and the
rest to train.parquet, drawn with a fixed seed. It needs scikit-learn.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from hf_cdl_command import stopping

if __name__ == "__main__":
    stopping.listen(resumes=False)  # before imports that take seconds

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL

from hf_cdl.escape import visible, visible_lines
from hf_cdl.runs.files import RunError, check_new, fill_folder

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SEED = 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    try:
        make(folder)
    except (ImportError, OSError, ValueError, RunError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2
    return 0


def make(folder: Path) -> None:
    """Write the three splits. Raises RunError if the folder cannot be written, ImportError without scikit-learn."""
    check_new(folder)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("It needs scikit-learn; install it: pip install scikit-learn") from None
    ink, labels = map(np.asarray, load_digits(return_X_y=True))  # 0 to 16 per pixel
    grey = np.round(255 * (1 - ink.reshape(-1, 8, 8) / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    splits = draw(labels)

    def write(path: Path) -> None:
        for split, rows in splits.items():
            columns = {"image": [{"bytes": png(grey[i]), "path": None} for i in rows], "label": labels[rows].tolist()}
            Dataset.from_dict(columns, features=features).to_parquet(str(path / f"{split}.parquet"))

    fill_folder(folder, write)
    for split, rows in splits.items():
        print(f"{visible(folder / split)}.parquet: {len(rows):,} images")


def draw(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Split -> its rows in ascending order: a fifth of each class, another fifth, and the rest."""
    drawn: dict[str, list[int]] = {"validation": [], "test": [], "train": []}
    for label in range(len(NAMES)):
        rows = np.random.default_rng([SEED, label]).permutation(np.flatnonzero(labels == label))
        fifth = round(len(rows) / 5)
        for split, part in zip(drawn, np.split(rows, [fifth, 2 * fifth]), strict=True):
            drawn[split].extend(part)
    return {split: np.sort(rows) for split, rows in drawn.items()}


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    PIL.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    stopping.end_with(lambda: main(sys.argv[1:]))
