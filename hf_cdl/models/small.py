"""Small checkpoints: what was learnt alone. The frozen backbones are named in the config and fetched on loading."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_cdl.models import backbone as bb
from hf_cdl.models.lora import is_adapter, load_frozen

PARTS = {"backbone": "backbone", "query_backbone": "query"}
"""A model's frozen parts, and how the config's fields about each begin (query_name: where query_backbone is from)."""
_HUB = ("cache_dir", "token", "local_files_only")


def left_out(name: str) -> bool:
    """Whether a weight is of a frozen backbone, so that a small checkpoint goes without it."""
    return name.startswith(tuple(f"{part}." for part in PARTS)) and not is_adapter(name)


def fetch_backbones(model: nn.Module, **options: Any) -> None:
    """Load the backbones from where they came; `options` are those of from_pretrained.

    Raises ValueError if one is gone, or is no longer what the checkpoint was made on.
    """
    config: Any = model.config
    hub = {name: options[name] for name in _HUB if name in options}
    for part, prefix in PARTS.items():
        if getattr(model, part) is None:
            continue
        name, revision, digest = (getattr(config, f"{prefix}_{field}") for field in ("name", "revision", "digest"))
        try:
            backbone = bb.load_backbone(name, revision, **hub)
            if digest not in (None, found := bb.digest(backbone)):
                raise ValueError(f"Its weights are others now: fingerprint {found}, not {digest}.")
        except ValueError as error:
            raise ValueError(
                f"This checkpoint holds what was learnt alone. Its {part} is '{name}' (revision {revision}), which "
                f"does not serve: {error} Get it back, or say where the same weights are: "
                f"from_pretrained(..., {prefix}_name='HUB ID OR FOLDER', {prefix}_revision=None) "
                "(in a recipe: the section's backbone)."
            ) from error
        load_frozen(getattr(model, part), backbone.state_dict())
