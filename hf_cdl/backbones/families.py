"""The table of backbone families: whatever differs between them is a field of a row, and nothing else knows a family.

A family belongs here if its encoder hands keywords down to the attention interface (so that prefixes arrive) and its
tokens attend globally. Each was checked against hand-written attention; families whose encoder swallows keywords or
whose attention is windowed (SigLIP, AIMv2, YOLOS, Data2Vec, Swin, timm wrappers) would silently ignore the prompts and
are refused. A new family is a row here and one in tests/tiny_families.py.
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


def _pixels_alone(config: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
    return {}


def _ascending_noise(config: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
    """ViT-MAE would mask and shuffle patches: ascending noise keeps them all, in order."""
    (height, width), batch = pair(config.patch_size), pixel_values.shape[0]
    count = (pixel_values.shape[2] // height) * (pixel_values.shape[3] // width)
    noise = torch.arange(count, device=pixel_values.device, dtype=pixel_values.dtype)
    return {"noise": noise.expand(batch, -1)}


@dataclass(frozen=True)
class Family:
    """How to reach into one family of backbones.

    `layers`: path of its layer list; `attention`: name of the attention module in a layer.
    `has_cls`: the sequence starts with a CLS token; `extra_tokens`: how many tokens of its own stand between that and
    the patches, or the config's field that says so.
    `feature`: (config, final tokens (B, N, D)) -> (B, D) of an image; `norm`: backbone -> a final norm that its own
    forward leaves out, or None.
    `inputs`: (config, pixel values) -> inputs beside the pixels.
    `token_at`: index at which an extra token is put into the sequence; `position_bias`: fields of the config that ask
    for a relative position bias, a table over its own tokens that has no place for another.
    `any_size`: takes any image size that is a multiple of its patch size; `resizes`: its learnt positions can be
    interpolated to another size, for good.
    `random_positions`: fields of the config that change positions at random in training.
    `init`: arguments of the model class (poolers are not used).
    `part_of`: types of composite configs that hold one of this family, and under which name.
    """

    layers: str
    attention: str = "attention"
    has_cls: bool = True
    extra_tokens: int | str = 0
    feature: Callable[[Any, torch.Tensor], torch.Tensor] = _cls_token
    norm: Callable[[Any], nn.Module | None] = _no_norm
    inputs: Callable[[Any, torch.Tensor], dict[str, Any]] = _pixels_alone
    token_at: int = -1
    position_bias: tuple[str, ...] = ()
    any_size: bool = False
    resizes: bool = False
    random_positions: tuple[str, ...] = ()
    init: dict[str, Any] = field(default_factory=dict)
    part_of: dict[str, str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "vit": Family("layers", resizes=True, init={"add_pooling_layer": False}),
    "deit": Family("layers", extra_tokens=1, init={"add_pooling_layer": False}),  # the distillation token
    "vit_msn": Family("layers"),
    "vit_mae": Family("layers", inputs=_ascending_noise),
    "ijepa": Family("layers", has_cls=False, feature=_mean),
    "beit": Family(
        "layers",
        feature=_beit_feature,
        norm=_beit_norm,
        position_bias=("use_relative_position_bias", "use_shared_relative_position_bias"),
    ),
    "dinov2": Family("encoder.layer", any_size=True),
    "dinov2_with_registers": Family("encoder.layer", extra_tokens="num_register_tokens", any_size=True),
    "dinov3_vit": Family(
        "model.layer",
        extra_tokens="num_register_tokens",
        token_at=1,  # it rotates the last tokens as patches: an extra one goes right behind CLS
        any_size=True,
        random_positions=("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
    ),
    "clip_vision_model": Family(
        "encoder.layers", attention="self_attn", norm=_post_norm, part_of={"clip": "vision_config"}
    ),
}


def family(config: PreTrainedConfig) -> Family:
    """The family of a backbone config. Raises ValueError for one that would ignore the prompts."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"A backbone of type '{config.model_type}' is not supported: prefixes would not reach its attention "
            f"layers. Supported types: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[config.model_type]


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the backbone that a composite config holds; any other config itself."""
    for row in FAMILIES.values():
        if config.model_type in row.part_of:
            return getattr(config, row.part_of[config.model_type])
    return config


def layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers."""
    return attrgetter(family(backbone.config).layers)(backbone)


def final_norm(backbone: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Tokens (..., D) after the final norm, where the backbone's own forward left it out."""
    norm = family(backbone.config).norm(backbone)
    return hidden if norm is None else norm(hidden)


def pool(backbone: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(B, D) feature of images from final tokens (B, N, D), after the final norm."""
    return final_norm(backbone, family(backbone.config).feature(backbone.config, hidden))


def extra_inputs(config: PreTrainedConfig, pixel_values: torch.Tensor) -> dict[str, Any]:
    """Inputs beside the pixels."""
    return family(config).inputs(config, pixel_values)


def num_extra_tokens(config: PreTrainedConfig) -> int:
    """Tokens of the family's own between CLS and patches: registers, or a distillation token."""
    count = family(config).extra_tokens
    return getattr(config, count) if isinstance(count, str) else count


def check_extra_token(config: PreTrainedConfig, what: str) -> None:
    """Raise ValueError if no further token can be put into the sequence of this backbone; `what` it would be."""
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


def pair(size: Any) -> tuple[int, int]:
    """Height and width, where one number may stand for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
