"""Compiled training (`torch_compile`): torch compiles the encoders of a phase's models, each as a step calls it.

Heads, and pools that are asked before the pass, grow from task to task and stay outside, so the graphs of one task
serve the next. Every shape of batch has its own graphs: a result depends on its batch, not on the batches before it,
and a resumed run computes what it would have computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

BACKENDS = ("inductor", "aot_eager", "eager")
_TIMED = "its kernels are chosen by timing them, so a run that is resumed would compute other last bits"
MODES = {
    "default": None,
    "reduce-overhead": "its CUDA graphs overwrite what they answered, and queries are kept from step to step",
    "max-autotune": _TIMED,
    "max-autotune-no-cudagraphs": _TIMED,
}
"""torch.compile's modes, and why one is refused."""

_FIELDS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
_GRAPHS = 2**10
"""Most graphs of one function, over all encoders, tasks and shapes; torch would stop compiling after 8."""


@contextmanager
def hidden_from_transformers(args: Any) -> Iterator[None]:
    """Hide these arguments from transformers, which would compile the whole model and enable TF32 along the way."""
    given = {name: getattr(args, name) for name in _FIELDS}
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(args, name, value)


@contextmanager
def compiled(args: Any, *models: Any) -> Iterator[None]:
    """Compile the encoders of these models (or None) while a phase lasts, if the arguments ask for it.

    Weights keep their names, and copies of a model are not compiled.
    """
    if not args.torch_compile:
        yield
        return
    import torch._dynamo.config  # takes a second

    encoders = {id(part): part for model in models if model is not None for part in _encoders(model)}
    before = [(part, part._compiled_call_impl) for part in encoders.values()]
    for part in encoders.values():
        part.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=_GRAPHS):
            yield
    finally:
        for part, call in before:
            part._compiled_call_impl = call


def check_compiler(args: Any) -> None:
    """Raise ValueError on a CPU without a compiler; for a GPU torch brings what it needs."""
    if args.torch_compile_backend != "inductor" or args.device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "torch_compile is true, but on a CPU torch compiles with a C++ compiler, and found none (g++, or what CXX "
            "names). Install one (apt install g++, xcode-select --install), or leave torch_compile out."
        ) from error


def is_compiled(encoder: nn.Module) -> bool:
    """Whether an encoder's answers are those of compiled graphs, whose last bits differ."""
    return encoder._compiled_call_impl is not None


def are_compiled(model: Any) -> bool:
    """Whether a model's answers are those of compiled graphs."""
    return any(map(is_compiled, _encoders(model)))


def _encoders(model: Any) -> list[nn.Module]:
    """What is compiled of a model; all of a user's own."""
    return model.encoders if hasattr(model, "encoders") else [model]
