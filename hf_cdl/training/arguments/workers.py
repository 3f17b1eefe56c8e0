"""The default number of processes that load images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MOST = 8
"""Processes of which a GPU has use: benchmarks/data.py says what each prepares."""


def useful_workers(device: str) -> int:
    """How many for a kind of device: none on a CPU, whose cores compute; on a GPU one less than cores, at most MOST.

    Processes on the same machine share its cores.
    """
    if device != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, MOST))


@contextmanager
def fitting_workers(args: Any, images: int, batch_size: int) -> Iterator[None]:
    """In this context `args` have fewer workers than there are batches, unless the user chose the number."""
    names = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor")
    before = {name: getattr(args, name) for name in names}
    if args.chose_workers:
        args.dataloader_num_workers = min(args.dataloader_num_workers, max(0, -(-images // batch_size) - 1))
    if not args.dataloader_num_workers:  # torch refuses options that need workers
        args.dataloader_persistent_workers, args.dataloader_prefetch_factor = False, None
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
