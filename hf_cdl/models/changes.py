"""Changes of a trained classifier: images added or corrected, classes removed, renamed or merged.

With a fitted head every change is exact: the result is the model that would have learnt the final images at once (with
the same standardisation). A change that fails leaves the model unchanged. The last change can be undone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch

from hf_cdl.checked import near, short
from hf_cdl.counted import counted
from hf_cdl.heads import example
from hf_cdl.heads.base import FittedHead
from hf_cdl.labels import alike, class_list, one_encoding, same_name
from hf_cdl.models.input_checks import check_pixels
from hf_cdl.types import CDLOutput

_BATCH, _PAIRS = 32, 20
"""Images prepared at a time; pairs of labels listed in a message."""


@dataclass(frozen=True)
class Change:
    """What a change did.

    `images`: class name -> number of images added (negative: removed). `classes`: old -> new name of each class that
    was renamed, None if it was removed. `notes`: effects that you may not have intended.
    """

    kind: str
    said: str
    images: dict[str, int] = field(default_factory=dict)
    choices: dict[str, float] = field(default_factory=dict)
    classes: dict[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        chosen = "".join(f"; {name} {value:.4g} chosen" for name, value in self.choices.items())
        return ". ".join([f"{self.said}{chosen}", *self.notes]) + "."


def add(model: Any, images: Any, labels: Sequence[str], processor: Any = None) -> Change:
    names = _labels(images, labels)
    known = _class_names(model)
    new = [name for name in dict.fromkeys(names) if _find(known, name) is None]
    with _changing(model):
        head = fitted_head(model, "add images to known classes")
        if new:
            _begin(model, new)
        found, notes = _encoded(model, images, names, processor)
        if model.unmeasured:
            model.measure(found)
        model.accumulate(found, _rows(model, names, found.features))
        model.end_task()
    count = Counter(_class_names(model)[_index(model, name)] for name in names)
    parts = []
    if new:
        parts.append(f"{counted(len(new), 'new class')} ({_list(new)})")
    if more := [name for name in count if name not in new]:
        parts.append(f"more images of {_list(more)}")
    said = f"{counted(len(names), 'image')} learnt: {', '.join(parts)}"
    return Change("add", said, {**count}, head.choices(), notes=(*_alike(new, known), *notes))


def correct(model: Any, images: Any, labels: Sequence[str], was: Sequence[str], processor: Any = None) -> Change:
    names, before = _labels(images, labels), _labels(images, was, "was")
    if same := [name for name, old in zip(names, before, strict=True) if same_name(name, old)]:
        said = f"{counted(len(same), 'image')} would have the same label before and after, as {short(same[0])}"
        raise ValueError(f"{said}. Leave such images out.")
    known = _class_names(model)
    new = [name for name in dict.fromkeys(names) if _find(known, name) is None]
    with _changing(model):
        head = fitted_head(model, "correct labels of classes")
        check_features_fixed(model, "correct labels")
        old = torch.tensor([_index(model, name) for name in before], device=model.device)
        if new:
            _begin(model, new)
        found, notes = _encoded(model, images, names, processor)
        head.check_learnt(found.features, old)
        model.accumulate(found, old, sign=-1)
        model.accumulate(found, _rows(model, names, found.features))
        _check_counts(model, head)
        model.end_task()
    count = Counter(names)
    count.subtract(before)
    moved = Counter(zip(before, names, strict=True))
    parts = [f"{number} from {short(a)} to {short(b)}" for (a, b), number in moved.most_common(_PAIRS)]
    what = ", ".join([*parts, *([f"and {counted(len(moved) - _PAIRS, 'more pair')}"] if len(moved) > _PAIRS else [])])
    said = f"{counted(len(names), 'label')} corrected: {what}"
    said += f"; {counted(len(new), 'new class')} ({_list(new)})" if new else ""
    return Change("correct", said, {**count}, head.choices(), notes=(*_alike(new, known), *notes))


def remove(model: Any, name: str, images: Any = None, processor: Any = None) -> Change:
    task, row = _place(model, index := _index(model, name))
    name = _class_names(model)[index]
    tasks = [[*names] for names in model.tasks]
    if sum(map(len, tasks)) == 1:
        raise ValueError(f"{short(name)} is the only class of this model, which cannot be without one.")
    if len(tasks[task]) == 1 and model._prompts(1):
        raise ValueError(
            f"{short(name)} is the only class of its task, whose prompts belong to the model. Only models with a "
            "fitted head can lose a task."
        )
    head, count = model.head, {}
    with _changing(model):
        if images is not None:
            head = fitted_head(model, "forget images of classes")
            check_features_fixed(model, "forget images")
            found, _ = _encoded(model, images, [name] * len(images), processor)
            labels = torch.full((len(found.features),), index, device=model.device)
            model.accumulate(found, labels, sign=-1)
            head.check_forgotten(task, row)
            count = {name: -len(labels)}
        elif isinstance(head, FittedHead) and head.forgets:
            count = {name: -int(head.blocks[task].count[row])}  # type: ignore[index]
        _keep(model, {task: [r for r in range(len(tasks[task])) if r != row]})
        if head.fitted:
            model.end_task()
    said = f"{name!r} is removed: the model never answers it again"
    if head.fitted:
        left = "and nothing of its images is left in the sums" if count else "its images still count as other ones"
        said = f"{said}, {left}" if head.keeps_sums or count else said
    return Change("remove", said, count, head.choices() if head.fitted else {}, {name: None})


def rename(model: Any, old: str, new: str) -> Change:
    index, (fresh,) = _index(model, old), class_list([new])
    known = _class_names(model)
    taken = _find(known, fresh)
    if taken is not None and taken != index:
        raise ValueError(f"There is a class {short(fresh)} already; to make one of both, merge them.")
    with _changing(model, head=False):
        task, row = _place(model, index)
        tasks = [[*names] for names in model.tasks]
        old, tasks[task][row] = tasks[task][row], fresh
        model.config.set_tasks(tasks)
    notes = _alike([fresh], known[:index] + known[index + 1 :])
    return Change("rename", f"{old!r} is called {fresh!r} now", classes={old: fresh}, notes=notes)


def merge(model: Any, names: Sequence[str], name: str) -> Change:
    (fresh,) = class_list([name])
    indices = [_index(model, old) for old in class_list(names)]
    if len(indices) < 2 or len({*indices}) < len(indices):
        raise ValueError(f"Merging takes at least two different classes; got {short([*names])}.")
    taken = _find(_class_names(model), fresh)
    if taken is not None and taken not in indices:
        raise ValueError(f"There is another class {short(fresh)} already; merge it too, or choose another name.")
    old = [_class_names(model)[index] for index in indices]
    with _changing(model):
        head = fitted_head(model, "merge classes")
        first, *others = [_place(model, index) for index in indices]
        for other in others:
            head.merge(first, other)
        tasks = [[*each] for each in model.tasks]
        tasks[first[0]][first[1]] = fresh
        kept = {task: [row for row in range(len(tasks[task])) if (task, row) not in others] for task, _ in others}
        if any(not rows for rows in kept.values()) and model._prompts(1):
            raise ValueError("A task would be left without classes, but its prompts belong to the model.")
        _keep(model, kept, tasks)
        model.end_task()
    said, others = f"{_list(old)} are one class {fresh!r} now", [name for name in _class_names(model) if name != fresh]
    return Change("merge", said, {}, head.choices(), dict.fromkeys(old, fresh), _alike([fresh], others))


def undo(model: Any) -> Change:
    before = model._before_change
    if before is None:
        raise ValueError("There is no change to undo: only the last one of this model in memory can be undone.")
    before.restore(model)
    model._before_change = None
    return Change("undo", "The last change is undone")


# ---- parts ----


@dataclass(frozen=True)
class _State:
    """What a change may change."""

    tasks: list[list[str]]
    trained_tasks: int
    heads: tuple[Any, Any] | None

    @classmethod
    def of(cls, model: Any, head: bool) -> _State:
        heads = copy.deepcopy((model.head, model.kd_head)) if head else None
        return cls([[*names] for names in model.tasks], model.trained_tasks, heads)

    def restore(self, model: Any) -> None:
        if self.heads is not None:
            model.head, model.kd_head = self.heads
        model.config.set_tasks(self.tasks)
        model.trained_tasks = self.trained_tasks


@contextmanager
def _changing(model: Any, head: bool = True) -> Iterator[None]:
    """Restore the model if the change fails; otherwise keep what undoes it."""
    if model.session_head is not None:
        raise ValueError("The model is in the middle of a session; change it once the task has been learnt.")
    if not model.tasks and head and model.config.first_session is not None:
        raise ValueError("The model's first session trains it on its first task; learn that with a CDLTrainer.")
    before = _State.of(model, head)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    except BaseException:
        before.restore(model)
        raise
    finally:
        model.train(was_training)
    model._before_change = before


def check_features_fixed(model: Any, what: str) -> None:
    """Raise ValueError if features moved since images were learnt, so that their sums are not known exactly."""
    if model.later is not None and len(model.tasks) > 1:
        raise ValueError(
            f"To {what} takes what images left in the sums out again, but this model's features moved in sessions "
            "since (later_sessions), and its sums with them, so these images give other numbers now. A head with "
            "sums: per_class can remove a class without its images."
        )


def fitted_head(model: Any, what: str) -> FittedHead:
    """The model's head, if its sums can change. Raises ValueError otherwise."""
    if not model.fitted:
        raise ValueError(
            f"To {what} their old images are needed: this model's head is trained, and what it learnt cannot be told "
            "apart (new classes alone are learnt by a CDLTrainer, or hf-cdl add). A fitted head keeps sums that can "
            f"change exactly: in a recipe, head: {example(fitted=True)}."
        )
    model.head.check_change()
    return model.head


def _encoded(model: Any, images: Any, names: list[str], processor: Any) -> tuple[Any, tuple[str, ...]]:
    """Output with features of pixel values (N, C, H, W) or of what `decode` reads, and notes on equal images.

    `names`: the label of each.
    """
    if isinstance(images, torch.Tensor):
        check_pixels(images, model.backbone.config.num_channels)
        batches: Any = images.split(_BATCH)
    else:
        from hf_cdl.data.views import Preprocess  # not at import of hf_cdl: Pillow takes its time

        view = Preprocess(_processor(model) if processor is None else processor)
        batches = (_pixels(images[at : at + _BATCH], view) for at in range(0, len(images), _BATCH))
    found, keys = [], []
    for pixels in batches:
        if wrong := int((~pixels.isfinite()).flatten(1).any(dim=1).sum()):
            raise ValueError(f"NaN or infinite pixels: {counted(wrong, 'image')}. Give those of an image processor.")
        keys += [sha256(image.numpy().tobytes()).digest() for image in pixels.cpu().contiguous()]
        output = model(pixel_values=pixels.to(model.device, model.dtype))
        found.append({name: output[name] for name in ("features", "kd_features", "layers") if name in output})
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return CDLOutput(**joined), _repeated(keys, names)


def _repeated(keys: list[bytes], names: list[str]) -> tuple[str, ...]:
    """Notes on images that are the same to the model, given as keys of their pixels and their labels."""
    labels: dict[bytes, set[str]] = {}
    for key, name in zip(keys, names, strict=True):
        labels.setdefault(key, set()).add(name)
    again, several = len(keys) - len(labels), sum(len(of_key) > 1 for of_key in labels.values())
    notes = [f"{again} of the images {'is' if again == 1 else 'are'} the same as another one, and counted again"]
    notes += [f"{counted(several, 'image')} came with different labels, which cannot both be right"]
    return (*notes[: again > 0], *notes[1 : 1 + (several > 0)])


def _alike(new: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Notes on new classes whose names differ from known ones, or one another, in spelling alone."""
    seen, notes = {alike(name): name for name in known}, []
    for name in new:
        if (other := seen.setdefault(alike(name), name)) != name:
            notes.append(
                f"{name!r} is another class than {other!r}, as it is spelt differently; to make one, merge them"
            )
    return tuple(notes)


def _pixels(images: Sequence[Any], view: Any) -> torch.Tensor:
    from hf_cdl.data.images import check_resized, decode

    decoded = [decode(image) for image in images]
    for image in decoded:
        check_resized(image.size, view.processor)
    return view.evaluation(decoded)


def _processor(model: Any) -> Any:
    from transformers import AutoImageProcessor  # not at import of hf_cdl: it loads tokenizers

    place = model.name_or_path
    try:
        return AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No image processor is known for these images ({short(place)} has none). Give one, as processor="
            "AutoImageProcessor.from_pretrained(...), or give pixel values (N, 3, H, W)."
        ) from error


def _begin(model: Any, names: list[str]) -> None:
    """Give the model a task of these classes, as learnt."""
    model.begin_task(names)
    model.trained_tasks = len(model.tasks)


def _keep(model: Any, kept: dict[int, list[int]], tasks: list[list[str]] | None = None) -> None:
    """Keep these rows of tasks, and drop the others; `tasks`: the names, if they changed too."""
    tasks = [[*names] for names in model.tasks] if tasks is None else tasks
    for task in sorted(kept, reverse=True):
        for head in (model.head, model.kd_head):
            if head is not None:
                head.keep(task, kept[task])
        tasks[task] = [tasks[task][row] for row in kept[task]]
    model.trained_tasks -= sum(not names for names in tasks)
    model.config.set_tasks([names for names in tasks if names])


def _check_counts(model: Any, head: FittedHead) -> None:
    counts = [int(number) for block in head.blocks for number in block.count]  # type: ignore[union-attr]
    for name, count in zip(_class_names(model), counts, strict=True):
        if count < 1:
            raise ValueError(
                f"Class {short(name)} would be left with {counted(count, 'image')}. Check which labels these images "
                "were learnt with; a class without images is removed or merged instead."
            )


def _labels(images: Any, labels: Any, what: str = "labels") -> list[str]:
    names = class_list(labels) if not isinstance(labels, torch.Tensor) else []
    if not hasattr(images, "__len__") or isinstance(images, str | bytes | dict):
        raise ValueError(f"images is a {type(images).__name__}; give a list of images, or pixel values (N, 3, H, W).")
    if len(names) != len(images):
        has = counted(len(images), "image")
        raise ValueError(f"images has {has}, but {what} has {len(names)}; give the class name of each image.")
    return one_encoding(names)


def _class_names(model: Any) -> list[str]:
    return [name for task in model.tasks for name in task]


def _find(known: list[str], name: Any) -> int | None:
    return next((index for index, other in enumerate(known) if same_name(other, name)), None)


def _index(model: Any, name: Any) -> int:
    """Index of a class over all tasks. Raises ValueError for a class that is not known."""
    known = _class_names(model)
    found = _find(known, name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"The model knows no class {short(name)}{near(str(name), known)} It has {len(known)}: {_list(known)}."
        )
    return found


def _place(model: Any, index: int) -> tuple[int, int]:
    """Task and row of a class."""
    for task, names in enumerate(model.tasks):
        if index < len(names):
            return task, index
        index -= len(names)
    raise IndexError(index)


def _rows(model: Any, names: list[str], features: torch.Tensor) -> torch.Tensor:
    known = {name: _index(model, name) for name in dict.fromkeys(names)}
    return torch.tensor([known[name] for name in names], device=features.device)


def _list(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
