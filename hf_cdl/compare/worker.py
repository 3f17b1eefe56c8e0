"""A run of a comparison as a process of its own, forked from a server that has imported everything before.

Importing costs more CPU time than a small run's training. The server has one thread of Python's, and no CUDA; where
processes cannot be forked safely (Windows, macOS), each run is an interpreter of its own and imports for itself.

A run ends together with the process that started it, even if that was killed. Otherwise a killed comparison would
leave its runs running alongside those of the next start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hf_cdl.commands.stopping import end_after

PRELOADED = ("hf_cdl.commands.train", "hf_cdl.training.trainer", "hf_cdl.compare.test_split", "matplotlib.pyplot")
"""What the runs of comparisons import."""
_SERVED: dict[str, str] = {}
"""Variables that the server's libraries have read: threads are counted once, as a library is loaded."""
_NVML = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Lets torch look for GPUs without starting CUDA, after which no fork could use one."""


def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Start a module with its arguments (`hf_cdl`: the commands); it writes into `log`, and `environment` is added."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()  # it fails here, not in the run, where nobody could read why
    context: Any = multiprocessing.get_context("forkserver" if _is_served(environment) else "spawn")
    process = context.Process(target=_run, args=([*words], str(log), {**os.environ, **environment}))
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([*PRELOADED])
        environment = {**environment, **_NVML}
    with _added(environment):  # for the server's imports, or the interpreter's
        process.start()
    return process


def _is_served(environment: Mapping[str, str]) -> bool:
    """Whether there can be a server whose libraries have read this environment."""
    read = {name: value for name, value in environment.items() if name.endswith("_NUM_THREADS")}
    if not _SERVED:
        _SERVED.update(read)
    return sys.platform == "linux" and read == _SERVED


@contextlib.contextmanager
def _added(environment: Mapping[str, str]) -> Iterator[None]:
    """Let the processes that are started meanwhile have these variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _run(words: list[str], log: str, environment: dict[str, str]) -> None:
    """Be the process of a run."""
    with open(log, "a") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    end_after(_wait_for_the_end_above)
    gc.freeze()  # collections leave out the modules, whose pages stay shared with the server
    multiprocessing.set_start_method(None, force=True)  # for the processes that load images: the usual one
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _wait_for_the_end_above() -> None:
    """Wait until the comparison has ended, or the server, which alone learns how this process ends."""
    comparison, above = multiprocessing.parent_process(), os.getppid()
    while comparison is not None and comparison.is_alive() and os.getppid() == above:
        comparison.join(1.0)
