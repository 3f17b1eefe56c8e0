"""What the benchmarks here share: training steps and functions measured in turn, and ratios with their spread.

Everything that is compared takes turns within one process, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_cdl import CDLTrainer
from hf_cdl.types import Task

CARD = torch.cuda.is_available()
UNIT = "ms" if CARD else "CPU ms"


class Cost(NamedTuple):
    """Seconds, and the most bytes that tensors held beyond what they held before (0 where that is not known)."""

    seconds: float
    memory: int


def precision(*change: str) -> tuple[str, str]:
    """The precision of float32 products and convolutions on a GPU, for the whole process; changed if given."""
    parts: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    for part, asked in zip(parts, change, strict=False):
        part.fp32_precision = asked
    return parts[0].fp32_precision, parts[1].fp32_precision


def now() -> float:
    """Wall-clock time once the GPU has finished; on a CPU, time of its cores, which other load does not affect."""
    if CARD:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Watch:
    """Measures what happens between `begin` and `end`, in the thread that calls them.

    Memory on a CPU is that of the second time, which is profiled and so takes longer; warm-up does not count.
    """

    def __init__(self) -> None:
        self.calls, self.memory = 0, 0

    def begin(self) -> None:
        self.calls += 1
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if self._profiles() else None
        if self.profiler is not None:
            self.profiler.start()
        if CARD:
            torch.cuda.reset_peak_memory_stats()
        self.held = torch.cuda.memory_allocated() if CARD else 0
        self.start = now()

    def end(self) -> Cost:
        seconds = now() - self.start
        if self.profiler is not None:
            self.profiler.stop()
            self.memory, self.profiler = peak(self.profiler), None  # its events take as much as a small model
        return Cost(seconds, torch.cuda.max_memory_allocated() - self.held if CARD else self.memory)

    def _profiles(self) -> bool:
        return not CARD and self.calls == 2


def peak(profiler: profile) -> int:
    """The most bytes that tensors held beyond what they held when the profiler was started, on the CPU."""
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted(results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max([0, *itertools.accumulate(changes)])


class Stepper(TrainerCallback):
    """A trainer that learns a task in a thread of its own, one step whenever it is asked."""

    def __init__(self, trainer: CDLTrainer, task: Task):
        self.go, self.costs, self.stopped = threading.Semaphore(0), queue.Queue[Any](), False
        self.watch = Watch()
        trainer.add_callback(self)
        states: list[dict[str, Any]] = [kind._shared_state for kind in (PartialState, AcceleratorState)]
        self.states = [(state, dict(state)) for state in states]  # another trainer's would replace this one's
        self.precision = precision()
        self.thread = threading.Thread(target=self._learn, args=(trainer, task), daemon=True)
        self.thread.start()

    def _learn(self, trainer: CDLTrainer, task: Task) -> None:
        self.go.acquire()
        try:
            trainer.learn(task)
        except BaseException as error:
            self.costs.put(error)

    def step(self) -> Cost:
        """Let it take one step, from batch to updated weights. Raises what it raises."""
        for state, own in self.states:
            state.clear()
            state.update(own)
        precision(*self.precision)
        self.go.release()
        cost = self.costs.get()
        if isinstance(cost, BaseException):
            raise cost
        return cost

    def stop(self) -> None:
        self.stopped = True
        self.go.release()
        self.thread.join()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.costs.put(self.watch.end())
        self.go.acquire()
        control.should_training_stop = self.stopped


def in_turn(parts: Mapping[str, Callable[[], Cost]], repeats: int, warm_up: int = 2) -> dict[str, list[Cost]]:
    """The costs of `repeats` calls of every part, taken in turn after a few that do not count."""
    found: dict[str, list[Cost]] = {name: [] for name in parts}
    for number in range(warm_up + repeats):
        for name, call in parts.items():
            cost = call()
            if number >= warm_up:
                found[name].append(cost)
    return found


def call_of(function: Callable[[], Any]) -> Callable[[], Cost]:
    """A part for `in_turn` that measures one call of a function."""

    def call() -> Cost:
        watch = Watch()
        watch.begin()
        function()
        return watch.end()

    return call


def ratio(values: list[Cost], others: list[Cost]) -> str:
    """`others` over `values`, taken in turn: the ratio of the least seconds, and the range of neighbours' ratios."""
    ratios = [other.seconds / value.seconds for value, other in zip(values, others, strict=True)]
    least = min(other.seconds for other in others) / min(value.seconds for value in values)
    return f"{least:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def machine() -> str:
    """The machine in words, for a table's last line."""
    device = torch.cuda.get_device_name() if CARD else f"CPU, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {device}; seed 0"
