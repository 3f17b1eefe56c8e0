r"""KD token and KD prompts of D-CDL (Continual Distillation Learning, Zhang et al., arXiv 2407.13911, v3 and later).

A learnable KD token joins the embedded sequence; its own KD head reads it after the final norm. In layers 1 .. L-1 a
KD prompt, shared by all samples and tasks and not selected by a query, is concatenated to the layer's own keys and
values:

    MSA(h_Q, [P^{cl}_K; h_K; P^{kd}_K], [P^{cl}_V; h_V; P^{kd}_V])

It carries the teacher's knowledge from task to task, so it keeps training through all of them (ours: `later_rate`
slows it down after the first). Notation: `token` is the KD token (D), `prompt` the P^{kd} of layers 1 .. L-1
(L-1, length, D): first half keys, second half values. With length 0 only the token remains: the distillation token of
DeiT (arXiv 2012.12877).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import initialization as init

from hf_cdl.checked import check_effect, check_types
from hf_cdl.counted import counted
from hf_cdl.types import KV


@dataclass(frozen=True)
class KDPromptConfig:
    length: int = field(default=6, metadata={"help": "Tokens of a KD prompt, half keys, half values; 0: token only."})
    layers: int | None = field(
        default=None,
        metadata={"help": "KD prompts are in layers 1 .. layers-1 (authors: 12); null: in every layer but the first."},
    )
    alpha: float = field(
        default=0.5, metadata={"help": "Weight of the KD head in evaluation: (1 - alpha) * cls + alpha * kd."}
    )
    token_init: Literal["uniform", "cls"] = field(
        default="uniform", metadata={"help": "Initialisation of the KD token: U(0, 1) as published, or the CLS token."}
    )
    prompt_init: Literal["uniform", "normal"] = field(
        default="uniform", metadata={"help": "Initialisation of the KD prompts: U(0, 1) as published, or N(0, 0.02)."}
    )

    later_rate: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the KD token's and KD prompts' learning rate after the first task; 0 freezes them."
        },
    )

    def __post_init__(self):
        check_types(self, "KD prompts")
        for name in ("layers", "prompt_init"):
            check_effect(self, "KD prompts", name, self.length != 0, "length is 0: there is the KD token alone")
        fits = self.length >= 0 and self.length % 2 == 0 and (self.layers is None or self.layers >= 1)
        if not fits or not 0 <= self.alpha <= 1 or self.later_rate < 0:
            raise ValueError(
                "KD prompts need an even length >= 0, alpha from 0 to 1, layers >= 1 and later_rate >= 0; got "
                f"length={self.length}, alpha={self.alpha}, layers={self.layers}, later_rate={self.later_rate}."
            )


class KDPrompt(nn.Module):
    """KD token and KD prompts of a backbone with `num_layers` layers of width D."""

    def __init__(self, config: KDPromptConfig, hidden_size: int, num_layers: int):
        super().__init__()
        layers = num_layers if config.layers is None else config.layers
        if layers > num_layers:
            raise ValueError(
                f"kd_prompt.layers is {layers}, but the backbone has only {counted(num_layers, 'layer')}."
            )
        self.config = config
        self.token = nn.Parameter(torch.empty(hidden_size))
        self.prompt = nn.Parameter(torch.empty(layers - 1, config.length, hidden_size)) if config.length else None

    def reset_parameters(self) -> None:
        """Initialise as published; for `token_init: cls` the model then copies the token from its backbone."""
        init.uniform_(self.token)
        if self.prompt is not None:
            if self.config.prompt_init == "uniform":
                init.uniform_(self.prompt)
            else:
                init.normal_(self.prompt, std=0.02)

    def forward(self, layer: int) -> KV | None:
        """Return the KD prefix (1, length / 2, D) of a layer, or None if it has none."""
        if self.prompt is None or not 1 <= layer <= len(self.prompt):
            return None
        half = self.config.length // 2
        prompt = self.prompt[layer - 1].unsqueeze(0)
        return KV(prompt[:, :half], prompt[:, half:], "append")
