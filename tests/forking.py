"""Commands as processes forked from one that has imported everything, which saves seconds for each."""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

IMPORTED = (
    "helpers",
    "bad_inputs",
    "test_hub",
    "test_kills",
    "hf_cdl.commands.train",
    "hf_cdl.training.trainer",
    "matplotlib.pyplot",
)
"""Modules imported by the process that the others are forked from."""


@functools.cache
def begin() -> ForkServerContext:
    """Start importing everything in a separate process, which takes seconds, without waiting for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("PYTHONUNBUFFERED", "1")
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # modules not found would be skipped silently
        forkserver.ensure_running()
    return context


@functools.cache
def server() -> ForkServerContext:
    """The context for starting processes that have imported everything."""
    context = begin()
    imported = f"import sys; sys.exit(not {{*{IMPORTED}}} <= {{*sys.modules}})"
    process = context.Process(target=exec, args=(imported,))
    process.start()
    process.join()
    assert process.exitcode == 0, "nothing was imported"
    return context


def take(env: dict[str, str]) -> None:
    """Apply environment variables for the Hub to modules that only read them on import."""
    import datasets.config
    import huggingface_hub.hf_api
    from huggingface_hub import constants

    os.environ.update(env)
    before = {name: value for name, value in vars(constants).items() if name.isupper()}
    importlib.reload(constants)
    importlib.reload(datasets.config)
    changed = {name: value for name, value in before.items() if getattr(constants, name) != value}
    for module in [*sys.modules.values()]:
        for name in changed.keys() & vars(module).keys():
            setattr(module, name, getattr(constants, name))
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT


def become(file: str, words: Sequence[str], cwd: str, env: dict[str, str], log: str, warn: bool) -> None:
    """Run a script in the forked process, as if the interpreter had been started with it."""
    os.setsid()
    gc.freeze()  # otherwise every collection scans all imported modules
    multiprocessing.set_start_method("fork", force=True)  # the usual method again, for data loader workers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    if env:
        take(env)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    if warn:
        warnings.simplefilter("error", UserWarning)
    sys.argv = [file, *words]
    runpy.run_path(file, run_name="__main__")


class Forked:
    """A running script, with the part of subprocess.Popen's interface that the tests need.

    `env`: environment variables for the Hub; `warn`: turn UserWarning into an error.
    """

    def __init__(
        self, file: Path, words: Sequence[str], cwd: Path | str, env: dict[str, str] | None = None, warn: bool = False
    ):
        number, log = tempfile.mkstemp()
        os.close(number)
        weakref.finalize(self, os.unlink, log)
        self._log = Path(log)
        self.args = [str(file), *words]
        given = (str(file), [*words], str(cwd), env or {}, log, warn)
        self._process = server().Process(target=become, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._log.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
