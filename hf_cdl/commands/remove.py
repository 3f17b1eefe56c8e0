"""hf-cdl remove: a class that a student never answers again, and of which its sums hold nothing more."""

from __future__ import annotations

from typing import Any

from hf_cdl import CDLForImageClassification
from hf_cdl.commands.changing import change
from hf_cdl.commands.parsers import read
from hf_cdl.data.labelled import read_class
from hf_cdl.models.changes import Change


def main(arguments: list[str]) -> int:
    options, _ = read("remove", arguments)

    def remove(model: CDLForImageClassification, processor: Any) -> Change:
        images = None if options.images is None else read_class(options.images, options.name)
        return model.remove(options.name, images, processor)

    return change(options, remove)
