"""From images to pixel values: the augmented training view and the processor's evaluation view.

The training view is stateless: crop and flip are a pure function of (seed, task, sample, view), drawn from the
counter-based generator Philox. So batches do not depend on workers, ranks or where a run was resumed, teacher and
student see the same crop, and a view can be recomputed at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor

from hf_cdl.data.images import ImageError as ImageError
from hf_cdl.data.images import decode as decode
from hf_cdl.data.images import readable

MOST_SIDE = 4096
"""Maximum side length in pixels in an image processor's sizes."""
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_NAMES = {"image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "auto_map"}
"""Fields that name a processor and do not affect pixels."""
_COLOUR = (200, 120, 40)
_MASK = (1 << 64) - 1


def stateless_rng(seed: int, task: int, sample: int, view: int) -> np.random.Generator:
    """Random generator for augmented view `view` of sample `sample` in task `task`, the same for every caller."""
    key = np.array([seed & _MASK, task & _MASK], dtype=np.uint64)
    counter = np.array([0, 0, sample & _MASK, view & _MASK], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Output (height, width) of an image processor. Raises ValueError if it has no single fixed size."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or getattr(processor, "size", None) or {}
    height, width = size.get("height"), size.get("width")
    if crop is None and getattr(processor, "crop_pct", None) is not None:  # ConvNeXt: a square, cropped or squeezed
        height = width = size.get("shortest_edge")
    if height is None or width is None:
        raise ValueError(
            f"The image processor's size is {dict(size)}, which does not give one fixed height and width. Set 'size' "
            'to {"height": H, "width": W}, or do_center_crop with a crop_size, in its preprocessor_config.json.'
        )
    return height, width


def check_processor(processor: Any) -> None:
    """Raise ValueError, naming the field, for an image processor that cannot produce valid pixels for a model.

    Checks the range of every number first, then runs the processor on a small image, so that fields unknown here can
    neither change the declared size nor fail later.
    """
    if not hasattr(processor, "to_dict"):
        raise ValueError(
            f"{readable(repr(processor), 60)} is not an image processor, so it has no size; give one of "
            "transformers, as AutoImageProcessor.from_pretrained loads it."
        )
    problems = [*_size_problems(processor)]
    if not problems:
        output_size(processor)
        problems = [*_colour_problems(processor)]
    if problems:
        raise ValueError(
            f"The image processor's {'; its '.join(problems)}. Correct its preprocessor_config.json, or give another."
        )
    _try(processor)


def _size_problems(processor: Any) -> Iterator[str]:
    """Yield settings that give no size, a huge one, or different sizes in training and inference."""
    if getattr(processor, "do_resize", True) is not True:
        yield f"do_resize is {processor.do_resize}, but must be true: training resizes every image"
    for name in ("do_rescale", "do_normalize", "do_center_crop", "do_pad"):
        if not isinstance(found := getattr(processor, name, None), bool | None):
            yield f"{name} is {found}, but must be true or false"
    for name in ("size", "crop_size", "pad_size"):
        sides = getattr(processor, name, None) or {}
        sides = {side: sides.get(side) for side in _SIDES} if hasattr(sides, "get") else {"all": sides}
        if wrong := [value for value in sides.values() if value is not None and not _is_side(value)]:
            yield f"{name} has a side of {readable(repr(wrong[0]), 60)}, but sides have 1 to {MOST_SIDE:,} pixels"
    pct = getattr(processor, "crop_pct", None)
    if pct is not None and not (_finite(pct) and 0.1 <= pct <= 1):
        yield f"crop_pct is {pct}, but must be a number from 0.1 to 1"
    for name, value in processor.to_dict().items():
        if isinstance(value, int) and not -MOST_SIDE <= value <= MOST_SIDE:
            yield f"{name} is {readable(str(value), 60)}, but must be at most {MOST_SIDE:,}"


def _colour_problems(processor: Any) -> Iterator[str]:
    if processor.do_normalize:
        for name in ("image_mean", "image_std"):
            values = getattr(processor, name)
            numbers = [*values] if isinstance(values, list | tuple) else [values] * 3
            if len(numbers) != 3 or not all(map(_finite, numbers)) or (name == "image_std" and min(numbers) <= 0):
                rule = "3 numbers above 0" if name == "image_std" else "3 finite numbers"
                yield f"{name} is {values}, but must be {rule}, one a channel"
    if processor.do_rescale and not (_finite(processor.rescale_factor) and processor.rescale_factor > 0):
        yield f"rescale_factor is {processor.rescale_factor}, but must be a number above 0, like 1/255"
    if processor.resample not in [*Image.Resampling]:
        yield f"resample is {processor.resample}, but must be one of {[int(r) for r in Image.Resampling]}"


def _try(processor: Any) -> None:
    """Raise ValueError unless it gives finite pixels of its declared size, both in inference and in training."""
    height, width = output_size(processor)
    for image, how in ((_flat(24, 16), {}), (_flat(width, height), {"do_resize": False, "do_center_crop": False})):
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are reported below
                made = processor(images=[image], return_tensors="pt", **how)["pixel_values"]
            shape, finite = tuple(made.shape), bool(torch.isfinite(made).all())
        except Exception as error:  # from fields that its code relies on
            reason = f"{type(error).__name__}: {readable(' '.join(str(error).split()), 150)}"
            raise ValueError(
                f"The image processor fails on an image ({reason}). Correct its preprocessor_config.json, or give "
                "another."
            ) from error
        if shape != (1, 3, height, width) or not finite:
            raise ValueError(
                f"The image processor makes {'' if finite else 'infinite '}pixels of shape {shape[1:]} of an image; "
                f"by its size they must be finite, of shape {(3, height, width)}. Correct its "
                "preprocessor_config.json (size, crop_size, do_pad, data_format, image_std), or give another."
            )


def _flat(width: int, height: int) -> Image.Image:
    """A single-colour image with different channel values."""
    return Image.new("RGB", (width, height), _COLOUR)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_SIDE


def _finite(value: Any) -> bool:
    """Whether the value is a finite number in float32, the dtype of pixels."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


def same_view(first: BaseImageProcessor, second: BaseImageProcessor) -> bool:
    """Whether two image processors give the same pixel values for every image, judging by their fields."""

    def fields(processor: BaseImageProcessor) -> dict[str, Any]:
        values = {name: value for name, value in processor.to_dict().items() if name not in _NAMES}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    return type(first) is type(second) and fields(first) == fields(second)


def query_view(own: BaseImageProcessor, query: BaseImageProcessor) -> dict[str, list] | None:
    """How to convert `own`'s pixel values to `query`'s, as CDLConfig.query_view; None if they are the same.

    Raises ValueError if they differ in more than scaling and shifting each channel, such as by swapping channels.
    """
    if same_view(own, query):
        return None
    (a, b), (c, d) = normalisation(own), normalisation(query)
    scale, shift = c / a, d - c / a * b
    for colour in (_COLOUR, _COLOUR[::-1]):
        mine, asked = (_pixel(processor, colour) for processor in (own, query))
        if not np.allclose(mine * scale + shift, asked, rtol=1e-3, atol=1e-3):
            raise ValueError(
                "What the student's image processor makes of colours does not follow from the teacher's, so the "
                "teacher cannot ask the student's backbone (query: student). Set teacher.query to self, or give "
                "processors that differ in size, rescale_factor, image_mean and image_std alone."
            )
    return {"size": list(output_size(query)), "scale": scale.tolist(), "shift": shift.tolist()}


def _pixel(processor: Any, colour: tuple[int, ...]) -> np.ndarray:
    """Pixel values (3,) that a processor gives for a colour."""
    image = Image.new("RGB", (24, 16), colour)
    made = processor(images=[image], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return made[0, :, made.shape[2] // 2, made.shape[3] // 2].double().numpy()


def normalisation(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) per channel: a colour value x in 0 .. 255 becomes a * x + b."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    return factor / np.broadcast_to(std, 3), -np.broadcast_to(mean, 3) / np.broadcast_to(std, 3)


@dataclass(eq=False)  # compared by identity: what it makes of an image is cached under it
class Preprocess:
    """Image -> pixel values with an HF image processor; the training view adds RandomResizedCrop and a flip.

    `crop_scale`: range of the crop's area as a fraction of the image; `crop_ratio`: range of its aspect ratio
    (width / height); `flip`: probability of a horizontal flip. `crop_padding`: instead, a crop of the image's own size
    after padding every side with that many black pixels.
    """

    processor: Any  # a BaseImageProcessor, whose attributes and call differ between models
    seed: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    crop_padding: int | None = None

    def __post_init__(self) -> None:
        check_processor(self.processor)
        self.size = output_size(self.processor)
        self._levels = _levels(self.processor, self.size)

    def evaluation(self, images: list[Image.Image]) -> torch.Tensor:
        """Return (n, 3, H, W), exactly what the image-classification pipeline would feed the model."""
        return self.processor(images=images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    def training(self, images: list[Image.Image], keys: list[tuple[int, int, int]]) -> torch.Tensor:
        """Return (n, 3, H, W), the augmented views `keys` = (task, sample, view) of the images."""
        return self.pixels([self.augmented(image, *key) for image, key in zip(images, keys, strict=True)])

    def pixels(self, views: list[Image.Image]) -> torch.Tensor:
        """Return (n, 3, H, W), the pixel values of augmented views."""
        return _scaled(self.processor, views) if self._levels is None else _looked_up(self._levels, views)

    def augmented(self, image: Image.Image, task: int, sample: int, view: int) -> Image.Image:
        """The augmented view of an image, before its levels become pixel values."""
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


def _scaled(processor: Any, images: list[Image.Image]) -> torch.Tensor:
    """What an image processor makes of images that have its size already: (n, 3, H, W)."""
    how = {"input_data_format": "channels_last", "do_resize": False, "do_center_crop": False}
    return processor(images=images, return_tensors="pt", **how)["pixel_values"]


def _levels(processor: Any, size: tuple[int, int]) -> torch.Tensor | None:
    """What an image processor makes of the levels 0 .. 255 of each channel: (3, 256).

    Looking a level up takes a fraction of the time of computing it, and gives the same number. None for a processor
    that does more with a pixel than scale it by itself.
    """
    ramp, draw = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2), np.random.default_rng(0)
    ranges = ((0, 256), (60, 90), (7, 8))  # a processor may depend on an image's own range
    images = [Image.fromarray(draw.integers(*levels, (*size, 3), dtype=np.uint8)) for levels in ranges]
    made = _scaled(processor, [Image.fromarray(ramp)])
    if made.shape != (1, 3, 16, 16):
        return None
    levels = made.reshape(3, 256)
    same = (
        torch.equal(_looked_up(levels, some), _scaled(processor, some))
        for some in (images, *([image] for image in images))
    )
    return levels if all(same) else None


def _looked_up(levels: torch.Tensor, images: list[Image.Image]) -> torch.Tensor:
    """Pixel values (n, 3, H, W) of RGB images, by those of every level."""
    table = levels.numpy()
    made = np.empty((len(images), 3, images[0].height, images[0].width), dtype=table.dtype)
    for image, pixels in zip(images, made, strict=True):  # one by one: they stay in the processor's cache
        colours = np.asarray(image)
        for channel in range(3):
            np.take(table[channel], colours[..., channel], out=pixels[channel], mode="wrap")  # "raise" would buffer
    return torch.from_numpy(made)


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw a RandomResizedCrop box (left, top, right, bottom) in pixels; after ten tries, the largest central crop."""
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
