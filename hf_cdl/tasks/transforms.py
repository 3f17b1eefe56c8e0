"""From an image to pixel values: the augmented training view, the processor's evaluation view.

The training view is stateless: crop and flip are a pure function of (seed, task, sample, view), taken from the
counter-based generator Philox. So batches do not depend on workers, ranks or on where a run was resumed, teacher and
student see the same crop, and a view can be computed again at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor

from hf_cdl.images import ImageError as ImageError
from hf_cdl.images import decode as decode

_MASK = (1 << 64) - 1


def stateless_rng(seed: int, task: int, sample: int, view: int) -> np.random.Generator:
    """Generator of augmented view `view` of sample `sample` in task `task`: the same numbers whoever asks."""
    key = np.array([seed & _MASK, task & _MASK], dtype=np.uint64)
    counter = np.array([0, 0, sample & _MASK, view & _MASK], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """(height, width) that the image processor produces. Raises ValueError if it is not one fixed size."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or getattr(processor, "size", None) or {}
    height, width = size.get("height"), size.get("width")
    if crop is None and getattr(processor, "crop_pct", None) is not None:  # ConvNeXt's: a square, cropped or squeezed
        height = width = size.get("shortest_edge")
    if height is None or width is None:
        raise ValueError(
            f"The image processor's size is {dict(size)}, which does not give one fixed height and width. Set 'size' "
            'to {"height": H, "width": W}, or do_center_crop with a crop_size, in its preprocessor_config.json.'
        )
    return height, width


def check_processor(processor: Any) -> None:
    """Raise ValueError, naming the field, for an image processor of which no pixels for a model can come."""
    if min(output_size(processor)) < 1:
        raise ValueError(f"The image processor's size is {output_size(processor)}; set one of at least 1x1 pixels.")
    problems = []
    if processor.do_normalize:
        for name in ("image_mean", "image_std"):
            values = getattr(processor, name)
            numbers = [*values] if isinstance(values, list | tuple) else [values] * 3
            if len(numbers) != 3 or not all(map(_finite, numbers)) or (name == "image_std" and min(numbers) <= 0):
                rule = "3 numbers above 0" if name == "image_std" else "3 finite numbers"
                problems.append(f"{name} is {values}, but must be {rule}, one a channel")
    if processor.do_rescale and not (_finite(processor.rescale_factor) and processor.rescale_factor > 0):
        problems.append(f"rescale_factor is {processor.rescale_factor}, but must be a number above 0, like 1/255")
    if processor.resample not in [*Image.Resampling]:
        problems.append(f"resample is {processor.resample}, but must be one of {[int(r) for r in Image.Resampling]}")
    if problems:
        raise ValueError(
            f"The image processor's {'; its '.join(problems)}. Correct its preprocessor_config.json, or give another."
        )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_FIELDS = (
    "do_resize size resample crop_pct do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean "
    "image_std"
)


def same_view(first: BaseImageProcessor, second: BaseImageProcessor) -> bool:
    """Whether two image processors make the same pixel values of every image."""

    def fields(processor: BaseImageProcessor) -> list[Any]:
        values = [processor.to_dict().get(name) for name in _FIELDS.split()]
        return [tuple(value) if isinstance(value, list) else value for value in values]

    return type(first) is type(second) and fields(first) == fields(second)


def query_view(own: BaseImageProcessor, query: BaseImageProcessor) -> dict[str, list] | None:
    """How to make pixel values of `query`'s kind from `own`'s, as CDLConfig.query_view; None if they are the same."""
    if same_view(own, query):
        return None
    (a, b), (c, d) = _normalisation(own), _normalisation(query)
    return {"size": list(output_size(query)), "scale": (c / a).tolist(), "shift": (d - c / a * b).tolist()}


def _normalisation(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of each channel: a colour x of 0 .. 255 becomes a * x + b."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    return factor / np.broadcast_to(std, 3), -np.broadcast_to(mean, 3) / np.broadcast_to(std, 3)


@dataclass
class Preprocess:
    """Image -> pixel values, by an HF image processor; the training view adds RandomResizedCrop and a flip.

    `crop_scale`: range of the crop's area as a fraction of the image; `crop_ratio`: range of its aspect ratio
    (width / height); `flip`: probability of a horizontal flip. `crop_padding`: instead, a crop of the image's own size
    after that many black pixels were added on every side.
    """

    processor: Any  # a BaseImageProcessor, whose attributes and call differ from model to model
    seed: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    crop_padding: int | None = None

    def __post_init__(self) -> None:
        check_processor(self.processor)
        self.size = output_size(self.processor)

    def evaluation(self, images: list[Image.Image]) -> torch.Tensor:
        """(n, 3, H, W): exactly what the image-classification pipeline would feed the model."""
        return self.processor(images=images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    def training(self, images: list[Image.Image], keys: list[tuple[int, int, int]]) -> torch.Tensor:
        """(n, 3, H, W): the augmented views `keys` = (task, sample, view) of the images."""
        views = [self._augment(image, *key) for image, key in zip(images, keys, strict=True)]
        return self.processor(
            images=views, return_tensors="pt", input_data_format="channels_last", do_resize=False, do_center_crop=False
        )["pixel_values"]

    def _augment(self, image: Image.Image, task: int, sample: int, view: int) -> Image.Image:
        rng = stateless_rng(self.seed, task, sample, view)
        if self.crop_padding is None:
            box = crop_box(image.width, image.height, self.crop_scale, self.crop_ratio, rng)
        else:
            left, top = rng.integers(0, 2 * self.crop_padding + 1, 2).tolist()
            box = (left, top, left + image.width, top + image.height)
            image = ImageOps.expand(image, self.crop_padding)
        height, width = self.size
        image = image.resize((width, height), Image.Resampling(self.processor.resample), box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.flip else image


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a RandomResizedCrop in pixels; ten draws, then the largest central crop."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, height * ratio[1])
    h = min(height, width / ratio[0])
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
