"""Commands as processes, forked from one that has imported everything: seconds less for each."""

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
    "test_hub",
    "test_kills",
    "hf_cdl.commands.train",
    "hf_cdl.training.trainer",
    "matplotlib.pyplot",
)
"""Modules that the process has imported from which others are forked."""


@functools.cache
def begin() -> ForkServerContext:
    """Begins to import everything in a process of its own, which takes seconds, and does not wait for that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("PYTHONUNBUFFERED", "1")
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else modules that are not found are left out
        forkserver.ensure_running()
    return context


@functools.cache
def server() -> ForkServerContext:
    """Starts processes that have imported everything."""
    context = begin()
    imported = f"import sys; sys.exit(not {{*{IMPORTED}}} <= {{*sys.modules}})"
    process = context.Process(target=exec, args=(imported,))
    process.start()
    process.join()
    assert process.exitcode == 0, "nothing was imported"
    return context


def take(env: dict[str, str]) -> None:
    """An environment for the Hub, as if the modules had found it that read it when they are imported."""
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
    """In the forked process: the script, as if the interpreter had been started with it."""
    os.setsid()
    gc.freeze()  # or every collection goes through all that was imported
    multiprocessing.set_start_method("fork", force=True)  # the usual one again, for the workers that load images
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
    """A script that is at work: what the tests need of subprocess.Popen.

    `env`: what is set for the Hub; `warn`: warnings of ours are errors.
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
