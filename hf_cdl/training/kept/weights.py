"""What identifies frozen weights and images, within a process and from run to run."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_cdl.training.sharding import is_sharded, local

_NAMES = ("name", "revision", "digest", "transformers_version", "id2label", "label2id", "name_or_path", "dtype")
"""Endings of the names of config fields that do not affect an output."""
_HEADS = ("head.", "kd_head.")
"""Prefixes of the names of heads' weights."""
_OF_HEADS = ("head", "first_session", "later_sessions", "tasks")
"""Fields of a config that are about heads."""
_PACKAGES = ("torch", "transformers", "peft")


def query_backbone_of(model: Any) -> nn.Module:
    """The backbone that computes a model's queries."""
    return model.backbone if model.query_backbone is None else model.query_backbone


def equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights of two modules are equal; False for sharded ones, which no process has whole."""
    if is_sharded(first) or is_sharded(second):
        return False
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        value.shape == theirs[name].shape and torch.equal(value, theirs[name].to(value.device))
        for name, value in ours.items()
    )


def state_of(model: nn.Module, heads: bool = False) -> tuple[Any, ...]:
    """What changes whenever a weight does, outside the heads or in them; also by `.data`, which counts no version."""
    named = [*model.named_parameters(), *model.named_buffers()]
    values = [local(value).detach() for name, value in named if heads or not name.startswith(_HEADS)]
    sums = torch.stack([value.sum(dtype=torch.float32).cpu() for value in values]).tolist()
    return tuple((v.data_ptr(), v.dtype, v._version, total) for v, total in zip(values, sums, strict=True))


def content_of(values: Iterable[torch.Tensor]) -> str:
    """A digest of tensors' types, shapes and bytes."""
    found = hashlib.sha256()
    for value in values:
        found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        found.update(bytes_of(value))
    return found.hexdigest()[:32]


def bytes_of(value: torch.Tensor) -> memoryview:
    """The bytes of a tensor."""
    found: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(found)


def digest_of(module: nn.Module, about: str, heads: bool) -> str | None:
    """A digest of all that a module's outputs depend on besides images, precision and machine.

    `about`: what else they depend on; `heads`: whether they come from the heads too. None for a model of one's own,
    whose outputs may depend on what is not in its weights, and for code that is in no file.
    """
    own = type(module).__module__.partition(".")[0] == "hf_cdl"
    if not own and not isinstance(module, PreTrainedModel):
        return None
    named = {name: value for name, value in module.state_dict().items() if heads or not name.startswith(_HEADS)}
    weights = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    try:
        code = [type(module).__qualname__, *_sources(module), *_versions()]
    except (TypeError, OSError):  # written in a notebook, say
        return None
    said = [*code, about, settings_of(module, heads), sorted(weights)]
    found = hashlib.sha256(json.dumps(said, default=str).encode())
    found.update(content_of(weights[name] for name in sorted(weights)).encode())
    return found.hexdigest()[:32]


def settings_of(module: nn.Module, heads: bool) -> str:
    """The fields of the configs of a module's models that may affect its outputs."""

    def moves(key: str) -> bool:
        return not key.startswith("_") and not key.endswith(_NAMES) and (heads or key not in _OF_HEADS)

    def kept(content: Any) -> Any:
        return {k: kept(v) for k, v in content.items() if moves(str(k))} if isinstance(content, dict) else content

    configs = [part.config for part in module.modules() if isinstance(part, PreTrainedModel)]
    return repr([(kept(config.to_dict()), str(config._attn_implementation)) for config in configs])


def _sources(module: nn.Module) -> list[str]:
    """Digests of the code that computes the outputs: ours, and what plugins add."""
    ours = Path(__file__).parents[2]
    kinds = {kind for part in module.modules() for kind in type(part).__mro__ if kind.__module__ != "builtins"}
    files = {*map(inspect.getfile, kinds)}
    installed = {Path(inspect.getfile(package)).parent for package in (torch, transformers)}
    plugins = [Path(file) for file in files if not {ours, *installed} & {*Path(file).parents}]
    return [_own_code(ours), *sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in plugins)]


@functools.cache
def _own_code(folder: Path) -> str:
    found = hashlib.sha256()
    for room in ("backbones", "heads", "models", "prompts"):
        for file in sorted((folder / room).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()


@functools.cache
def _versions() -> list[str]:
    return [f"{name} {version(name)}" for name in _PACKAGES]


def machine_of(device: torch.device) -> str:
    """Everything about a machine that may affect the last bit of a result on a device."""
    conv: Any = torch.backends.cudnn
    switches = [
        torch.get_float32_matmul_precision(),
        conv.allow_tf32,
        conv.version() if device.type == "cuda" else None,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
    ]
    if device.type == "cuda":
        return repr([torch.cuda.get_device_name(device), torch.version.cuda, switches])
    capability = torch.backends.cpu.get_cpu_capability()
    return repr([_processor(), capability, torch.get_num_threads(), device.type, switches])


@functools.cache
def _processor() -> str:
    """The name of this machine's processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
