"""Outputs kept in a folder, which runs share: safetensors in parts that are never changed once they have their name.

    FOLDER/DIGEST/CONTENT.safetensors     DIGEST: of weights, code, precision and machine; CONTENT: of what is in it

A part appears whole, by a rename, and is named for its content, so any number of processes may write at once, and one
that is killed leaves nothing but a hidden file. Every tensor has a checksum, verified when it is read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_cdl.training.kept.weights import bytes_of, machine_of
from hf_cdl.types import CDLOutput

FORMAT = "hf_cdl kept outputs 1"
_TOGETHER = 2**26
"""Bytes that wait in memory for a part of their own."""
_OFTEN = 10
"""Seconds after which less than that is written too, and other processes' parts are looked for."""
_OLD = 24 * 3600
"""Seconds after which a part that never got its name is that of a killed process."""
_COUNT = itertools.count()


class KeptFiles:
    """A folder of outputs. `say` is told, once each, of what is damaged and that nothing more can be stored.

    Raises ValueError for a folder that cannot be one. `read`, `written`: bytes since it was opened.
    """

    def __init__(self, folder: Path, say: Callable[[str], Any]):
        check_place(folder)
        self.folder, self.say = folder, say
        self.read = self.written = 0
        self._stores = True
        self._parts: dict[str, _Parts] = {}
        self._machines: dict[Any, str] = {}

    def place(self, digest: str, device: torch.device, precision: torch.dtype) -> str:
        """The name of the folder of outputs that certain weights give on this machine."""
        said = repr([FORMAT, digest, machine_of(device), str(precision)])
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def find(self, place: str, what: Any, device: torch.device) -> CDLOutput | None:
        """An output, if it is known."""
        parts = self._at(place)
        if (found := parts.find(_name(what))) is None:
            return None
        self.read += sum(value.nbytes for value in found.values())
        return _output({path: value.to(device) for path, value in found.items()})

    def keep(self, place: str, what: Any, output: CDLOutput) -> None:
        """Keep an output; it is written some time later, or by `flush`."""
        if self._stores:
            parts = self._at(place)
            parts.waiting[_name(what)] = {path: value.detach().cpu().clone() for path, value in _tensors(output)}
            waiting = sum(value.nbytes for some in parts.waiting.values() for value in some.values())
            if waiting >= _TOGETHER or time.monotonic() - parts.flushed > _OFTEN:
                self._write(parts)

    def __str__(self) -> str:
        return f"{self.read / 2**20:,.1f} MiB read from {self.folder}, {self.written / 2**20:,.1f} MiB written"

    def flush(self) -> None:
        """Write what waits."""
        for parts in self._parts.values():
            if parts.waiting and self._stores:
                self._write(parts)

    def _write(self, parts: _Parts) -> None:
        try:
            self.written += parts.write()
        except (OSError, SafetensorError) as error:
            self._stores, parts.waiting = False, {}
            self.say(f"Nothing more is stored in the cache {self.folder} ({_line(error)}); the run continues.")

    def _at(self, place: str) -> _Parts:
        if place not in self._parts:
            self._parts[place] = _Parts(self.folder / place, self.say)
        return self._parts[place]


class _Parts:
    """The parts in a folder: an index of what is in them, and what `waiting` is still to be written."""

    def __init__(self, folder: Path, say: Callable[[str], Any]):
        self.folder, self.say = folder, say
        self.waiting: dict[str, dict[str, torch.Tensor]] = {}
        self.flushed = time.monotonic()
        self._index: dict[str, tuple[Path, dict[str, tuple[str, str]]]] = {}
        self._known: set[str] = set()
        self._looked = 0.0
        for old in folder.glob(".*.partial"):
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > _OLD:
                    old.unlink()

    def find(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors of an entry by their paths, if it is whole."""
        if name in self.waiting:
            return self.waiting[name]
        if name not in self._index:
            self._rescan()
        file, named = self._index.get(name, (None, {}))
        if file is None:
            return None
        try:
            with safe_open(file, "pt") as part:
                found = {path: part.get_tensor(key).clone() for path, (key, _) in named.items()}
        except (OSError, SafetensorError, ValueError) as error:
            return self._skip_damaged(file, _line(error))
        if any(_checksum(value) != named[path][1] for path, value in found.items()):
            return self._skip_damaged(file, "a checksum is wrong")
        return found

    def _whole(self, file: Path) -> dict[str, dict[str, torch.Tensor]]:
        """The entries of a part whose checksums are right."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        with suppress(OSError, SafetensorError, ValueError), safe_open(file, "pt") as part:
            for name, (_, named) in self._of(file).items():
                values = {path: part.get_tensor(key).clone() for path, (key, _) in named.items()}
                if all(_checksum(value) == named[path][1] for path, value in values.items()):
                    found[name] = values
        return found

    def _of(self, file: Path) -> dict[str, Any]:
        return {name: entry for name, entry in self._index.items() if entry[0] == file}

    def write(self) -> int:
        """Write what waits as one part; returns its bytes."""
        values = {f"{name}/{path}": value for name, found in self.waiting.items() for path, value in found.items()}
        sums = {key: _checksum(value) for key, value in values.items()}
        content = hashlib.sha256(repr((FORMAT, sorted(sums.items()))).encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{content}-{os.getpid()}-{next(_COUNT)}.partial"
        file = self.folder / f"{content}.safetensors"
        try:
            save_file(values, partial, {"format": FORMAT, **sums})
            os.replace(partial, file)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        self._add(file, sums)
        self.waiting, self.flushed = {}, time.monotonic()
        return file.stat().st_size

    def _rescan(self) -> None:
        """Look for parts that other processes have written."""
        if time.monotonic() - self._looked < _OFTEN and self._looked:
            return
        self._looked = time.monotonic()
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self._known:
                continue
            try:
                with safe_open(file, "pt") as part:
                    about, keys = dict(part.metadata() or {}), {*part.keys()}
            except (OSError, SafetensorError, ValueError) as error:
                self._skip_damaged(file, _line(error))
                continue
            if about.pop("format", None) != FORMAT or about.keys() != keys:
                self._known.add(file.name)
                self.say(f"{file} in the cache is not of the format of this version and is not read.")
                continue
            self._add(file, about)

    def _add(self, file: Path, sums: dict[str, str]) -> None:
        self._known.add(file.name)
        for key, checksum in sums.items():
            name, _, path = key.partition("/")
            if self._index.setdefault(name, (file, {}))[0] == file:
                self._index[name][1][path] = key, checksum

    def _skip_damaged(self, file: Path, why: str) -> None:
        """Read no more of a damaged part; what is whole in it goes into another."""
        self._known.add(file.name)
        self.waiting |= self._whole(file)
        self._index = {name: entry for name, entry in self._index.items() if entry[0] != file}
        with suppress(OSError):
            os.replace(file, file.with_suffix(".damaged"))
        self.say(f"{file} in the cache is damaged ({why}): it is put aside as .damaged, and what it held is computed.")


def check_place(folder: Path) -> None:
    """Raise ValueError for a folder in which nothing can be kept, or that is a model's."""
    where = folder.resolve()
    if where.exists() and not where.is_dir():
        raise ValueError(f"The cache {folder} is a file; name a folder for it, which is made if there is none.")
    if model := next((above for above in (where, *where.parents) if (above / "config.json").exists()), None):
        raise ValueError(
            f"The cache {folder} would lie in the model's folder {model}, whose files are pushed and checked; name "
            "another folder."
        )
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The cache {folder} cannot be made ({error.strerror}); name another folder.") from error


def _name(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def _checksum(value: torch.Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)} {zlib.crc32(bytes_of(value)):08x}"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an output by their paths: of a tuple number and length, as hidden_states.3/13."""
    if isinstance(value, CDLOutput):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name), f.name)
    elif isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, f"{path}.{number}/{len(value)}")


def _output(found: dict[str, torch.Tensor]) -> CDLOutput:
    """An output of tensors by their paths."""
    tree: dict[str, Any] = {}
    for path, value in found.items():
        *steps, last = path.split(".")
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = value
    return CDLOutput(**{name: _tuples(node) for name, node in tree.items()})


def _tuples(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    places = {tuple(map(int, key.split("/"))): _tuples(part) for key, part in node.items()}
    given = {number: part for (number, _), part in places.items()}
    return tuple(given.get(number) for number in range(next(iter(places))[1]))
