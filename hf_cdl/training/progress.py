"""What the user sees of a phase while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


def phase_title(index: int, num_tasks: int | None, role: str) -> str:
    """What a bar and messages call a phase: `task 2/5 · student` is of the task with index 1."""
    return f"task {index + 1}{f'/{num_tasks}' if num_tasks else ''} · {role}"


def progress_bar(title: str, hidden: bool, **options: Any) -> Any:
    """A progress bar on a terminal; in a log file a line a minute."""
    pace = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60}
    return tqdm(desc=title, disable=hidden, leave=False, dynamic_ncols=True, **pace, **options)


class PhaseProgress(TrainerCallback):
    """Shows where the phase stands, on a bar that `make_bar(total=, initial=)` gives, and measures its time.

    `set_epoch(number)` is called before every epoch.
    """

    def __init__(self, make_bar: Callable[..., Any], set_epoch: Callable[[int], None]):
        self.make_bar, self.set_epoch = make_bar, set_epoch
        self.bar: Any = None
        self.first_step = 0  # the step that this process began or went on from
        self.started = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since this process began the phase."""
        return time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        if state.global_step:  # Trainer does not ask whether a phase that goes on had been stopped already
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
        """Take the bar off the screen, whatever ended the phase."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
