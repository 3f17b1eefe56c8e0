"""A teacher too large for one device: every process holds a share of each of its transformer layers.

`shard` applies PyTorch's FSDP2 (`fully_shard`) to the layers of a frozen backbone: a layer's weights are gathered when
it runs, forwards and backwards, and freed again. Everything else of the teacher (prompts, heads, embeddings) and the
whole student stay copied to every process, as in data-parallel training.

A layer runs when all processes run it, so it must never run on only some of them: whether an output is looked up or
computed is decided by `everywhere`, and weights are saved within `gathered`, which every process enters.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

_WHOLE: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()
"""The weights of sharded layers within `gathered`."""


def shard_teacher(args: Any, role: str, model: Any, teacher: Any, run: Any) -> None:
    """Shard what the arguments ask for: a teacher's trainer its own model, any other the model it learns from.

    Raises ValueError where that has no effect, or cannot be done.
    """
    if not args.shard_teacher:
        return
    own = role == "teacher"
    found = model if own else teacher
    if found is None:
        if run is None:  # in a recipe, whose arguments all roles share, it may be another role's
            raise ValueError(
                "shard_teacher is true, but this trainer learns from no teacher; leave it out. The trainer of a "
                'teacher has role="teacher".'
            )
        return
    check_shardable(found, args.world_size, own)
    if not is_sharded(found):
        shard(found, args.device, args.world_size)


def check_shardable(teacher: nn.Module, processes: int, trained: bool = False) -> None:
    """Raise ValueError if a teacher cannot be sharded; `trained`: whether it is the one that a trainer trains."""
    if processes == 1:
        raise ValueError(
            "shard_teacher is true, but there is one process, which would hold all of the teacher. Start several, as "
            "accelerate launch --num_processes 2 (recipes/accelerate has files for it), or leave it out."
        )
    layers = _layers(teacher)
    if not layers:
        raise ValueError(
            f"shard_teacher is true, but this teacher, a {type(teacher).__name__}, has none of transformers' layers "
            "(GradientCheckpointingLayer), by which it would be sharded; leave it out."
        )
    config = getattr(teacher, "config", None)
    if trained and getattr(config, "later_sessions", None):
        raise ValueError(
            "shard_teacher is true, but the teacher has later_sessions, which compare it with a copy of what it was, "
            "and a sharded model cannot be copied. Train it where it fits, without shard_teacher, or leave "
            "later_sessions out."
        )
    learns = [name for name in ("train_backbone", "lora") if getattr(config, name, None)]
    if trained and (learns or any(parameter.requires_grad for layer in layers for parameter in layer.parameters())):
        raise ValueError(
            f"shard_teacher is true, but the layers of the teacher learn ({', '.join(learns) or 'all its weights'}), "
            "and only frozen ones are sharded. Train it where it fits, without shard_teacher, and let it teach as "
            "it is: a classifier with train: null, any other by prompts or a head on the frozen backbone."
        )


def shard(teacher: nn.Module, device: torch.device, processes: int) -> None:
    """Leave each process its share of the teacher's layers, on its device; only these are moved there."""
    mesh = init_device_mesh(device.type, (processes,))
    for layer in _layers(teacher):  # not the model around them: FSDP2 changes a class, by which transformers knows it
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        layer.register_state_dict_post_hook(_give_whole)
        layer.register_load_state_dict_pre_hook(_take_share)


def is_sharded(module: nn.Module) -> bool:
    """Whether processes hold shares of a module's weights."""
    return distributed.is_initialized() and any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(value: torch.Tensor) -> torch.Tensor:
    """This process's share of a weight, which is all of it unless it is sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def everywhere(known: bool, device: torch.device) -> bool:
    """Whether something is known on every process; all of them must ask."""
    found = torch.tensor(float(known), device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MIN)
    return bool(found)


def replicated(model: nn.Module, accelerator: Any) -> nn.Module:
    """A model with sharded layers, prepared by Accelerate and wrapped in DDP for its other weights.

    Accelerate itself refuses to wrap a model with sharded weights.
    """
    model = accelerator.prepare_model(model, evaluation_mode=True)  # only for autocast
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    options = {} if accelerator.ddp_handler is None else accelerator.ddp_handler.to_kwargs()
    ids = None if accelerator.device.type == "cpu" else [accelerator.device]
    return DistributedDataParallel(model, device_ids=ids, **options)


@contextmanager
def gathered(model: nn.Module, keep: bool) -> Iterator[None]:
    """A context in which a sharded model can be saved by the processes that `keep` its weights, in main memory.

    All processes must enter it.
    """
    layers = _layers(model) if is_sharded(model) else []
    try:
        for layer in layers:
            full = {name: p.full_tensor() for name, p in layer.named_parameters() if isinstance(p, DTensor)}
            if keep:
                _WHOLE[layer] = {name: value.cpu() for name, value in full.items()}
        yield
    finally:
        for layer in layers:
            _WHOLE.pop(layer, None)


def _layers(teacher: nn.Module) -> list[nn.Module]:
    """The transformer layers of a model, or of its backbone if it has one."""
    backbone = getattr(teacher, "backbone", None)
    root = backbone if isinstance(backbone, nn.Module) else teacher
    return [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]


def _give_whole(layer: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of `state_dict`: the whole weights, or an error where shares would be taken for them."""
    if layer not in _WHOLE:
        raise RuntimeError(
            "Processes hold shares of this teacher's layers (shard_teacher), so one alone has no weights to save. "
            "Save it by its trainer, on every process: trainer.save_model(FOLDER)."
        )
    state.update({f"{prefix}{name}": value for name, value in _WHOLE[layer].items()})


def _take_share(layer: nn.Module, state: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
    """Hook of `load_state_dict`: this process's share of weights that every process has read."""
    for name, parameter in layer.named_parameters():
        value = state.get(f"{prefix}{name}")
        if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            on = value.to(parameter.device_mesh.device_type)
            state[f"{prefix}{name}"] = distribute_tensor(
                on, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
