"""Prompt pools. A new method is one file here and one line in PROMPTS."""

from __future__ import annotations

from hf_cdl.prompts.base import PromptPool
from hf_cdl.prompts.coda import Coda
from hf_cdl.prompts.dualprompt import DualPrompt
from hf_cdl.prompts.kd_prompt import KDPrompt, KDPromptConfig
from hf_cdl.prompts.l2p import L2P

PROMPTS: dict[str, type[PromptPool]] = {
    "coda": Coda,
    "dualprompt": DualPrompt,
    "l2p": L2P,
}

__all__ = ["PROMPTS", "KDPrompt", "KDPromptConfig", "PromptPool"]
