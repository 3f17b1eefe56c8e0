"""Logging to TensorBoard, Trackio or Weights & Biases: one run per role, with steps that continue across tasks.

transformers' own callbacks start a new run, or restart the steps, at every training, and so at every task.
"""

from __future__ import annotations

import netrc
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, rewrite_logs

from hf_cdl.runs.files import RunError, first_line, write_whole


class TensorBoard:
    """Event files in the folder. Events written by a killed process after its last stored state are superseded."""

    def __init__(self, folder: Path, first_step: int, **rest: Any):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run NAME-ID in a Trackio project, stored where Trackio keeps all projects (TRACKIO_DIR)."""

    def __init__(self, name: str, key: str, project: str, config: dict[str, Any], **rest: Any):
        import trackio

        self.run = trackio.init(project=project, name=f"{name}-{key}", config=config, resume="allow", embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class WandB:
    """A Weights & Biases run, resumed in every phase.

    With WANDB_MODE=offline it is in the folder, in parts that `wandb sync` joins.
    """

    def __init__(self, folder: Path, name: str, key: str, config: dict[str, Any], **rest: Any):
        import wandb

        # A part's folder is named by the second: two in the same second would overwrite each other.
        while [*folder.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-{key}")]:
            time.sleep(0.05)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "huggingface"),
            name=name,
            id=key,
            dir=str(folder),
            config=config,
            resume="allow",
            reinit="create_new",  # the user may have a run of their own open
            settings=wandb.Settings(console="off"),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


_WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


def wandb_problem() -> str | None:
    """What keeps Weights & Biases from starting here, worded to follow the field's name; None if nothing is known.

    Contacts no server and prompts for no key.
    """
    import wandb

    given = os.environ.get("WANDB_MODE") or None
    if given is not None and given not in _WANDB_MODES:
        return f"is wandb, with WANDB_MODE {given!r} in the environment; allowed: {', '.join(_WANDB_MODES)}"
    try:
        settings = wandb.setup().settings
    except Exception as error:  # an invalid settings file or environment variable
        return f"is wandb, which does not take its settings here ({first_line(error)}); set them right or unset them"
    if (given or settings.mode) in ("offline", "disabled", "dryrun") or settings.api_key:
        return None
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc(settings.base_url):
        return None
    return (
        "is wandb, but nobody is logged in to it here; log in with `wandb login` or set WANDB_API_KEY, or set "
        "WANDB_MODE=offline, which keeps all in the run's folder"
    )


def _in_netrc(url: str) -> bool:
    """Whether the netrc file, which `wandb login` writes, has a login for a server."""
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    file = next((path for place in places if place and (path := Path(place).expanduser()).exists()), None)
    try:
        return file is not None and netrc.netrc(file).authenticators(urlsplit(url).netloc) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # unreadable, for wandb too
        return False


TRACKERS: dict[str, Callable[..., Any]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}
"""Trackers by name in `report_to`, which is also the name of the package."""


class Tracking(TrainerCallback):
    """Logs one role's phases to the tracker `kind`, with files in `folder`.

    `name`: name of the role's run. `steps_before()`: steps of all tasks before the phase's. Replaces the callback
    that Trainer created for the tracker.
    """

    def __init__(self, kind: str, folder: Path, name: str, steps_before: Callable[[], int]):
        self.kind, self.folder, self.name, self.steps_before = kind, folder, name, steps_before
        self.before = 0
        self.tracker: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = self.steps_before()
        if not state.is_world_process_zero:
            return
        with self._tracker_errors("start"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tracker = TRACKERS[self.kind](
                folder=self.folder,
                name=self.name,
                key=self._key(),
                project=args.project,
                config=args.to_sanitized_dict(),
                first_step=self.before + state.global_step + 1,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.tracker is not None:
            numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
            with self._tracker_errors("log"):
                self.tracker.log(rewrite_logs(numbers), self.before + state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            with self._tracker_errors("end"):
                tracker.close()

    @contextmanager
    def _tracker_errors(self, what: str) -> Iterator[None]:
        """Turn any error of a tracker (no login, no network, a full disk, a damaged file) into a RunError."""
        try:
            yield
        except RunError:
            raise
        except Exception as error:  # each has its own exception classes
            said = first_line(error).rstrip(".")
            raise RunError(
                f"{self.kind} (report_to) could not {what} in {self.folder}: {said}. What was "
                "learnt before is whole. Make room, or remove what is in the way there, or set its environment right; "
                "then run the same command again."
            ) from error

    def _key(self) -> str:
        """An id that distinguishes this run from others of the same name, also in the processes that resume it."""
        file = self.folder / "id"
        if not file.exists():
            write_whole(file, lambda path: path.write_text(uuid.uuid4().hex[:8]))
        key = file.read_text(errors="replace") if file.is_file() else ""
        if not re.fullmatch(r"[\w-]{1,64}", key, re.ASCII):
            raise RunError(
                f"{file} does not hold the id of a run of {self.kind}, as hf_cdl writes it. Restore it, or remove it: "
                f"then {self.kind} begins a new run there."
            )
        return key


def replace_trackers(trainer: Any, folder: Path, name: str, steps_before: Callable[[], int]) -> None:
    """Replace a Trainer's own trackers with ones that last across tasks."""
    for kind in TRACKERS:
        if kind in trainer.args.report_to:
            trainer.remove_callback(INTEGRATION_TO_CALLBACK[kind])
            trainer.add_callback(Tracking(kind, folder, name, steps_before))


def close_trackers(trainer: Any) -> None:
    """Close trackers that a phase left open because it was stopped or failed."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Tracking):
            callback.close()
