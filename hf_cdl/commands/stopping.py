"""Stopping a command early: what stops it, and which command resumes it.

Ctrl-C, SIGTERM and SIGHUP (sent when a terminal closes, and passed on by torchrun) raise Stopped in the main thread;
a second signal ends the process at once. A process started by a launcher (accelerate launch, torchrun) stops with the
launcher, even if that was killed; otherwise it would keep running and holding the run's lock. Nothing is saved on
stopping: a phase resumes from its last stored state.
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
"""Seconds from the parent's end, or from a signal, until this process ends, whatever it is doing."""
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Variables that accelerate launch and torchrun set in the environment of the processes they start."""


_ANEW = "The same command begins again"


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number
        """The exit code for the signal, by the shell's convention."""


class _State:
    launcher: list[str] | None = None
    """The command line of the launcher that started this process."""
    parent: int | None = None
    """The process ID of that launcher."""
    owner: int | None = None
    """Id of the process that handles signals; its forks do not."""
    stopped: float | None = None
    """When the first signal arrived."""
    ready = False
    """Whether the command handles Stopped; until it is imported, nothing would catch it."""
    resumes = True
    """Whether the command resumes where it stopped; otherwise it starts over."""
    said = False
    """Whether the user was told how to continue."""
    stored: str | None = None
    """What a command that does not resume has stored nevertheless: it must not begin again."""


def listen(resumes: bool = True) -> None:
    """Handle signals as described above. Call this before slow imports, in the main thread.

    `resumes`: whether the command resumes where it stopped when it is run again.
    """
    _State.resumes = resumes
    try:
        os.getcwd()
    except OSError:
        print(
            "error: The current folder is gone. Go to another one with cd, and run the command there.", file=sys.stderr
        )
        sys.exit(2)
    _State.owner, _State.launcher = os.getpid(), _find_launcher()
    for number in (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if os.name == "posix" else ())):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup or a shell's & may have it ignored
            signal.signal(number, _stop)
    if _State.launcher is not None and os.name == "posix":
        _State.parent = os.getppid()
        end_after(lambda: _wait_until(_is_orphan))


def ready() -> None:
    """Declare that the command now handles Stopped."""
    _State.ready = True


def end_after(wait: Callable[[], Any], grace: float = GRACE) -> None:
    """Stop this process as by SIGTERM when `wait()` returns; if that does not end it, exit hard."""

    def watch() -> None:
        wait()
        if _State.stopped is None and os.name == "posix":  # sent to the main thread, which may be blocked
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(grace)
        _end(signal.SIGTERM)

    threading.Thread(target=watch, name="end of the process", daemon=True).start()


def print_how_to_continue() -> None:
    """Print, once and from one process only, how to continue a command that was stopped."""
    if not _State.said and int(os.environ.get("RANK", 0)) == 0:
        how = "Nothing finished is lost; the same command resumes from there" if _State.resumes else _ANEW
        text = _State.stored or f"{how}:\n  {own_command()}"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\nStopped. {text}", flush=True)
    _State.said = True


def stored(what: str) -> None:
    """Declare what the command has stored, which is then printed instead of how to start it again."""
    _State.stored = what


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command that does not resume, and end the process with its exit code."""
    ready()
    try:
        code = main()
    except KeyboardInterrupt as stop:
        print_how_to_continue()
        code = getattr(stop, "code", 130)
    except Exception as error:
        if _is_orphan():  # another process ended first, in the middle of what they computed together
            print_how_to_continue()
            code = 128 + signal.SIGTERM
        elif isinstance(error, OSError) and _output_is_gone():
            code = _say_unwritten(error)
        else:
            raise
    end_process(code)


def _say_unwritten(error: OSError) -> int:
    """Say on standard error that standard output is closed or full; returns the exit code."""
    end = "the same command resumes from what is finished" if _State.resumes else "run it again"
    with contextlib.suppress(OSError):
        print(
            f"error: Standard output cannot be written ({error.strerror or error}), so not all was said. Give it "
            f"another file, or a program that reads to the end; then {end}.",
            file=sys.stderr,
            flush=True,
        )
    return 2


def end_process(code: int) -> NoReturn:
    """End the process with an exit code; after a signal, skip the seconds that Python takes to clean up."""
    if _State.stopped is not None:
        atexit._run_exitfuncs()  # trackers and others may still have something to write
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _say_unwritten(error)
    if code == 0:
        _end_process_group()
    sys.exit(code)


def _end_process_group() -> None:
    """End what connects this process with others, whose threads could abort it while Python cleans up."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def own_command() -> str:
    """The command line that started this process, including its launcher."""
    return shell_line(_short(_State.launcher) if _State.launcher else [*_program(), *sys.argv[1:]])


def command(verb: str, *words: Any) -> str:
    """The command line of another verb, in the form that this process was started in."""
    program = _program() if _is_script("hf-cdl") else [python(), "-m", "hf_cdl"]
    return shell_line([*program, verb, *map(str, words)])


def _program() -> list[str]:
    """The start of this process's command line: hf-cdl, python -m hf_cdl, or python and a script."""
    if _is_module():
        return [python(), "-m", "hf_cdl"]
    return [_name(sys.argv[0])] if _is_script("hf-cdl") else [python(), sys.argv[0]]


def _is_module() -> bool:
    """Whether this process is python -m hf_cdl."""
    return Path(sys.argv[0]) == Path(__file__).parent.with_name("__main__.py")


def _is_script(name: str) -> bool:
    return Path(sys.argv[0]).stem == name


def shell_line(words: Sequence[str]) -> str:
    """Arguments as one line for the shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def python() -> str:
    """This interpreter's name if the shell finds it by that; else its path."""
    return _name(sys.executable)


def _name(program: str) -> str:
    """A program's name if the shell finds it by that; else its path, relative if below the current folder."""
    path, name = Path(program), os.path.basename(program)
    found = [shutil.which(word) for word in ("python", name)] if program == sys.executable else [shutil.which(name)]
    for place in found:
        if place is not None and Path(place).parent.absolute() == path.parent.absolute():
            return Path(place).stem if os.name == "nt" else Path(place).name
    return _near(path)


def _near(path: Path) -> str:
    """A path, relative if it is below the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _short(words: list[str]) -> list[str]:
    """A launcher's command line as typed: without the interpreter from its script's shebang."""
    if len(words) > 1 and os.path.basename(words[0]).startswith("python") and os.access(words[1], os.X_OK):
        return [_name(words[1]), *words[2:]]
    return [_name(words[0]), *words[1:]]


def _find_launcher() -> list[str] | None:
    """The parent's command line if it is a launcher, in which case it ends with this process's own arguments."""
    if not any(name in os.environ for name in LAUNCHERS):
        return None
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    started = ["hf_cdl"] if _is_module() else sys.argv[:1]
    return words if words[-len(sys.argv) :] == [*started, *sys.argv[1:]] else None


def _output_is_gone() -> bool:
    """Whether nothing can be written to standard output."""
    try:
        os.write(1, b"\n")
    except OSError:
        return True
    return False


def _is_orphan() -> bool:
    """Whether the launcher that started this process has ended."""
    return _State.parent is not None and os.getppid() != _State.parent


def _wait_until(arrived: Callable[[], bool]) -> None:
    while not arrived():
        time.sleep(0.2)


def _stop(number: int, frame: Any) -> None:
    if os.getpid() != _State.owner:  # a fork, such as a data loader's worker: keep the default behaviour
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    now = time.monotonic()
    if _State.stopped is None:
        _State.stopped = now
        if not _State.ready:
            _end(number)
        sys.unraisablehook = lambda _: None  # hides errors of half-built objects
        end_after(lambda: None, PATIENCE)  # the process would go on if Python drops the exception (in a destructor)
        raise Stopped(number)
    if now - _State.stopped > 0.5:  # a launcher passes on a signal that its whole group already received
        _end(number)


def _end(number: int) -> None:
    if _State.owner is not None:
        print_how_to_continue()
    os._exit(128 + number)
