"""Commands stopped by signals or by the end of their launcher, and what they print about how to continue."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ROOT, make_recipe, write_recipe
from test_train import assert_same_run

from hf_cdl.commands import stopping
from hf_cdl.commands.parsers import VERBS

COMMAND = """
import hashlib, os, sys, time
from hf_cdl_command import stopping
{before}
stopping.listen()
print("pid", os.getpid(), flush=True)
try:
    {body}
except KeyboardInterrupt as stop:
    print(type(stop).__name__, flush=True)
    stopping.print_how_to_continue()
    {after}
    stopping.end_process(stop.code)
"""
"""What the commands do."""
LAUNCHER = "import os, subprocess, sys\nos.environ |= {environment}\nsubprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """Write a command to a file; returns the arguments that start it."""

    def write(body: str = "stopping.ready(); time.sleep(60)", before: str = "", after: str = "") -> list[str]:
        file = tmp_path / "it's a command.py"
        file.write_text(COMMAND.format(before=before, body=body, after=after))
        return [str(file), "--output_dir", "a folder"]

    return write


def launched(tmp_path: Path, **environment: str) -> list[str]:
    """The start of a command line: a launcher that sets `environment`."""
    file = tmp_path / "launcher.py"
    file.write_text(LAUNCHER.format(environment=environment))
    return [sys.executable, str(file)]


@pytest.fixture
def begin() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start a process; returns it, and the process id that the command prints."""
    began: list[tuple[subprocess.Popen[str], int]] = []

    def start(words: list[str], **options: Any) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        assert process.stdout is not None
        line = process.stdout.readline()
        began.append((process, int(line.removeprefix("pid "))))
        time.sleep(0.3)  # it has come to its sleep
        return began[-1]

    yield start
    for process, pid in began:
        for left in (process.pid, pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.communicate()


Begin = Callable[..., tuple[subprocess.Popen[str], int]]


def ended(pid: int, seconds: float) -> bool:
    """Whether a process ends within that time; zombies, whose parent has not waited for them, have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


STOPPED = "Stopped. Nothing finished is lost; the same command resumes from there:\n  "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_a_command(command: Callable[..., list[str]], begin: Begin, number: signal.Signals) -> None:
    words = [sys.executable, *command()]
    process, _ = begin(words, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # also under nohup
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    head, shown = said.split(STOPPED)
    assert head == "Stopped\n\n"
    python, *rest = shlex.split(shown)
    assert rest == words[1:] and (python == "python" or Path(python).absolute() == Path(sys.executable))


def test_a_terminal_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(stopping._State, "said", False)
    monkeypatch.setattr(sys, "stdout", Gone())
    stopping.print_how_to_continue()
    assert stopping._State.said


def test_a_second_signal_ends_it_at_once(command: Callable[..., list[str]], begin: Begin) -> None:
    process, _ = begin([sys.executable, *command(after="time.sleep(60)")])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=5)
    assert process.returncode == 143 and said.count(STOPPED) == 1


def test_the_same_signal_from_group_and_launcher_is_one(command: Callable[..., list[str]], begin: Begin) -> None:
    process, _ = begin([sys.executable, *command(after="time.sleep(0.3); print('tidied up')")])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=5)
    assert process.returncode == 143 and said.endswith("tidied up\n")


def test_a_signal_while_it_is_imported_is_no_traceback(command: Callable[..., list[str]], begin: Begin) -> None:
    process, _ = begin([sys.executable, *command("time.sleep(60)")])
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=5)
    assert process.returncode == 143 and said.startswith(f"\n{STOPPED}")


def test_a_signal_that_python_drops_ends_it_all_the_same(command: Callable[..., list[str]], begin: Begin) -> None:
    before = "stopping.PATIENCE = 0.5\nclass Slow:\n    def __del__(self):\n        time.sleep(60)"
    process, _ = begin([sys.executable, *command("stopping.ready(); Slow(); time.sleep(60)", before)])
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=5)
    assert process.returncode == 143 and said.startswith(f"\n{STOPPED}")


def test_what_is_ignored_stays_ignored(command: Callable[..., list[str]], begin: Begin) -> None:
    """As with a shell's & or nohup."""
    before = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    process, pid = begin([sys.executable, *command(before=before)])
    process.send_signal(signal.SIGINT)
    assert not ended(pid, 0.5)


def test_a_command_that_begins_anew_says_so(command: Callable[..., list[str]], begin: Begin) -> None:
    body = "stopping.listen(resumes=False); stopping.end_with(lambda: time.sleep(60))"
    process, _ = begin([sys.executable, *command(body)])
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=5)
    assert process.returncode == 143 and said.startswith("\nStopped. The same command begins again:\n  ")


TAKES = {
    **dict.fromkeys(("add", "shrink", "correct", "remove", "predict", "evaluate"), ["a", "b"]),
    **{"rename": ["a", "b", "c"], "merge": ["a", "b", "c", "--as", "d"]},
    **{"make_digits": ["a"], "make_foreign": ["a"], "pretrain": ["--data", "a"]},
}


@pytest.mark.parametrize(
    "name", [*VERBS, "recipes/train.py", "recipes/make_digits.py", "recipes/make_foreign.py", "recipes/pretrain.py"]
)
def test_every_command_listens(name: str) -> None:
    """Stopped while still importing, before the actual work."""
    program = [str(ROOT / name)] if name.startswith("recipes/") else ["-m", "hf_cdl", name]
    process = subprocess.Popen(
        [sys.executable, *program, *TAKES.get(Path(name).stem, ["a"])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << signal.SIGTERM - 1:
        assert process.poll() is None and time.monotonic() < deadline, "it does not listen"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and "Stopped. " in said and "Traceback" not in said


def test_workers_say_nothing(command: Callable[..., list[str]], begin: Begin) -> None:
    """A forked process receives the group's signal, too, but leaves the message to its parent."""
    before = (
        "import multiprocessing\nworker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))"
    )
    words = command(
        "worker.start(); stopping.ready(); time.sleep(60)", before, "worker.join(); print(worker.exitcode)"
    )
    process, _ = begin([sys.executable, *words], start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=5)
    assert said.count(STOPPED) == 1 and said.endswith("\n-15\n") and "Traceback" not in said


@pytest.mark.parametrize(
    ("number", "name", "body"),
    [
        (signal.SIGTERM, "ACCELERATE_MIXED_PRECISION", "time.sleep(60)"),
        (signal.SIGKILL, "TORCHELASTIC_RUN_ID", "time.sleep(60)"),
        (signal.SIGKILL, "ACCELERATE_MIXED_PRECISION", "hashlib.pbkdf2_hmac('sha1', b'', b'', 10**9)"),
    ],
)
def test_a_command_ends_with_its_launcher(
    command: Callable[..., list[str]], begin: Begin, tmp_path: Path, number: signal.Signals, name: str, body: str
) -> None:
    """It prints the launcher's command, even if its main thread hangs where no exception reaches it."""
    words = [*launched(tmp_path, **{name: "no"}), *command(f"stopping.ready(); {body}")]
    process, pid = begin(words)
    process.send_signal(number)
    assert ended(pid, 5)  # 2 seconds, on a machine with nothing else to do
    said, _ = process.communicate(timeout=5)
    assert shlex.split(said.split(STOPPED)[1])[1:] == words[1:]


def test_what_breaks_when_the_launcher_and_other_processes_end_is_no_error(
    command: Callable[..., list[str]], begin: Begin, tmp_path: Path
) -> None:
    """One that ends first breaks what they compute together, before the others have looked for their launcher."""
    broken = "def broken():\n    while os.getppid() == parent:\n        pass\n    raise RuntimeError('closed by peer')"
    body = command("stopping.end_with(broken)", f"parent = os.getppid()\n{broken}")
    process, pid = begin([*launched(tmp_path, TORCHELASTIC_RUN_ID="1"), *body])
    process.kill()
    assert ended(pid, 5)
    said, _ = process.communicate(timeout=5)
    assert said.count(STOPPED) == 1 and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "1"}])
def test_a_command_without_a_launcher_outlives_its_parent(
    command: Callable[..., list[str]], begin: Begin, tmp_path: Path, environment: dict[str, str]
) -> None:
    """That is what users want who start it with nohup and log out."""
    process, pid = begin([*launched(tmp_path, **environment), *command()])
    process.kill()
    assert not ended(pid, 1)


def test_a_shell_is_no_launcher(command: Callable[..., list[str]], begin: Begin, tmp_path: Path) -> None:
    """Even if a launcher's variables were exported by hand."""
    line = f"{shlex.join([sys.executable, *command()])}; true"
    process, pid = begin(["sh", "-c", line], env={**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"})
    process.kill()
    assert not ended(pid, 1)


@pytest.mark.parametrize(
    ("started", "again", "push"),
    [
        ("hf_cdl/__main__.py", "python -m hf_cdl train 'a b.yaml'", "python -m hf_cdl push 'a run'"),
        ("hf-cdl", "hf-cdl train 'a b.yaml'", "hf-cdl push 'a run'"),
        ("elsewhere/hf-cdl", "'{elsewhere}' train 'a b.yaml'", "'{elsewhere}' push 'a run'"),
        ("recipes/train.py", "python recipes/train.py 'a b.yaml'", "python -m hf_cdl push 'a run'"),
    ],
)
def test_commands_are_said_as_this_one_was_started(
    started: str, again: str, push: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf-cdl by its name alone if the shell finds it by that."""
    (tmp_path / "elsewhere").mkdir()
    places = {"hf-cdl": tmp_path / "hf-cdl", "elsewhere/hf-cdl": tmp_path / "elsewhere" / "hf-cdl"}
    for file in places.values():
        file.touch(0o755)
    words = ["a b.yaml"] if started == "recipes/train.py" else ["train", "a b.yaml"]
    program = places.get(started, started if started == "recipes/train.py" else ROOT / started)
    monkeypatch.setattr(sys, "argv", [str(program), *words])
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent)]))
    monkeypatch.setattr(stopping._State, "launcher", None)
    monkeypatch.setattr(stopping, "python", lambda: "python")
    elsewhere = str(places["elsewhere/hf-cdl"])
    assert stopping.own_command() == again.replace("'{elsewhere}'", shlex.quote(elsewhere))
    assert stopping.command("push", "a run") == push.replace("'{elsewhere}'", shlex.quote(elsewhere))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("accelerate launch --quiet --num_processes 1 --cpu recipes/train.py", signal.SIGTERM),
        ("accelerate launch --quiet --num_processes 1 --cpu -m hf_cdl train", signal.SIGTERM),
        ("accelerate launch --quiet --num_processes 1 --cpu recipes/train.py", signal.SIGKILL),
        ("accelerate launch --multi_gpu --num_processes 2 --main_process_port 29561 recipes/train.py", signal.SIGTERM),
        ("torchrun --nproc_per_node 2 --master_port 29563 recipes/train.py", signal.SIGKILL),
    ],
)
def test_training_ends_with_its_launcher_and_goes_on_by_what_it_says(
    tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    """No process is left, the lock is free, and the result equals that of an uninterrupted run."""
    recipe = make_recipe(tmp_path, baselines=[])
    recipe["train"]["num_train_epochs"] = 10
    file, whole, cut = write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "whole", tmp_path / "it's cut"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options: dict[str, Any] = {
        "cwd": ROOT,
        "env": {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    words = [*launcher.split(), str(file), "--output_dir"]
    process = subprocess.Popen([*words, str(cut)], **options)
    deadline = time.monotonic() + 300
    while not list(cut.glob("work/*/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert all(ended(child.pid, 10) for child in children)  # 2 seconds, on a machine with nothing else to do
    said, _ = process.communicate(timeout=60)
    shown = said.split(STOPPED)[1].splitlines()[0].strip()
    assert shown == shlex.join([*words, str(cut)])
    done = subprocess.run(shown, shell=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout
    assert subprocess.run([*words, str(whole)], timeout=300, **options).returncode == 0
    assert_same_run(cut, whole)
