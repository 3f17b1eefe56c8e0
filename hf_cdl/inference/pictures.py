"""Pictures of an evaluation: confusions, calibration, mistakes, where classes lie, which prompts are used.

They need the extra `report`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_cdl.escape import visible
from hf_cdl.inference.measuring import Measured
from hf_cdl.runs.pictures import COLOURS, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED, _NUMBERED = 60, 15
"""How many classes have their names at the axes, and numbers in their cells."""
_LONGEST = 22
_ACROSS, _DOWN, _SIDE = 6, 4, 128
"""Mistakes in a row, rows of them, and pixels of a thumbnail's longer side."""


def confusion_figure(measured: Measured, title: str) -> Figure:
    """Share of each class's images (row) that were answered with each class (column), in percent.

    Rows are the classes with images, columns those and all others that were ever answered.
    """
    from matplotlib.figure import Figure

    table = measured.confusion()
    rows = np.flatnonzero(table.sum(axis=1))
    columns = np.flatnonzero(table.sum(axis=0) + table.sum(axis=1))
    shares = 100 * table[np.ix_(rows, columns)] / table[rows].sum(axis=1, keepdims=True)
    named = len(columns) <= _NAMED
    side = min(max(0.17 if len(columns) > _NUMBERED else 0.5, 3 / len(columns)) * len(columns), 10.0)
    figure = Figure(figsize=(side + 4.2, side * len(rows) / len(columns) + 2.8), dpi=150, layout="compressed")
    panel = figure.subplots()
    image = panel.imshow(shares, vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
    if len(columns) <= _NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if share:
                colour = "white" if share < 42 else "black"
                panel.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    if named:
        _name(panel.yaxis, [measured.classes[row] for row in rows])
        _name(panel.xaxis, [measured.classes[column] for column in columns], rotation=90)
    panel.set(ylabel="class of the image", xlabel="answer")
    panel.set_title(f"{title}: accuracy {measured.metrics['accuracy']:.1f} %", fontsize=10, parse_math=False)
    figure.colorbar(image, ax=panel, label="images of the class (%)", shrink=0.8)
    return figure


def calibration_figure(measured: Sequence[Measured], title: str) -> Figure:
    """Accuracy against confidence in bins of equal width, a line per revision; below, how many images are in each."""
    figure, ((above,), (below,)) = figure_of(6.4, 6.0, 2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 100), (0, 100), color="0.5", linestyle=":", label="as sure as right")
    for number, found in enumerate(measured):
        bins = found.calibration()
        confidence, colour = [part["confidence"] for part in bins], COLOURS[number % len(COLOURS)]
        label = f"{found.revision} (calibration error {found.metrics['calibration_error']:.1f})"
        above.plot(confidence, [part["accuracy"] for part in bins], "o-", color=colour, markersize=4, label=label)
        below.plot(confidence, [part["images"] for part in bins], "o-", color=colour, markersize=3)
    above.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 102))
    above.set_title(title, fontsize=10, parse_math=False)
    below.set(xlabel="confidence (%)", ylabel="images", ylim=(0, None))
    for panel in (above, below):
        panel.grid(alpha=0.3)
    for text in above.legend(loc="upper left", fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
    return figure


def mistakes_figure(measured: Measured, image: Callable[[int], Any]) -> Figure | None:
    """The wrong answers that the model was surest of, each pair of classes once; None without any.

    `image(index)` returns an image; above each are its right class, the answer, and how sure the model was of it.
    """
    wrong = sorted(np.flatnonzero(~measured.correct), key=lambda i: -measured.confidence[i])
    pairs = {(measured.labels[i], measured.answers[i]): i for i in reversed(wrong)}
    shown = sorted(pairs.values(), key=lambda i: -measured.confidence[i])[: _ACROSS * _DOWN]
    if not shown:
        return None
    names, down = _shown(measured.classes, 15), -(-len(shown) // _ACROSS)
    figure, panels = figure_of(8.0, 1.75 * down + 0.2, down, _ACROSS)
    for panel, i in itertools.zip_longest(panels.flat, shown):
        panel.set_axis_off()
        if i is not None:
            small = image(int(measured.indices[i])).convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
            panel.imshow(small)
            right, answer = names[measured.labels[i]], names[measured.answers[i]]
            panel.set_title(f"{right}\n→ {answer} {100 * measured.confidence[i]:.0f} %", fontsize=9, parse_math=False)
    return figure


def latent_figure(measured: Sequence[Measured], title: str) -> Figure | None:
    """The means of the classes' features on the two directions in which those of the newest state vary most.

    A panel per state, all on the same directions; colours are tasks, in the order in which they came. None for models
    without features, or with fewer than three classes that have images.
    """
    from matplotlib.colors import BoundaryNorm

    means = [found.means for found in measured if found.means is not None]
    known = means[-1][np.isfinite(means[-1]).all(axis=1)] if len(means) == len(measured) else ()
    if len(known) < 3:
        return None
    directions = np.linalg.svd(known - known.mean(axis=0), full_matrices=False)[2][:2].T
    across, tasks = min(len(measured), 3), max(len(found.tasks) for found in measured)
    down = -(-len(measured) // across)
    figure, panels = figure_of(8.0, 6.4 if across == 1 else 0.6 + 2.9 * down, down, across, sharex=True, sharey=True)
    figure.suptitle(title, fontsize=11, parse_math=False)
    scale: Any = {"cmap": "viridis", "norm": BoundaryNorm(np.arange(tasks + 1) + 0.5, 256), "edgecolors": "0.4"}
    points: Any = None
    for panel, found, mean in itertools.zip_longest(panels.flat, measured, means):
        if mean is None:
            panel.set_visible(False)
            continue
        places = (mean - known.mean(axis=0)) @ directions
        task = np.repeat(np.arange(tasks) + 1, [*map(len, found.tasks), *[0] * (tasks - len(found.tasks))])
        points = panel.scatter(*places.T, c=task, s=24, linewidths=0.5, zorder=3, **scale)
        apart = np.linalg.norm(places[:, None] - places, axis=-1) + np.diag(np.full(len(places), np.inf))
        below = places[:, 1] < places[np.nan_to_num(apart, nan=np.inf).argmin(axis=1), 1]  # its nearest neighbour
        for name, place, under in zip(_shown(found.classes, 14), places, below, strict=True):
            if np.isfinite(place).all() and len(places) <= _NAMED / across:
                where: Any = {"xytext": (0, -12 if under else 5), "textcoords": "offset points", "ha": "center"}
                panel.annotate(name, place, fontsize=8, parse_math=False, **where)
        panel.set(xticks=[], yticks=[], title=found.revision if across > 1 else "")
    if tasks > 1:
        ticks = range(1, tasks + 1, 1 + (tasks - 1) // 20)
        figure.colorbar(points, ax=panels, label="task that brought the class", shrink=0.6, ticks=ticks)
    return figure


def usage_figure(measured: Measured, title: str) -> Figure | None:
    """How much the images of each task (rows) use the prompts (columns), by the task that brought them if they grow.

    None for models without prompts that are chosen.
    """
    if measured.usage is None:
        return None
    ends = np.cumsum([*map(len, measured.tasks)])[:-1]
    parts = [(task, own) for task, own in enumerate(np.split(measured.usage, ends), 1) if np.isfinite(own).any()]
    rows = [np.nanmean(own, axis=0) for _, own in parts]
    grown = measured.brought if measured.brought and len(rows[0]) % measured.brought == 0 else len(rows[0])
    shares = np.stack(rows).reshape(len(rows), grown, -1).mean(axis=-1)
    figure, ((panel,),) = figure_of(min(2.8 + 0.55 * grown, 8.0), min(1.6 + 0.5 * len(rows), 8.0))
    image = panel.imshow(shares, vmin=0, cmap="viridis", aspect="auto", interpolation="nearest")
    for (row, column), share in np.ndenumerate(shares) if grown <= _NUMBERED else ():
        colour = "white" if share < 0.6 * shares.max() else "black"
        panel.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=9)
    for axis, numbers in ((panel.xaxis, range(1, grown + 1)), (panel.yaxis, [task for task, _ in parts])):
        ticks = range(0, len(numbers), 1 + (len(numbers) - 1) // 20)
        axis.set_ticks(ticks, [numbers[tick] for tick in ticks])
    panel.set(ylabel="images of task", xlabel="prompts of task" if grown < len(rows[0]) else "prompt")
    panel.set_title(title, fontsize=11, parse_math=False)
    figure.colorbar(image, ax=panel, label="use, mean over layers")
    return figure


def _shown(names: Sequence[str], longest: int = _LONGEST) -> list[str]:
    """Names of classes for a picture: short, and numbers in place of those that a font may not have."""
    texts = [visible(name) for name in names]
    known = [text if max(text, default="a") < "\u0250" else f"class {i + 1}" for i, text in enumerate(texts)]
    return [text if len(text) <= longest else f"{text[: longest - 1]}…" for text in known]


def _name(axis: Any, names: Sequence[str], rotation: int = 0) -> None:
    """Put the names of classes at an axis."""
    cut = _shown(names)
    axis.set_ticks(
        range(len(cut)), cut, fontsize=8 if len(cut) <= _NUMBERED else 6, rotation=rotation, parse_math=False
    )
