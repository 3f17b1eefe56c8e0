"""hf-cdl correct: give images that a student learnt with a wrong label their right one."""

from __future__ import annotations

from typing import Any

from hf_cdl import CDLForImageClassification
from hf_cdl.commands.changing import change
from hf_cdl.commands.parsers import read
from hf_cdl.data.labelled import read_corrections
from hf_cdl.models.changes import Change


def main(arguments: list[str]) -> int:
    options, _ = read("correct", arguments)

    def correct(model: CDLForImageClassification, processor: Any) -> Change:
        images, was = read_corrections(options.file)
        return model.correct(images, images.labels, was, processor)

    return change(options, correct)
