"""Code saved with a checkpoint, so that `trust_remote_code` loads it where hf_cdl is not installed.

transformers follows a module's relative imports within its own folder. So the modules that the model needs are copied
next to the weights: hf_cdl/prompts/coda.py becomes hf_cdl_prompts_coda.py, and in every copy `from
hf_cdl.prompts.coda import Coda` becomes `from .hf_cdl_prompts_coda import Coda`; nothing else changes.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS

ENTRY = "models.modeling_cdl"
_IMPORT = re.compile(r"^( *)from hf_cdl\.([\w.]+) import (\w+|\()( as \w+)?", re.MULTILINE)
_PACKAGE = Path(__file__).parent.parent


def put_code(config: Any, folder: Path) -> None:
    """Write the code into a checkpoint folder and reference it in the config, if `save_code` is set.

    Call this before the config is saved. Raises ValueError if part of the code is a plugin's.
    """
    check_code(config)
    if not config.save_code:
        vars(config).pop("auto_map", None)  # left over from a checkpoint with code
        return
    entry = _flat(ENTRY)
    config.auto_map = {
        "AutoConfig": f"{entry}.CDLConfig",
        "AutoModelForImageClassification": f"{entry}.CDLForImageClassification",
    }
    folder.mkdir(parents=True, exist_ok=True)
    todo, written = {ENTRY}, set[str]()
    while todo:
        module = todo.pop()
        source = _file(module).read_text(encoding="utf-8")
        head = (
            f"# hf_cdl/{_file(module).relative_to(_PACKAGE).as_posix()} of hf_cdl {version('hf-cdl')}, Apache-2.0.\n"
        )
        copy = folder / f"{_flat(module)}.py"
        copy.write_text(head + _IMPORT.sub(_relative, source), encoding="utf-8")
        written.add(module)
        todo |= {_imported(found) for found in _IMPORT.finditer(source)} - written


def check_code(config: Any) -> None:
    """Raise ValueError if checkpoints should include the code (`save_code`), but part of it comes from a plugin."""
    pools = (config.prompt, (config.teacher_pool or {}).get("prompt"))
    heads = (config.head, config.first_session)
    sections = [(registry, s) for registry, of in ((PROMPTS, pools), (HEADS, heads)) for s in of if s]
    if config.save_code and (added := [s["type"] for known, s in sections if s["type"] in known.added]):
        raise ValueError(
            f"save_code is true, but the code of {', '.join(added)} is a plugin's, which is not copied beside the "
            "weights. Set save_code to false; who loads the model imports the plugin first."
        )


def _file(module: str) -> Path:
    path = _PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _flat(module: str) -> str:
    return f"hf_cdl_{module.replace('.', '_')}"


def _imported(found: re.Match[str]) -> str:
    """The module that `from hf_cdl.module import name` loads: `module`, or its submodule `name`."""
    inner = f"{found[2]}.{found[3]}"
    return inner if found[3] != "(" and _file(inner).is_file() else found[2]


def _relative(found: re.Match[str]) -> str:
    module = _imported(found)
    if module != found[2]:
        return f"{found[1]}from . import {_flat(module)}{found[4] or f' as {found[3]}'}"
    return f"{found[1]}from .{_flat(module)} import {found[3]}"
