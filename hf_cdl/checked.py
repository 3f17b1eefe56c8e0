"""Checks of external input: fields of a section, the size of a part, NaN or infinite weights."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from hf_cdl.counted import counted

MOST = 10**10
"""Maximum number of elements of a part; the largest backbone of an allow-listed family has 7 * 10^9."""
_MOST_PARTS, _MOST_LABELS = 1000, 10**6
_PARTS = re.compile(r"layers|depth|blocks|repeats")
"""Config fields that count parts of a model: each part costs time and memory, however small it is."""
_SIZES = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio"),
    *("image_size", "patch_size", "num_channels"),
}
_GENERIC: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), (None, "sdpa", "eager")),
    **dict.fromkeys(("_attn_implementation_internal", "experts_implementation"), (None, "sdpa", "eager")),
    **dict.fromkeys(("quantization_config", "fusion_config", "distributed_config", "per_layer_config"), (None,)),
    **dict.fromkeys(("return_dict", "use_return_dict"), (None, True)),
    **dict.fromkeys(("output_hidden_states", "output_attentions"), (None, False, True)),
}
"""Fields of any config.json that change how transformers runs a model, and their allowed values."""
_WORDS = {
    bool: "true or false",
    int: "a whole number of at most 9 digits",
    float: "a finite number",
    str: "a text",
    NoneType: "null",
}


# ---- fields ----


def check_types(fields: Any, what: str) -> None:
    """Raise ValueError unless every field of a dataclass has a value of its type: finite, and no bool as a number."""
    for name, hint in _hints(type(fields)).items():
        if not fits(value := getattr(fields, name), hint):
            raise ValueError(f"{what}'s {name} is {short(value)}; allowed: {_allowed(hint)}.")


def check_effect(fields: Any, what: str, name: str, used: bool, why: str) -> None:
    """Raise ValueError for a field of a dataclass that is not its default, unless it is `used`; `why` it is not."""
    value = getattr(fields, name)
    if not used and value != next(f.default for f in dataclasses.fields(fields) if f.name == name):
        raise ValueError(f"{what}: {name} is {short(value)}, but has no effect, as {why}. Leave {name} out.")


def build_fields(kind: Any, content: Any, what: str) -> Any:
    """Build the dataclass `kind` from a config section. Raises ValueError for anything else and for unknown fields."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} has fields; got {short(content)}.")
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"{what} has no field {', '.join(unknown)}; it has {', '.join(known)}.")
    built = kind(**content)
    check_types(built, what)  # a plugin's dataclass may not do this itself
    return built


def check_share(value: Any, what: str) -> float:
    """A share of images as a number. Raises ValueError unless it is above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:  # of NumPy too
        raise ValueError(f"{what} is {short(value)}; give a share above 0 and below 1, such as 0.95.")
    return float(value)


def check_numbers(config: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for impossible numbers in a transformers config: NaN, a size of 0, a billion layers."""
    for name, value in config.items():
        if name in ("id2label", "label2id"):
            continue
        if isinstance(value, Mapping):
            check_numbers(value, f"{what}.{name}")
            continue
        most = _MOST_PARTS if _PARTS.search(str(name)) else _MOST_LABELS if name == "num_labels" else 10**9
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            least = 1 if name in _SIZES else 0 if str(name).endswith("eps") else -math.inf
            if not (math.isfinite(number) and least <= number and (isinstance(number, float) or abs(number) <= most)):
                raise ValueError(
                    f"{what}.{name} is {short(number)}; allowed are finite numbers"
                    f"{f' from {least}' if least >= 0 else ''} to {most:,}."
                )


def check_generic(stored: Mapping[str, Any], what: str, **others: tuple[Any, ...]) -> None:
    """Raise ValueError for a field in a stored config, nested ones included, that changes how the model is run.

    An attention implementation may name a repository whose code transformers would download and run. `others`: other
    allowed values.
    """
    for name, value in stored.items():
        allowed = {**_GENERIC, **others}.get(name)
        if allowed is not None and not any(type(value) is type(known) and value == known for known in allowed):
            words = ", ".join("null" if known is None else str(known).lower() for known in allowed)
            raise ValueError(
                f"{what}.{name} is {short(value)}; allowed: {words}. hf_cdl runs models in no other way: "
                "take the field out of that file."
            )
        if isinstance(value, Mapping):
            check_generic(value, f"{what}.{name}")


def near(name: str, known: Iterable[str]) -> str:
    """End a sentence about an unknown name: `; did you mean 'prompt'?` for `promt`, or a full stop."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{found[0]}'?" if found else "."


def one_line(error: Exception) -> str:
    """Format another library's error on one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"


def short(value: Any) -> str:
    """Format a value for a message, in at most 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an int with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def fits(value: Any, hint: Any) -> bool:
    """Whether a value matches a type annotation, of the kinds used in the dataclasses here."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, UnionType):
        return any(fits(value, option) for option in inner)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**9
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    if kind in (tuple, list):
        return isinstance(value, tuple | list) and all(fits(part, inner[0]) for part in value)
    return kind is Any or isinstance(value, kind)


def storable(hint: Any) -> bool:
    """Whether values of a type annotation can be checked by `fits`, stored as JSON, and are the same when read."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, UnionType):
        return all(map(storable, inner))
    if kind is Literal:
        return all(isinstance(word, str) for word in inner)
    if kind in (tuple, list, dict):
        return bool(inner) and all(storable(part) for part in inner if part is not ...)
    return kind in (Any, *_WORDS)


def _finite(value: float) -> bool:
    """Whether the value is also finite in float32, the dtype of the weights."""
    return abs(value) <= torch.finfo(torch.float32).max  # false for NaN


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, localns={"torch": torch})  # PreTrainedConfig only names it
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _allowed(hint: Any) -> str:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, UnionType):
        return " or ".join(map(_allowed, inner))
    if kind is Literal:
        return ", ".join(map(str, inner))
    if kind in (tuple, list):
        return f"a list of which each is {_allowed(inner[0])}"
    return _WORDS.get(kind, "fields")


# ---- sizes and numbers ----


def check_size(what: str, build: Callable[[], nn.Module]) -> int:
    """Count the elements of the part that `build` makes, without allocating it.

    Raises ValueError if it cannot be built, and if it would not fit in this machine's memory.
    """
    try:
        with torch.device("meta"), init.no_init_weights():
            part = build()
    except ValueError:
        raise
    except Exception as error:  # transformers and torch raise many error types; sizes beyond 2^63 a RuntimeError
        raise ValueError(f"{what} cannot be made; check its config.json: {one_line(error)}") from error
    tensors = [*part.parameters(), *part.buffers()]
    numbers, size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
    room = _memory()
    if numbers > MOST or size > room:
        there = f"{MOST:,} are allowed" if numbers > MOST else f"this machine has {room / 2**30:,.0f} GiB"
        raise ValueError(
            f"{what} would hold {numbers:,} numbers ({size / 2**30:,.0f} GiB), but {there}. Check its sizes."
        )
    return numbers


def _memory() -> float:
    """This machine's memory in bytes; infinite where tensors take none (the meta device, fake tensors)."""
    probe = torch.empty(0)
    if type(probe) is not torch.Tensor or probe.is_meta:
        return math.inf
    try:  # in a try block, transformers does not require it of remote code (save_code)
        import psutil
    except ImportError:
        return math.inf
    return psutil.virtual_memory().total


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise ValueError naming tensors with NaN or infinite values; integer tensors (float64 bits) always pass."""
    bad = [name for name, value in tensors.items() if not _all_finite(value)]
    if bad:
        raise ValueError(
            f"{what} are NaN or infinite in {len(bad)} of {counted(len(tensors), 'tensor')}: {listed(bad)}. What is "
            "computed with them is no answer. Give a checkpoint that is whole, from before its training diverged."
        )


def listed(names: Iterable[str], count: int = 3) -> str:
    """Join the first `count` names in sorted order."""
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _all_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.numel() == 0 or value.is_meta:
        return True
    low, high = torch.aminmax(value.detach())  # both are NaN if any is; one pass, no copy
    return math.isfinite(low.item()) and math.isfinite(high.item())
