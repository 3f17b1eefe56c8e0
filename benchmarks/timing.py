"""What the benchmarks here share: training steps and functions measured in turn, and ratios with their spread.

Everything that is compared takes turns within one process, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback

from hf_cdl import CDLTrainer
from hf_cdl.types import Task

CARD = torch.cuda.is_available()
UNIT = "ms" if CARD else "CPU ms"


class Cost(NamedTuple):
    """Seconds, and the bytes that a GPU held at most beyond what it held before (0 on a CPU)."""

    seconds: float
    memory: int


def precision(*change: str) -> tuple[str, str]:
    """What products and convolutions of float32 are computed in on a GPU, for all of the process; changed if given."""
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
    """Measures what happens between `begin` and `end`."""

    def begin(self) -> None:
        if CARD:
            torch.cuda.reset_peak_memory_stats()
        self.held = torch.cuda.memory_allocated() if CARD else 0
        self.start = now()

    def end(self) -> Cost:
        seconds = now() - self.start
        return Cost(seconds, torch.cuda.max_memory_allocated() - self.held if CARD else 0)


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
    """`others` by `values`, each neighbours' seconds: of the least ones, and from the least ratio to the largest."""
    ratios = [other.seconds / value.seconds for value, other in zip(values, others, strict=True)]
    least = min(other.seconds for other in others) / min(value.seconds for value in values)
    return f"{least:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def machine() -> str:
    """The machine in words, for a table's last line."""
    device = torch.cuda.get_device_name() if CARD else f"CPU, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {device}; seed 0"
