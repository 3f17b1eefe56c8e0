"""The images that a run measures its models on, read again from its data, for commands on a finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_cdl import TaskStream
from hf_cdl.commands.console import say
from hf_cdl.commands.verify import check_data, stored_recipe
from hf_cdl.data.names import nfc
from hf_cdl.escape import visible
from hf_cdl.inference.labelled import Labelled, numbers_of
from hf_cdl.inference.students import Student
from hf_cdl.runs.files import RunError
from hf_cdl.runs.learnt import names_at
from hf_cdl.runs.ledger import CHANGED, revisions
from hf_cdl.runs.results import stored_ledger


class Images(NamedTuple):
    """Images by index. `of`: their description; `labels`: the index of each image's class, -1 if unknown."""

    of: str
    decode: Callable[[int], Image.Image]
    labels: np.ndarray


def run_of(student: Student) -> Path | None:
    """The folder of the run that holds a student; None if there is none."""
    place = Path(student.place)
    root = place.resolve().parents[1] if student.results is not None and place.is_dir() else None
    return root if root is not None and (root / "run.json").exists() else None


def own_images(root: Path) -> Labelled:
    """The validation images of a run's tasks, or those its accuracy is measured on.

    Raises OSError or ValueError if the data are gone or have no such images, RunError if they changed.
    """
    recipe = stored_recipe(root)
    check_data(root, stored_ledger(root), recipe)
    stream = TaskStream(recipe.data.labelled, {}, seed=recipe.seed)
    tasks = [*stream]
    has = any(task.validation is not None and len(task.validation) for task in tasks)
    split = "validation" if has else recipe.data.eval_split
    parts: list[Any] = [part for task in tasks if len(part := getattr(task, split) or ())]
    if not parts:
        raise ValueError(f"The run in {visible(root)} has no images to measure on. Give IMAGES after it.")
    names = [*map(nfc, stream.class_names)]
    table = parts[0].data.select(np.concatenate([part.rows for part in parts]))
    labels = [names[label] for part in parts for label in part.labels]
    return Labelled(table, labels, names, parts[0].cells, split, [f"measured on the {split} images of the run"])


def named_at(root: Path, images: Labelled, role: str, state: str | None = None) -> Labelled:
    """The run's `own_images`, with the names that a state of a role, by default the newest, has for their classes.

    Only the student's classes are ever renamed, merged or removed. Those of a removed class get no name of another.
    """
    ledger = stored_ledger(root)
    if role != CHANGED or not ledger.get("changes"):
        return images
    number = revisions(ledger, role) if state is None else int(state[5:])
    now = {
        old: f"{old} (removed)" if new is None else new
        for old, new in names_at(ledger, images.classes, number).items()
    }
    return replace(images, labels=[now[label] for label in images.labels], classes=[*dict.fromkeys(now.values())])


def images_of_run(
    root: Path, names: Sequence[str], most: int, role: str = CHANGED, state: str | None = None
) -> Images | None:
    """At most so many of `own_images`, of the classes `names` of a role's state; None, with a note, without."""
    try:
        own = named_at(root, own_images(root), role, state)
    except (OSError, ValueError, RunError) as error:
        say(f"note: the data of {visible(root.name)} are not there ({visible(str(error).splitlines()[0])[:200]})")
        return None
    labels = numbers_of(own.labels, names)
    rows = spread(np.flatnonzero(labels >= 0).tolist(), most)
    told = f"{own.split} images of the run"
    return Images(told, lambda index: own.decode(rows[index]).image, labels[rows]) if rows else None


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).astype(int).tolist()]
