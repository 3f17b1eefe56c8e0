"""Pictures of an evaluation: confusion matrices, and calibration curves. They need the extra `report`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_cdl.escape import visible
from hf_cdl.inference.measuring import Measured
from hf_cdl.runs.pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED, _NUMBERED = 60, 15
"""How many classes have their names at the axes, and numbers in their cells."""
_LONGEST = 22


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.0), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
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


def _name(axis: Any, names: Sequence[str], rotation: int = 0) -> None:
    """Put the names of classes at an axis; those that a font may not have become numbers."""
    texts = [visible(name) for name in names]
    shown = [text if max(text, default="a") < "\u0250" else f"class {i + 1}" for i, text in enumerate(texts)]
    cut = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in shown]
    axis.set_ticks(
        range(len(cut)), cut, fontsize=8 if len(cut) <= _NUMBERED else 6, rotation=rotation, parse_math=False
    )
