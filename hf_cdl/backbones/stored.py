"""Checks of what is stored at a Hub id or in a folder, where possible without loading it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from hf_cdl.checked import check_finite, listed
from hf_cdl.counted import counted

HUB = ("cache_dir", "token", "local_files_only")
"""Options of from_pretrained for accessing the Hub."""


def at(revision: str | None) -> str:
    """Format a revision for a message."""
    return "" if revision is None else f" (revision {revision})"


def is_folder(name: Any) -> bool:
    """Whether a name refers to a local folder: it exists, or does not look like a Hub id."""
    folder, name = Path(name).expanduser(), str(name)
    return folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def check_revision(name: Any, revision: str | None) -> None:
    """Raise ValueError for a revision given with a folder."""
    if revision is not None and Path(name).is_dir():
        raise ValueError(
            f"'{name}' is a folder, and a folder has no revisions, but revision is '{revision}'. Leave it out, or "
            "give the Hub id that it is of."
        )


def weight_files(name: Any, revision: str | None = None, **hub: Any) -> list[str]:
    """The safetensors files at a Hub id or folder: one, or the shards; empty if not found."""
    try:
        for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False, **hub)
            if found is not None and file == SAFE_WEIGHTS_INDEX_NAME:
                return get_checkpoint_shard_files(name, found, revision=revision, **hub)[0] or []
            if found is not None:
                return [found]
    except (OSError, ValueError, KeyError):  # loading reports what is wrong
        pass
    return []


def named(name: Any) -> str:
    """The name of a folder's weights in messages: one file, or those an index names. None: the place is not known."""
    index = Path(name or "").expanduser() / SAFE_WEIGHTS_INDEX_NAME
    several = name is not None and index.is_file() and not index.with_name(SAFE_WEIGHTS_NAME).exists()
    return f"every file that {SAFE_WEIGHTS_INDEX_NAME} names" if several else SAFE_WEIGHTS_NAME


def check_no_adapters(name: Any, revision: str | None = None, **hub: Any) -> None:
    """Raise ValueError if there are adapters next to a model's weights: transformers would load what they name."""
    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    try:
        found = cached_file(name, "adapter_config.json", revision=revision, **quiet, **hub)
    except (OSError, ValueError):  # loading reports what is wrong
        return
    if found is not None:
        raise ValueError(
            f"'{name}'{at(revision)} has an adapter_config.json beside its weights, so transformers would load "
            "adapters, perhaps on another model. Merge them first and save what peft's merge_and_unload() gives, or "
            "take adapter_config.json away if you want the bare model."
        )


def stored_sizes(files: Sequence[str]) -> dict[str, int]:
    """Weight -> number of elements, over all these safetensors files; empty if one cannot be read."""
    sizes: dict[str, int] = {}
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                sizes |= {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # loading reports what is wrong
        return {}
    return sizes


def check_stored(what: str, numbers: int, files: Sequence[str]) -> None:
    """Raise ValueError if a model with `numbers` elements cannot be the one in these safetensors files.

    Reads only headers, so nothing is allocated for a config that claims more than is stored. Up to twice the stored
    amount may be missing (heads, poolers); the missing weights are reported after loading.
    """
    stored = sum(stored_sizes(files).values())
    if stored and numbers > 3 * stored + 10**7:
        raise ValueError(
            f"The config of {what} describes a model of {numbers:,} numbers, but its weights are {stored:,}. They do "
            f"not belong together: get config.json and {named(Path(files[0]).parent)} again from where they came."
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress transformers' table of missing weights: they raise an error or are missing on purpose."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_complete(info: Mapping[str, Any], what: str, place: Any) -> None:
    """Raise ValueError naming weights that are missing from a checkpoint, unexpected or of another shape.

    `info`: the loading info of from_pretrained, or part of it; `place`: folder or Hub id, None if not known.
    """
    problems = []
    if missing := [name for name in info.get("missing_keys", ()) if "mask_token" not in name]:
        problems.append(f"it lacks {counted(len(missing), 'weight')} ({listed(missing)}), which would be random")
    if unknown := info.get("unexpected_keys"):
        problems.append(f"it has {len(unknown)} that its config does not ask for ({listed(unknown)})")
    if shapes := [
        f"{name} {tuple(stored)} instead of {tuple(own)}" for name, stored, own in info.get("mismatched_keys", ())
    ]:
        problems.append(f"{len(shapes)} have another shape ({listed(shapes)})")
    if problems:
        raise ValueError(
            f"{what} is not what config.json describes: {'; '.join(problems)}. Get config.json and "
            f"{named(place)} again from where they came, or take an earlier checkpoint."
        )


def check_weights(state: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise ValueError naming NaN or infinite weights, except those that never reach the output."""
    check_finite({name: value for name, value in state.items() if "mask_token" not in name}, f"The weights of {what}")
