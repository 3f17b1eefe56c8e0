"""Outputs of frozen weights: computed once and kept in memory by batch, with `cache` also in a folder.

The roles of a run train on the same views of a task's images in the same batches; after every task evaluation reads
the same images again; with `data.views` whole batches recur, as they do in another run on the same stream. No training
changes the weights behind a query or a teacher's output. Only whole batches are reused: beside other images the last
bits of an output could differ.

In memory an image is identified by its place in the data; in a folder, which other runs read, by its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import default_data_collator

from hf_cdl.data.task_split import TaskSplit
from hf_cdl.data.unlabelled import of_images
from hf_cdl.training.compiling import are_compiled, is_compiled
from hf_cdl.training.kept.files import KeptFiles
from hf_cdl.training.kept.weights import content_of, digest_of, equal, query_backbone_of, settings_of, state_of
from hf_cdl.training.sharding import everywhere, is_sharded
from hf_cdl.types import CDLOutput, Task

MOST = 2**30
"""Bytes that are kept in memory; what is beyond them is read from the folder, or computed again."""

_OF: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()

Query = Callable[[torch.Tensor, Any], torch.Tensor]
"""(pixel values (B, 3, H, W), what identifies the images) -> query (B, D_q), without gradient."""
Recall = Callable[[torch.Tensor, Any, Any, Callable[[], CDLOutput]], CDLOutput]
"""(pixel values, what identifies the images, further arguments, compute) -> the output, known or computed."""


@dataclass(frozen=True)
class BatchKey:  # no tuple: Trainer makes those anew when it moves a batch to its device
    """Identifies the images of a batch; `trained`: whether they are augmented views, which no other task has."""

    trained: bool
    key: Any


class _Source(NamedTuple):
    """The weights that an output comes from: their number in this process, and a digest that other runs share.

    Of `shared` weights every process holds a part, so that all of them compute an output, or none.
    """

    number: int
    digest: str | None
    shared: bool


class Kept:
    """What the trainers of a run keep together."""

    def __init__(self) -> None:
        self._weights: list[tuple[ReferenceType[nn.Module], tuple[Any, ...], bool]] = []
        self._digests: dict[tuple[int, str], str | None] = {}
        self._asking: set[int] = set()
        self._views: dict[Any, _Entry] = {}
        self._images: dict[Any, _Entry] = {}
        self._held: list[Any] = []
        self._task: Task | None = None
        self.held = self.found = 0
        """Bytes of outputs: held in memory now, and found there so far."""
        self.files: KeptFiles | None = None

    def begin(self, task: Task) -> None:
        """Begin to learn a task: forget the training views of others."""
        if self._task is not task:
            self.held -= sum(entry.bytes for entry in self._views.values())
            self._task, self._views = task, {}

    def flush(self) -> None:
        """Write what is still to be stored in the folder."""
        if self.files is not None:
            self.files.flush()

    def hold(self, split: Any) -> None:
        """Keep a stream's split alive, so that no other images are taken for its."""
        if isinstance(split, TaskSplit) and not any(split is held for held in self._held):
            self._held.append(split)

    def reader(self, model: Any, recurring: bool = False) -> Query | None:
        """A function for a model's queries while its weights stay; None if they must be computed in every pass.

        `recurring`: whether training batches come again, even if no other role needs their queries.
        """
        if not getattr(model, "reads_query", False):  # a user's own model need not know of queries
            return None
        backbone = query_backbone_of(model)
        if any(parameter.requires_grad for parameter in backbone.parameters()):
            return None
        about = repr((model.config.query_view, model.config.lora))
        source = self._source(backbone, about, heads=True)
        self._asking.add(id(model))

        def query(pixels: torch.Tensor, images: BatchKey) -> torch.Tensor:
            again = not images.trained or recurring or len(self._asking) > 1
            way = ("query", about, is_compiled(backbone))
            found = self._recall(
                way, source, pixels, images, again, lambda: CDLOutput(query=model.compute_query(pixels))
            )
            return found.query  # type: ignore[return-value]

        return query

    def outputs(self, model: Any, about: str, heads: bool = True, recurring: bool = False) -> Recall | None:
        """A function for a model's outputs while its weights stay; None where none would be reused.

        `about`: which outputs; `heads`: whether they depend on the heads too; `recurring` as in `reader`.
        """
        if not (recurring or self.files):
            return None
        source, changes = self._source(model, about, heads), _changes(model)

        def recall(pixels: torch.Tensor, images: BatchKey, asked: Any, compute: Callable[[], CDLOutput]) -> CDLOutput:
            if _changes(model) != changes:  # for example, a callback changes what should be frozen
                return compute()
            return self._recall((about, asked, are_compiled(model)), source, pixels, images, recurring, compute)

        return recall

    def _recall(
        self, what: Any, source: _Source, pixels: torch.Tensor, images: BatchKey, again: bool, compute: Any
    ) -> CDLOutput:
        """The known output for these images, or else the computed one; `again`: whether it is needed again here."""
        kind = pixels.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pixels.dtype
        kept = self._views if images.trained else self._images
        key = (what, source.number, precision, str(pixels.device), images.key)
        entry = kept.get(key)
        known = entry is not None and entry.untouched
        if known and not source.shared or source.shared and everywhere(known, pixels.device):
            self.found += entry.bytes  # type: ignore[union-attr]
            return entry.output  # type: ignore[union-attr]
        files, compiled, place = self.files, what[-1], None
        if files is not None and source.digest is not None and not compiled:
            place = files.place(source.digest, pixels.device, precision)
        found = files.find(place, (what, images.key), pixels.device) if files and place else None
        if found is None:
            found = compute()
            if type(found) is not CDLOutput:
                return found
            if files and place:
                files.keep(place, (what, images.key), found)
        entry = _Entry(found)
        if again and key not in kept and self.held + entry.bytes <= MOST:
            kept[key] = entry
            self.held += entry.bytes
        return found

    def _source(self, module: nn.Module, about: str, heads: bool) -> _Source:
        """The weights of a module now, with or without its heads; equal weights share a number."""
        number = self._number(module, _state(module, heads), heads)
        shared = is_sharded(module)
        if self.files is not None and (number, about) not in self._digests:
            self._digests[number, about] = None if shared else digest_of(module, about, heads)
        return _Source(number, self._digests.get((number, about)), shared)

    def _number(self, module: nn.Module, now: tuple[Any, ...], heads: bool) -> int:
        for number, (reference, then, with_heads) in enumerate(self._weights):
            known = reference()
            if known is module and then == now and with_heads == heads:
                return number
            if known is None or known is module or not (heads and with_heads) or now[0] != then[0]:
                continue
            if _state(known, heads) == then and equal(known, module):
                return number
        self._weights.append((ref(module), now, heads))
        return len(self._weights) - 1


class _Entry:
    """An output that is kept, and whether it is still what it was."""

    def __init__(self, output: CDLOutput):
        self.output = output
        self._versions = self._now()
        self.bytes = sum(value.nbytes for value in tensors(output))

    def _now(self) -> list[int]:
        return [value._version for value in tensors(self.output)]

    @property
    def untouched(self) -> bool:
        """Whether nobody wrote into it since."""
        return self._versions == self._now()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of an output."""
    if isinstance(value, torch.Tensor):
        yield value
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ():
        yield from tensors(part)


def _state(module: nn.Module, heads: bool) -> tuple[Any, ...]:
    return (settings_of(module, heads), *state_of(module, heads))


def _changes(model: nn.Module) -> int:
    """A number that grows whenever a weight is written to (but by `.data`, which is noticed when a task begins)."""
    return sum(value._version for value in (*model.parameters(), *model.buffers()))


def kept_with(*owners: Any) -> Kept:
    """What is kept for the first of these that is not None, a run or a model; trainers with the same one share it."""
    return _OF.setdefault(next(owner for owner in owners if owner is not None), Kept())


class Collate:
    """A batch as transformers makes it, with what identifies its images by the name of their pixel values.

    `by_content`: by the pixels, as for a folder that other runs read; else by their places in the data, where they
    have one.
    """

    def __init__(self, by_content: bool = False):
        self.by_content = by_content

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator([{k: v for k, v in item.items() if k != "images"} for item in items])
        places = items[0].get("images", {})
        trained = next((first[-1] is not None for first in places.values()), True)
        if self.by_content:
            names = [name for name in ("pixel_values", "teacher_pixel_values") if name in batch]
            batch["images"] = {name: BatchKey(trained, content_of(of_images(batch, name))) for name in names}
        elif places:
            batch["images"] = {name: BatchKey(trained, tuple(row["images"][name] for row in items)) for name in places}
        return batch


def open_folder(kept: Kept, folder: str | Path, say: Callable[[str], Any]) -> None:
    """Let a run keep things in a folder too. Raises ValueError if it cannot be used."""
    if kept.files is None:
        kept.files = KeptFiles(Path(folder), say)
