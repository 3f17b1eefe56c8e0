"""No file, method or function is too long, counting lines of code without blanks, comments and docstrings."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from hf_cdl.distill import TERMS
from hf_cdl.prompts import PROMPTS

FILE, METHOD, FUNCTION = 300, 150, 40
EMPTY = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
FILES = [file for folder in ("hf_cdl", "recipes") for file in sorted((ROOT / folder).rglob("*.py"))]
HEADS = {file for file in (ROOT / "hf_cdl" / "heads").glob("*.py") if file.stem not in ("__init__", "base", "sums")}
METHODS = {Path(inspect.getfile(kind)) for registry in (PROMPTS, TERMS) for kind in registry.values()} | HEADS


def code_lines(text: str) -> set[int]:
    """Numbers of the lines with code. Strings that are statements, such as docstrings, do not count."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in EMPTY:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return lines


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Every function with its number of lines of code, including decorators and nested definitions."""
    lines = code_lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, len(lines & {*range(first, (node.end_lineno or first) + 1)})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_file_and_its_functions_are_short(file: Path) -> None:
    text = file.read_text()
    most = METHOD if file in METHODS else FILE
    count = len(code_lines(text))
    assert count <= most, f"{count} lines of code; allowed: {most}. Split it, or say it with fewer"
    long = {name: number for name, number in functions(text) if number > FUNCTION}
    assert not long, f"functions of more than {FUNCTION} lines of code: {long}"


CORE = ("types", "config", "data", "backbones", "prompts", "heads", "distill", "models", "training")
AROUND = ("runs", "hub", "recipe", "inference", "export", "compare", "commands")


@pytest.mark.parametrize(("rooms", "most"), [(CORE, 11_210), (AROUND, 10_400)], ids=["core", "around it"])
def test_the_rooms_do_not_grow_unnoticed(rooms: tuple[str, ...], most: int) -> None:
    """The bounds are moved on purpose: whoever adds a feature states its size here."""
    files = [
        file for file in (ROOT / "hf_cdl").rglob("*.py") if file.relative_to(ROOT).parts[1].split(".")[0] in rooms
    ]
    count = sum(len(code_lines(file.read_text())) for file in files)
    assert 0.9 * most < count <= most, f"{', '.join(rooms)} have {count} lines of code; the bound is {most}"


COUNTED = """
x = 1  # a comment


def f():
    '''Doc.'''
    # another
    y = (
        2
    )

    return y
"""


def test_every_method_s_file_is_known_and_its_lines_are_counted_as_said() -> None:
    assert METHODS <= {*FILES} and len(METHODS) > len(PROMPTS) and HEADS
    assert code_lines(COUNTED) == {2, 5, 8, 9, 10, 12}
    assert [*functions(COUNTED)] == [("f", 5)]
