"""Images of none of the icons' or the digits' classes, as a folder that `data.foreign` reads: nothing is downloaded.

python recipes/make_foreign.py data/foreign [--beside digits]
A hundred images of each kind, drawn with a fixed seed: uniform noise, Gaussian noise, stripes of two colours, crops of
the two photographs that come with scikit-learn, and scikit-learn's handwritten digits or, beside the digits, the
quickstart's test icons. One table, foreign.parquet, with the columns image and kind. It needs scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from hf_cdl_command import stopping

if __name__ == "__main__":
    stopping.listen(resumes=False)  # before imports that take seconds

import numpy as np
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PIL

from hf_cdl.escape import visible_lines
from hf_cdl.runs.files import RunError, check_new, fill_folder

EACH, SIZE, SEED = 100, 96, 0
ICONS = Path(__file__).parent / "quickstart" / "icons" / "test.parquet"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--beside", choices=("icons", "digits"), default="icons", help="what the classes are")
    given = parser.parse_args(arguments)
    try:
        make(given.folder, given.beside)
    except (ImportError, OSError, ValueError, RunError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2
    return 0


def make(folder: Path, beside: str) -> None:
    """Write the table. Raises RunError if the folder cannot be written, ImportError without scikit-learn."""
    check_new(folder)
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError:
        raise ImportError("It needs scikit-learn; install it: pip install scikit-learn") from None
    random = np.random.default_rng(SEED)
    found = {
        "uniform noise": (random.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(EACH)),
        "Gaussian noise": (
            np.clip(random.normal(128, 64, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8) for _ in range(EACH)
        ),
        "stripes": (stripes(random) for _ in range(EACH)),
        "photographs": crops(load_sample_images().images, random),
    }
    if beside == "icons":
        ink = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)
        chosen = random.choice(len(ink), EACH, replace=False)
        found["digits"] = (np.round(255 * (1 - ink[i] / 16)).astype(np.uint8) for i in chosen)
    else:
        icons = load_dataset("parquet", data_files=str(ICONS), split="train")
        chosen = random.choice(len(icons), EACH, replace=False)
        found["icons"] = (np.asarray(icons[int(i)]["image"].convert("RGB")) for i in chosen)
    pairs = [(PIL.fromarray(image), kind) for kind, images in found.items() for image in images]
    columns = {"image": [image for image, _ in pairs], "kind": [kind for _, kind in pairs]}
    table = Dataset.from_dict(columns, features=Features({"image": Image(), "kind": Value("string")}))
    fill_folder(folder, lambda path: table.to_parquet(str(path / "foreign.parquet")))
    print(f"{len(table)} images of {', '.join(found)} in {folder}/: --data.foreign {folder}")


def stripes(random: np.random.Generator) -> np.ndarray:
    """Waves of two colours in any direction."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle, waves = random.uniform(0, 2 * np.pi), random.uniform(2, 20)
    share = 0.5 + 0.5 * np.sin(2 * np.pi * waves * (columns * np.cos(angle) + rows * np.sin(angle)))
    one, other = random.uniform(0, 255, (2, 3))
    return (share[..., None] * one + (1 - share[..., None]) * other).astype(np.uint8)


def crops(photographs: list[np.ndarray], random: np.random.Generator) -> Iterator[np.ndarray]:
    """Square crops of a third to all of a photograph's height."""
    for number in range(EACH):
        image = photographs[number % len(photographs)]
        height, width, _ = image.shape
        side = int(random.integers(height // 3, height + 1))
        top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
        cut = PIL.fromarray(image[top : top + side, left : left + side])
        yield np.asarray(cut.resize((SIZE, SIZE), PIL.Resampling.BICUBIC))


if __name__ == "__main__":
    stopping.end_with(lambda: main(sys.argv[1:]))
