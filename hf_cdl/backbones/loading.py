"""Loading backbones: configs, weights and their completeness; building new ones from a config."""

from __future__ import annotations

import copy
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.hub import cached_file, extract_commit_hash

from hf_cdl.backbones.families import FAMILIES, family, layers, vision_part
from hf_cdl.backbones.last_layer import let_last_layer_read
from hf_cdl.backbones.stored import (
    HUB,
    at,
    check_complete,
    check_no_adapters,
    check_revision,
    check_stored,
    check_weights,
    is_folder,
    named,
    quietly,
    weight_files,
)
from hf_cdl.checked import check_generic, check_numbers, check_size, listed, short
from hf_cdl.counted import counted
from hf_cdl.types import is_ours


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Commit that a revision of a Hub id currently points to, or `revision` if unknown; None for a folder.

    Raises ValueError for a revision given with a folder.
    """
    check_revision(name, revision)
    if Path(name).is_dir():
        return None
    try:
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None) or revision
    except OSError:  # loading reports what is wrong
        return revision


def read_config(name: str, revision: str | None = None, **hub: Any) -> PreTrainedConfig:
    """Read the config of the model at a Hub id or folder; `hub`: cache_dir, token ...

    Raises ValueError if there is none, for impossible values (a billion layers, NaN), and for a revision given with a
    folder.
    """
    name = str(name)
    check_revision(name, revision)
    folder = Path(name).expanduser()
    if not folder.exists() and is_folder(name):
        raise ValueError(f"There is no folder '{name}'; give a backbone by its Hub id or its folder.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"The folder '{name}' has no config.json; give one saved by save_pretrained, or a Hub id.")
    try:  # check numbers first: a config allocates as many labels as it is told to
        found, _ = PreTrainedConfig.get_config_dict(name, revision=revision, **hub)
        if not isinstance(found, dict):
            raise ValueError(f"it holds no config, but {short(found)}.")
        check_numbers(found, "config.json's value")
        check_generic(found, "config.json")
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **hub)
    except Exception as error:  # transformers and its configs raise many error types
        raise ValueError(
            f"No usable model config at backbone '{name}'{at(revision)}: {_first_line(error)} Give a Hub id "
            "or a folder with config.json and model.safetensors. Prompts work on backbones of type "
            f"{', '.join(sorted(FAMILIES))}."
        ) from error


def load_config(name: str, revision: str | None = None, **hub: Any) -> PreTrainedConfig:
    """Read the config of the backbone at a Hub id or folder. Raises ValueError if missing or of an unsupported type.

    For a checkpoint of ours, this is the config of its backbone.
    """
    found = read_config(name, revision, **hub)
    config = found.backbone_config if is_ours(found) else vision_part(found)
    family(config)
    return config


def load_weights(
    model_class: Any, config: PreTrainedConfig, name: str, revision: str | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a pre-trained model in float32, only from safetensors; also return the loading info (missing weights ...).

    `options`: arguments of the model class, cache_dir, token ... Raises ValueError if there are no readable weights,
    if there are adapters next to them, if they belong to a smaller model than the config's or have other shapes, and
    if any is NaN or infinite.
    """
    hub = {key: options[key] for key in HUB if key in options}
    check_no_adapters(name, revision, **hub)
    own = {key: value for key, value in options.items() if key not in HUB}
    make = getattr(model_class, "from_config", model_class)  # of an Auto class, or the class itself
    numbers = check_size(f"The model of '{name}'", lambda: make(copy.deepcopy(config), **own))
    check_stored(f"'{name}'", numbers, weight_files(name, revision, **hub))
    how = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        with quietly():  # a classifier's head is dropped or re-created on purpose
            model, info = model_class.from_pretrained(
                name, revision=revision, config=config, output_loading_info=True, **how, **options
            )
    except Exception as error:  # transformers, safetensors and the Hub raise many error types
        raise ValueError(
            f"The weights of backbone '{name}'{at(revision)} cannot be loaded: {_first_line(error)} "
            f"Check that {named(name)} is there and whole; download it again if it was cut short."
        ) from error
    check_complete({"mismatched_keys": info["mismatched_keys"]}, f"The checkpoint '{name}'", name)
    check_weights(model.state_dict(), f"'{name}'")
    return model, info


def load_backbone(name: str, revision: str | None = None, **hub: Any) -> PreTrainedModel:
    """Load a pre-trained backbone in float32, without a head, from a Hub id or folder (a classifier's will do).

    From a checkpoint of ours, this is its backbone as trained. Raises ValueError if weights are missing or incomplete,
    or if it has adapters.
    """
    config = load_config(name, revision, **hub)
    if is_ours(read_config(name, revision, **hub)):
        return _learnt_backbone(config, name, revision, **hub)
    model_class = cast(Any, MODEL_MAPPING[type(config)])
    backbone, info = load_weights(model_class, config, name, revision, **family(config).init, **hub)
    if missing := sorted(key for key in info["missing_keys"] if "mask_token" not in key and "pooler" not in key):
        raise ValueError(
            f"The checkpoint of backbone '{name}' lacks {counted(len(missing), 'weight')} ({listed(missing)}), so "
            "they would be random. Give a complete checkpoint."
        )
    return backbone


def _learnt_backbone(config: PreTrainedConfig, name: str, revision: str | None, **hub: Any) -> PreTrainedModel:
    """A plain copy of the backbone from a checkpoint of ours."""
    model: Any
    try:
        model = AutoModelForImageClassification.from_pretrained(
            name, revision=revision, dtype=torch.float32, trust_remote_code=False, **hub
        )
    except OSError as error:
        raise ValueError(f"The weights of '{name}'{at(revision)} cannot be loaded: {_first_line(error)}") from error
    if model.config.lora is not None:
        raise ValueError(
            f"The backbone of '{name}' has low-rank adapters. Merge them first: load the bare backbone "
            f"('{model.config.backbone_name}') and the checkpoint's folder adapter by peft's PeftModel, save what "
            "merge_and_unload() gives, and take that folder."
        )
    backbone = cast(Any, MODEL_MAPPING[type(config)])(config, **family(config).init)
    backbone.load_state_dict(model.backbone.state_dict())
    return backbone.eval()


def digest(backbone: nn.Module) -> str:
    """Fingerprint of the weights that reach the output, 16 hex digits; independent of the weights' names."""
    parts = [
        sha256(value.detach().contiguous().numpy().reshape(-1)).digest()
        for name, value in backbone.state_dict().items()
        if "mask_token" not in name
    ]
    return sha256(b"".join(sorted(parts))).hexdigest()[:16]


def build_backbone(config: PreTrainedConfig, frozen: bool = True) -> PreTrainedModel:
    """Build the backbone of a config, numbering its attention modules by layer so that each finds its prefixes.

    A frozen backbone has no randomness: what its config may enable in training (dropout, stochastic depth, DINOv3's
    position augmentation) would only make features and queries noisy while prompts train. The config is copied.
    Raises ValueError if no model can be built from it, or only one that does not fit in memory.
    """
    kind, config = family(config), copy.deepcopy(config)
    check_numbers(vars(config), f"The {config.model_type} backbone's")
    for name, value in kind.whole.items():
        setattr(config, name, value)
    if frozen:
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
            elif name in kind.random_positions:
                setattr(config, name, None)
    check_size(f"A {config.model_type} backbone of this config", lambda: AutoModel.from_config(config, **kind.init))
    backbone = AutoModel.from_config(config, **kind.init)
    for number, layer in enumerate(layers(backbone)):
        getattr(layer, kind.attention).layer_idx = number
    let_last_layer_read(backbone)
    return backbone


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
