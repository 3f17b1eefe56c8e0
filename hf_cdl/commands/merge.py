"""hf-cdl merge: merge several classes into one."""

from __future__ import annotations

from hf_cdl.commands.changing import change
from hf_cdl.commands.parsers import read


def main(arguments: list[str]) -> int:
    options, _ = read("merge", arguments)
    return change(options, lambda run, model, processor: (model.merge(options.names, options.name), ()))
