"""Classify images with the .onnx file beside this script: python classify.py FILE.onnx IMAGE ... [--reject]

It needs onnxruntime and Pillow alone, and answers as transformers' pipeline("image-classification") does. With
--reject the first answer is `unknown` for an image that is probably of none of the classes, if the model can tell.
For an image that cannot be read the reason is printed instead, and the exit code is 1.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def decode(file: Any) -> Image.Image:
    """Read an image file as RGB, rotated by its orientation tag; of 16 bits the upper eight. Others are refused."""
    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.format == "EPS":  # Pillow would run Ghostscript on it
        raise ValueError("it is of the format EPS, a program that would be run; save it as PNG")
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    negative = deep and getattr(image, "tag_v2", {}).get(262) == 0  # a TIFF whose zero is white
    if (image.mode in ("I", "F") and not deep) or negative:
        raise ValueError(f"it has the colour mode {image.mode}; save it with 8 bits per channel")
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")


def fit(image: Image.Image, how: dict[str, Any]) -> np.ndarray:
    """The pixels (H, W, 3) that the model takes: the image resized and cropped as the file's metadata says."""
    short, (width, height) = how["shortest_edge"] or 0, image.size
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    image = image.resize(how["size"] or scaled, how["resample"])
    wide, high = how["crop"] or image.size
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return np.asarray(image.crop((left, top, left + wide, top + high)))


def main(*words: str) -> int:
    model, *files = [word for word in words if word != "--reject"] or [""]
    if not files or any(word.startswith("-") for word in (model, *files)):
        sys.exit(__doc__)
    import onnxruntime

    failed = 0
    session: Any = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    labels, how, unknown = (json.loads(about.get(name, "null")) for name in ("labels", "preprocessing", "unknown"))
    reject = "--reject" in words
    if reject and unknown is None:
        sys.exit(f"{model} cannot tell which images are of none of its classes; leave --reject out")
    for file in files:
        try:
            pixels = fit(decode(file), how)
        except Exception as error:  # Pillow raises all kinds of errors for damaged files
            print(json.dumps({"image": file, "error": str(error) or type(error).__name__}))
            failed = 1
            continue
        _, scores, *known = session.run(None, {"pixels": pixels[None]})
        best = np.argsort(-scores[0], kind="stable")[:5]
        answers = [{"label": labels[i], "score": float(scores[0, i])} for i in best]
        if reject and not known[0][0] >= unknown["threshold"]:  # also for NaN
            more_known = float(np.mean(np.array(unknown["quantiles"]) > known[0][0]))
            answers = [{"label": "unknown", "score": more_known}, *answers][:5]
        print(json.dumps({"image": file, "answers": answers}))
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
