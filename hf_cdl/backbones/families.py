"""Table of backbone families: all their differences are fields of a row, so no other code is family-specific.

A family belongs here if its encoder passes keyword arguments down to the attention interface (so that prefixes arrive)
and its tokens attend globally. Each was checked against hand-written attention; families whose encoder swallows
keyword arguments or whose attention is windowed (SigLIP, AIMv2, YOLOS, Data2Vec, Swin, timm wrappers) would silently
ignore the prompts and are refused. A new family needs a row here and one in tests/tiny_families.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def _cls_token(config: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0]


def _mean(config: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens.mean(dim=1)


def _beit_feature(config: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 1:].mean(dim=1) if config.use_mean_pooling else tokens[:, 0]


def _no_norm(backbone: Any) -> nn.Module | None:
    return None


def _beit_norm(backbone: Any) -> nn.Module | None:
    return backbone.pooler.layernorm if backbone.config.use_mean_pooling else None


def _post_norm(backbone: Any) -> nn.Module | None:
    return backbone.post_layernorm


def _rotated(attention: Any, key: torch.Tensor, positions: Any) -> tuple[torch.Tensor, Any]:
    """DINOv3's keys (B, N, D), rotated at the patches, and the positions of a sequence without any."""
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    heads = key.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    rotated = apply_rotary_pos_emb(heads, heads, *positions)[1]
    return rotated.transpose(1, 2).flatten(2), tuple(part[..., :0, :] for part in positions)


def _pixels_alone(config: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
    return {}


def _ascending_noise(config: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
    """ViT-MAE would shuffle patches; ascending noise keeps their order."""
    (height, width), batch = pair(config.patch_size), pixel_values.shape[0]
    count = (pixel_values.shape[2] // height) * (pixel_values.shape[3] // width)
    noise = torch.arange(count, device=pixel_values.device, dtype=pixel_values.dtype)
    return {"noise": noise.expand(batch, -1)}


@dataclass(frozen=True)
class Family:
    """How to access the internals of a backbone family.

    `layers`: path of its layer list; `attention` and `first_norm`: names of the attention module in a layer, which has
    `k_proj` and `v_proj`, and of the norm before it.
    `has_cls`: whether the sequence starts with a CLS token; `extra_tokens`: number of the family's own tokens between
    CLS and the patches, or the config field that holds it.
    `feature`: (config, final tokens (B, N, D)) -> image features (B, D); `norm`: backbone -> a final norm that its
    forward leaves out, or None.
    `inputs`: (config, pixel values) -> further inputs.
    `token_at`: index at which an extra token is inserted into the sequence; `position_bias`: config fields that enable
    a relative position bias, a table over the backbone's own tokens with no entry for another.
    `any_size`: takes any image size that is a multiple of the patch size; `resizes`: its learnt position embeddings
    can be permanently interpolated to another size.
    `rotate`: (attention, keys, positions) -> keys with rotary positions, and the positions of CLS and a KD token.
    `whole`: config fields that let all patches through, whatever a checkpoint's config says.
    `random_positions`: config fields that randomise positions in training.
    `init`: arguments of the model class (poolers are not used).
    `part_of`: composite config types that contain a config of this family, and the field that holds it.
    """

    layers: str
    attention: str = "attention"
    first_norm: str = "layernorm_before"
    has_cls: bool = True
    extra_tokens: int | str = 0
    feature: Callable[[Any, torch.Tensor], torch.Tensor] = _cls_token
    norm: Callable[[Any], nn.Module | None] = _no_norm
    inputs: Callable[[Any, torch.Tensor], dict[str, Any]] = _pixels_alone
    token_at: int = -1
    position_bias: tuple[str, ...] = ()
    any_size: bool = False
    resizes: bool = False
    rotate: Callable[[Any, torch.Tensor, Any], tuple[torch.Tensor, Any]] | None = None
    whole: dict[str, Any] = field(default_factory=dict)
    random_positions: tuple[str, ...] = ()
    init: dict[str, Any] = field(default_factory=dict)
    part_of: dict[str, str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "vit": Family("layers", resizes=True, init={"add_pooling_layer": False}),
    "deit": Family("layers", extra_tokens=1, init={"add_pooling_layer": False}),  # the distillation token
    "vit_msn": Family("layers"),
    "vit_mae": Family("layers", inputs=_ascending_noise, whole={"mask_ratio": 0.0}),
    "ijepa": Family("layers", has_cls=False, feature=_mean),
    "beit": Family(
        "layers",
        feature=_beit_feature,
        norm=_beit_norm,
        position_bias=("use_relative_position_bias", "use_shared_relative_position_bias"),
    ),
    "dinov2": Family("encoder.layer", first_norm="norm1", any_size=True),
    "dinov2_with_registers": Family(
        "encoder.layer", first_norm="norm1", extra_tokens="num_register_tokens", any_size=True
    ),
    "dinov3_vit": Family(
        "model.layer",
        first_norm="norm1",
        extra_tokens="num_register_tokens",
        token_at=1,  # RoPE treats the last tokens as patches: an extra one goes right after CLS
        any_size=True,
        rotate=_rotated,
        random_positions=("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
    ),
    "clip_vision_model": Family(
        "encoder.layers",
        attention="self_attn",
        first_norm="layer_norm1",
        norm=_post_norm,
        part_of={"clip": "vision_config"},
    ),
}


def family(config: PreTrainedConfig) -> Family:
    """Return the family of a backbone config. Raises ValueError for one that would ignore the prompts."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"A backbone of type '{config.model_type}' is not supported: prefixes would not reach its attention "
            f"layers. Supported types: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[config.model_type]


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the backbone config inside a composite config; any other config is returned as is."""
    for row in FAMILIES.values():
        if config.model_type in row.part_of:
            return getattr(config, row.part_of[config.model_type])
    return config


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """Return the transformer layers."""
    return attrgetter(family(backbone.config).layers)(backbone)


def final_norm(backbone: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Apply the final norm to tokens (..., D) if the backbone's forward leaves it out."""
    norm = family(backbone.config).norm(backbone)
    return hidden if norm is None else norm(hidden)


def pool(backbone: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Pool final tokens (B, N, D) into image features (B, D), after the final norm."""
    return final_norm(backbone, family(backbone.config).feature(backbone.config, hidden))


def patch_mean(backbone: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Mean (B, D) of the patches' final tokens, of tokens (B, N, D), after the final norm."""
    return final_norm(backbone, hidden[:, 1 + num_extra_tokens(backbone.config) :].mean(dim=1))


def adds_patch_mean(config: PreTrainedConfig) -> bool:
    """Whether the mean of the patches adds something: this backbone's feature may already be that mean."""
    row = family(config)
    return row.feature is _cls_token or (row.has_cls and not config.use_mean_pooling)


def check_patch_mean(config: PreTrainedConfig) -> None:
    """Raise ValueError if the mean of the patches adds nothing to this backbone's feature."""
    if not adds_patch_mean(config):
        raise ValueError(
            f"patch_mean would have no effect: the feature of this {config.model_type} backbone is the mean of its "
            "patches already. Set patch_mean to false."
        )


def extra_inputs(config: PreTrainedConfig, pixel_values: torch.Tensor) -> dict[str, Any]:
    """Return the model inputs other than pixels."""
    return family(config).inputs(config, pixel_values)


def num_extra_tokens(config: PreTrainedConfig) -> int:
    """Number of the family's own tokens between CLS and patches: registers, or a distillation token."""
    count = family(config).extra_tokens
    return getattr(config, count) if isinstance(count, str) else count


def check_extra_token(config: PreTrainedConfig, what: str) -> None:
    """Raise ValueError if no token can be added to this backbone's sequence; `what`: the token, for the message."""
    if any(getattr(config, name) for name in family(config).position_bias):
        raise ValueError(
            f"A {config.model_type} backbone with a relative position bias has no place for {what}: the bias is a "
            "table over its own tokens. Use another backbone, or a method that adds no token to the sequence."
        )


def check_image_size(config: PreTrainedConfig, size: tuple[int, int]) -> None:
    """Raise ValueError unless the backbone takes images of `size` = (height, width) in pixels."""
    patch, image = pair(config.patch_size), pair(config.image_size)
    if family(config).any_size:
        if any(side % step for side, step in zip(size, patch, strict=True)):
            raise ValueError(f"Image size {size} is not a multiple of the backbone's patch size {patch}.")
    elif size != image:
        raise ValueError(
            f"The image processor gives images of {size[0]}x{size[1]} pixels, but the backbone ({config.model_type}) "
            f"was trained on {image[0]}x{image[1]}. Set the processor's size to {image[0]}x{image[1]}, or choose a "
            "backbone of that resolution."
        )


def resize(vit: Any, size: int) -> None:
    """Adapt a ViT to images of `size` pixels a side. Raises ValueError if that is not a multiple of its patch size."""
    patch = vit.config.patch_size
    if size % patch:
        raise ValueError(
            f"--size is {size}, which is not a multiple of the backbone's patch size {patch}. Give one that is, as "
            f"{max(1, round(size / patch)) * patch}."
        )
    tokens = torch.empty(1, 1 + (size // patch) ** 2, vit.config.hidden_size)
    with torch.no_grad():
        positions = vit.embeddings.interpolate_pos_encoding(tokens, size, size)
    vit.embeddings.position_embeddings = torch.nn.Parameter(positions)
    vit.config.image_size = size
    vit.embeddings.image_size = (size, size)


def pair(size: Any) -> tuple[int, int]:
    """Height and width; a single number stands for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
