"""hf-cdl undo: go back to the student before its last change."""

from __future__ import annotations

from hf_cdl.commands.changing import undo
from hf_cdl.commands.parsers import read


def main(arguments: list[str]) -> int:
    return undo(read("undo", arguments)[0])
