"""The last layer computes only the tokens that are read from it; their queries attend to the keys of all tokens.

From most backbones only CLS and a KD token are read. A backbone passes their indices in the sequence, the keyword
argument `read`, down to its last layer. Queries, output projection and MLP of that layer (10 of its 12 products of
size N D^2) are computed for these tokens only, and so is all that follows. Keys and values are those of the whole
sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_cdl.backbones.families import Family, adds_patch_mean, family, layers
from hf_cdl.backbones.prefix_attention import with_tokens
from hf_cdl.types import KV


def tokens_read(
    backbone: PreTrainedModel, token: int | None, states: bool | Sequence[int] | None = None
) -> tuple[int, int] | None:
    """Indices of the tokens to compute in the last layer: CLS, and the KD token if `token` has one, or else any.

    None means the whole sequence. This is needed if the feature is the mean of the patches, if `states` (the hidden
    states to keep) includes the last one, or if the layer has a relative position bias, a table over all pairs of
    tokens. At least two tokens are computed, because the last bits of a matrix times one image's single token depend
    on where the weights are in memory.
    """
    config, depth = backbone.config, len(layers(backbone))
    biased = any(getattr(config, name) for name in family(config).position_bias)
    kept = range(depth + 1) if states is True else {number % (depth + 1) for number in states or ()}
    if depth in kept or (kept and depth == 1) or biased or not adds_patch_mean(config):
        return None
    if not str(config._attn_implementation).startswith("prefix_"):  # set from outside: it would miss most of the keys
        return None
    return 0, 1 if token is None else token


def let_last_layer_read(backbone: PreTrainedModel) -> None:
    """Let a backbone take `read`; hooks of its last layer that change the whole sequence must run before this one."""
    own, number = layers(backbone), len(layers(backbone)) - 1
    own[number].register_forward_pre_hook(functools.partial(_enter, family(backbone.config), number), with_kwargs=True)


def _enter(row: Family, number: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Forward pre-hook of the last layer: hands it the tokens that are read, and all keys and values as a prompt."""
    if (read := kwargs.get("read")) is None:
        return None
    sequence = args[0] if args else kwargs["hidden_states"]
    rest = {name: value for name, value in kwargs.items() if name not in ("read", "hidden_states", "attention_mask")}
    attention: Any = getattr(layer, row.attention)
    normed = getattr(layer, row.first_norm)(sequence)
    key, value = attention.k_proj(normed), attention.v_proj(normed)
    if row.rotate is not None:
        key, rest["position_embeddings"] = row.rotate(attention, key, rest["position_embeddings"])
    rest["prefix"] = {number: [KV(key, value, "instead"), *(rest.get("prefix") or {}).get(number, ())]}
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if (mask := with_tokens(mask, sequence.shape[1])) is not None:  # while a graph is traced
        mask = _of(mask, read)
    return (_of(sequence, read), mask, *args[2:]), rest


def _of(rows: torch.Tensor, read: Sequence[int]) -> torch.Tensor:
    """These rows of (..., N, M)."""
    return torch.stack([rows.select(-2, at) for at in read], dim=-2)
