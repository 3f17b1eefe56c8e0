"""Console output of the commands, and silencing of other libraries."""

from __future__ import annotations

import io
import logging
import sys

from accelerate import PartialState
from datasets import disable_progress_bars
from transformers.utils import logging as hf_logging

from hf_cdl.escape import visible_lines


def say(*lines: str, **options) -> None:
    """Print lines, from the main process only."""
    if PartialState().is_main_process:
        print(*map(visible_lines, lines), flush=True, **options)  # class names may contain anything


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
