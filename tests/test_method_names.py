"""Methods and backbone families are named only in their own subpackage: no other code treats one as special.

The test searches the package's source for string literals that are such a name, or that contain `type: name`.
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
# (Module, name) -> why the module may use the name. Remove entries that are no longer needed.
EXCEPTIONS = {
    ("config", "linear"): "the default of the field `head`",
    ("config", "vit"): "the default that transformers asks of a nested config",
    ("hub.card.text", "linear"): "a card calls the default head `a head`",
    ("models.sessions", "linear"): "a map of features, which is linear",
    ("recipe.fields", "linear"): "the default of the field `head`, and the baseline linear_head",
    ("recipe.fields", "ncm"): "the baseline nearest_class_mean",
    ("recipe.fields", "ridge"): "the baseline ridge_head",
    ("training.checking", "ridge"): "an example, where no head may be imported",
    ("training.arguments.table", "label_smoothing"): "what to write in the place of an argument of transformers",
}


def named(source: str, room: str) -> Iterator[str]:
    """Methods and families of other subpackages that are named in a source's literals, docstrings excluded."""
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
