"""Progress of a phase, as shown to the user while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


def phase_title(index: int, num_tasks: int | None, role: str) -> str:
    """Title of a phase in progress bars and messages: `task 2/5 · student` for the task with index 1."""
    return f"task {index + 1}{f'/{num_tasks}' if num_tasks else ''} · {role}"


class _Log:
    """Standard error as a log: each state of a bar is a line of its own, and a bar that goes leaves nothing."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(title: str, hidden: bool, **options: Any) -> Any:
    """A progress bar on a terminal; one line per minute in a log file."""
    pace: dict[str, Any] = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60, "file": _Log()}
    return tqdm(desc=title, disable=hidden, leave=False, dynamic_ncols=True, **pace, **options)


class PhaseProgress(TrainerCallback):
    """Shows a phase's progress on the bar that `make_bar(total=, initial=)` returns, and measures its time.

    `set_epoch(number)` is called before every epoch.
    """

    def __init__(self, make_bar: Callable[..., Any], set_epoch: Callable[[int], None]):
        self.make_bar, self.set_epoch = make_bar, set_epoch
        self.bar: Any = None
        self.first_step = 0  # the step this process started or resumed from
        self.started = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since this process began the phase."""
        return time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        if state.global_step:  # Trainer does not check whether a resumed phase had already been stopped
            stored = state.stateful_callbacks["TrainerControl"]["args"]
            control.should_training_stop = stored["should_training_stop"]
        self.bar = self.make_bar(total=state.max_steps, initial=state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        terms = {name[5:]: f"{value:.3f}" for name, value in (logs or {}).items() if name.startswith("loss/")}
        if self.bar is not None and terms:
            self.bar.set_postfix(terms, refresh=False)

    def close(self) -> None:
        """Remove the bar, however the phase ended."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
