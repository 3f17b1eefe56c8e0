"""Compare an exported file with its model: logits, answers, accuracy, latency."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from hf_cdl.counted import counted
from hf_cdl.export.classify import fit
from hf_cdl.export.graph import quietly, unknown_of

_BATCH = 16
_WARM_UP, _LEAST, _MOST, _SECONDS = 3, 10, 50, 10.0
"""Of a latency: warm-up passes, least and most timed passes, and seconds after which the least are enough."""


class Model(NamedTuple):
    """A trained model and its image processor."""

    model: Any
    processor: Any

    def outputs(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """Logits (N, C) of RGB images as the pipeline computes them and, if the model has it, `known` (N,)."""
        made = self.processor(images=[*images], return_tensors="pt", input_data_format="channels_last")
        with torch.inference_mode():
            found = self.model(pixel_values=made["pixel_values"])
        known = getattr(found, "known", None)
        return [value.float().numpy() for value in (found.logits, known) if value is not None]


@dataclass(frozen=True)
class Compared:
    """How an exported file's answers compare with the model's. Shares are in percent.

    `difference`: largest difference of a logit, as a share of the largest logit; `known_difference`: the same for
    `known`. `same`: share of images with the same answer; `same_unknown`: share that both call unknown, or neither.
    `accuracy`, `accuracy_before`: None without labels.
    """

    images: int
    difference: float
    same: float
    accuracy: float | None
    accuracy_before: float | None
    known_difference: float = 0.0
    same_unknown: float | None = None


def opened(file: Path, threads: int | None = None) -> Any:
    """An onnxruntime session of a file on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    with quietly():
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def compare(
    session: Any,
    own: Model,
    before: Model,
    steps: dict[str, Any],
    images: Callable[[int], Image.Image],
    labels: np.ndarray,
) -> Compared:
    """Compare a session with the model of its own size, and with the one before any change of size.

    `images(i)` is image i in RGB, `labels` (N,) the index of its class, -1 if it is not known. The session gets one
    image at a time, as from the script: 8-bit activations are scaled by the largest one in a batch.
    """
    ours, theirs, answers = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for start in range(0, len(labels), _BATCH):
        batch = [images(i) for i in range(start, min(start + _BATCH, len(labels)))]
        one_by_one = [session.run(None, {"pixels": fit(image, steps)[None]}) for image in batch]
        logits, _, *known = map(np.concatenate, zip(*one_by_one, strict=True))
        expected = own.outputs(batch)
        ours.append(np.column_stack([logits, *known]))
        theirs.append(np.column_stack(expected))
        answers.append(np.column_stack(expected if before is own else before.outputs(batch)))
    found, expected, said = map(np.concatenate, (ours, theirs, answers))
    classes, told = own.model.config.num_labels, labels >= 0
    chosen, first = found[:, :classes].argmax(axis=1), said[:, :classes].argmax(axis=1)
    return Compared(
        images=len(labels),
        difference=_difference(found[:, :classes], expected[:, :classes]),
        same=_percent(chosen == first),
        accuracy=_percent((chosen == labels)[told]) if told.any() else None,
        accuracy_before=_percent((first == labels)[told]) if told.any() else None,
        **_compare_known(own.model, *(values[:, classes:] for values in (found, expected, said))),
    )


def _compare_known(model: Any, found: np.ndarray, expected: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Compare `known` (N, 1), or nothing for a model without it (N, 0)."""
    if not (about := unknown_of(model)) or not found.size:
        return {}
    threshold = about["unknown"]["threshold"]
    same = _percent((found < threshold) == (before < threshold))
    return {"known_difference": _difference(found, expected), "same_unknown": same}


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(abs(found - expected).max() / max(abs(expected).max(), 1e-12))


def _percent(right: np.ndarray) -> float:
    return 100 * float(right.mean())


def latencies(session: Any, own: Model, size: tuple[int, int]) -> tuple[float, float]:
    """Least time in milliseconds that the file and the model take for one image of `size`, measured in turn."""
    pixels = np.zeros((1, *size, 3), dtype=np.uint8)
    image = torch.zeros(1, 3, *size)

    def of_model() -> Any:
        with torch.inference_mode():
            return own.model(pixel_values=image).logits.argmax().item()

    acts: list[Callable[[], Any]] = [lambda: session.run(["logits"], {"pixels": pixels}), of_model]
    best, begun = [np.inf, np.inf], time.monotonic()
    for number in range(_WARM_UP + _MOST):
        for index, act in enumerate(acts):
            start = time.perf_counter()
            act()
            seconds = time.perf_counter() - start
            best[index] = min(best[index], seconds) if number >= _WARM_UP else np.inf
        if number >= _WARM_UP + _LEAST and time.monotonic() - begun > _SECONDS:
            break
    return 1000 * best[0], 1000 * best[1]


def machine() -> str:
    """The machine that latencies were measured on."""
    threads = torch.get_num_threads()
    return f"cpu, {platform.machine()}, {counted(threads, 'thread')}"
