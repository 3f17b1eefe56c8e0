"""hf_cdl: Continual Distillation Learning for the Hugging Face ecosystem."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_cdl.config import CDLConfig
    from hf_cdl.data import StreamConfig, TaskStream
    from hf_cdl.models.modeling_cdl import CDLForImageClassification
    from hf_cdl.training.arguments import CDLTrainingArguments
    from hf_cdl.training.trainer import CDLTrainer

__version__ = "0.1.0"

# Loaded on first use, so that a deployed student costs no more than transformers itself.
_LAZY = {
    "CDLConfig": "hf_cdl.config",
    "CDLForImageClassification": "hf_cdl.models.modeling_cdl",
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


def register() -> None:
    """Register the model type with transformers: on `import hf_cdl`, in a command after parsing its arguments."""
    from transformers import AutoConfig, AutoModelForImageClassification

    from hf_cdl.config import CDLConfig
    from hf_cdl.models.modeling_cdl import CDLForImageClassification

    AutoConfig.register("cdl", CDLConfig, exist_ok=True)
    AutoModelForImageClassification.register(CDLConfig, CDLForImageClassification, exist_ok=True)


def _is_command() -> bool:
    """Whether this process is a command, which parses its arguments before slow imports."""
    if sys.argv[:1] == ["-m"]:  # sys.argv[0] is this until python -m has found its module
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "hf_cdl"
    return "hf_cdl_command" in sys.modules


if not _is_command():
    register()
