"""Bad inputs, one per row, and the code that runs each, with a time and a memory limit."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import resource
import runpy
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import datasets.config
import huggingface_hub.constants as hub_constants
import torch
from accelerate.state import AcceleratorState
from helpers import MAIN, ROOT
from transformers.utils import logging as hf_logging

from bad_inputs.parts import Parts

SECONDS = 10
"""What a bad input may take, without the time that a busy machine lets it wait. Stopped at three times as much."""
MEMORY = 2**30
"""Bytes that a bad input may take. A child is stopped at three times as much."""
LINES = 6
WAY = (
    r"\b(allowed|must|should|needs?|needed|takes?|did you mean|give|set|choose|use|write|leave|remove|restore|repair"
    r"|scale|save|keep|install|one of|at (least|most)|lies? between|from 0 to|lower|raise|it has|only|check|download"
    r"|name (it|one|them|a|an|another|the|where)|get|put|build|ask|run|mend|make|change|copy|move|rename|lay|train"
    r"|push|fix|supported|log in)\b"
)
"""Words of what is allowed or of a way out; a row may ask for others."""
NAMED = ("ValueError", "RecipeError", "RunError", "ImageError", "HubError")


class Command(NamedTuple):
    """A verb of hf-cdl, or a script given by its path, and its arguments."""

    script: str
    words: list[str]


Act = Command | Callable[[], Any]


def command(script: str, *words: Any) -> Command:
    return Command(script, [str(word) for word in words])


@dataclass(frozen=True)
class Row:
    """One bad input.

    `make(parts)` writes what is needed into the empty current folder and returns what to do: a command, which must
    exit with code 2, or a callable, which must raise one of NAMED. `says`: what the message must name, alternatives
    separated by `|`; `way`: a pattern of the solution it offers. `hub`: it uses the tests' Hub.
    """

    name: str
    make: Callable[[Parts], Act]
    says: tuple[str, ...]
    way: str = WAY
    hub: bool = False


class Result(NamedTuple):
    """Outcome of a child: its exit code or the exception's class, its message, and both of its outputs.

    `memory`: bytes by which its memory grew.
    """

    code: int | None
    error: str | None
    message: str
    memory: int
    output: str
    seconds: float


def rows(kind: str, *tables: list[Row]) -> list[Row]:
    """The rows of tables, with their names prefixed by a kind."""
    return [dataclasses.replace(row, name=f"{kind}: {row.name}") for table in tables for row in table]


def check(row: Row, parts: Parts, folder: Path, alone: bool) -> None:
    """Run a row in an empty folder, in a forked child or in this process.

    Raises AssertionError with everything that is wrong.
    """
    with inside(folder):
        act = row.make(parts)
    before = snapshot(folder, parts.root)
    result = (in_child if alone else in_process)(act, folder, parts.hub_url if row.hub else None)
    after = snapshot(folder, parts.root)
    wrong = [*problems(row, act, result)]
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        wrong.append(f"files changed: {', '.join(changed[:5])}")
    assert not wrong, "; ".join(wrong) + f"\n{result.error or ''} {result.message}\n{result.output[-3000:]}"


def problems(row: Row, act: Act, result: Result) -> list[str]:
    """List what is wrong with the response to a bad input."""
    wrong = []
    if result.seconds > SECONDS:
        wrong.append(f"it took {result.seconds:.1f} s")
    if result.memory > MEMORY:
        wrong.append(f"it took {result.memory / 2**30:.1f} GiB")
    if "Traceback" in result.output:
        wrong.append("a traceback")
    if "Warning" in result.output:
        wrong.append("a warning")
    if "[y/N]" in result.output:
        wrong.append("a question")
    if isinstance(act, Command):
        if result.code != 2:
            wrong.append(f"exit code {result.code} instead of 2")
        _, *messages = re.split(r"^(?:[\w. -]+: )?error: ", result.output, flags=re.MULTILINE)
        if len(messages) != 1:
            return [*wrong, f"{len(messages)} messages 'error: ...' instead of one"]
        [message] = messages
    else:
        message = result.message
        if result.error not in NAMED:
            return [*wrong, f"{result.error or 'nothing'} instead of a named exception"]
    if (lines := message.strip().count("\n") + 1) > LINES:
        wrong.append(f"{lines} lines")
    said = message.lower()
    for words in row.says:
        if not any(re.search(rf"(?<![^\W_]){re.escape(word.lower())}", said) for word in words.split("|")):
            wrong.append(f"it does not say {words!r}")
    usage = "usage: " in result.output  # argparse shows what is allowed
    if not usage and not re.search(row.way, message, re.IGNORECASE):
        wrong.append("no way out")
    return wrong


def in_process(act: Act, folder: Path, hub: str | None = None) -> Result:
    """Run it in this process, where what earlier ones imported and cached is there; what it changes is set back."""
    log = _log(folder)
    with _set_back():
        os.dup2(log, 1)
        os.dup2(log, 2)
        measured = _measured(act, folder, hub)
    return _result(measured, log)


def in_child(act: Act, folder: Path, hub: str | None = None) -> Result:
    """Run it in a forked child; a child that takes too long is killed."""
    reading, writing = os.pipe()
    log = _log(folder)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.write(writing, json.dumps(_measured(act, folder, hub)).encode())
        finally:
            os._exit(0)  # even if other threads are running
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 3 * SECONDS)
    content = os.read(reading, 1 << 20) if ready else b""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    stopped = (None, "a process that had to be stopped", "", 0, 3.0 * SECONDS)
    return _result(json.loads(content) if content else stopped, log)


def _log(folder: Path) -> int:
    """A file next to the folder for all output."""
    return os.open(str(folder.with_name(f"{folder.name}.log")), os.O_CREAT | os.O_RDWR | os.O_TRUNC)


def _result(measured: Sequence[Any], log: int) -> Result:
    code, error, message, memory, seconds = measured
    output = os.pread(log, 1 << 20, 0).decode(errors="replace")
    os.close(log)
    return Result(code, error, message, memory, output, seconds)


def _measured(act: Act, folder: Path, hub: str | None) -> tuple[Any, ...]:
    """What `_do` returns, then the bytes and seconds that it took."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    memory, start, waited = _peak(), time.monotonic(), _waited()
    answer = _do(act, folder, hub)
    seconds = time.monotonic() - start - (_waited() - waited)
    return *answer, _peak() - memory, seconds


@contextlib.contextmanager
def _set_back() -> Iterator[None]:
    """Set back what a command changes in its process."""
    streams, words, level = (sys.stdout, sys.stderr), sys.argv, hf_logging.get_verbosity()
    numbers, environment = [os.dup(number) for number in (1, 2)], dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    memory = resource.getrlimit(resource.RLIMIT_AS)
    with warnings.catch_warnings(), inside(Path.cwd()):
        yield
    sys.stdout.flush()
    sys.stderr.flush()
    (sys.stdout, sys.stderr), sys.argv = streams, words
    hf_logging.set_verbosity(level)
    for to, number in enumerate(numbers, 1):
        os.dup2(number, to)
        os.close(number)
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    resource.setrlimit(resource.RLIMIT_AS, memory)


def _waited() -> float:
    """Seconds in which this process was ready to run but waited for a core."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def _peak() -> int:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _do(act: Act, folder: Path, hub: str | None) -> tuple[int | None, str | None, str]:
    """Run in the child: the exit code of a command, or a callable's exception and its message."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * MEMORY, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    _use_hub(hub, folder.with_name(f"{folder.name}.cache"))
    try:
        if isinstance(act, Command):
            script = act.script.endswith(".py")
            sys.argv = [str(ROOT / act.script), *act.words] if script else [str(MAIN), act.script, *act.words]
            runpy.run_path(sys.argv[0], run_name="__main__")
            return 0, None, ""
        act()
    except SystemExit as end:
        if isinstance(end.code, str):  # as the interpreter does
            print(end.code, file=sys.stderr)
        return (end.code if isinstance(end.code, int) else int(end.code is not None)), None, ""
    except BaseException as error:
        if isinstance(act, Command):
            traceback.print_exc()
            return 1, None, ""
        ours = type(error) is ValueError or type(error).__module__.startswith("hf_cdl.")
        return None, type(error).__name__ if ours else f"a foreign {type(error).__name__}", str(error)[:20_000]
    return None, None, ""


def _use_hub(url: str | None, cache: Path) -> None:
    """Go offline, or use the tests' Hub instead of the real one, by changing constants that are read on import."""
    hub_constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = url is None
    os.environ["HF_HUB_OFFLINE"] = str(int(url is None))
    for name in ("HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE"):
        setattr(hub_constants, name, str(cache))
    os.environ["HF_TOKEN"] = "hf_write"
    os.environ["HF_CDL_PUSH_DELAY"] = "0.01"
    if url is not None:
        hub_constants.ENDPOINT = url
        hub_constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"


def snapshot(folder: Path, *others: Path) -> dict[str, Any]:
    """Every path in the folders: kind, size and modification times; for the first folder also sha256 sums."""
    found = {}
    for place in (folder, *others):
        for inside, folders, files in os.walk(place):
            for path in (os.path.join(inside, name) for name in (*folders, *files)):
                stat = os.lstat(path)
                about: tuple[Any, ...] = (stat.st_mode,)
                if S_ISREG(stat.st_mode) and os.path.basename(path) != ".lock":  # a lock file is opened to test it
                    about += (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                    if place == folder and stat.st_size < 2**25:
                        about += (hashlib.sha256(Path(path).read_bytes()).hexdigest(),)
                found[path.removeprefix(f"{place.parent}{os.sep}")] = about
    return found


@contextlib.contextmanager
def inside(folder: Path) -> Any:
    """Like contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
