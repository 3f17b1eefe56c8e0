"""Memory of the process: its peak, and garbage collections that do not look at what stays anyway."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Keep what is in memory out of garbage collections for a while.

    Trainer runs one at the start of every phase; over all modules and models it takes longer than a short phase.
    Objects that somebody else froze stay frozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of this phase on the GPU, or of the whole process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
