"""Scripts of recipes/ as processes, forked from one that has imported everything: seconds less for each."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

IMPORTED = ("helpers", "test_hub", "test_kills", "train", "hf_cdl.training.trainer", "matplotlib.pyplot")
"""Modules that the process has imported from which others are forked."""


@functools.cache
def server() -> ForkServerContext:
    """Starts processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("PYTHONUNBUFFERED", "1")
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else modules that are not found are left out
        process = context.Process(
            target=exec, args=(f"import sys; sys.exit(not {{*{IMPORTED}}} <= {{*sys.modules}})",)
        )
        process.start()
        process.join()
        assert process.exitcode == 0, "nothing was imported"
    return context


def become(file: str, words: Sequence[str], cwd: str, log: str, warn: bool) -> None:
    """In the forked process: the script, as if the interpreter had been started with it."""
    os.setsid()
    gc.freeze()  # or every collection goes through all that was imported
    multiprocessing.set_start_method("fork", force=True)  # the usual one again, for the workers that load images
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    if warn:
        warnings.simplefilter("error", UserWarning)
    sys.argv = [file, *words]
    runpy.run_path(file, run_name="__main__")


class Forked:
    """A script that is at work: what the tests need of subprocess.Popen."""

    def __init__(self, file: Path, words: Sequence[str], cwd: Path | str, warn: bool = False):
        self._log = tempfile.NamedTemporaryFile()
        self.args = [str(file), *words]
        self._process = server().Process(target=become, args=(str(file), [*words], str(cwd), self._log.name, warn))
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
        return Path(self._log.name).read_text(), None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
