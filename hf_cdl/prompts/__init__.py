"""Prompt pools. A new method is one file here and one line in PROMPTS."""

from __future__ import annotations

from hf_cdl.prompts.base import PromptPool
from hf_cdl.prompts.coda import Coda
from hf_cdl.prompts.kd_prompt import KDPrompt, KDPromptConfig

PROMPTS: dict[str, type[PromptPool]] = {
    "coda": Coda,
}

__all__ = ["PROMPTS", "KDPrompt", "KDPromptConfig", "PromptPool"]
