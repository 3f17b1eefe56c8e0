"""Pushing during training: the background thread, its retries, and the messages about them."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.utils import disable_progress_bars, get_session, logging

from hf_cdl.counted import counted
from hf_cdl.hub.content import Results, finished_revisions
from hf_cdl.hub.repository import HubError, Repository
from hf_cdl.runs.ledger import CHANGED

_PERMANENT = {400, 401, 402, 403, 404, 413, 422}
_ATTEMPTS, _LONGEST_WAIT, _SILENCE = 5, 300.0, 60.0
"""Attempts without progress; in seconds, the longest wait between two and the timeout for an answer."""


class Pusher:
    """Pushes the tasks of the run in `folder` during training, in one thread; its errors never reach the training.

    `repositories`: role -> name of its repository; if empty, nothing is pushed. `private`: for new repositories.
    `every_task`: push after every task, or all at the end. `say` prints. `delay`: seconds before the second attempt,
    doubled before each further one; default: HF_CDL_PUSH_DELAY in the environment, or 2. `patience`: seconds to wait
    at the end for the next task to arrive on the Hub; None: as long as attempts continue. `origin`: `Run.origin`.
    `later`: the command that pushes the run later.
    """

    def __init__(
        self,
        folder: str | Path,
        repositories: Mapping[str, str],
        private: bool = True,
        every_task: bool = True,
        say: Callable[[str], Any] = print,
        api: HfApi | None = None,
        delay: float | None = None,
        patience: float | None = 1800.0,
        origin: Mapping[str, Any] | None = None,
        later: str | None = None,
    ):
        self.folder, self.every_task, self.say, self.patience = Path(folder), every_task, say, patience
        self.later = later or shlex.join(["python", "-m", "hf_cdl", "push", str(folder)])
        self.delay = float(os.environ.get("HF_CDL_PUSH_DELAY", 2)) if delay is None else delay
        api = api or HfApi()
        if repositories:  # during training: no bars, and no URLs (they may be signed) of failed attempts
            disable_progress_bars()
            logging.set_verbosity_error()
        self.repositories = [
            Repository(api, name, role, self.folder, private, origin) for role, name in repositories.items()
        ]
        for first, second in permutations(self.repositories, 2):
            first.other = second
        self.problems: dict[str, str] = {}
        """Role -> why its last push failed."""
        self._told: dict[str, str] = {}
        self._token = api.token if isinstance(api.token, str) else get_token()
        self._results: Results | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)

    def check(self, results: Results) -> None:
        """Check, before training, that the run can be pushed; only report it if the Hub cannot be reached now.

        Raises HubError for an invalid token, a missing permission or a repository that holds something else.
        """
        for repository in self.repositories:
            try:
                _limit_silence()
                repository.open()
                repository.compare(finished_revisions(results, repository.role))
            except HubError:
                raise
            except Exception as error:
                if _status(error) in _PERMANENT:
                    raise HubError(self._reason(error, repository)) from None
                self.say(
                    f"The Hub cannot be reached now ({self._reason(error, repository)}). The run continues; what is "
                    "finished is pushed as soon as the Hub answers."
                )

    def push(self, results: Results) -> None:
        """Push a finished task, and any that could not be pushed before. Returns at once."""
        if self.repositories and self.every_task:
            problems = dict(self.problems)
            for role, problem in problems.items():
                if self._told.get(role) != problem:
                    self.say(f"The {role} could not be pushed so far: {problem} It is tried again now.")
            self._told = problems
            self._submit(results)

    def finish(self, results: Results) -> bool:
        """Push what is left, wait for it and report the outcome; returns whether everything is on the Hub."""
        if not self.repositories:
            return True
        self._submit(results, closing=True)
        try:
            self._wait(results)
        except KeyboardInterrupt:
            self._give_up(results, "the waiting was stopped.")
        for repository in self.repositories:
            count = finished_revisions(results, repository.role)
            address = f"{repository.api.endpoint}/{repository.id}"
            if repository.role not in self.problems:
                changes = len(results.get("changes", [])) if repository.role == CHANGED else 0
                held = " and ".join(counted(n, of) for n, of in ((count - changes, "task"), (changes, "change")) if n)
                self.say(f"Pushed the {repository.role}: {address} ({held}, the newest task-{count:02d})")
        for role, problem in dict(self.problems).items():
            self.say(f"NOT PUSHED: the {role}. {problem}")
        if self.problems:
            self.say(f"The run itself is whole in {self.folder}/. Push it later with:\n  {self.later}")
        return not self.problems

    def _wait(self, results: Results) -> None:
        self._thread.join(1.0)
        if self._thread.is_alive():
            self.say(f"Waiting for the Hub. Ctrl-C ends the waiting; later: {self.later}")
        while self._thread.is_alive():
            before = self._pushed()
            self._thread.join(self.patience)
            if self._thread.is_alive() and self._pushed() == before:
                return self._give_up(results, f"The Hub took nothing for {self.patience} s.")

    def _give_up(self, results: Results, reason: str) -> None:
        for repository in self.repositories:
            if repository.pushed < finished_revisions(results, repository.role):
                self.problems.setdefault(repository.role, reason)

    def _pushed(self) -> int:
        return sum(repository.pushed for repository in self.repositories)

    # ---- the thread ----

    def _submit(self, results: Results, closing: bool = False) -> None:
        with self._changed:
            self._results, self._closing = json.loads(json.dumps(results)), closing
            self._changed.notify()
        if not self._thread.is_alive():
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._results is not None or self._closing)
                results, self._results = self._results, None
            if results is None:
                return
            for repository in self.repositories:
                problem = self._attempt(repository, results)
                if problem is None:
                    self.problems.pop(repository.role, None)
                else:
                    self.problems[repository.role] = problem

    def _attempt(self, repository: Repository, results: Results) -> str | None:
        """Push, retrying as long as that can help; returns why it failed, or None."""
        failures = 0
        while True:
            try:
                _limit_silence()
                for _ in repository.push(results):
                    failures = 0
                return None
            except Exception as error:  # whatever it is, training continues
                failures += 1
                wait = max(_retry_after(error), self.delay * 2 ** (failures - 1) * random.uniform(1, 1.5))
                permanent = isinstance(error, HubError) or _status(error) in _PERMANENT or is_offline_mode()
                if permanent or failures == _ATTEMPTS or wait > _LONGEST_WAIT:
                    return self._reason(error, repository)
            time.sleep(wait)

    def _reason(self, error: Exception, repository: Repository) -> str:
        """Describe an error in one line, without URLs (they may be signed) or the token."""
        response, advice = _response(error), ""
        if isinstance(error, HubError):
            text = str(error)
        elif is_offline_mode():
            text = "HF_HUB_OFFLINE is set."
        elif response is not None:
            said = response.headers.get("X-Error-Message") or response.reason_phrase
            text = f"{repository.id}: the Hub answers {response.status_code} ({said})."
            if response.status_code == 401:
                advice = " Log in with `hf auth login`, or set HF_TOKEN to a valid token."
            elif response.status_code in (403, 404):
                advice = f" The token must be allowed to write to {repository.id}."
        else:
            text = re.sub(r"https?://\S+", "the Hub", f"{type(error).__name__}: {error}".strip().split("\n")[0] + ".")
        return (text + advice).replace(self._token or "\0", "***")


def _limit_silence() -> None:
    """Set a read timeout; huggingface_hub would wait for an answer forever."""
    session = get_session()
    if session.timeout.read is None:
        session.timeout = _SILENCE


def _response(error: BaseException | None) -> Any:
    """The HTTP response behind an error; None if there was none."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response
        error = error.__cause__
    return None


def _status(error: Exception) -> int | None:
    response = _response(error)
    return None if response is None else response.status_code


def _retry_after(error: Exception) -> float:
    """Seconds the Hub asks to wait before a retry."""
    response = _response(error)
    text = "" if response is None else response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
