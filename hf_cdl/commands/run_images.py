"""The images that a run looks at as it learns, for commands that show or compare what its student says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_cdl import TaskStream
from hf_cdl.commands.console import say
from hf_cdl.commands.verify import stored_recipe
from hf_cdl.escape import visible
from hf_cdl.inference.labelled import numbers_of


class Images(NamedTuple):
    """Images by index: `of` says which; `labels`: the index of each one's class, -1 where it is not known."""

    of: str
    decode: Callable[[int], Image.Image]
    labels: np.ndarray


def images_of_run(root: Path, names: Sequence[str], most: int) -> Images | None:
    """At most so many of the validation images of a run's tasks, or of those its accuracy is measured on.

    `names`: the classes that they are of, as a model knows them. None, with a note, if the data are gone.
    """
    try:
        recipe = stored_recipe(root)
        stream = TaskStream(recipe.data.labelled, {}, seed=recipe.seed)
    except (OSError, ValueError) as error:
        say(f"note: the data of {visible(root.name)} are not there ({visible(str(error).splitlines()[0])[:200]})")
        return None
    tasks = [*stream]
    has = any(task.validation is not None and len(task.validation) for task in tasks)
    split = "validation" if has else recipe.data.eval_split
    parts = [part for task in tasks if (part := getattr(task, split)) is not None]
    labels = numbers_of([stream.class_names[label] for part in parts for label in part.labels], names)
    places = [(part, row) for part in parts for row in range(len(part))]
    rows = spread([row for row, label in enumerate(labels) if label >= 0], most)

    def image(index: int) -> Image.Image:
        part, row = places[rows[index]]
        return part.image(row)

    return Images(f"{split} images of the run", image, labels[rows]) if rows else None


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).astype(int).tolist()]
