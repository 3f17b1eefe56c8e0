"""How an image processor resizes and crops, as steps that a device can do with Pillow, and how it scales colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from hf_cdl.data.views import normalisation, output_size
from hf_cdl.export.classify import fit

_EXACT, _ROUNDED = 1e-3, 2.0
"""Differences in grey levels: float32's own, and those of another library's rounding after resizing."""


def steps_of(processor: Any) -> dict[str, Any]:
    """Steps for classify.fit: `size` (width, height) or `shortest_edge`, `resample`, `crop` (width, height)."""
    height, width = output_size(processor)
    sides, crop = processor.size, bool(getattr(processor, "do_center_crop", False))
    steps: dict[str, Any] = {"size": None, "shortest_edge": None, "resample": int(processor.resample), "crop": None}
    if (percent := getattr(processor, "crop_pct", None)) is not None:  # ConvNeXt's
        short = sides["shortest_edge"]
        whole = {"size": [width, height]} if short >= 384 else {"shortest_edge": int(short / percent)}
        return {**steps, **whole, "crop": [width, height]}
    if sides.get("shortest_edge"):
        return {**steps, "shortest_edge": sides["shortest_edge"], "crop": [width, height]}
    return {**steps, "size": [sides["width"], sides["height"]], "crop": [width, height] if crop else None}


def check_steps(processor: Any, steps: dict[str, Any]) -> float:
    """Compare the steps with the processor on images of several shapes; returns the difference in grey levels.

    It is not 0 where transformers resizes with torchvision instead of Pillow. Raises ValueError for a processor that
    does anything else.
    """
    scale, shift = (value[:, None, None] for value in normalisation(processor))
    height, width = output_size(processor)
    worst = 0.0
    for number, size in enumerate(((2 * width + 3, height + 5), (width // 2 + 1, height + 40), (width, height))):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        made = processor(images=[image], return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
        ours = fit(image, steps).transpose(2, 0, 1) * scale + shift
        same = ours.shape == tuple(made.shape)
        worst = max(worst, float((abs(ours - made.double().numpy()) / abs(scale)).max()) if same else np.inf)
    if worst > _ROUNDED:
        raise ValueError(
            f"The image processor ({type(processor).__name__}) does more than resize, crop, rescale and normalise, so "
            "a file for a device would see other pixels than the model. Use a processor that does these alone, as "
            "ViTImageProcessor, in its preprocessor_config.json."
        )
    return worst if worst > _EXACT else 0.0


def resized(processor: Any, side: int) -> Any:
    """The same image processor for images of `side` pixels; it crops away the same share."""
    height, width = output_size(processor)
    fields = processor.to_dict()
    for name in ("size", "crop_size"):
        sides = {key: value for key, value in dict(fields.get(name) or {}).items() if value}
        if sides:
            fields[name] = {key: max(1, round(value * side / min(height, width))) for key, value in sides.items()}
    made = type(processor)(**{name: value for name, value in fields.items() if name != "image_processor_type"})
    if output_size(made) != (side, side):
        raise ValueError(
            f"The image processor makes images of {height}x{width} pixels, which are not square, so --size {side} "
            "gives no such size. Leave --size out."
        )
    return made
