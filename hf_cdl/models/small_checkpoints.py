"""Small checkpoints hold only what was learnt; the config names the frozen backbones, which loading fetches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from hf_cdl.backbones import loading as bb
from hf_cdl.backbones.lora import is_adapter, load_frozen
from hf_cdl.backbones.stored import HUB, at, check_stored, stored_sizes, weight_files
from hf_cdl.types import is_ours

PARTS = {"backbone": "backbone", "query_backbone": "query"}
"""A model's frozen parts and the prefix of their config fields (query_name: where query_backbone comes from)."""
_DEEPEST = 4
"""Maximum length of a chain of small checkpoints that ends in a full backbone."""
_PLACES: ContextVar[tuple[tuple[str, str | None], ...]] = ContextVar("places that are being fetched from", default=())


def left_out(name: str) -> bool:
    """Whether a weight belongs to a frozen backbone, so that a small checkpoint leaves it out."""
    return name.startswith(tuple(f"{part}." for part in PARTS)) and not is_adapter(name)


def absent_parts(config: Any, names: Iterable[str]) -> dict[str, str]:
    """Part -> prefix of its fields, for frozen parts that have no weights under these names and can be fetched.

    A trained backbone cannot be fetched again, nor one without a fingerprint to show that it is the same.
    """
    there = {name.partition(".")[0] for name in names if left_out(name)}
    return {part: prefix for part, prefix in _frozen_parts(config).items() if part not in there}


def misnamed_parts(config: Any, info: Mapping[str, Any]) -> dict[str, str]:
    """The same for parts stored under another family's weight names, as older checkpoints of two families were.

    `info`: the loading info of from_pretrained.
    """
    parts = [{name.partition(".")[0] for name in info[kind]} for kind in ("missing_keys", "unexpected_keys")]
    return {part: prefix for part, prefix in _frozen_parts(config).items() if all(part in found for found in parts)}


def _frozen_parts(config: Any) -> dict[str, str]:
    return {
        part: prefix
        for part, prefix in PARTS.items()
        if getattr(config, f"{prefix}_config") is not None and not config.train_backbone
        and not (config.save_backbone and getattr(config, f"{prefix}_digest") is None)
    }  # fmt: skip


def check_backbones(model: nn.Module, parts: Mapping[str, str], **hub: Any) -> None:
    """Raise ValueError unless parts (from absent_parts) can be fetched and are no larger than the config says.

    Reads only configs and file headers, before anything is allocated.
    """
    for part, prefix in parts.items():
        name, revision = place_of(model.config, prefix)
        with _about(part, prefix, name, revision):
            whole, its_revision = whole_one(name, revision, **hub)
            numbers = sum(value.numel() for value in getattr(model, part).state_dict().values())
            check_stored(f"'{whole}'", numbers, weight_files(whole, its_revision, **hub))


def fetch_backbones(model: nn.Module, parts: Mapping[str, str], **options: Any) -> None:
    """Load parts (from absent_parts) from their original source; `options` are those of from_pretrained.

    Raises ValueError if one is gone, or is no longer the one the checkpoint was trained on.
    """
    hub = {name: options[name] for name in HUB if name in options}
    for part, prefix in parts.items():
        name, revision = place_of(model.config, prefix)
        digest = getattr(model.config, f"{prefix}_digest")
        with _about(part, prefix, name, revision), _fetching(name, revision):
            backbone = bb.load_backbone(name, revision, **hub)
            if digest not in (None, found := bb.digest(backbone)):
                raise ValueError(f"Its weights are others now: fingerprint {found}, not {digest}.")
        load_frozen(getattr(model, part), backbone.state_dict())
        setattr(model.config, f"{prefix}_revision", revision)


def place_of(config: Any, prefix: str) -> tuple[str, str | None]:
    """Hub id or folder of a frozen part, and its revision: None for a folder, even if it replaced a Hub id."""
    name, revision = getattr(config, f"{prefix}_name"), getattr(config, f"{prefix}_revision")
    if name is None:
        raise ValueError(f"This checkpoint holds what was learnt alone, and has no {prefix}_name to say on what.")
    return name, None if Path(name).is_dir() else revision


def whole_one(
    name: str, revision: str | None, below: tuple[tuple[str, str | None], ...] = (), **hub: Any
) -> tuple[str, str | None]:
    """Where a backbone's weights are: there or, if that is a small checkpoint of ours, where its backbone's are.

    Reads only configs and file headers. `below`: the small checkpoints that depend on this one. Raises ValueError if
    it depends on itself, or on too many others.
    """
    place = (str(Path(name).resolve()) if Path(name).is_dir() else name, revision)
    if place in below or len(below) >= _DEEPEST:
        names = " -> ".join(f"'{folder}'" for folder, _ in (*below, place))
        which = "each other or themselves" if place in below else f"more than {_DEEPEST} others in turn"
        raise ValueError(f"Small checkpoints that name {which} as backbone have none: {names}.")
    config: Any = bb.read_config(name, revision, **hub)
    if not is_ours(config):
        return name, revision
    absent = absent_parts(config, stored_sizes(weight_files(name, revision, **hub)))
    on = {part: whole_one(*place_of(config, prefix), (*below, place), **hub) for part, prefix in absent.items()}
    return on.get("backbone", (name, revision))


@contextmanager
def _fetching(name: str, revision: str | None) -> Iterator[None]:
    """Raise ValueError if fetching a checkpoint's part requires that same part."""
    places = _PLACES.get()
    if (name, revision) in places or len(places) > _DEEPEST:
        raise ValueError("It is a checkpoint that needs itself, or too many others, as its backbone.")
    token = _PLACES.set((*places, (name, revision)))
    try:
        yield
    finally:
        _PLACES.reset(token)


@contextmanager
def _about(part: str, prefix: str, name: str, revision: str | None) -> Iterator[None]:
    """Make errors name the part and a remedy."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"This checkpoint holds what was learnt alone. Its {part} is '{name}'{at(revision)}, which does not "
            f"serve: {error} Get it back, or say where the same weights are: "
            f"from_pretrained(..., {prefix}_name='HUB ID OR FOLDER', {prefix}_revision=None) "
            "(in a recipe: the section's backbone)."
        ) from error
