"""What the commands say, and what they keep others from saying."""

from __future__ import annotations

import io
import logging
import sys

from accelerate import PartialState
from datasets import disable_progress_bars
from transformers.utils import logging as hf_logging

from hf_cdl.escape import visible_lines


def say(*lines: str, **options) -> None:
    """Print lines, by one process of many."""
    if PartialState().is_main_process:
        print(*map(visible_lines, lines), flush=True, **options)  # names of classes may hold anything


def quiet() -> None:
    """Leave the console to what is said here, which may be of any alphabet."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
