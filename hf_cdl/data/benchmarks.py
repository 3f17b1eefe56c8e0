"""Benchmark names that a recipe may use as `data.path` instead of a Hub id."""

from __future__ import annotations

from typing import Any

# The values fill StreamConfig fields that were left at None. No commit is pinned: the latest version on the Hub is
# loaded unless the recipe sets `revision`.
BENCHMARKS: dict[str, dict[str, Any]] = {
    "cifar100": {
        "path": "uoft-cs/cifar100",
        "name": "cifar100",
        "image_column": "img",
        "label_column": "fine_label",
        "train_split": "train",
        "test_split": "test",
    },
    "imagenet_r": {  # a single split of 30,000 images; there is no official train/test split
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
"""Number of classes and images in each published training split, to plan a run without the data."""
