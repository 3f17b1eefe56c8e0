"""Prompt pools. A new method is one file here and one line in PROMPTS."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_cdl.prompts.apt import APT
from hf_cdl.prompts.base import PromptPool
from hf_cdl.prompts.coda import Coda
from hf_cdl.prompts.dualprompt import DualPrompt
from hf_cdl.prompts.kd_prompt import KDPrompt, KDPromptConfig
from hf_cdl.prompts.l2p import L2P
from hf_cdl.prompts.mapping import MappingConfig, PromptMapping

PROMPTS: dict[str, type[PromptPool]] = {
    "coda": Coda,
    "dualprompt": DualPrompt,
    "l2p": L2P,
    "apt": APT,
}


def build_pool(prompt: dict[str, Any], hidden_size: int, query_size: int, num_layers: int) -> PromptPool | None:
    """The prompt pool of a config's `prompt` section; None for type `none`. Raises ValueError for an unknown one."""
    fields = dict(prompt)
    kind = fields.pop("type")
    if kind == "none":
        return None
    if kind not in PROMPTS:
        raise ValueError(f"Unknown prompt type '{kind}'; allowed: none, {', '.join(PROMPTS)}.")
    pool = PROMPTS[kind]
    known = [f.name for f in dataclasses.fields(pool.config_class)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"Prompt type '{kind}' has no field {', '.join(unknown)}; it has {', '.join(known)}.")
    return pool(pool.config_class(**fields), hidden_size, query_size, num_layers)


__all__ = ["PROMPTS", "KDPrompt", "KDPromptConfig", "MappingConfig", "PromptMapping", "PromptPool", "build_pool"]
