"""Schedule the runs of a comparison: as many at a time as there are workers, teachers first."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from hf_cdl.compare.spec import PlannedRun
from hf_cdl.compare.worker import start
from hf_cdl.escape import visible


def make(
    runs: list[PlannedRun],
    jobs: int | None,
    command: Callable[[PlannedRun], list[str]],
    results_of: Callable[[PlannedRun], dict[str, Any] | None],
) -> list[tuple[PlannedRun, str]]:
    """Make the runs that have no `results_of`, one per worker at a time; returns those that failed, and why.

    `command`: a run's module and its arguments, for worker.start.
    """
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    free = workers(jobs, devices.split(",") if torch.cuda.device_count() else [], os.cpu_count() or 1)
    schedule = _Schedule(runs, command, results_of, free)
    with _progress(len(runs), len(schedule.done), len(free)) as tell, contextlib.closing(schedule):
        while schedule.waiting or schedule.working:
            failures = schedule.begin()
            time.sleep(0.1)
            for run, why, seconds in [*failures, *schedule.end()]:
                tell(run, why, seconds)
    return schedule.failed


Ended = tuple[PlannedRun, str | None, float]
"""A run that ended, why it failed (None if it did not), and the seconds it took."""


class _Schedule:
    """The runs that are done, running, waiting and failed."""

    def __init__(
        self,
        runs: list[PlannedRun],
        command: Callable[[PlannedRun], list[str]],
        results_of: Callable[[PlannedRun], dict[str, Any] | None],
        free: list[dict[str, str]],
    ):
        self.command, self.results_of, self.free = command, results_of, free
        self.done = {run.folder for run in runs if results_of(run) is not None}
        self.waiting = [run for run in runs if run.folder not in self.done]
        self.working: list[tuple[PlannedRun, BaseProcess, dict[str, str], float]] = []
        self.failed: list[tuple[PlannedRun, str]] = []

    def close(self) -> None:
        """Stop the runs that are still working, as the comparison was interrupted, and wait until they have ended."""
        processes = [process for _, process, _, _ in self.working]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()

    def begin(self) -> list[Ended]:
        """Start runs on the free workers; returns runs that are impossible because their teacher's run failed."""
        lost = {run.folder for run, _ in self.failed}
        orphans = [run for run in self.waiting if run.teacher_from in lost]
        ended = [self._fail(run, "the run that trains its teacher failed", 0.0) for run in orphans]
        self.waiting = [run for run in self.waiting if run not in orphans]
        taught = [run for run in self.waiting if run.teacher_from is None or run.teacher_from in self.done]
        for run in [run for run in taught if not in_use(run.folder)][: len(self.free)]:
            worker = self.free.pop(0)
            process = start(self.command(run), log_of(run), worker)
            self.working.append((run, process, worker, time.monotonic()))
            self.waiting.remove(run)
        return ended

    def end(self) -> list[Ended]:
        """Collect the runs that have ended since the last call."""
        ended = []
        for entry in [entry for entry in self.working if entry[1].exitcode is not None]:
            run, process, worker, began = entry
            self.working.remove(entry)
            self.free.append(worker)
            seconds = time.monotonic() - began
            if process.exitcode == 0 and self.results_of(run) is not None:
                self.done.add(run.folder)
                ended.append((run, None, seconds))
            else:
                ended.append(self._fail(run, f"exit code {process.exitcode}, see {log_of(run)}", seconds))
        return ended

    def _fail(self, run: PlannedRun, why: str, seconds: float) -> Ended:
        self.failed.append((run, why))
        return run, why, seconds


@contextlib.contextmanager
def _progress(total: int, done: int, at_once: int) -> Iterator[Callable[[PlannedRun, str | None, float], Any]]:
    """Report each run that ends: a progress bar in a terminal, otherwise one line each, as in a log."""
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, unit="run") as bar:
            yield lambda run, why, seconds: None if why else bar.update()
        return
    if done < total:
        print(f"{done} of {total} runs are done; {min(at_once, total - done)} at a time", flush=True)
    ended = done

    def tell(run: PlannedRun, why: str | None, seconds: float) -> None:
        nonlocal ended
        ended += 1
        name = visible(f"{run.folder.parent.name}/{run.folder.name}")
        print(f"run {ended} of {total}: {name} {'failed' if why else 'done'} after {seconds:.0f} s", flush=True)

    yield tell


def workers(jobs: int | None, gpus: list[str], cores: int) -> list[dict[str, str]]:
    """The environment of each worker: its GPU, if there are any, and its share of the cores."""
    count = jobs or len(gpus) or cores
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count))}
    return [{**threads, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(count)]


def in_use(folder: Path) -> bool:
    """Whether another process is using a run's folder: one started by hand, or one just ending."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def log_of(run: PlannedRun) -> Path:
    return run.folder.parent.parent / "logs" / f"{run.folder.parent.name}-{run.folder.name}.log"
