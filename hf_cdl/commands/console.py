"""Console output of the commands, their exit codes, and silencing of other libraries."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

from accelerate import PartialState
from datasets import disable_progress_bars
from transformers.utils import logging as hf_logging

from hf_cdl.escape import visible_lines
from hf_cdl.hub import HubError
from hf_cdl.runs.files import RunError


def say(*lines: str, **options) -> None:
    """Print lines, from the main process only."""
    if PartialState().is_main_process:
        print(*map(visible_lines, lines), flush=True, **options)  # class names may contain anything


def exit_code_of(work: Callable[[], int | None]) -> int:
    """Do a command's work and return its exit code; if it is refused, print the reason and return 2."""
    try:
        return work() or 0
    except BrokenPipeError:  # reported where the process ends
        raise
    except (OSError, ValueError, RunError, HubError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2


def quiet() -> None:
    """Leave the console to this package's own output, which may be in any alphabet."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
