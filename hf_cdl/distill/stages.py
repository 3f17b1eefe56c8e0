"""The stages A_1 .. A_N of an image classifier, found by a forward pass with one blank image.

Stages are groups of the model's own modules, named by their paths. Hooks on those modules can watch any classifier, or
run it a second time with something between its stages; its own forward does the rest (prefixes, queries, Swin's
windows, ...), so no model family needs code of its own. What follows the last stage (final norm, pooling, classifier)
is the head.

Rules [ours]: the outermost list of modules is the body. Up to four members (the `stages` of ResNet, RegNet, ConvNeXt
and Swin) are stages; more are layers, grouped by output resolution (MobileNetV2) or, if that never changes (ViT, DeiT,
DINOv2 and similar), into four groups of equal length. For anything else, the user names the modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

STEMS = ("embeddings", "embedder", "conv_stem", "stem")  # what comes before the body, by name
GROUPS = 4  # stages of a body whose resolution never changes


class Stage(NamedTuple):
    """The paths of a stage's modules in order, and the last module's output shape for one image.

    `shape`: (1, C, H, W) of a map, (1, N, D) of tokens; `extra_tokens`: whether some are not patches (CLS, registers).
    """

    modules: tuple[str, ...]
    shape: tuple[int, ...]
    extra_tokens: bool


@dataclass(frozen=True)
class Stages:
    """The points where a model can be cut, as module paths in the model given to find_stages.

    `stem`: path of the module before the body, if it is a single one with a known name. `head`: path of the module
    that computes the logits. `patch_size`: (height, width) in pixels, for token models.
    """

    stages: tuple[Stage, ...]
    stem: str | None
    head: str
    patch_size: tuple[int, int] | None


def find_stages(model: Any, named: Sequence[str] | None = None) -> Stages:
    """Find the stages of a Hugging Face model or a wrapper of one; with `named`, each of those modules is one stage.

    Raises ValueError, listing what was found, if there is no single body, a named module does not exist, there are
    fewer than two stages, or their outputs are neither maps nor tokens.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} is not a Hugging Face model: its stages cannot be found.")
    base: Any = inner.base_model
    title, at, start = type(inner).__name__, _path(model, inner), _path(inner, base)
    found = {name: [f"{start}{member}" for member in members] for name, members in _body(base).items()}
    if named is None and len(found) != 1:
        raise ValueError(f"The stages of {title} are not plain. {_advice(found)}")
    members = list(named) if named is not None else [*found.values()][0]
    known = dict(inner.named_modules())
    if unknown := [name for name in members if name not in known]:
        raise ValueError(f"{title} has no module {', '.join(map(repr, unknown))}. {_advice(found)}")
    shapes = _probe(base, {name: known[name] for name in members})
    if wrong := [f"{name}: {shapes.get(name)}" for name in members if len(shapes.get(name, ())) not in (3, 4)]:
        raise ValueError(
            f"Modules of {title} that give neither a map (1, C, H, W) nor tokens (1, N, D) for one image: "
            f"{', '.join(wrong)}. {_advice(found)}"
        )
    groups = [[name] for name in members] if named is not None else _group(members, shapes)
    if len(groups) < 2:
        raise ValueError(f"{title} has one stage only ({members}); two are needed. {_advice(found)}")
    patch: Any = getattr(base.config, "patch_size", None)
    if patch is None and any(len(shapes[group[-1]]) == 3 for group in groups):
        raise ValueError(f"The stages of {title} give tokens, but its config has no patch_size to lay them out.")
    size = _pair(patch) if patch is not None else None

    def stage(group: list[str]) -> Stage:
        shape = shapes[group[-1]]
        extra = len(shape) == 3 and size is not None and shape[1] > math.prod(token_grid(shape[1], _image(base), size))
        return Stage(tuple(at + name for name in group), shape, extra)

    stem = next((at + start + name for name in STEMS if hasattr(base, name)), None)
    return Stages(tuple(map(stage, groups)), stem, at + _head(inner), size)


def first_tensor(output: Any) -> Any:
    """The features in a module's output: the output itself, or the first item of a tuple (as Swin's stages return)."""
    return output[0] if isinstance(output, tuple) else output


def token_grid(count: int, image: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the patch grid among `count` tokens; the remaining ones are CLS, registers and the like.

    `image`, `patch`: (height, width) in pixels. Stages that merge patches halve the grid, rounding up.
    """
    height, width = (-(-side // step) for side, step in zip(image, patch, strict=True))
    while height * width > count:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _path(model: nn.Module, part: nn.Module) -> str:
    """Prefix of a part's module names in the whole model: 'resnet.', or empty if the part is the whole model."""
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is part)


def _body(base: nn.Module) -> dict[str, list[str]]:
    """Member paths of the base model's outermost ModuleLists, or of its Sequentials if it has none."""
    for kind in (nn.ModuleList, nn.Sequential):
        found: dict[str, list[str]] = {}
        for name, module in base.named_modules():
            if isinstance(module, kind) and len(module) > 1 and not any(name.startswith(f"{n}.") for n in found):
                found[name] = [f"{name}.{child}" for child, _ in module.named_children()]
        if found:
            return found
    return {}


def _advice(found: dict[str, list[str]]) -> str:
    lists = "; ".join(f"{members[0]} to {members[-1]} ({len(members)})" for members in found.values())
    return f"Name its stages as module paths, in order (stages: [...]). Lists of modules found: {lists or 'none'}."


def _probe(base: Any, modules: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Output shapes of these modules for one blank image; the model is left unchanged."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: shapes.__setitem__(name, _shape(output))

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    modes = [(module, module.training) for module in base.modules()]
    image = torch.zeros(1, getattr(base.config, "num_channels", 3), *_image(base)).to(next(base.parameters()))
    try:
        base.eval()  # keep the blank image out of batch norm statistics
        with torch.no_grad():
            base(image)
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    return shapes


def _image(base: Any) -> tuple[int, int]:
    """Size in pixels of the blank image; many convolutional nets take any size and declare none."""
    return _pair(getattr(base.config, "image_size", None) or 64)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _shape(output: Any) -> tuple[int, ...]:
    tensor = first_tensor(output)
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def _group(members: list[str], shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    if len(members) <= GROUPS:
        return [[name] for name in members]

    def resolution(name: str) -> tuple[int, ...]:
        shape = shapes[name]
        return shape[2:] if len(shape) == 4 else shape[1:2]

    groups = [list(group) for _, group in groupby(members, resolution)]
    if len(groups) > 1:
        return groups
    bounds = [round(len(members) * number / GROUPS) for number in range(GROUPS + 1)]
    return [members[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def _head(model: Any) -> str:
    for name in ("classifier", "head"):
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    count = model.config.num_labels
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == count]
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no module 'classifier' or 'head', nor a Linear with {count} outputs."
        )
    return linear[-1]
