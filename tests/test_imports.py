"""Allowed imports between modules, checked in the source, including those in functions or for type checking only."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_cdl"

# Part of the package -> the parts it may import, besides its own (within prompts and distill see below).
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "checked": {"counted"},
    "registry": {"checked"},
    "labels": {"counted", "checked"},
    "escape": set(),
    "counted": set(),
    "places": set(),
    "unknown": {"checked", "labels"},
    "serving": {"types", "data.images", "unknown"},
    "config": {"counted", "types", "checked", "labels", "serving"},
    "data": {"counted", "types", "escape"},
    "backbones": {"counted", "types", "checked"},
    "prompts": {"counted", "types", "checked", "registry"},
    "heads": {"counted", "types", "checked", "registry"},
    "distill": {"counted", "types", "checked", "registry", "prompts.mapping"},
    "models": {"counted", "types", "checked", "labels", "config", "data", "backbones", "prompts", "heads", "distill"},
    "runs": {"counted", "types", "escape", "data.benchmarks"},
    "training": {"counted", "types", "data", "distill", "runs"},
    "hub": {"counted", "types", "escape", "places", "runs", "data.benchmarks"},
    "recipe": {
        "counted",
        *("types", "checked", "escape", "places", "config", "data", "backbones", "prompts", "heads", "distill"),
        *("models", "registry", "training.arguments"),
    },
    "export": {"counted", "backbones", "data", "models"},
    "inference": {
        "counted",
        *("types", "checked", "escape", "places", "data", "backbones", "models", "runs", "training", "hub", "recipe"),
        "unknown",
    },
}
ANYTHING = {"__main__", "commands", "compare"}
"""Parts that stand on top: they may import all, and no other part imports them."""
# In these, a method is one file that imports the shared files, but no other method. Their __init__ may import all.
SHARED = {
    "prompts": {"base", "components"},
    "distill": {"objective", "kd_head", "stages", "prompt_blocks", "prompt_path"},
}


def module_name(file: Path, package: Path = PACKAGE) -> str:
    """`prompts.coda` for prompts/coda.py, `tasks` for tasks/__init__.py, `__init__` for the package's own."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


SPACE = PACKAGE / "commands" / "space"
"""No part of the package: files of a Space, where the package may be missing."""
MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py")) if SPACE not in file.parents}


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names of every import anywhere in the source; `from a import b` gives a.b."""
    here = ["hf_cdl", *module.split(".")]
    package = here if is_package else here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            yield str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else "hf_cdl"


def target(name: str) -> str:
    """The module of the package that a dotted name below `hf_cdl` lies in; `__init__` for its public names."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    part = module.split(".")[0]
    wrong = []
    for name in imported(source, module, is_package):
        if name.split(".")[0] in ("tests", "recipes", "conftest"):
            wrong.append(f"{module} imports {name}: the package stands alone")
        if name.split(".")[0] != "hf_cdl":
            continue
        to = target(name)
        if to.split(".")[0] == part:
            siblings = SHARED.get(part)
            if siblings is not None and not is_package and to.removeprefix(f"{part}.") not in siblings:
                wrong.append(f"{module} imports {to}: a method imports only {sorted(siblings)} of {part}/")
        elif part not in ANYTHING and not any(
            to == allowed or to.startswith(f"{allowed}.") for allowed in ALLOWED[part]
        ):
            wrong.append(f"{module} imports {to}: {part} may import only {sorted(ALLOWED[part])}")
    return wrong


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_module_imports_what_it_may(module: str):
    assert module.split(".")[0] in ALLOWED.keys() | ANYTHING, f"{module}: say in ALLOWED what this new part may import"
    file = MODULES[module]
    assert violations(module, file.read_text(), file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("types", "from hf_cdl.config import CDLConfig"),
        ("config", "from hf_cdl import CDLTrainer"),
        ("runs.metrics", "def f():\n    import hf_cdl.training.trainer"),
        ("heads.linear", "from ..tasks import TaskStream"),
        ("heads.linear", "import importlib\nimportlib.import_module('hf_cdl.training.trainer')"),
        ("prompts.coda", "from .kd_prompt import KDPrompt"),
        ("prompts.coda", "from hf_cdl.prompts import PROMPTS"),
        ("distill.kd", "from hf_cdl.prompts.coda import Coda"),
        ("models.classifier", "from hf_cdl.recipe import Recipe"),
        (
            "training.trainer",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_cdl.models import backbone",
        ),
        ("runs.run", "from recipes.train import main"),
        ("compare.worker", "from recipes.train import main"),
        ("hub.push", "from hf_cdl.commands import stopping"),
        ("recipe.build", "from hf_cdl.compare.spec import Spec"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str):
    assert len(violations(module, source)) == 1


def test_the_package_loads_no_more_than_transformers_own_models():
    """`import hf_cdl` serves a deployed student: it loads transformers' own model classes, no data, no training."""
    code = """
import json, sys
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
before = set(sys.modules)
import hf_cdl
after = set(sys.modules)
names = {name: getattr(hf_cdl, name).__module__ for name in hf_cdl.__all__}
print(json.dumps([sorted(after - before), sorted(after), names]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added, loaded, names = json.loads(done.stdout)
    heavy = {"datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "peft", "transformers.trainer"}
    assert heavy.isdisjoint(loaded)
    assert {"hf_cdl.data", "hf_cdl.training.trainer", "hf_cdl.runs.run", "hf_cdl.recipe"}.isdisjoint(loaded)
    assert [name for name in added if not name.startswith(("hf_cdl", "transformers."))] == []
    assert names["TaskStream"] == "hf_cdl.data.stream" and names["CDLTrainer"] == "hf_cdl.training.trainer"


def test_what_the_package_imports_is_installed_with_it():
    """Named in pyproject.toml, or needed by a package that is: tools of development hide what is missing."""
    named = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    own = requires("hf-cdl") or []
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in own}
    needed = {re.split(r"[^\w-]", line)[0].lower() for line in own if "extra ==" not in line}
    for package in list(needed):
        needed |= {re.split(r"[^\w-]", line)[0].lower() for line in requires(package) or [] if "extra ==" not in line}
    top, inner = set[str](), set[str]()
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text())
        everywhere = imported(file.read_text(), module, file.name == "__init__.py")
        inner |= {name.split(".")[0] for name in everywhere}
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            top |= {name.split(".")[0] for name in names}
    known = {*sys.stdlib_module_names, "hf_cdl", "app"}  # app: of the Space
    missing = {name for name in top - known if named.get(name, name.replace("_", "-")).lower() not in needed}
    assert not missing, f"imported by hf_cdl, but not installed with it: {sorted(missing)}"
    lazy = {named.get(name, name.replace("_", "-")).lower() for name in inner - known}
    assert lazy - needed - declared <= {"trackio", "wandb", "tensorboard"}
