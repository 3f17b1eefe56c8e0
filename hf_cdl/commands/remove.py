"""hf-cdl remove: remove a class, which the student then never answers with, and its share of the sums."""

from __future__ import annotations

from typing import Any

from hf_cdl.commands.changing import Made, change
from hf_cdl.commands.known_images import to_forget
from hf_cdl.commands.parsers import read
from hf_cdl.data.labelled import read_class
from hf_cdl.runs.changes import ChangingRun


def main(arguments: list[str]) -> int:
    options, _ = read("remove", arguments)

    def remove(run: ChangingRun, model: Any, processor: Any) -> Made:
        if options.images is None:
            return model.remove(options.name), ()
        images, moves = to_forget(run, model, read_class(options.images, options.name), options.name)
        return model.remove(options.name, images, processor), moves

    return change(options, remove)
