"""Build dataclasses from plain dicts; problems are collected as text, not raised.

pydantic validates the values. A field's annotation may specify a section further: `Annotated[dict, method(PROMPTS)]`
is one from a registry, `{type: ..., fields}`, and `Annotated[dict, fields_of(LoraOptions)]` one with a dataclass's
fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from hf_cdl.registry import Registry

LARGEST = 10**18
"""Upper bound of integers in recipes; larger ones do not fit into arrays, and much larger ones not into floats."""
WRONG: Any = object()  # replaces a value whose problem was reported
Check = Callable[[dict[str, Any], str, list[str]], dict[str, Any]]
"""(section, its path, problems) -> the section with values of the right types; unchanged if there are problems."""


def method(registry: Registry[Any]) -> Check:
    """The check for a section `{type: ..., fields}` whose fields are those of the type's `config_class`."""

    def check(section: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
        kind = section.get("type")
        fields = {key: value for key, value in section.items() if key != "type"}
        if not isinstance(kind, str) or kind not in registry.types:
            able = f"{', '.join(registry.types)}, and what a file in 'plugins' registers"
            problems.append(f"'{path}.type' is {kind!r}; allowed: {able}")
        elif kind in registry:
            return {**section, **_typed_fields(registry[kind].config_class, fields, path, problems)}
        else:
            problems += [f"unknown field '{path}.{key}'; type {kind} has none" for key in fields]
        return section

    return check


def fields_of(kind: type) -> Check:
    """The check for a section with the fields of a dataclass."""
    return lambda section, path, problems: {**section, **_typed_fields(kind, section, path, problems)}


def build_typed(kind: type, content: Any, path: str, problems: list[str]) -> Any:
    """Build an instance of the dataclass `kind` from a dict; WRONG if that fails. Problems go into `problems`."""
    if not isinstance(content, dict):
        problems.append(f"{path or 'the recipe'} must have fields, but is {_short(content)}")
        return WRONG
    hints = hints_of(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    at = f"{path}." if path else ""
    values = {key: typed_value(hints[key], content[key], f"{at}{key}", problems) for key in content if key in fields}
    unknown = [key for key in content if key not in fields]
    near = {key: found for key in unknown if (found := near_name(key, fields))}
    problems += [f"unknown field '{at}{key}'; did you mean '{found}'?" for key, found in near.items()]
    if rest := [f"'{at}{key}'" for key in unknown if key not in near]:
        allowed = f"; allowed: {', '.join(fields)}" if len(fields) < 30 else ""
        problems.append(f"unknown {'field' if len(rest) == 1 else 'fields'} {', '.join(rest)}{allowed}")
    missing = [key for key, f in fields.items() if key not in content and default_of(f) is dataclasses.MISSING]
    problems += [f"'{at}{key}' is missing" for key in missing]
    if any(value is WRONG for value in values.values()) or missing:
        return WRONG
    try:
        return kind(**values)  # even with unknown fields: its own checks may find more problems
    except (ValueError, TypeError) as error:
        problems.append(f"{path}: {error}" if path else str(error))
        return WRONG


@functools.cache  # a recipe is built several times in a process, and evaluating annotations takes most of that time
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with what `Annotated` adds to them."""
    return typing.get_type_hints(kind, include_extras=True)


def _typed_fields(kind: type, fields: dict[str, Any], path: str, problems: list[str]) -> dict[str, Any]:
    """The given fields with values of the right type; empty if any of them is wrong."""
    before, built = len(problems), build_typed(kind, fields, path, problems)
    return {} if len(problems) > before else {key: getattr(built, key) for key in fields}


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field; MISSING if it has none."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def typed_value(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """The value converted to its type, e.g. 8.0 to 8; WRONG if that fails, with the reason added to `problems`."""
    for option in _options(hint):
        if dataclasses.is_dataclass(option) and value is not None:
            return build_typed(option, value, name, problems)  # type: ignore[arg-type]
        if (check := _check(option)) and isinstance(value, dict):
            return check(value, name, problems)
        item = _check(*typing.get_args(option)) if typing.get_origin(option) is list else None
        if item and isinstance(value, list):
            checked = [item(v if isinstance(v, dict) else {}, f"{name}.{i}", problems) for i, v in enumerate(value)]
            value = [new if isinstance(old, dict) else old for old, new in zip(value, checked, strict=True)]
    if value is False and "no" in _words(hint):
        value = "no"  # YAML reads `no` as false, in files and on the command line
    try:
        typed = TypeAdapter(hint).validate_python(value)
        if _turned(value, typed):
            problems.append(f"'{name}' is {_short(value)}, but should be a number, not yes or no")
            return WRONG
        return typed
    except PydanticUserError:  # a few types of TrainingArguments have no schema; its own checks cover them
        return value
    except ValidationError as error:
        said = ("should have more values" if line["type"] == "missing" else line["msg"] for line in error.errors())
        wanted = "; or ".join(dict.fromkeys(words.replace("Input should", "should") for words in said))
        problems.append(f"'{name}' is {_short(value)}, but {wanted}")
        return WRONG


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _check(hint: Any) -> Check | None:
    return hint.__metadata__[0] if typing.get_origin(hint) is typing.Annotated else None


def near_name(name: Any, known: Iterable[str]) -> str | None:
    """The known name closest to an unknown one; None if none is close."""
    return next(iter(difflib.get_close_matches(str(name), known, n=1)), None)


def _words(hint: Any) -> set[Any]:
    """The values that a Literal or Enum type allows."""
    if typing.get_origin(hint) is typing.Literal:
        return {*typing.get_args(hint)}
    if len(options := _options(hint)) > 1:
        return {word for option in options for word in _words(option)}
    return {member.value for member in hint} if isinstance(hint, type) and issubclass(hint, Enum) else set()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _turned(before: Any, after: Any) -> bool:
    """Whether a boolean became a number, which nobody who writes a boolean means."""
    if isinstance(before, list) and isinstance(after, list | tuple):
        return any(map(_turned, before, after))
    return isinstance(before, bool) and not isinstance(after, bool)


def check_finite(content: Any, path: str, problems: list[str]) -> None:
    """Report NaN, infinite and oversized numbers: with NaN, a run could not recognise its own recipe."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            check_finite(value, f"{path}.{key}" if path else str(key), problems)
    elif isinstance(content, float) and not math.isfinite(content):
        problems.append(f"'{path}' is {content}, but must be a finite number")
    elif isinstance(content, int) and abs(content) >= LARGEST:
        problems.append(f"'{path}' is a whole number of more than 18 digits; allowed are those below 10^18")
