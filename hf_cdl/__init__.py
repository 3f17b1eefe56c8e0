"""hf_cdl: Continual Distillation Learning for the Hugging Face ecosystem."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForImageClassification

from hf_cdl.config import CDLConfig
from hf_cdl.models.modeling_cdl import CDLForImageClassification

if TYPE_CHECKING:
    from hf_cdl.data import StreamConfig, TaskStream
    from hf_cdl.training.arguments import CDLTrainingArguments
    from hf_cdl.training.trainer import CDLTrainer

# Loaded when first used, so that a deployed student costs no more than transformers itself.
_LAZY = {
    "CDLTrainer": "hf_cdl.training.trainer",
    "CDLTrainingArguments": "hf_cdl.training.arguments",
    "StreamConfig": "hf_cdl.data",
    "TaskStream": "hf_cdl.data",
}

__all__ = [
    "CDLConfig",
    "CDLForImageClassification",
    "CDLTrainer",
    "CDLTrainingArguments",
    "StreamConfig",
    "TaskStream",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hf_cdl' has no attribute {name!r}")


AutoConfig.register("cdl", CDLConfig, exist_ok=True)
AutoModelForImageClassification.register(CDLConfig, CDLForImageClassification, exist_ok=True)
