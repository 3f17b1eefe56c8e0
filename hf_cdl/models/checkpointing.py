"""Saving and loading. A checkpoint is full or small (only what was learnt) and may include the code.

from_pretrained returns a complete model or fails: missing weights are never left random, and nothing is allocated for
a checkpoint that does not hold what its config claims.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from hf_cdl.backbones import lora
from hf_cdl.backbones.stored import (
    HUB,
    check_complete,
    check_revision,
    check_stored,
    check_weights,
    is_folder,
    named,
    quietly,
    stored_sizes,
)
from hf_cdl.checked import one_line
from hf_cdl.heads import Head
from hf_cdl.models import small_checkpoints
from hf_cdl.models.prompted_backbone import PromptedBackbone
from hf_cdl.models.remote_code import put_code
from hf_cdl.models.small_checkpoints import absent_parts, check_backbones, fetch_backbones, left_out, misnamed_parts

_TRAINING = ("scaffold", "session_head", "session_kd_head")
"""Parts that training needs and a checkpoint does not hold."""


class Checkpointed(PromptedBackbone):
    """A model with heads whose checkpoints hold all weights, or all but those of the frozen backbones."""

    head: Head
    kd_head: Head | None
    scaffold: nn.Module | None
    session_head: Head | None
    session_kd_head: Head | None

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save like PreTrainedModel.save_pretrained, but without the training scaffold and first-session head.

        The config fields `save_backbone` and `save_code` decide what a checkpoint holds. Raises ValueError for a
        config that could not be loaded again.
        """
        self.config.check_saving()
        if not self.is_remote_code():  # transformers copies remote code itself
            put_code(self.config, Path(save_directory))
        if self.config.lora is not None:
            place = Path(save_directory) / lora.FOLDER
            lora.save_adapters(self.backbone, place, self.config.backbone_name, self.config.backbone_revision)
        bare = self._to_save(kwargs.get("state_dict") or self.state_dict())
        return PromptedBackbone.save_pretrained(bare, save_directory, *args, **kwargs)

    def _to_save(self, names: Iterable[str]) -> Any:
        """A model of the same parts without those that only training needs; this one is not changed."""
        bare = copy.copy(self)
        bare.config = copy.deepcopy(self.config)  # transformers notes in it what it saves
        bare._modules = {name: None if name in _TRAINING else part for name, part in self._modules.items()}
        bare._keys_to_ignore_on_save = self._not_stored(names)
        return bare

    def _not_stored(self, names: Iterable[str]) -> set[str]:
        small = not self.config.save_backbone
        return {name for name in names if name.partition(".")[0] in _TRAINING or (small and left_out(name))}

    def to_store(self) -> tuple[dict[str, torch.Tensor], set[str], set[str]]:
        """The weights as save_pretrained stores them, by their names there; and the names of those that stay.

        These are of frozen backbones, and of the newest blocks, which the next task freezes if they are trained now.
        """
        state = self.state_dict(keep_vars=True)
        for name in self._not_stored(state):
            del state[name]
        last = f".blocks.{len(self.config.tasks) - 1}."
        newest = {name for name, value in state.items() if value.requires_grad and last in name}
        state = {name: value.detach() for name, value in state.items()}
        theirs = {name: value for name, value in state.items() if name.partition(".")[0] in small_checkpoints.PARTS}
        weights = {name: value for name, value in state.items() if name not in theirs}  # ours, which no family renames
        weights |= revert_weight_conversion(self, theirs)
        backbone = set() if self.config.train_backbone else {name for name in weights if left_out(name)}
        return weights, backbone, newest

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load like PreTrainedModel.from_pretrained, only from safetensors; fetch a small checkpoint's backbones.

        Loading forgets what was frozen, so the backbone is frozen again. Raises ValueError if a folder or its weights
        are missing, if a backbone is gone, if config and weights do not match (naming weights that are missing,
        unexpected or of another shape), and for NaN or infinite weights; errors from the Hub remain OSErrors.
        """
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError("ignore_mismatched_sizes would leave weights at random; a checkpoint fits its config.")
        if place is not None:
            check_revision(place, kwargs.get("revision"))
        kwargs = {"use_safetensors": True, **kwargs}
        with_info = kwargs.pop("output_loading_info", False)
        with _explained(place):
            with torch.random.fork_rng(devices=[]), quietly():  # missing weights are first drawn at random
                loaded: Any = super().from_pretrained(
                    *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                )
            model, info = loaded
            absent = absent_parts(model.config, model.state_dict().keys() - info["missing_keys"])
            absent |= misnamed_parts(model.config, info)
            for kind in ("missing_keys", "unexpected_keys"):
                info[kind] = {name for name in info[kind] if not _is_of(name, absent)}
            check_complete(info, "It", place)
            fetch_backbones(model, absent, **kwargs)
            check_weights(model._numbers(), "this checkpoint")
        model.freeze()
        return (model, info) if with_info else model

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """As in PreTrainedModel, which allocates whatever the config claims; so check the claim first."""
        if checkpoint_files:
            absent = absent_parts(model.config, stored_sizes(checkpoint_files))
            own = [value.numel() for name, value in model.state_dict().items() if not _is_of(name, absent)]
            check_stored("this checkpoint", sum(own), checkpoint_files)
            hub = getattr(args[0] if args else kwargs.get("load_config"), "download_kwargs", None) or {}
            check_backbones(model, absent, **{name: hub[name] for name in HUB if name in hub})
        return PromptedBackbone._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _numbers(self) -> dict[str, torch.Tensor]:
        """The weights by name; a fitted head's weights that are stored as bits are given as numbers."""
        heads = {"head": self.head, "kd_head": self.kd_head}
        parts = [(name, head.numbers()) for name, head in heads.items() if head is not None]
        return self.state_dict() | {f"{part}.{name}": value for part, found in parts for name, value in found.items()}


def _is_of(name: str, parts: Any) -> bool:
    """Whether a weight belongs to one of these frozen parts."""
    return left_out(name) and name.partition(".")[0] in parts


@contextmanager
def _explained(place: Any) -> Iterator[None]:
    """Make loading errors name the checkpoint and a remedy; `place`: its folder or Hub id, if known."""
    try:
        yield
    except ImportError:
        raise
    except ValueError as error:
        raise ValueError(f"The checkpoint '{place}' cannot be used. {error}") from error
    except Exception as error:  # transformers and safetensors raise many error types
        if isinstance(error, OSError) and (place is None or not is_folder(place)):
            raise
        if place is not None and is_folder(place) and not Path(place).expanduser().is_dir():
            raise ValueError(f"There is no folder '{place}'; give a checkpoint by its folder or Hub id.") from error
        raise ValueError(
            f"The checkpoint '{place}' cannot be loaded: {one_line(error)} Check that config.json and "
            f"{named(place)} are there and whole; get them again if they were cut short."
        ) from error
