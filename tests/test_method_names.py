"""A method and a backbone family are named in their own room alone: nothing else treats one of them as special.

Looked for are string literals that are such a name, or that say `type: name`, in the source of the package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from test_imports import MODULES

from hf_cdl.backbones.families import FAMILIES
from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS

ROOMS = {
    "heads": [*HEADS],
    "prompts": [*PROMPTS],
    "distill": [*TERMS],
    "backbones": [*FAMILIES, *(kind for row in FAMILIES.values() for kind in row.part_of)],
}
# (Module, name) -> why it may name it. One that is no longer named goes out.
EXCEPTIONS = {
    ("config", "linear"): "the default of the field `head`",
    ("config", "vit"): "the default that transformers asks of a nested config",
    ("hub.card.text", "linear"): "a card calls the default head `a head`",
    ("recipe.fields", "linear"): "the default of the field `head`, and the baseline linear_head",
    ("recipe.fields", "ncm"): "the baseline nearest_class_mean",
    ("recipe.checks", "linear"): "the default of the field `head`, and an example",
    ("recipe.checks", "ridge"): "an example",
    ("training.checking", "ridge"): "an example, where no head may be imported",
    ("training.arguments.table", "label_smoothing"): "what to write in the place of an argument of transformers",
}


def named(source: str, room: str) -> Iterator[str]:
    """The methods and families of other rooms whose names stand in a source as literals; not in its docstrings."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            for name in (name for own, names in ROOMS.items() if own != room for name in names):
                if node.value == name or re.search(rf"type\W+{name}\b", node.value):
                    yield name


def test_no_other_room_names_a_method_or_a_family() -> None:
    found = {
        (module, name) for module, file in MODULES.items() for name in named(file.read_text(), module.split(".")[0])
    }
    assert found == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    "source",
    [
        'head["type"] == "ridge"',
        "raise ValueError(f\"{role}: give {{'type': 'ridge'}}\")",
        'warn("use head: {type: ridge}")',
        'kind in ("cosine", "ridge")',
        'config.model_type == "vit_mae"',
    ],
)
def test_a_name_is_found(source: str) -> None:
    assert {"ridge", "vit_mae"} & {*named(source, "training")}
    assert not [*named(f'"""{source.replace(chr(34), "")}"""', "training")], "a docstring may"
