"""Choice of the training, validation and test splits and of the image and label columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import datasets
from datasets import ClassLabel, Dataset

from hf_cdl.data.names import some

USUAL_SPLITS = {  # the names `datasets` uses, most common first
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
USUAL_LABELS = ("label", "labels", "fine_label", "class", "class_name", "target")


def role_of(name: str) -> str | None:
    """The role (train, validation, test) of a split name, ignoring case; None for any other name."""
    return next((role for role, words in USUAL_SPLITS.items() if name.casefold() in words), None)


def role_like(name: str) -> str | None:
    """The role contained in a name, as `datasets` finds it: training_set, seg_train, test2017, TestSet."""
    words = re.split(r"[-._ 0-9]+|(?<=[a-z])(?=[A-Z])|(?i:sets?|data|images)(?![a-z])", name)
    roles = {role_of(word) for word in words} - {None}
    return roles.pop() if len(roles) == 1 else None


def choose_splits(found: Collection[str], named: Mapping[str, str | None], needed: set[str]) -> dict[str, str]:
    """Role (train, validation, test) -> split name; a role without a split is left out.

    Usual names match regardless of case, the most common first. Raises ValueError if a `named` split does not exist,
    a `needed` role has none, or two names differ only in case.
    """
    chosen = {role: name for role, name in named.items() if name is not None}
    for role, name in chosen.items():
        if name not in found:
            raise ValueError(f"{role}_split is {name!r}, but the splits are {some(found)}.")
    for role, usual in USUAL_SPLITS.items():
        if role in chosen:
            continue
        free = [name for name in found if name not in chosen.values()]
        order = [[name for name in free if name.casefold() == word] for word in usual]
        alike = next(filter(None, order), [])
        if len(alike) > 1:
            raise ValueError(f"Several splits could be {role}: {some(alike)}. Name one with {role}_split.")
        if alike:
            chosen[role] = alike[0]
        elif role in needed:
            instead = ", or hold images out with test_fraction" if role == "test" else ""
            raise ValueError(
                f"There is no split for {role} (usual names: {some(usual)}); the splits are {some(found)}. "
                f"Name one with {role}_split{instead}."
            )
    return chosen


def choose_columns(tables: Mapping[str, Dataset], image: str | None, label: str | None) -> tuple[str, str]:
    """Return (image column, label column); if not named, found by type, for labels also by usual names.

    Raises ValueError if a column is not in all splits, does not hold images or is not the only candidate.
    """
    features = tables["train"].features
    images = image_columns(tables["train"])
    labels = label_columns(tables["train"])
    chosen = []
    for what, named, candidates in (("image", image, images), ("label", label, labels)):
        column = candidates[0] if named is None and len(candidates) == 1 else named
        if column is None:
            raise ValueError(
                f"{'Several columns' if candidates else 'No column'} could be the {what}; candidates: "
                f"{some(candidates)}; columns: {some(features)}. Name it with {what}_column."
            )
        for role, table in tables.items():
            if column not in table.column_names:
                raise ValueError(
                    f"The {role} split has no {what} column {column!r}; columns: {some(table.column_names)}. "
                    f"Name it with {what}_column."
                )
        chosen.append(column)
    if chosen[0] not in images:
        raise ValueError(f"image_column {chosen[0]!r} holds {features[chosen[0]]}, not images; with images: {images}.")
    return chosen[0], chosen[1]


def image_columns(table: Dataset) -> list[str]:
    """The columns of a table that hold images."""
    return [column for column, feature in table.features.items() if _holds_images(feature)]


def label_columns(table: Dataset) -> list[str]:
    """The columns of a table that could be its labels."""
    labels = [column for column, feature in table.features.items() if isinstance(feature, ClassLabel)]
    return labels or [column for column in USUAL_LABELS if column in table.features]


def _holds_images(feature: Any) -> bool:
    """Whether a column is of type Image, or has its fields (a parquet file that `datasets` did not write)."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
