"""A tiny config of every backbone family; a new family of hf_cdl.backbones.families needs a row here, too.

Every test over all families is parametrised by TINY or by FAMILIES, which have the same rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, set_seed

from hf_cdl.backbones.loading import build_backbone

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# Family -> config fields in addition to SIZES.
TINY: dict[str, dict[str, Any]] = {
    "vit": {"intermediate_size": 64},
    "deit": {"intermediate_size": 64},
    "vit_msn": {"intermediate_size": 64},
    "vit_mae": {"intermediate_size": 64},
    "ijepa": {"intermediate_size": 64},
    "beit": {"intermediate_size": 64},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2},
    "dinov3_vit": {"intermediate_size": 64},
    "clip_vision_model": {"intermediate_size": 64},
}


def family_config(kind: str, **fields: Any) -> Any:
    """The tiny config of a family."""
    return AutoConfig.for_model(kind, **SIZES, **TINY[kind], **fields)


def stored_backbone(folder: Path, kind: str = "vit", **fields: Any) -> Path:
    """Make a backbone folder with weights large enough that every part matters."""
    set_seed(3)
    model = build_backbone(family_config(kind, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
