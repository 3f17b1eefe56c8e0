"""Answers for many images: decoded by worker processes while the model computes, in constant memory, in order.

Images are decoded as in training, so answers are those of the pipeline (hf_cdl/serving.py). An image that cannot be
read is part of the answer, with the reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from hf_cdl.data.images import Decoded, ImageError, check_resized, readable
from hf_cdl.data.task_split import CLIPPED
from hf_cdl.escape import visible
from hf_cdl.runs.files import RunError
from hf_cdl.unknown import UNKNOWN, rejected, thresholds, unknown_score

_MOST_WORKERS = 16


class Batch(NamedTuple):
    """A model's outputs for one batch: `logits` (B, C) in float32 of the images `indices`, and why others have none.

    `known` (B,): how known the images are, for a model that scores this. `features` (B, D) and `usage` (B, M), how
    much each prompt is used over the layers that choose prompts, are those of our own models.
    """

    indices: list[int]
    logits: torch.Tensor
    known: torch.Tensor | None
    unreadable: dict[int, str]
    features: torch.Tensor | None = None
    usage: torch.Tensor | None = None


class Answer(NamedTuple):
    """The answer for an image: class names and scores, the most likely class first.

    `confidence`: the probability of the most likely class. `unknown`: the image is rejected, so that `unknown` is the
    first answer.
    """

    answers: list[tuple[str, float]]
    confidence: float
    unknown: bool = False


@dataclass(frozen=True)
class Images(Dataset[Any]):
    """Images prepared for a model: `images[[3, 4]]` gives index, pixel values (3, H, W) and problem of each.

    `decode(index)` returns an image, or raises ImageError; `name(index)` is for messages. `plain`: the model is served
    by transformers' own pipeline, which would clip 16 bits.
    """

    decode: Callable[[int], Decoded]
    name: Callable[[int], str]
    count: int
    processor: Any
    plain: bool

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str | None]:
        try:
            image, wide, _ = self.decode(index)
        except ImageError as error:
            return index, None, str(error)
        try:
            check_resized(image.size, self.processor)
            if wide and self.plain:
                raise ImageError(CLIPPED)
        except ImageError as error:
            return index, None, f"{readable(self.name(index))}: {error}"
        return index, self.processor(images=[image], return_tensors="pt")["pixel_values"][0], None


def outputs(
    model: Any, images: Images, batch_size: int = 32, workers: int | None = None, bar: Any = None
) -> Iterator[Batch]:
    """Yield the model's outputs for all images, in order. `bar.update(n)` is told how many are done.

    `workers`: processes that decode images; 0: this process does; None: as many as help on this machine. Raises
    ValueError for a model whose outputs are not classes.
    """
    if getattr(model.config, "problem_type", None) == "regression":
        raise ValueError(
            "The model's config.json says problem_type: regression, so it answers with numbers, not with classes. "
            "Give a classifier; transformers' pipeline shows such numbers."
        )
    device: Any = PartialState().device
    model.to(device)
    workers = useful_workers(math.ceil(len(images) / batch_size)) if workers is None else workers
    loader = DataLoader(
        images, batch_size, num_workers=workers, collate_fn=_gathered, pin_memory=device.type == "cuda"
    )
    for indices, pixels, unreadable in _explained(loader):
        if pixels is not None:
            with torch.inference_mode():
                found = model(pixel_values=pixels.to(device, model.dtype, non_blocking=True))
                usage = _usage(model, getattr(found, "query", None))
            logits = found.logits.float().cpu()
            more = (getattr(found, "known", None), getattr(found, "features", None), usage)
            known, features, usage = (None if one is None else one.float().cpu() for one in more)
            yield Batch(indices, logits, known, unreadable, features, usage)
        else:
            yield Batch(indices, torch.empty(0), None, unreadable)
        if bar is not None:
            bar.update(len(indices) + len(unreadable))


def _usage(model: Any, query: torch.Tensor | None) -> torch.Tensor | None:
    """How much each prompt of a pool is used (B, M) for these queries, over its layers; None without such a pool."""
    pool: Any = getattr(model, "pool", None)
    if pool is None or query is None:
        return None
    found = [used for layer in pool.layers if (used := pool.usage(layer, query)) is not None]
    return torch.stack(found).mean(dim=0) if found else None


def _explained(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader. Raises RunError if a process that reads images has died."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"A process that reads images was ended ({visible(str(error).splitlines()[0])[:200]}): the machine has "
            "too little memory, or too little shared memory (/dev/shm). Use --workers 0, or a smaller --batch-size."
        ) from error


def answers(
    batch: Batch, model: Any, names: list[str], top: int, limits: torch.Tensor | None = None
) -> Iterator[tuple[int, Answer | str]]:
    """Index and answer of each image of a batch, or why it has none, in order; `top` answers of each.

    `limits` (C,): those of hf_cdl.unknown.thresholds. An image that is less known is rejected, as in the pipeline.
    """
    found: dict[int, Answer | str] = dict(batch.unreadable)
    if batch.indices:
        best = scores(batch.logits, model.config).sort(dim=-1, descending=True, stable=True)
        rows = zip(best.values[:, :top].tolist(), best.indices[:, :top].tolist(), strict=True)
        unknown = unknown_scores(batch, model, limits)
        for index, score, (values, classes) in zip(batch.indices, unknown, rows, strict=True):
            said = [(names[number], value) for number, value in zip(classes, values, strict=True)]
            said = said if score is None else [(UNKNOWN, score), *said][:top]
            found[index] = Answer(said, values[0], score is not None)
    yield from sorted(found.items())


def unknown_scores(batch: Batch, model: Any, limits: torch.Tensor | None) -> list[float | None]:
    """The score of the answer `unknown` for each image of a batch that is rejected; None for the others."""
    if limits is None or batch.known is None:
        return [None] * len(batch.indices)
    told = zip(rejected(limits, batch.known, batch.logits).tolist(), batch.known.tolist(), strict=True)
    return [unknown_score(model, known) if less else None for less, known in told]


def share_kept(model: Any, given: float | bool) -> float:
    """The share of images of known classes that keep their answer: as given, or True: as the head's config says.

    Raises ValueError for a model that cannot tell unknown images.
    """
    thresholds(model, given)
    return model.head.config.known if given is True else given


def useful_workers(batches: int) -> int:
    """Number of decoding processes: one per core, but fewer than there are batches."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if batches < 2 else min(cores, _MOST_WORKERS, batches - 1)


def scores(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Probabilities (B, C) of logits (B, C), as the pipeline computes them for a model of this config."""
    one = config.num_labels == 1 or getattr(config, "problem_type", None) == "multi_label_classification"
    return logits.sigmoid() if one else logits.softmax(dim=-1)


def _gathered(
    items: Sequence[tuple[int, torch.Tensor | None, str | None]],
) -> tuple[list[int], torch.Tensor | None, dict[int, str]]:
    good = {index: pixels for index, pixels, _ in items if pixels is not None}
    unreadable = {index: str(problem) for index, pixels, problem in items if pixels is None}
    return [*good], torch.stack([*good.values()]) if good else None, unreadable
