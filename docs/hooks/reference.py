"""The reference pages of options and commands, from the code's own descriptions; if one is missing, the build ends."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from hf_cdl import CDLTrainingArguments, StreamConfig
from hf_cdl.backbones.lora import LoraOptions
from hf_cdl.commands.parsers import VERBS
from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.models.sessions import LaterSessions
from hf_cdl.prompts import PROMPTS, KDPromptConfig, MappingConfig
from hf_cdl.recipe.fields import CardRecipe, ModelRecipe, Recipe
from hf_cdl.training.arguments.table import ARGUMENTS, Used


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    for place, text in (("reference/options.md", options()), ("reference/commands.md", commands())):
        files.append(File.generated(config, place, content=text))
    return files


# ---- options ----

SECTIONS: dict[str, tuple[str, type, str]] = {
    "A recipe": ("", Recipe, "The top level of a file."),
    "data": ("data", StreamConfig, "The stream of tasks. Layouts of folders: [Your data](../guides/data.md)."),
    "teacher, student": ("student", ModelRecipe, "One model; both sections have the same fields."),
    "lora": ("student.lora", LoraOptions, "Low-rank adapters on the frozen backbone. They learn in sessions."),
    "later_sessions": ("student.later_sessions", LaterSessions, "Learning after the first session."),
    "kd_prompt": ("student.kd_prompt", KDPromptConfig, "KD token and KD prompts of `kdp`, `kd_token`, `kdp_labels`."),
    "mapping": ("student.mapping", MappingConfig, "How `prompt_mapping` maps the teacher's prompts to the student's."),
    "card": ("card", CardRecipe, "Facts that a run cannot know. You may change them at any time."),
}


def options() -> str:
    """The page of all fields of a recipe: name, what it may be, default, description."""
    parts = [_OPTIONS]
    for title, (_, kind, about) in SECTIONS.items():
        parts += [f"## {title}", about, _fields(kind)]
    for title, registry, where in (
        ("Prompts", PROMPTS, "prompt: {{type: {}}}"),
        ("Heads", HEADS, "head: {{type: {}}}"),
        ("Distillation terms", TERMS, "distill: [{{type: {}}}]"),
    ):
        parts.append(f"## {title}")
        for name, method in registry.items():
            parts += [f"### {name}", f"`{where.format(name)}`: {_purpose(method)}", _fields(method.config_class)]
    return "\n\n".join([*parts, *_training()]) + "\n"


_OPTIONS = """# Options of a recipe

You can set every field in a recipe, or on the command line by its dotted name: `--student.head.strength 100`. A field
without a default is required. This page is generated from the code."""


def _fields(kind: type, names: typing.Collection[str] | None = None) -> str:
    lines = ["| field | may be | default | |", "|---|---|---|---|"]
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if names is not None and field.name not in names:
            continue
        text = field.metadata.get("help")
        if not text:
            raise PluginError(f"{kind.__module__}.{kind.__qualname__}.{field.name} has no description (help).")
        lines.append(f"| `{field.name}` | {_kinds(hints[field.name])} | {_default(field)} | {_cell(text)} |")
    return "\n".join(lines)


def _kinds(hint: Any) -> str:
    """What a field may be, in words of YAML."""
    if typing.get_origin(hint) is typing.Annotated:
        return "section" if "dict" in str(hint.__origin__) else _kinds(hint.__origin__)
    origin, inner = typing.get_origin(hint), [part for part in typing.get_args(hint) if part is not ...]
    if origin is typing.Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin in (list, tuple):
        return f"list of {_kinds(inner[0])}".replace("of list", "of lists") if inner else "list"
    if origin is dict:
        return "section"
    if inner:
        return " or ".join(dict.fromkeys(_kinds(part) for part in inner))
    words = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", type(None): "null"}
    return words.get(hint, "section")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "–"
    made = field.default_factory is not dataclasses.MISSING
    value: Any = field.default_factory() if made else field.default  # type: ignore[misc]
    if dataclasses.is_dataclass(value):
        return "{}"
    value = (
        {None: "null", True: "true", False: "false"}.get(value, value)
        if not isinstance(value, (int, float, list, dict)) or isinstance(value, bool)
        else value
    )
    return f"`{list(value) if isinstance(value, tuple) else getattr(value, 'value', value)}`".replace("'", "")


def _purpose(method: type) -> str:
    """The first line of a method's docstring, else of its module's."""
    text = method.__doc__ or __import__(method.__module__, fromlist=["x"]).__doc__
    if not text:
        raise PluginError(f"{method.__module__}.{method.__qualname__} has no docstring.")
    return _cell(text.strip().split("\n\n")[0])


def _training() -> Iterator[str]:
    own = [name for name in CDLTrainingArguments.__annotations__ if isinstance(ARGUMENTS.get(name), Used)]
    yield "## train"
    yield "Training arguments of both models. Set those that differ in `teacher.train` and `student.train`."
    yield "Fields that hf_cdl adds, or whose default it changes:"
    yield _fields(CDLTrainingArguments, own)
    rest = [name for name, row in ARGUMENTS.items() if isinstance(row, Used) and name not in own]
    yield "Fields of transformers' `TrainingArguments` that work as described there:"
    yield ", ".join(f"`{name}`" for name in sorted({*rest} - {"output_dir"})) + "."
    yield "The others are refused:"
    refused = {name: row.why for name, row in ARGUMENTS.items() if not isinstance(row, Used)}
    reasons = dict.fromkeys(refused.values())
    lines = [
        f"| {', '.join(f'`{name}`' for name, why in refused.items() if why == reason)} | {_cell(reason)} |"
        for reason in reasons
    ]
    yield "\n".join(["| field | why, and what to do |", "|---|---|", *lines])


# ---- commands ----


def commands() -> str:
    """The page of all commands, from their argument parsers."""
    parts = ["# Commands", "`hf-cdl VERB`, or `python -m hf_cdl VERB`. This page is generated from `--help`."]
    parts.append("\n".join(["| verb | |", "|---|---|", *(f"| [{n}](#{n}) | {v.about} |" for n, v in VERBS.items())]))
    for name, verb in VERBS.items():
        parser = verb.parser(name)
        about, example = parser.description, (parser.epilog or "").removeprefix("example:").strip()
        if not about or not example:
            raise PluginError(f"hf-cdl {name} has no description, or no example.")
        parts += [
            f"## {name}",
            f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```",
            _cell(about, "\n"),
        ]
        parts += ["\n".join(["| argument | |", "|---|---|", *_arguments(parser, name)]), f"```bash\n{example}\n```"]
    return "\n\n".join(parts) + "\n"


def _arguments(parser: argparse.ArgumentParser, verb: str) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if not action.help:
            raise PluginError(f"hf-cdl {verb}: {action.dest} has no description (help).")
        metavar = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        words = [*action.option_strings[-1:], *([str(metavar)] if metavar else [])]
        yield f"| `{' '.join(words)}` | {_cell(action.help % {'default': action.default})} |"


def _cell(text: str, newline: str = " ") -> str:
    """Text in a table or paragraph: no line breaks, and no markup but code spans."""
    text = re.sub(r"[ \n]*\n(?!\n)(?<!\n\n)", " ", text.strip()) if newline == " " else text.strip()
    parts = text.split("`")
    plain = parts[::2] if len(parts) % 2 else [text]
    escaped = [re.sub(r"(?<!\\)([|<>*_\[\]])", r"\\\1", part) for part in plain]
    code = [part.replace("|", r"\|") for part in parts[1::2]] if len(parts) % 2 else []
    return escaped[0] + "".join(f"`{inside}`{after}" for inside, after in zip(code, escaped[1:], strict=True))
