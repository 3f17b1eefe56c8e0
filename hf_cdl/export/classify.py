"""What the .onnx file beside this script says of images: python classify.py FILE.onnx IMAGE ...

It needs onnxruntime and Pillow alone, and answers as transformers' pipeline("image-classification") does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def decode(file: Any) -> Image.Image:
    """An image file in RGB, turned as its camera was held; of 16 bits the upper eight. Others are refused."""
    image = Image.open(file)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    negative = deep and getattr(image, "tag_v2", {}).get(262) == 0  # a TIFF whose zero is white
    if (image.mode in ("I", "F") and not deep) or negative:
        sys.exit(f"{file} has the colour mode {image.mode}; save it with 8 bits per channel")
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")


def fit(image: Image.Image, how: dict[str, Any]) -> np.ndarray:
    """The pixels (H, W, 3) that the model takes: the image resized and cropped as the file's metadata says."""
    short, (width, height) = how["shortest_edge"], image.size
    size = how["size"] or (
        (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    )
    image = image.resize(tuple(size), how["resample"])
    wide, high = how["crop"] or image.size
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return np.asarray(image.crop((left, top, left + wide, top + high)))


def main(model: str, *files: str) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    labels, how = json.loads(about["labels"]), json.loads(about["preprocessing"])
    for file in files:
        (scores,) = session.run(["scores"], {"pixels": fit(decode(file), how)[None]})[0]
        best = [{"label": labels[i], "score": float(scores[i])} for i in np.argsort(-scores, kind="stable")[:5]]
        print(json.dumps({"image": file, "answers": best}))


if __name__ == "__main__":
    main(*sys.argv[1:])
