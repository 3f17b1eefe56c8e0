"""Read recipe files and the command line into one plain dict: bases, several files, dotted overrides. No checks."""

from __future__ import annotations

import functools
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_cdl.counted import counted
from hf_cdl.escape import visible, visible_lines

_CHARACTERS, _NODES, _DEPTH = 1_000_000, 50_000, 50
"""Limits of a YAML text: characters, values, nesting depth."""
_NUMBERS, _DIGITS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"), 1000
_MERGE = "tag:yaml.org,2002:merge"
_MANY, _DEEP = f"it has more than {_NODES:,} values", f"it is nested more than {_DEPTH} deep"


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, in one message."""


def read_recipe(arguments: Sequence[str], default: str | Path) -> dict[str, Any]:
    """Read `[RECIPE.yaml ...] [--any.field value ...]`; `default`: the file if none is given.

    Later files override earlier ones, and their names are joined. A file may name a `base` file (relative to itself)
    that it overrides. Values are YAML. Raises RecipeError if something cannot be read.
    """
    arguments, files = list(arguments), []
    while arguments and not arguments[0].startswith("--"):
        if not arguments[0] or arguments[0].startswith("-"):
            raise _unexpected(arguments[0])
        files.append(arguments.pop(0))
    parts = [read_yaml(Path(file)) for file in files or [default]]
    content = functools.reduce(merge, parts)
    names = [str(part["name"]) for part in parts if part.get("name") is not None]
    if len(names) > 1:
        content["name"] = "-".join(names)
    override(content, fields_given(arguments))
    return content


def override(content: dict[str, Any], fields: Sequence[tuple[str, Any]]) -> None:
    """Set fields of a recipe, given by their dotted names. Raises RecipeError for a field that cannot be."""
    for name, value in fields:
        _override(content, name.split("."), value, name)


class _Refused(yaml.YAMLError):
    """Valid YAML that is not a recipe: larger than any recipe, or with a duplicate field."""


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number; PyYAML (YAML 1.1) reads it as a string.

    At most _NODES values with aliases expanded: a few lines of aliases of aliases would exhaust any memory. A
    duplicate field is refused; PyYAML would keep the last one.
    """

    def compose_document(self) -> Any:
        node = super().compose_document()
        self._written_out(node, {})
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth = getattr(self, "depth", 0) + 1
        self.nodes = getattr(self, "nodes", 0) + 1
        if self.depth > _DEPTH or self.nodes > _NODES:
            raise _Refused(_DEEP if self.depth > _DEPTH else _MANY)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and ":" in node.value:
            node.tag = "tag:yaml.org,2002:str"  # YAML 1.1 reads 1:30 as 90, which nobody means
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > _DIGITS:
            raise _Refused(f"it has a number of {counted(len(node.value), 'character')}")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if (first := lines.get(name)) is not None:
                where = f"in line {line}" if first == line else f"in lines {first} and {line}"
                raise _Refused(f"the field '{visible(key.value)[:200]}' is given twice, {where}; leave one of them")
            lines[name] = line
        return node

    def _written_out(self, node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """Number of values below a node, itself included, and their depth. Raises _Refused, also for cycles."""
        if id(node) not in known:
            known[id(node)] = (_NODES + 1, 0)  # while it is open: a cycle counts as too large
            pairs = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
            below = [self._written_out(part, known) for part in parts]
            known[id(node)] = (1 + sum(size for size, _ in below), 1 + max((depth for _, depth in below), default=0))
        size, depth = known[id(node)]
        if size > _NODES:
            raise _Refused(f"{_MANY}, with its aliases written out, or one is an alias of what it lies in")
        if depth > _DEPTH:
            raise _Refused(_DEEP)
        return size, depth


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError if it is invalid or larger than any recipe."""
    if len(text) > _CHARACTERS:
        raise _Refused(f"it has {counted(len(text), 'character')}; a recipe has fewer than {_CHARACTERS:,}")
    try:
        return _unshared(yaml.load(text, _Loader))  # a SafeLoader
    except (ValueError, OverflowError, TypeError, AttributeError) as error:  # !!int x, !!timestamp 2001-99-99 ...
        raise yaml.YAMLError(f"it has a value that cannot be read: {visible(error)[:200]}") from error


def _unshared(value: Any) -> Any:
    """A copy in which YAML aliases share nothing: an override of one section must not change another."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def read_yaml(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a YAML file merged over those of its `base`. Raises RecipeError if something cannot be read."""
    if file.resolve() in above:
        raise RecipeError(f"{file} is its own base; leave that out, or name another file.")
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > 4 * _CHARACTERS:
            bulk, regular = counted(found.st_size, "byte"), stat.S_ISREG(found.st_mode)
            kind = f"it has {bulk}" if regular else "it is not a regular file"
            kind = "Is a directory" if stat.S_ISDIR(found.st_mode) else kind
            raise RecipeError(f"Cannot read the recipe {visible(file)}: {kind}. Give a YAML file.")
        content = _parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {file}: {error.strerror}. Give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not a text file in UTF-8; a recipe is a YAML file.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{visible(file)} is not valid YAML; fix it here: {_shown(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file} must hold fields like 'name: ...', but holds {type(content).__name__}.")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"{file}: 'base' is {base!r}, but must be the path of another recipe, relative to this one.")
    return merge(read_yaml(file.parent / base, (*above, file.resolve())), content)


def _shown(error: yaml.YAMLError) -> str:
    """A YAML error in at most five lines; the last ones give its position."""
    lines = visible_lines(error).split("\n")
    return "\n".join(line[:200] for line in lines[:5])


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `override`, section by section; a section of another `type` replaces the old one."""
    merged = dict(base)
    for key, value in override.items():
        old: Any = merged.get(key)
        same = (
            isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type")
        )
        merged[key] = merge(old, value) if same else value
    return merged


def fields_given(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Dotted name and value of every `--any.field value`. Raises RecipeError for anything else."""
    arguments, pairs = list(arguments), []
    while arguments:
        name = arguments.pop(0)
        if not name.startswith("--"):
            raise _unexpected(name)
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                then = f" ({visible(arguments[0])[:100]} is the next field)" if arguments else ""
                shown = visible(name)
                raise RecipeError(f"--{shown} has no value{then}; write --{shown} VALUE, or --{shown}=VALUE.")
            text = arguments.pop(0)
        if not text.strip():
            raise RecipeError(
                f"--{visible(name)} is empty; leave it out for the recipe's value, or write null for none."
            )
        try:
            pairs.append((name, _parse(text)))
        except yaml.YAMLError as error:
            why = f" ({error})" if isinstance(error, _Refused) else ""
            raise RecipeError(
                f"The value of --{visible(name)}, '{visible(text)[:200]}', is not valid YAML{why}."
            ) from error
    return pairs


def _unexpected(word: str) -> RecipeError:
    """The error for an argument that is neither a file nor a field."""
    near = f" Did you mean -{visible(word)[:100]}?" if re.match(r"-[A-Za-z_]", word) else ""
    return RecipeError(
        f"Unexpected argument '{visible(word)[:200]}'; write [RECIPE.yaml ...] --field value, like --train.bf16 true."
        + near
    )


def _override(section: Any, path: list[str], value: Any, name: str) -> None:
    """Set one field of a nested recipe. A new `type` drops the fields of the old one."""
    content = section
    for step, part in enumerate(path):
        key: Any = part
        if isinstance(content, list):
            if not part.isdigit() or int(part) >= len(content):
                raise RecipeError(f"--{name}: '{'.'.join(path[:step])}' is a list of {len(content)}; count from 0.")
            key = int(part)
        elif not isinstance(content, dict):
            raise RecipeError(f"--{name}: '{'.'.join(path[:step])}' holds {content!r}, which has no fields.")
        if step < len(path) - 1:
            if isinstance(content, dict) and content.get(key) is None:
                content[key] = {}
            content = content[key]
        else:
            last: Any = content
            if key == "type" and last.get("type") != value:
                last.clear()
            last[key] = value
