r"""Low-rank adapters on a frozen backbone (LoRA, Hu et al. 2021, arXiv 2106.09685), with the peft library.

    h = W_0 x + \frac{\alpha}{r} B A x        (Eq. 3, and the scale of Sec. 4.1)

W_0 (d, k) is a frozen projection; A (r, k) is initialised at random and B (d, r) at zero, so a new model reproduces
the bare backbone's features bit for bit. They train only in the first session, like RanPAC's adapters
(arXiv 2307.02251).

peft wraps a projection in its own layer: `q_proj.weight` becomes `q_proj.base_layer.weight`, next to
`q_proj.lora_A.default.weight` and `q_proj.lora_B.default.weight`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from hf_cdl.backbones.families import family, layers
from hf_cdl.checked import check_types

FOLDER = "adapter"
"""Checkpoint subfolder with the adapters in peft's format; at the top level transformers would load them itself."""


@dataclass(frozen=True)
class LoraOptions:
    r: int = field(default=8, metadata={"help": "Rank of an update."})
    alpha: int = field(default=8, metadata={"help": "The update's scale is alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on an adapter's input in training."})
    targets: tuple[str, ...] | None = field(
        default=None,
        metadata={"help": "Names of the linear modules to adapt in every layer; null: the attention's projections "
                  "to queries and values."},
    )  # fmt: skip

    def __post_init__(self):
        check_types(self, "lora")
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1 or self.targets == ():
            raise ValueError(
                "lora needs r >= 1, alpha > 0, dropout from 0 to below 1 and some targets (or null); got "
                f"r {self.r}, alpha {self.alpha}, dropout {self.dropout}, targets {self.targets}."
            )


def add_adapters(backbone: PreTrainedModel, options: LoraOptions) -> LoraOptions:
    """Insert uninitialised adapters into all layers; return the options with the resolved targets.

    Raises ValueError for a target that is not a linear layer in the backbone's layers, and ImportError without peft.
    """
    path, attention = family(backbone.config).layers, family(backbone.config).attention
    linear = [n for n, module in layers(backbone)[0].named_modules() if isinstance(module, nn.Linear)]
    names = {name: name.rpartition(".")[2] for name in linear}
    found = tuple(leaf for name, leaf in names.items() if name.startswith(f"{attention}.") and leaf[0] in "qv")
    targets = tuple(sorted(found if options.targets is None else options.targets))
    if unknown := sorted({*targets} - {*names.values()}):
        raise ValueError(
            f"lora.targets names {', '.join(unknown)}, but the linear layers in each layer of a "
            f"{backbone.config.model_type} backbone are {', '.join(names.values())}."
        )
    layer = dict(layers(backbone)[0].named_modules())
    narrow = min(min(layer[name].weight.shape) for name, leaf in names.items() if leaf in targets)  # type: ignore
    if options.r > narrow:
        raise ValueError(
            f"lora.r is {options.r}, but the narrowest layer that it adapts has width {narrow}, where an update is "
            f"not low-rank any more. Take 1 to {narrow}, usually 4 to 64."
        )
    peft = _peft()
    adapters = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=rf"{re.escape(path)}\.\d+\.(.*\.)?({'|'.join(map(re.escape, targets))})",
    )
    with torch.device("meta"):  # moved to the device below: peft's own way fails with fake tensors (--plan)
        peft.inject_adapter_in_model(adapters, backbone)
    for module in _adapted(backbone):
        weight = module.get_base_layer().weight
        for part in (module.lora_A["default"], module.lora_B["default"]):
            part.weight = nn.Parameter(torch.empty_like(part.weight, device=weight.device, dtype=weight.dtype))
    return replace(options, targets=targets)


def reset_adapters(backbone: nn.Module) -> None:
    """Draw A from PyTorch's global generator and set B to zero, as peft does for new adapters.

    Drawn on the CPU, so that they do not depend on the device. On the meta device they are left to from_pretrained.
    """
    for module in _adapted(backbone):
        drawn = module.lora_A["default"].weight
        if (device := drawn.device).type != "meta":
            drawn.data = drawn.data.cpu()
            module.reset_lora_parameters("default", init_lora_weights=True)
            drawn.data = drawn.data.to(device)


def is_adapter(name: str) -> bool:
    """Whether a weight's name in the model is that of an adapter."""
    return ".lora_" in name


def load_frozen(backbone: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load the weights of a bare backbone into one that may have adapters, which are left unchanged."""
    state = backbone.state_dict()
    own = {name.replace(".base_layer.", "."): name for name in state if not is_adapter(name)}
    adapters = {name: value for name, value in state.items() if is_adapter(name)}
    backbone.load_state_dict({**adapters, **{own.get(name, name): value for name, value in weights.items()}})


def save_adapters(backbone: Any, folder: Path, name: str | None, revision: str | None) -> None:
    """Write the adapters in peft's format; `name`, `revision`: where the bare backbone is.

    `PeftModel.from_pretrained(AutoModel.from_pretrained(name, revision=revision), folder)` is the adapted backbone.
    """
    adapters = copy.copy(backbone.peft_config["default"])
    adapters.base_model_name_or_path, adapters.revision, adapters.inference_mode = name, revision, True
    adapters.save_pretrained(str(folder))
    weights = {
        f"base_model.model.{key.replace('.default.', '.')}": value.contiguous()
        for key, value in backbone.state_dict().items()
        if is_adapter(key)
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted(backbone: nn.Module) -> list[Any]:
    """The peft layers that wrap the projections."""
    layer = _peft().tuners.lora.LoraLayer
    return [module for module in backbone.modules() if isinstance(module, layer)]


def _peft() -> Any:
    """Import peft lazily: it takes a second to load, and models without adapters do not need it."""
    try:  # in a try block, transformers does not require it of remote code (save_code)
        import peft
    except ImportError as error:
        raise ImportError("A model with lora needs the package peft: pip install peft.") from error
    return peft
