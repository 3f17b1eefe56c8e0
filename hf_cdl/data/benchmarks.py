"""Benchmark names that a recipe's `data.path` may hold instead of a Hub id."""

from __future__ import annotations

from typing import Any

# The values fill the fields of StreamConfig that were left at None. No commit is pinned: the newest version on the
# Hub is loaded, unless the recipe sets `revision`.
BENCHMARKS: dict[str, dict[str, Any]] = {
    "cifar100": {
        "path": "uoft-cs/cifar100",
        "name": "cifar100",
        "image_column": "img",
        "label_column": "fine_label",
        "train_split": "train",
        "test_split": "test",
    },
    "imagenet_r": {  # one split for all 30,000 images; there is no official division into training and test
        "path": "axiong/imagenet-r",
        "image_column": "image",
        "label_column": "wnid",
        "train_split": "test",
        "test_fraction": 0.2,
    },
    "cub200": {
        "path": "bentrevett/caltech-ucsd-birds-200-2011",
        "image_column": "image",
        "label_column": "label",
        "train_split": "train",
        "test_split": "test",
    },
}

SIZES: dict[str, tuple[int, int]] = {"cifar100": (100, 50_000), "imagenet_r": (200, 30_000), "cub200": (200, 5_994)}
"""Classes and images of a benchmark's training split as published, to plan a run without the data."""
