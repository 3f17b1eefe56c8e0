"""hf-cdl correct: correct the labels of images that a student learnt with a wrong one."""

from __future__ import annotations

from typing import Any

from hf_cdl.commands.changing import Made, change
from hf_cdl.commands.known_images import to_correct
from hf_cdl.commands.parsers import read
from hf_cdl.data.labelled import read_corrections
from hf_cdl.runs.changes import ChangingRun


def main(arguments: list[str]) -> int:
    options, _ = read("correct", arguments)

    def correct(run: ChangingRun, model: Any, processor: Any) -> Made | None:
        images, was = read_corrections(options.file)
        images, was, moves = to_correct(run, model, images, was)
        return (model.correct(images, images.labels, was, processor), moves) if moves else None

    return change(options, correct)
