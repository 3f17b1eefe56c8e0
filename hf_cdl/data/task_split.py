"""One split of a task, with images as the models see them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from hf_cdl.data.cells import Cells
from hf_cdl.data.images import Decoded, ImageError, check_resized, readable
from hf_cdl.data.kept_images import KeptImages
from hf_cdl.data.names import check_role
from hf_cdl.data.views import Preprocess

CLIPPED = (
    "has 16 bits a channel, which the pipeline of a plain checkpoint (model: classifier) would clip at 255; save it "
    "with 8 bits"
)

_Image = Callable[[int], Image.Image]


class Finding(NamedTuple):
    """Why an image cannot be used (`problem`) or is blank (`flaw`)."""

    problem: str | None
    flaw: str | None = None


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """Rows of one split of the data: `split[i]` is the evaluation view, `split[(i, v)]` the augmented view v.

    An item is {"pixel_values": (3, H, W), "labels": class index in stream order}; `seen_by` chooses the role whose
    image processor makes the pixel values. `rows` are indices into the full split `name`, by which augmentation
    identifies samples; `labels` (N,) are those of the items. Raises ImageError for a bad image.
    """

    data: Dataset
    name: str
    task: int
    rows: np.ndarray
    labels: np.ndarray
    views: Mapping[str, Preprocess]
    cells: Cells = Cells()
    roles: tuple[str, ...] = ("student",)
    kept: KeptImages = field(default_factory=KeptImages, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def seen_by(self, *roles: str) -> TaskSplit:
        """Return the same images with `pixel_values` for the model of the first role.

        Each further role with a different view adds `ROLE_pixel_values`, with the same crop in augmented views. A role
        without a view uses the stream's first one. Raises ValueError for a misspelt role.
        """
        for role in roles:
            check_role(role)
        return replace(self, roles=roles)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Return a batch of evaluation or augmented views (not both), with one call per image processor."""
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        samples = [(self.task, self._sample(key[0]), key[1]) for key in keys if isinstance(key, tuple)]
        image = functools.cache(self.image)  # decoded at most once for all views
        items: list[dict[str, Any]] = [{} for _ in indices]
        for name, view in self._pixel_values().items():
            pixels = self._augmented(view, image, indices, samples) if samples else self._plain(view, image, indices)
            for item, p in zip(items, pixels, strict=True):
                item[name] = p
        return [self._labelled(item, i) for item, i in zip(items, indices, strict=True)]

    def _augmented(
        self, view: Preprocess, image: _Image, indices: Sequence[int], samples: Sequence[tuple[int, int, int]]
    ) -> Iterable[torch.Tensor]:
        images = []
        for index, sample in zip(indices, samples, strict=True):
            key = (view, int(self.rows[index]), sample)
            if (found := self.kept.made(key)) is None:
                found = view.augmented(image(index), *sample)
                self.kept.keep_made(key, found, 3 * found.width * found.height)
            images.append(found)
        return view.pixels(images)

    def _plain(self, view: Preprocess, image: _Image, indices: Sequence[int]) -> Iterable[torch.Tensor]:
        keys = [(view, int(self.rows[index]), None) for index in indices]
        found = [self.kept.made(key) for key in keys]
        if any(pixels is None for pixels in found):  # all of them, as a processor takes images together
            found = view.evaluation([image(index) for index in indices])
            for key, pixels in zip(keys, found, strict=True):
                self.kept.keep_made(key, pixels.clone(), pixels.nbytes)
        return [pixels.clone() for pixels in found]

    @property
    def identity(self) -> dict[str, tuple[int, int, int]]:
        """Identifies the pixel values of this split, by their name, among all that exist at the same time.

        Within it, an image is identified by its row, and by its view if it is augmented.
        """
        return {name: (id(self.data), id(view), self.task) for name, view in self._pixel_values().items()}

    def _sample(self, index: int) -> int:
        """What identifies a sample in augmentation."""
        return int(self.rows[index])

    def _labelled(self, item: dict[str, Any], index: int) -> dict[str, Any]:
        return {**item, "labels": int(self.labels[index])}

    def _pixel_values(self) -> dict[str, Preprocess]:
        """The view that makes each tensor of an item, without duplicates of the first."""
        if not self.views:
            raise ValueError(
                "This stream was made without image processors, so its images cannot be prepared for a model. Give "
                "TaskStream the image processor of each role."
            )
        first, *others = (self.views.get(role) or next(iter(self.views.values())) for role in self.roles)
        more = {f"{role}_pixel_values": view for role, view in zip(self.roles[1:], others, strict=True)}
        return {"pixel_values": first, **{name: view for name, view in more.items() if view is not first}}

    def image(self, index: int) -> Image.Image:
        """Return the decoded image in RGB."""
        return self.kept.find(int(self.rows[index]), lambda: self._decode(index).image)

    def _decode(self, index: int) -> Decoded:
        (cell,) = self.data[int(self.rows[index])].values()
        try:
            decoded = self.cells.decode(cell)
        except ImageError as error:
            raise ImageError(f"{self.row_named(self.rows[index])}: {error}") from error
        try:
            for view in {id(view): view for view in self.views.values()}.values():
                check_resized(decoded.image.size, view.processor, self.cells.max_pixels)
        except ImageError as error:
            raise ImageError(f"{self.place(index)}: {error}") from error
        return decoded

    def place(self, index: int) -> str:
        """Name an image's split, row and file for messages."""
        (cell,) = self.data[int(self.rows[index])].values()
        path = readable(cell["path"]) if cell and cell["path"] else "in the table"
        return f"{self.row_named(self.rows[index])}: {path}"

    def row_named(self, row: Any) -> str:
        """The start of messages that name an image by its row."""
        return f"split {self.name!r}, row {row}"

    def headers(self, plain: bool = False) -> Callable[[int], int]:
        """A function from an image's index to its number of pixels, by its header; -1 if only decoding tells."""
        table, views = self.data.with_format("arrow"), [*{id(view): view for view in self.views.values()}.values()]

        def pixels(index: int) -> int:
            row = int(self.rows[index])
            cells: Any = table[row : row + 1]  # a slice: no byte of an image is copied
            found = self.cells.header(cells.column(0)[0])
            if found is None or (plain and found.wide):
                return -1
            try:
                for view in views:
                    check_resized(found.size, view.processor, self.cells.max_pixels)
            except ImageError:
                return -1
            count = found.size[0] * found.size[1]
            return -1 if count > self.cells.max_pixels else count

        return pixels

    def check_8_bits(self) -> None:
        """Raise ImageError for the first 16-bit image, which transformers' own pipeline would clip.

        Reads only file headers.
        """
        for index in range(len(self)):
            (cell,) = self.data[int(self.rows[index])].values()
            if self.cells.holds_16_bits(cell):
                raise ImageError(f"{self.place(index)}: {CLIPPED}")

    def examine(self, index: int, plain: bool = False) -> Finding:
        """Find what is wrong with an image; `plain`: also for transformers' own pipeline, which clips 16 bits."""
        try:
            image, wide, deep = self._decode(index)
        except ImageError as error:
            return Finding(str(error))
        if wide and plain:
            return Finding(f"{self.place(index)}: {CLIPPED}")
        ranges = image.getextrema()
        if all(low == high for low, high in ranges):  # type: ignore[misc]
            return Finding(None, f"is of one colour, {image.getpixel((0, 0))}")
        if deep and max(high for _, high in ranges) < 16:  # type: ignore[misc]
            return Finding(None, "is almost black: its 16 bits hold values below 4096 (12-bit data?); multiply by 16")
        return Finding(None)
