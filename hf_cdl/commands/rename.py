"""hf-cdl rename: give one of a student's classes another name."""

from __future__ import annotations

from hf_cdl.commands.changing import change
from hf_cdl.commands.parsers import read


def main(arguments: list[str]) -> int:
    options, _ = read("rename", arguments)
    return change(options, lambda run, model, processor: (model.rename(options.old, options.new), ()))
