"""Loading of tables and labels from a path: data, class names and the rows to use."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, load_dataset

from hf_cdl.counted import counted
from hf_cdl.data.benchmarks import BENCHMARKS
from hf_cdl.data.folders import read_folder
from hf_cdl.data.images import readable
from hf_cdl.data.names import nfc, some


class NoDataError(ValueError):
    """There is no data at `data.path`, or it cannot be reached."""


def load_splits(
    path: str | None,
    name: str | None,
    revision: str | None,
    named: Collection[str | None],
    label_column: str | None = None,
    read: Callable[..., Mapping[str, Dataset]] = read_folder,
    field: str = "path",
) -> Mapping[str, Dataset]:
    """Load split name -> data from a local folder (by `read`) or the Hub; `named`: further split names.

    `field`: the field of `data` that named the path, for messages. Raises ValueError if there is nothing to read, the
    layout is ambiguous, or the Hub cannot be reached.
    """
    if path is None:
        raise ValueError(f"data.{field} is missing; give a Hub id, a local folder or a benchmark: {some(BENCHMARKS)}.")
    root = Path(path).expanduser()
    if root.is_dir():
        if given := [what for what, value in (("name", name), ("revision", revision)) if value is not None]:
            raise ValueError(f"data.{given[0]} is of the Hub, but {readable(path)} is a local folder; leave it out.")
        return read(root, [split for split in named if split is not None], label_column)
    if root.exists():
        raise ValueError(f"data.{field} {readable(path)} is a file; name a folder (unpack archives), or a Hub id.")
    if root.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise NoDataError(
            f"The folder {readable(path)} does not exist (data.{field}); name one that does, or a Hub id."
        )
    try:
        found: Any = load_dataset(path, name, revision=revision)
        return {str(split): table for split, table in found.items()}
    except OSError as error:
        raise NoDataError(
            f"The data set {path!r} cannot be loaded: it is no local folder, no benchmark ({some(BENCHMARKS)}), and "
            f"the Hub answered: {error}. Without a network, use a local copy: where there is one, run `hf download "
            f"{path} --repo-type dataset --local-dir FOLDER`, copy FOLDER here and set data.{field} to it (and "
            "image_column, label_column and the splits as for the Hub)."
        ) from error


def check_tables(dataset: Any, test_fraction: float | None) -> Mapping[str, Dataset]:
    """Turn a given data set into split name -> data; a single Dataset is the split "train".

    Raises ValueError, naming the type, for anything but a Dataset or a dict of them.
    """
    needed = "a Dataset (with test_fraction) or a DatasetDict"
    if isinstance(dataset, Dataset):
        if test_fraction is None:
            raise ValueError("dataset is one Dataset, without test images. Set test_fraction, or give a DatasetDict.")
        dataset = {"train": dataset}
    tables = dataset if isinstance(dataset, Mapping) else {}
    wrong = {f"dataset[{split!r}]": table for split, table in tables.items() if not isinstance(table, Dataset)}
    if not tables or wrong:
        where, given = next(iter(wrong.items()), ("dataset", dataset))
        kind = f"{type(given).__module__.split('.')[0]}.{type(given).__name__}".removeprefix("builtins.")
        way = 'Make one by Dataset.from_dict({"image": images, "label": labels}).cast_column("image", Image())'
        if isinstance(given, datasets.IterableDataset | datasets.IterableDatasetDict):
            way = "Load it without streaming=True, or make one by Dataset.from_generator"
        empty = "empty and " if given is tables else ""
        raise ValueError(f"{where} is {empty}of the type {kind}, but must be {needed}. {way}.")
    if changed := [split for split, table in tables.items() if table.format["type"] == "custom"]:
        raise ValueError(
            f"dataset[{changed[0]!r}] has a transform (with_transform, set_transform), which would not be used: image "
            "processors and augmentation make the pixel values. Take it off by with_format(None), or change the "
            "images themselves by map."
        )
    return {str(split): table for split, table in tables.items()}


def read_labels(tables: Mapping[str, Dataset], column: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return (class names, role -> class index of each row); strings are sorted, plain numbers name themselves.

    Names that differ only in Unicode normalisation are the same. Raises ValueError for missing labels and names,
    numbers without a class, gaps, and splits that disagree about the classes.
    """
    kind, values, texts = tables["train"].features[column], dict[str, np.ndarray](), dict[str, Any]()
    kinds = {role: table.features[column] for role, table in tables.items()}
    for role, table in tables.items():
        cells = table.select_columns([column]).with_format("arrow")[:][column]
        if _kind(kinds[role]) != _kind(kind):
            shown = [f"{role}: {some(getattr(other, 'names', [other]))}" for role, other in kinds.items()]
            raise ValueError(
                f"The splits disagree about the classes ({'; '.join(shown)}). Give them the same ClassLabel."
            )
        if cells.null_count:
            raise ValueError(
                f"{counted(cells.null_count, 'label')} of the {role} split is missing (null). Remove such rows."
            )
        if any(fits(cells.type) for fits in _TEXTS):
            texts[role] = pc.utf8_normalize(cells.cast(pa.large_string()), "NFC")  # type: ignore[attr-defined]
        elif pa.types.is_integer(cells.type) and not any(cell.as_py() >= 2**63 for cell in cells.unique()):
            values[role] = cells.cast(pa.int64()).to_numpy()
        else:
            found = some(repr(cell.as_py()) for cell in cells[:3]) if len(cells) else "no rows"
            raise ValueError(
                f"Labels are of type {cells.type}; allowed: ClassLabel, whole numbers (below 2**63) and strings. The "
                f"column {column!r} of the {role} split has {found:.80}: make the labels texts, as "
                f"dataset.map(lambda row: {{{column!r}: str(row[{column!r}])}}), or name another label_column."
            )
    if texts:
        names = sorted({text for cells in texts.values() for text in cells.unique().to_pylist()})
        _check_names(names, column)
        order = pa.array(names, pa.large_string())
        return names, {role: pc.index_in(cells, order).to_numpy().astype(np.int64) for role, cells in texts.items()}  # type: ignore[attr-defined]
    present = np.unique(np.concatenate(list(values.values())))
    names = list(map(nfc, kind.names)) if isinstance(kind, ClassLabel) else [str(value) for value in present]
    _check_names(names, column)
    wrong = present[(present < 0) | (present >= len(names))]
    if len(wrong):
        raise ValueError(
            f"Labels must be 0 ... {len(names) - 1} for {counted(len(names), 'class')}, but there are {some(wrong)}. "
            "Renumber labels with gaps; -1 usually means unlabelled images: remove them or name another split."
        )
    return names, values


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def _kind(feature: Any) -> Any:
    """What must agree between splits: the class names, or whether labels are strings or integers."""
    if isinstance(feature, ClassLabel):
        return [*map(nfc, feature.names)]
    kind = str(getattr(feature, "dtype", feature))
    return "string" if "string" in kind else re.sub(r"^u?int\d+$", "int", kind)


def _check_names(names: list[str], column: str) -> None:
    if empty := [number for number, name in enumerate(names) if not name.strip()]:
        raise ValueError(
            f"The classes {some(empty)} of the column {column!r} have empty names. Name them, or remove the rows."
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"The column {column!r} has several classes called {some(twice)}. Rename or unite them.")


def draw_rows(
    names: list[str],
    labels: Mapping[str, np.ndarray],
    classes: Iterable[int],
    seed: int,
    test_fraction: float | None,
    limits: Mapping[str, int | None],
) -> dict[str, dict[int, np.ndarray]]:
    """Draw role -> class -> rows for the given classes; each draw depends only on the class's name and rows.

    `test_fraction` is held out from the training rows if there is no test role. `limits`: role -> rows kept per class;
    a smaller limit keeps a subset of what a larger one keeps.
    """

    def shuffled(rows: np.ndarray, purpose: str, c: int) -> np.ndarray:
        digest = hashlib.sha256(f"{seed}/{purpose}/{names[c]}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(rows)

    classes = list(classes)
    rows = {role: dict(zip(classes, _rows_of(values, classes), strict=True)) for role, values in labels.items()}
    if "test" not in rows:
        rows["test"] = {}
        for c, own in rows["train"].items():
            own = shuffled(own, "hold out", c)
            held = min(max(1, round(len(own) * (test_fraction or 0))), max(0, len(own) - 1))
            rows["test"][c], rows["train"][c] = np.sort(own[:held]), np.sort(own[held:])
    return {
        role: of_class
        if limits[role] is None
        else {c: shuffled(own, role, c)[: limits[role]] for c, own in of_class.items()}
        for role, of_class in rows.items()
    }


def _rows_of(values: np.ndarray, classes: list[int]) -> list[np.ndarray]:
    """The rows of each class, in ascending order."""
    order = np.argsort(values, kind="stable")
    first, last = (np.searchsorted(values[order], classes, side) for side in ("left", "right"))
    return [order[start:end] for start, end in zip(first, last, strict=True)]
