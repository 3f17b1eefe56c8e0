"""Self-attention with extra raw keys and values: attention functions registered with transformers.

A backbone passes the keyword argument `prefix` (layer number -> list of KV) down to its attention interface; the
registered functions `prefix_sdpa` and `prefix_eager` concatenate the layer's prefixes to its own keys and values and
then attend as usual. Prefixes bypass k_proj and v_proj (prefix tuning as in DualPrompt, arXiv 2204.04799, Sec. 4.2).
No module is patched, and keyword arguments survive gradient checkpointing, torch.compile and torch.export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_cdl.types import KV

IMPLEMENTATIONS = ("sdpa", "eager")


def prefix_sdpa(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any):
    """Scaled-dot-product attention over the keys and values (B, H, N, d) of the layer and its prefixes."""
    slow = key.device.type == "cpu" and key.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if slow and mask is None:
        return prefix_eager(module, query, key, value, mask, **kwargs)[0], None  # the fused backward is far slower
    key, value, pad = _extend(module, key, value, kwargs.pop("prefix", None))
    bias = kwargs.pop("position_bias", None)
    mask = _pad(with_tokens(mask, query.shape[2]), pad)
    return sdpa_attention_forward(module, query, key, value, mask, position_bias=_pad(bias, pad), **kwargs)


def prefix_eager(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    prefix: Mapping[int, list[KV]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with plain matrix products; also returns the attention weights (B, H, N, P + N)."""
    key, value, pad = _extend(module, key, value, prefix)
    weights = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for bias in (_pad(with_tokens(mask, query.shape[2]), pad), _pad(position_bias, pad)):
        if bias is not None:
            weights = weights + bias
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _extend(
    module: Any, key: torch.Tensor, value: torch.Tensor, prefix: Mapping[int, list[KV]] | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Keys and values with the layer's prefixes, and how many were added before and after the sequence's own.

    They are concatenated all at once: every further copy of the whole sequence's takes about 1 % of the layer's time.
    """
    before, after = [], []
    for extra in (prefix or {}).get(module.layer_idx, ()):
        extra_key, extra_value = _split_heads(extra, key)
        if extra.where == "instead":
            key, value = extra_key, extra_value
        elif extra.where == "add_to_cls":
            key = torch.cat([key[:, :, :1] + extra_key, key[:, :, 1:]], dim=2)
            value = torch.cat([value[:, :, :1] + extra_value, value[:, :, 1:]], dim=2)
        elif extra.where == "prepend":
            before.insert(0, (extra_key, extra_value))
        else:
            after.append((extra_key, extra_value))
    if before or after:
        key, value = (torch.cat(list(parts), dim=2) for parts in zip(*before, (key, value), *after, strict=True))
    return key, value, (sum(key.shape[2] for key, _ in before), sum(key.shape[2] for key, _ in after))


def _split_heads(extra: KV, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B or 1, P, D) -> (B, H, P, D / H) for key and value, in the dtype of the layer's own."""
    batch, heads, _, size = like.shape
    return tuple(
        x.unflatten(-1, (heads, size)).transpose(1, 2).expand(batch, -1, -1, -1).to(like.dtype) for x in extra[:2]
    )


def with_tokens(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Extend a mask (..., N, N), built before prompt tokens were added, to `length`, with nothing masked there."""
    missing = 0 if mask is None else length - mask.shape[-2]
    return _pad(mask, (missing, 0, missing, 0)) if missing else mask


def _pad(mask: torch.Tensor | None, pad: tuple[int, ...]) -> torch.Tensor | None:
    """Pad a mask or bias (..., N) so that every token also attends to the prefixes."""
    if mask is None or not any(pad):
        return mask
    return F.pad(mask, pad, value=True if mask.dtype == torch.bool else 0.0)


for _name, _function in (("sdpa", prefix_sdpa), ("eager", prefix_eager)):
    AttentionInterface.register(f"prefix_{_name}", _function)
    AttentionMaskInterface.register(f"prefix_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])
