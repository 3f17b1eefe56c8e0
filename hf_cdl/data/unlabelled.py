"""Images without labels, on which a teacher teaches its student beside the images of a task, and foreign images.

They come from a folder, with all images in and below it, or from a table. Labels and the names of folders are never
read: the order of the images is that of their digests. Images that are also validation or test images of the stream
are left out; they are recognised by the bytes of their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature

from hf_cdl.counted import counted
from hf_cdl.data.cells import Cells, cells_of
from hf_cdl.data.files import parquet_tables, saved_tables
from hf_cdl.data.folders import all_images
from hf_cdl.data.images import ImageError, readable
from hf_cdl.data.labelled import cell_digest
from hf_cdl.data.loading import check_tables, load_splits
from hf_cdl.data.names import some
from hf_cdl.data.settings import StreamConfig
from hf_cdl.data.splits_and_columns import USUAL_SPLITS, image_columns, label_columns
from hf_cdl.data.task_split import TaskSplit
from hf_cdl.data.threads import in_threads
from hf_cdl.data.views import Preprocess
from hf_cdl.types import Task

_SPLITS = ("unlabelled", "unlabeled", "unsupervised", *USUAL_SPLITS["train"])
"""Splits whose images are read: the first that exists."""
_FOREIGN = ("foreign", *USUAL_SPLITS["test"], *USUAL_SPLITS["train"])
"""The same for foreign images, which are measured."""
_BESIDE = "unlabelled_"
"""Prefix of the pixel values, in a batch, of unlabelled images."""


@dataclass(frozen=True, eq=False)
class Unlabelled(TaskSplit):
    """Images without labels, in the order of their `digests`; their items have pixel values alone."""

    digests: np.ndarray = field(default_factory=lambda: np.empty(0, "U16"))

    def _sample(self, index: int) -> int:
        return index

    def _labelled(self, item: dict[str, Any], index: int) -> dict[str, Any]:
        return item

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the content of the images alone."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()[:16]


def add_unlabelled(
    tasks: Sequence[Task], config: StreamConfig, given: Dataset | None, views: Mapping[str, Preprocess]
) -> tuple[list[Task], list[str]]:
    """Add the unlabelled images of `config`, or `given` ones, to the tasks; also returns notes for the user.

    Raises ValueError if there are none, ImageError for images that cannot be read.
    """
    if config.unlabelled is not None and given is not None:
        raise ValueError("data.unlabelled would not be used beside `unlabelled`; leave out one of them.")
    if config.unlabelled is None and given is None:
        if config.unlabelled_split is not None or config.unlabelled_ratio != 1:
            raise ValueError("unlabelled_split and unlabelled_ratio are of data.unlabelled: give it or leave them out")
        return [*tasks], []
    if config.unlabelled is not None:
        table, notes = _read(config.unlabelled, config.unlabelled_split, "unlabelled", _SPLITS)
    else:
        table, notes = check_tables({"unlabelled": given}, None)["unlabelled"], []
    where, data = readable(config.unlabelled or "unlabelled"), _pictures(table, config)
    cells = cells_of(config.unlabelled, config.max_pixels)
    digests = _digests(data, cells, range(len(data)), "Reading unlabelled images")
    held_out = [_digests(*images, "Reading images of the evaluation") for images in _measured(tasks)]
    order = np.argsort(digests, kind="stable")
    kept = order[~np.isin(digests[order], np.concatenate(held_out))]
    if left_out := len(data) - len(kept):
        notes.append(f"left out of {where}, as the stream measures on the same: {counted(left_out, 'image')}")
    if not len(kept):
        raise ValueError(f"{where} (data.unlabelled) has no images to learn from. Put some there, or leave it out.")
    if labels := label_columns(table):
        notes.append(f"the labels of {where} (column {some(labels)}) are not read")
    found = _split("unlabelled", data, kept, views, cells, digests)
    # a task below 0: the views of these images are not those of a task's own
    beside = [replace(found, task=-1 - task.index) if len(task.train) else None for task in tasks]
    ratio = config.unlabelled_ratio
    return [replace(t, unlabelled=b, unlabelled_ratio=ratio) for t, b in zip(tasks, beside, strict=True)], notes


def foreign_images(config: StreamConfig, views: Mapping[str, Preprocess]) -> tuple[Unlabelled | None, list[str]]:
    """The images of no class that `config` names, and notes for the user. Raises ValueError if there are none."""
    if config.foreign is None:
        return None, []
    table, notes = _read(config.foreign, None, "foreign", _FOREIGN)
    data, cells = _pictures(table, config), cells_of(config.foreign, config.max_pixels)
    if not len(data):
        raise ValueError(f"{readable(config.foreign)} (data.foreign) has no images. Put some there, or leave it out.")
    rows = np.arange(len(data))
    return _split("foreign", data, rows, views, cells, _digests(data, cells, rows, "Reading foreign images")), notes


def _split(name: str, data: Dataset, rows: np.ndarray, views: Any, cells: Cells, digests: np.ndarray) -> Unlabelled:
    """The images of these rows, without labels; `digests`: of all rows."""
    return Unlabelled(data, name, 0, rows, np.empty(0, np.int64), views, cells, digests=digests[rows])


def _read(path: str, wanted: str | None, field: str, usual: Sequence[str]) -> tuple[Dataset, list[str]]:
    """The table of images that a field of `data` names, of the split `wanted` or a usual one, and notes."""
    found = load_splits(path, None, None, [], read=_read_folder, field=field)
    named = [name for word in usual for name in found if name.casefold() == word]
    name = wanted or next(iter(named or (found if len(found) == 1 else ())), None)
    if name is None or name not in found:
        way = f"data.{field}_split" if field == "unlabelled" else f"putting them alone into data.{field}"
        raise ValueError(
            f"The splits of {readable(path)} (data.{field}) are {some(found)}"
            + (". Name the one with the images" if wanted is None else f", and {wanted!r} is none of them. Name one")
            + f" by {way}."
        )
    others = [other for other in found if other != name]
    return found[name], [f"not read are the splits {some(others)} of the {field} images"] if others else []


def _read_folder(root: Path, named: Iterable[str], label_column: str | None) -> Mapping[str, Dataset]:
    """The tables of a folder, or one of all image files in and below it."""
    for place in (root, root / "data"):
        if place.is_dir() and (tables := saved_tables(place) or parquet_tables(place)):
            return tables
    return {"unlabelled": all_images(root)}


def _pictures(table: Dataset, config: StreamConfig) -> Dataset:
    """The images of a table alone, not decoded."""
    column = _image_column(table, config)
    return table.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))


def _image_column(table: Dataset, config: StreamConfig) -> str:
    columns = image_columns(table)
    chosen = [name for name in columns if name == config.image_column] or columns
    if len(chosen) != 1:
        raise ValueError(
            f"The unlabelled images could be in the columns {some(columns)} of {some(table.column_names)}; there must "
            "be one of type Image, or one called like data.image_column."
        )
    return chosen[0]


def _measured(tasks: Sequence[Task]) -> Iterator[tuple[Dataset, Cells, np.ndarray]]:
    """All validation and test images: whole tables, also what the stream leaves out of them, or held-out rows."""
    found: dict[int, list[tuple[TaskSplit, np.ndarray]]] = {}
    for task in tasks:
        for split in (task.validation, task.test):
            if isinstance(split, TaskSplit):
                held_out = isinstance(task.train, TaskSplit) and split.data is task.train.data
                rows = split.rows if held_out else np.arange(len(split.data))
                found.setdefault(id(split.data), []).append((split, rows))
    for parts in found.values():
        yield parts[0][0].data, parts[0][0].cells, np.unique(np.concatenate([rows for _, rows in parts]))


def _digests(data: Dataset, cells: Cells, rows: Sequence[int] | np.ndarray, title: str) -> np.ndarray:
    """The digest of the image in each row. Raises ImageError for files that cannot be read."""

    def digest(row: int) -> str:
        (cell,) = data[int(row)].values()
        try:
            return cell_digest(cells, cell)
        except ImageError as error:
            bad[row] = str(error)
            return ""

    bad: dict[int, str] = {}
    found = np.fromiter(in_threads(digest, rows, title), "U16", len(rows))
    if bad:
        raise ImageError(f"{counted(len(bad), 'image')} cannot be read: {some(bad[row] for row in sorted(bad))}")
    return found


class WithUnlabelled:
    """A task's training images, each with its unlabelled ones as seen by `roles`; keys as from a ViewSampler.

    The pixel values (R, 3, H, W) of the R images beside one are `unlabelled_pixel_values` (and, where another role's
    view differs, `unlabelled_ROLE_pixel_values`). What `unlabelled` gives besides pixel values is not read.
    """

    def __init__(self, images: Any, unlabelled: Any, *roles: str):
        self.images = images
        self.unlabelled = unlabelled.seen_by(*roles) if hasattr(unlabelled, "seen_by") else unlabelled

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        items = self.images.__getitems__([key for key, _ in keys])
        others = [key for _, beside in keys for key in beside]
        batched = getattr(self.unlabelled, "__getitems__", None)
        found = batched(others) if batched else [self.unlabelled[key] for key in others]
        ratio = len(others) // len(keys)
        for number, item in enumerate(items):
            own = found[number * ratio : (number + 1) * ratio]
            names = [name for name in own[0] if name.endswith("pixel_values")]
            item.pop("images", None)  # they do not identify the unlabelled images
            item |= {_BESIDE + name: torch.stack([torch.as_tensor(o[name]) for o in own]) for name in names}
        return items


def of_images(batch: Mapping[str, Any], name: str) -> list[torch.Tensor]:
    """Pixel values of a batch by their name, and those of the unlabelled images beside them."""
    return [batch[key] for key in (name, _BESIDE + name) if key in batch]


def join_unlabelled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with its unlabelled images, if there are any, behind the labelled ones; `labels` stay as they are."""
    own = {name: value for name, value in batch.items() if not name.startswith(_BESIDE)}
    beside = {name.removeprefix(_BESIDE): batch[name].flatten(0, 1) for name in batch if name.startswith(_BESIDE)}
    return {**own, **{name: torch.cat([own[name], value]) for name, value in beside.items()}}
