"""Dataclasses from plain dicts, every problem with them named in words and none raised."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from enum import Enum
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

LARGEST = 10**18
"""Below it are the whole numbers of recipes; larger ones are no numbers for arrays, and far larger ones no floats."""
WRONG: Any = object()  # stands for a value that was reported


def build_typed(kind: type, content: Any, path: str, problems: list[str]) -> Any:
    """An instance of the dataclass `kind` from a dict; WRONG after adding to `problems` what is wrong with it."""
    if not isinstance(content, dict):
        problems.append(f"{path or 'the recipe'} must have fields, but is {_short(content)}")
        return WRONG
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    before, values, missing, unknown = len(problems), {}, False, []
    for key, value in content.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            if near:
                problems.append(f"unknown field '{name}'; did you mean '{near[0]}'?")
            else:
                unknown.append(f"'{name}'")
            continue
        nested = _dataclass_in(hints[key])
        if nested is not None and value is not None:
            values[key] = build_typed(nested, value, name, problems)
        else:
            values[key] = typed_value(hints[key], value, name, problems)
    if unknown:
        problems.append(f"unknown field{'s' * (len(unknown) > 1)} {', '.join(unknown)}{_allowed(fields)}")
    for key, f in fields.items():
        if key not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            problems.append(f"'{path}.{key}' is missing" if path else f"'{key}' is missing")
            missing = True
    if any(value is WRONG for value in values.values()) or missing:
        return WRONG
    try:
        built = kind(**values)  # even beside unknown fields: its own checks may find more
    except (ValueError, TypeError) as error:
        problems.append(f"{path}: {error}" if path else str(error))
        return WRONG
    return WRONG if len(problems) > before else built


def _allowed(fields: Any) -> str:
    return f"; allowed: {', '.join(fields)}" if len(fields) < 30 else ""


def _dataclass_in(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def typed_value(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    if value is False and "no" in _words(hint):
        value = "no"  # which is false in YAML, in a file as on the command line
    try:
        typed = TypeAdapter(hint).validate_python(value)
        if _turned(value, typed):
            problems.append(f"'{name}' is {_short(value)}, but should be a number, not yes or no")
            return WRONG
        return typed
    except PydanticUserError:  # a few of TrainingArguments' types have no schema; its own checks see them
        return value
    except ValidationError as error:
        said = ("should have more values" if line["type"] == "missing" else line["msg"] for line in error.errors())
        wanted = "; or ".join(dict.fromkeys(words.replace("Input should", "should") for words in said))
        problems.append(f"'{name}' is {_short(value)}, but {wanted}")
        return WRONG


def _words(hint: Any) -> set[Any]:
    """The words that a type lists."""
    kind = typing.get_origin(hint)
    if kind is typing.Literal:
        return {*typing.get_args(hint)}
    if kind in (typing.Union, types.UnionType):
        return {word for option in typing.get_args(hint) for word in _words(option)}
    return {member.value for member in hint} if isinstance(hint, type) and issubclass(hint, Enum) else set()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _turned(before: Any, after: Any) -> bool:
    """Whether a yes or no became a number, which nobody means who writes one."""
    if isinstance(before, list) and isinstance(after, list | tuple):
        return any(map(_turned, before, after))
    return isinstance(before, bool) and not isinstance(after, bool)


def check_finite(content: Any, path: str, problems: list[str]) -> None:
    """Name the numbers that are none: a run could not tell whether it is the same recipe again."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            check_finite(value, f"{path}.{key}" if path else str(key), problems)
    elif isinstance(content, float) and not math.isfinite(content):
        problems.append(f"'{path}' is {content}, but must be a finite number")
    elif isinstance(content, int) and abs(content) >= LARGEST:
        problems.append(f"'{path}' is a whole number of more than 18 digits; allowed are those below 10^18")


def typed_fields(kind: type, fields: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    """The fields that were given, with values of the right type; nothing if one of them is wrong."""
    built = build_typed(kind, fields, path, problems)
    return {} if built is WRONG else {key: getattr(built, key) for key in fields}
