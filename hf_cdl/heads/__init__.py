"""Classification heads. A new head is one file and one name in HEADS: here, or `HEADS.register` in a plugin."""

from __future__ import annotations

from typing import Any

from hf_cdl.checked import build_fields, check_size
from hf_cdl.heads.base import Head
from hf_cdl.heads.class_means import NearestMeanHead
from hf_cdl.heads.cosine import CosineHead
from hf_cdl.heads.lda import LdaHead
from hf_cdl.heads.linear import LinearHead
from hf_cdl.heads.ridge import RidgeHead
from hf_cdl.heads.weight_normalised import WeightNormalisedHead
from hf_cdl.registry import Registry

HEADS: Registry[Head] = Registry(
    "HEADS",
    "head",
    Head,
    {
        "linear": LinearHead,
        "weight_normalised": WeightNormalisedHead,
        "cosine": CosineHead,
        "ridge": RidgeHead,
        "lda": LdaHead,
        "ncm": NearestMeanHead,
    },
)


def build_head(head: dict[str, Any], hidden_size: int, layer_size: int | None = None) -> Head:
    """Build the head of a config's `head` section; `layer_size`: the backbone's width, by default the features'.

    Raises ValueError for an unknown type or field, and for a head that would not fit in memory.
    """
    kind, fields = HEADS.pick(head, "head")
    config = build_fields(HEADS[kind].config_class, fields, f"Head type '{kind}'")

    def made() -> Head:
        head = HEADS[kind](config, hidden_size)
        if head.reads_layers:
            head.read_layers(layer_size or hidden_size)
        return head

    def with_a_task() -> Head:
        head = made()
        head.add_task(1)
        return head

    check_size(f"A head of type '{kind}'", with_a_task)
    return made()


def example(fitted: bool) -> str:
    """Example of a fitted or a trained head for messages, such as `{'type': 'linear'}`."""
    return str({"type": next(name for name, head in HEADS.items() if head.fitted == fitted)})


def drop_sums(head: Head) -> None:
    """Drop what a head needs only to learn further tasks. Raises ValueError for a head that keeps no such sums."""
    if not head.keeps_sums:
        names = {kind: name for name, kind in HEADS.items()}
        able = " or ".join(name for name, kind in HEADS.items() if kind.keeps_sums)
        raise ValueError(f"Only a {able} head keeps such sums; this one is {names[type(head)]}.")
    head.drop_sums()


__all__ = ["HEADS", "Head", "build_head", "drop_sums", "example"]
