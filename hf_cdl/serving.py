"""Image-classification pipeline that decodes images as in training (see hf_cdl.data.images).

Transformers' own pipeline clips 16-bit images at 255, so the model would see white where it was trained on a picture.
Models from outside hf_cdl keep transformers' own decoding.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import get_session
from PIL import Image
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_classification import ImageClassificationPipeline

from hf_cdl.data.images import MAX_PIXELS, ImageError, check_resized, decode, readable
from hf_cdl.types import is_ours
from hf_cdl.unknown import UNKNOWN, rejected, thresholds, unknown_score

TASK = "image-classification"


class CDLImageClassificationPipeline(ImageClassificationPipeline):
    """Transformers' pipeline, with images decoded as in training for models of type "cdl".

    `max_pixels`: the maximum size of such an image; set it on a pipeline to accept larger ones. `reject` (of the
    pipeline or a call; off by default): the first answer is `unknown` for an image that is less known than that share
    of images of known classes, see hf_cdl.unknown.thresholds; its score is the share that is more known.
    """

    max_pixels = MAX_PIXELS

    def _sanitize_parameters(self, reject: Any = None, **options: Any) -> Any:  # type: ignore[override]
        before, forward, after = super()._sanitize_parameters(**options)
        if reject is not None:
            if reject is not False:
                thresholds(self.model, reject)  # refused at once if it cannot be
            after["reject"] = reject
        return before, forward, after

    def postprocess(self, model_outputs: Any, reject: Any = False, **options: Any) -> Any:  # type: ignore[override]
        answers = super().postprocess(model_outputs, **options)
        if reject is False:
            return answers
        least = thresholds(self.model, reject)  # of the model as it is now: it may have learnt since
        if not rejected(least, model_outputs["known"], model_outputs["logits"]):
            return answers
        unknown = {"label": UNKNOWN, "score": unknown_score(self.model, float(model_outputs["known"]))}
        top_k = options.get("top_k", 5)
        return [unknown, *answers][:top_k]

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        if is_ours(self.model.config):
            name, image = image, load(image, timeout, self.max_pixels)
            if isinstance(image, Image.Image) or (isinstance(image, np.ndarray) and image.ndim == 3):
                try:
                    check_resized(_size(image), self.image_processor, self.max_pixels)
                except ImageError as error:
                    raise ImageError(f"{readable(name) if isinstance(name, str) else 'image'}: {error}") from None
        return super().preprocess(image, timeout)


def _size(image: Any) -> tuple[int, int]:
    """(width, height) of a PIL image, or of an array with channels last or first."""
    if not isinstance(image, np.ndarray):
        return image.size
    height, width, *_ = image.shape if image.shape[-1] in (1, 3, 4) else image.shape[1:]
    return width, height


def serve() -> None:
    """Make `pipeline("image-classification")` use this class, unless transformers' own was already replaced."""
    options = PIPELINE_REGISTRY.supported_tasks[TASK]
    own = options["impl"] in (ImageClassificationPipeline, _dotted(ImageClassificationPipeline))
    if own:  # register_pipeline would log the replacement
        PIPELINE_REGISTRY.supported_tasks[TASK] = {**options, "impl": CDLImageClassificationPipeline}


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def load(image: Any, timeout: float | None = None, max_pixels: int = MAX_PIXELS) -> Any:
    """Load anything the pipeline accepts as RGB: a path, a URL, base64 text or a PIL image.

    A single-channel array is decoded like a file with its values; uint8 arrays and tensors with three channels are
    passed to the image processor unchanged. Raises ImageError for what cannot be read.
    """
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8:
            kind = f"tensor of shape {tuple(image.shape)} and type {image.dtype}"
            raise ImageError(f"{kind}: scale its channels to 0 ... 255, as torch.uint8")
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        answer = get_session().get(image, timeout=timeout, follow_redirects=True)
        return decode(answer.content, image, max_pixels)
    if isinstance(image, str) and image.startswith("data:image/"):
        return decode(_bytes(image.partition(",")[2]), "data:image", max_pixels)
    if isinstance(image, str) and not os.path.exists(image):
        try:
            return decode(_bytes(image), "base64 text", max_pixels)
        except ImageError as error:
            raise ImageError(f"{readable(image)}: no such file, and no URL or base64 text of an image") from error
    return decode(image, None, max_pixels) if isinstance(image, str | os.PathLike | Image.Image) else image


def _from_array(array: np.ndarray, max_pixels: int) -> Any:
    name = f"array of shape {array.shape} and type {array.dtype}"
    if array.dtype.kind not in "biuf" or array.dtype == np.float16:
        raise ImageError(f"{name}: its numbers are of no image; scale them to 0 ... 255, as uint8")
    if array.ndim == 2:
        return decode(Image.fromarray(array), name, max_pixels)
    if array.dtype != np.uint8:
        raise ImageError(f"{name}: scale its channels to 0 ... 255, as uint8")
    if array.ndim == 3 and (array.shape[0] == 3) == (array.shape[2] == 3):
        what = "may have its channels first or last" if array.shape[0] == 3 else "must have three channels"
        raise ImageError(f"{name}: it {what}; give a PIL image, as Image.fromarray makes one")
    return array


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError:  # neither base64 nor an image
        return b""
