"""Ending a command before it is done: what stops it, and the command that goes on.

Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed; torchrun passes it on) raise Stopped in the main thread, a
second signal ends the process at once. A process that a launcher started (accelerate launch, torchrun) stops with it,
also if that was killed; else it would be left behind, at work and with the run's lock. Nothing is stored on the way: a
phase goes on from its last stored state.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

GRACE, PATIENCE = 1.5, 10.0
"""Seconds from the end of the parent, or from a signal, to the end of this process, whatever it is at."""
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""What accelerate launch and torchrun set in the environment of those that they start."""


_ANEW = "The same command begins again"


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number
        """The exit code that tells the signal, as a shell has it."""


class _State:
    launcher: list[str] | None = None
    """The command line of the launcher that started this process."""
    owner: int | None = None
    """The process that listens: not those that it forks."""
    stopped: float | None = None
    """When the first signal came."""
    ready = False
    """Whether the command takes Stopped; before it is imported there is nobody who would."""
    resumes = True
    """Whether the command goes on where it was; else it begins again."""
    said = False
    """Whether it was said how to go on."""


def listen(resumes: bool = True) -> None:
    """From now on stop as said above. To be called before slow imports, in the main thread.

    `resumes`: whether the command goes on where it was when it is given again.
    """
    _State.resumes = resumes
    _State.owner, _State.launcher = os.getpid(), _find_launcher()
    for number in (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if os.name == "posix" else ())):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup or a shell's & may want it
            signal.signal(number, _stop)
    if _State.launcher is not None and os.name == "posix":
        parent = os.getppid()
        end_after(lambda: _wait_until(lambda: os.getppid() != parent))


def ready() -> None:
    """The command has come to where it takes Stopped."""
    _State.ready = True


def end_after(wait: Callable[[], Any], grace: float = GRACE) -> None:
    """Stop this process when `wait()` returns, as by SIGTERM; and if that does not end it, hard."""

    def watch() -> None:
        wait()
        if _State.stopped is None and os.name == "posix":  # to the main thread, which may be waiting for something
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(grace)
        _end(signal.SIGTERM)

    threading.Thread(target=watch, name="end of the process", daemon=True).start()


def say_goes_on() -> None:
    """Say, once and by one process of many, how a command goes on that was stopped."""
    if not _State.said and int(os.environ.get("RANK", 0)) == 0:
        how = "Nothing finished is lost; the same command goes on from there" if _State.resumes else _ANEW
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\nStopped. {how}:\n  {again()}", flush=True)
    _State.said = True


def end_with(main: Callable[[], int]) -> NoReturn:
    """Do what a command does that begins anew each time, and end the process with its exit code."""
    ready()
    try:
        code = main()
    except KeyboardInterrupt as stop:
        say_goes_on()
        code = getattr(stop, "code", 130)
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process with an exit code; after a signal without the seconds that Python takes to tidy up."""
    if _State.stopped is not None:
        atexit._run_exitfuncs()  # what trackers and others have left to write
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def again() -> str:
    """The command that started this process, with its launcher."""
    return shown(_short(_State.launcher) if _State.launcher else [*_program(), *sys.argv[1:]])


def command(verb: str, *words: Any) -> str:
    """Another command, as the shell that started this one takes it."""
    program = _program() if _is_script("hf-cdl") else [python(), "-m", "hf_cdl"]
    return shown([*program, verb, *map(str, words)])


def _program() -> list[str]:
    """What this process's command line begins with: hf-cdl, python -m hf_cdl, or python and a script."""
    if _is_module():
        return [python(), "-m", "hf_cdl"]
    return [_name(sys.argv[0])] if _is_script("hf-cdl") else [python(), sys.argv[0]]


def _is_module() -> bool:
    """Whether it is python -m hf_cdl."""
    return Path(sys.argv[0]) == Path(__file__).parent.with_name("__main__.py")


def _is_script(name: str) -> bool:
    return Path(sys.argv[0]).stem == name


def shown(words: Sequence[str]) -> str:
    """Words as a line for the shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def python() -> str:
    """This interpreter's name, where that is enough to find it."""
    return _name(sys.executable)


def _name(program: str) -> str:
    """A program's name if the shell finds it by that; else its path, from here if it lies below."""
    path, name = Path(program), os.path.basename(program)
    found = [shutil.which(word) for word in ("python", name)] if program == sys.executable else [shutil.which(name)]
    for place in found:
        if place is not None and Path(place).parent.absolute() == path.parent.absolute():
            return Path(place).stem if os.name == "nt" else Path(place).name
    return _near(path)


def _near(path: Path) -> str:
    """A path, from here if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _short(words: list[str]) -> list[str]:
    """A launcher's command line as it is typed: without the interpreter that its script names."""
    if len(words) > 1 and os.path.basename(words[0]).startswith("python") and os.access(words[1], os.X_OK):
        return [_name(words[1]), *words[2:]]
    return [_name(words[0]), *words[1:]]


def _find_launcher() -> list[str] | None:
    """The command line of the parent, if it is a launcher: then it ends with this process's own words."""
    if not any(name in os.environ for name in LAUNCHERS):
        return None
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    started = ["hf_cdl"] if _is_module() else sys.argv[:1]
    return words if words[-len(sys.argv) :] == [*started, *sys.argv[1:]] else None


def _wait_until(arrived: Callable[[], bool]) -> None:
    while not arrived():
        time.sleep(0.2)


def _stop(number: int, frame: Any) -> None:
    if os.getpid() != _State.owner:  # forked, as a worker that loads images: as if nobody listened
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    now = time.monotonic()
    if _State.stopped is None:
        _State.stopped = now
        if not _State.ready:
            _end(number)
        sys.unraisablehook = lambda _: None  # of what was half made
        end_after(lambda: None, PATIENCE)  # where Python drops an exception (in a destructor) it would go on
        raise Stopped(number)
    if now - _State.stopped > 0.5:  # a launcher passes on what its whole group has got already
        _end(number)


def _end(number: int) -> None:
    if _State.owner is not None:
        say_goes_on()
    os._exit(128 + number)
