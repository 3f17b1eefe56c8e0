"""Prompt pools. A new method is one file and one name in PROMPTS: here, or `PROMPTS.register` in a plugin."""

from __future__ import annotations

from typing import Any

from hf_cdl.checked import build_fields, check_size
from hf_cdl.prompts.apt import APT
from hf_cdl.prompts.base import PromptPool
from hf_cdl.prompts.coda import Coda
from hf_cdl.prompts.dualprompt import DualPrompt
from hf_cdl.prompts.kd_prompt import KDPrompt, KDPromptConfig
from hf_cdl.prompts.l2p import L2P
from hf_cdl.prompts.mapping import MappingConfig, PromptMapping
from hf_cdl.prompts.vpt import VPT
from hf_cdl.registry import Registry

PROMPTS: Registry[PromptPool] = Registry(
    "PROMPTS",
    "prompt pool",
    PromptPool,
    {
        "coda": Coda,
        "dualprompt": DualPrompt,
        "l2p": L2P,
        "apt": APT,
        "vpt": VPT,
    },
    fields=("layers",),
    bare=("none",),
)


def build_pool(prompt: dict[str, Any], hidden_size: int, query_size: int, num_layers: int) -> PromptPool | None:
    """Build the prompt pool of a config's `prompt` section; None for type `none`.

    Raises ValueError for an unknown type or field, and for a pool that would not fit in memory.
    """
    kind, fields = PROMPTS.pick(prompt, "prompt")
    pool = PROMPTS.get(kind)
    if pool is None:
        if fields:
            raise ValueError(f"Prompt type 'none' has no field {', '.join(map(str, fields))}; it has none.")
        return None
    config = build_fields(pool.config_class, fields, f"Prompt type '{kind}'")

    def with_a_task() -> PromptPool:
        made = pool(config, hidden_size, query_size, num_layers)
        made.add_task()
        return made

    check_size(f"A prompt pool of type '{kind}'", with_a_task)
    return pool(config, hidden_size, query_size, num_layers)


__all__ = ["PROMPTS", "KDPrompt", "KDPromptConfig", "MappingConfig", "PromptMapping", "PromptPool", "build_pool"]
