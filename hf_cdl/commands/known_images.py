"""Tell images that a student has already learnt from new ones, so that no image counts twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_cdl import TaskStream
from hf_cdl.commands.console import say
from hf_cdl.data.labelled import LabelledImages, cell_digest
from hf_cdl.data.names import nfc, some
from hf_cdl.models.changes import fitted_head
from hf_cdl.recipe import build_recipe, untrained
from hf_cdl.runs.changes import ChangingRun
from hf_cdl.runs.learnt import Moves, labels_now
from hf_cdl.runs.ledger import labelled_part


def to_add(run: ChangingRun, model: Any, images: LabelledImages) -> tuple[LabelledImages, Moves]:
    """The images that are new, and their moves between classes.

    Raises ValueError for images with two labels, here or in what was learnt, and for a trained head.
    """
    fitted_head(model, "add images to known classes")
    digests, known = _known(run, images)
    chosen, seen, again = [], dict[str, int](), 0
    for index, (digest, label) in enumerate(zip(digests, images.labels, strict=True)):
        first = seen.setdefault(digest, index)
        if nfc(images.labels[first]) != nfc(label):
            raise ValueError(
                f"{images.place(first)} and {images.place(index)} are the same image with two labels, "
                f"{images.labels[first]!r} and {label!r}. Leave one of them out."
            )
        if (learnt := known.get(digest)) is not None and nfc(label) not in learnt:
            raise ValueError(
                f"{images.place(index)} was learnt before, as {some(learnt)} and not {label!r}. Leave it out, or give "
                "it its right label with hf-cdl correct."
            )
        again += learnt is not None
        chosen += [index] if first == index and learnt is None else []
    twice = len(digests) - len(seen)
    _say_left_out(again, "learnt before, with the same label")
    _say_left_out(len(digests) - len(chosen) - again, "the same as another one of these", twice > 0)
    return images.chosen(chosen), [(digests[i], None, images.labels[i]) for i in chosen]


def to_correct(
    run: ChangingRun, model: Any, images: LabelledImages, was: list[str]
) -> tuple[LabelledImages, list[str], Moves]:
    """The images that are not corrected yet, their labels before, and their moves.

    Raises ValueError for images that had another label, and for a trained head.
    """
    fitted_head(model, "correct labels of classes")
    digests, known = _known(run, images)
    chosen = []
    for index, (digest, label, old) in enumerate(zip(digests, images.labels, was, strict=True)):
        learnt = known.get(digest)
        if learnt is not None and nfc(old) not in learnt:
            if nfc(label) in learnt:
                continue
            raise ValueError(
                f"{images.place(index)} was learnt as {some(learnt)}, not as {old!r}. Say so in the column was."
            )
        chosen.append(index)
    _say_left_out(len(digests) - len(chosen), "corrected before")
    moves = [(digests[i], was[i], images.labels[i]) for i in chosen]
    return images.chosen(chosen), [was[i] for i in chosen], moves


def to_forget(run: ChangingRun, model: Any, images: LabelledImages, name: str) -> tuple[LabelledImages, Moves]:
    """The images that are still counted in this class, and their moves.

    Raises ValueError if none are left, and for a trained head.
    """
    fitted_head(model, "forget images of classes")
    digests, known = _known(run, images)
    left = {digest: labels[nfc(name)] for digest, labels in known.items()}
    chosen, again = [], 0
    for index, digest in enumerate(digests):
        if left.get(digest, 1) > 0:
            chosen.append(index)
        again += digest in left and left[digest] <= 0 and known[digest][nfc(name)] > 0
        left[digest] = left.get(digest, len(digests)) - 1
    _say_left_out(again, "the same as another one of these, and learnt once")
    _say_left_out(len(digests) - len(chosen) - again, "counted in another class now")
    if not chosen:
        raise ValueError(f"None of these images is counted in the class {name!r} now. Give those it was learnt from.")
    return images.chosen(chosen), [(digests[i], name, None) for i in chosen]


def _say_left_out(count: int, why: str, there: bool = True) -> None:
    if count and there:
        say(f"note: {count} {'image is' if count == 1 else 'images are'} left out: {why}")


def _known(run: ChangingRun, images: LabelledImages) -> tuple[list[str], Mapping[str, Any]]:
    """The digest of each image, and by digest how often the student counts it in each class."""
    digests = [images.digest(index) for index in range(len(images))]
    first, problem = _of_tasks(run, images, {*digests})
    known, lost = labels_now(run.folder, run.ledger, first)
    if lost:
        problem = "; ".join([*([problem] if problem else []), f"the list of {some(lost)} is not in learnt/"])
    if problem:
        say(f"note: images that were learnt before are not all recognised: {problem}")
    return digests, known


def _of_tasks(run: ChangingRun, images: LabelledImages, wanted: set[str]) -> tuple[dict[str, list[str]], str | None]:
    """Labels, by digest, of the images that the run's tasks had; and why they are not known, if so."""
    if run.origin:
        return {}, "its tasks were learnt in another run"
    data = build_recipe(untrained(run.ledger["recipe"])).data
    if not Path(data.path or "").expanduser().is_dir():
        return {}, "the data of its tasks are in no folder here"
    try:
        stream = TaskStream(data.labelled, {}, seed=0)
        if labelled_part(stream.fingerprint) != labelled_part(run.ledger["stream"]):
            return {}, "the data of its tasks have changed since"
        found: dict[str, list[str]] = {}
        sizes = {images.size(index) for index in range(len(images))}
        for task in stream:
            _find(task.train, wanted, sizes, stream.class_names, found)
    except (OSError, ValueError) as error:
        return {}, f"the data of its tasks cannot be read ({str(error).splitlines()[0][:200]})"
    return found, None


def _find(split: Any, wanted: set[str], sizes: set[int], names: list[str], found: dict[str, list[str]]) -> None:
    """Add the labels of those images of a task that are wanted; only files of these sizes are read."""
    alike = np.isin(split.cells.sizes(split.data)[split.rows], [*sizes])
    for index in np.flatnonzero(alike).tolist():
        (cell,) = split.data[int(split.rows[index])].values()
        if (digest := cell_digest(split.cells, cell)) in wanted:
            found.setdefault(digest, []).append(names[split.labels[index]])
