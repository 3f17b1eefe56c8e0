"""A second device on a machine that has none: tensors on `lazy` hold one on the CPU, and mixing devices is an error.

Operations run as on the CPU, so that values decide as they do on a GPU. torch has no kernels for its type `lazy`, but
autograd treats it as any other device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
aten = torch.ops.aten


class OnDevice(torch.Tensor):
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], meta: Any, size: Any, stride: Any) -> OnDevice:
        return OnDevice(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("A tensor of a second device has no NumPy array; use Tensor.cpu() first.")


def is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on what the tensors hold; its results are where its arguments are, or where it is told."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    if func is aten.copy_.default:  # may cross devices, as `_to_copy`
        held(args[0]).copy_(held(args[1]))
        return args[0]
    ours = [value for value in tensors if isinstance(value, OnDevice)]
    theirs = [value for value in tensors if not isinstance(value, OnDevice) and value.ndim]
    if ours and theirs and not ("index" in str(func) and all(not value.is_floating_point() for value in theirs)):
        where = ", ".join(f"{tuple(value.shape)} on {value.device}" for value in tensors)
        raise RuntimeError(f"Expected all tensors on one device, but {func} got {where}")
    device = kwargs.get("device")
    stays = bool(ours) if device is None else is_second(device)
    kwargs = {**kwargs, **({"device": torch.device("cpu")} if is_second(device) else {})}
    found = func(*tree_map(held, args), **tree_map(held, kwargs))
    if not stays or func is aten._local_scalar_dense.default:
        return found
    found = tree_map(lambda value: OnDevice(value) if isinstance(value, torch.Tensor) else value, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if ours and func.namespace == "aten" else found


class Dispatched(TorchDispatchMode):
    """Brings factories and `Tensor.to` to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Called(TorchFunctionMode):
    """What C++ would make on the device itself is made on the CPU and moved: tensors, and lists as indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_second(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnDevice):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            at = tuple(torch.tensor(each) if isinstance(each, list) else each for each in at)
            return func(args[0], at if isinstance(args[1], tuple) else at[0])
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """In this context `Tensor.to`, `Module.to` and `device=` know the device."""
    with Called(), Dispatched():
        yield DEVICE
