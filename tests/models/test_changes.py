"""Changes of a trained classifier equal learning the final images at once, whatever their order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_contract import vit
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification

HEADS: dict[str, dict[str, Any]] = {
    "ridge": {"type": "ridge", "strength": 1.0},
    "ridge, strength auto": {"type": "ridge", "strength": "auto"},
    "ridge, random features": {"type": "ridge", "features": 60},
    "ridge, sums per class": {"type": "ridge", "strength": "auto", "sums": "per_class"},
    "lda": {"type": "lda"},
    "lda, sums per class": {"type": "lda", "sums": "per_class"},
    "ncm": {"type": "ncm"},
}


def model_with(head: dict[str, Any], **fields: Any) -> CDLForImageClassification:
    """In float64: in float32 the features themselves depend on the batch by more than the sums do."""
    set_seed(1)
    return CDLForImageClassification(CDLConfig(backbone_config=vit(32), head=head, **fields)).double().eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


def logits(model: CDLForImageClassification) -> dict[str, torch.Tensor]:
    """Logits of some images by class name, so that the order of the classes does not matter."""
    with torch.no_grad():
        found = model(pictures(20, seed=99)).logits
    return {name: found[:, number] for number, name in model.config.id2label.items()}


def assert_same(model: CDLForImageClassification, other: CDLForImageClassification) -> None:
    ours, theirs = logits(model), logits(other)
    assert ours.keys() == theirs.keys()
    size = max(float(value.abs().max()) for value in theirs.values())
    for name, value in ours.items():
        assert float((value - theirs[name]).abs().max()) <= 1e-6 * size, name


class Album:
    """Images with labels that are changed together with a model, and what it should be in the end."""

    def __init__(self, head: dict[str, Any], seed: int):
        self.random, self.head, self.seed = random.Random(seed), head, seed
        self.model = model_with(head)
        self.labels: dict[int, str] = {}
        self.number = self.classes = 0
        self.before: dict[int, str] | None = None
        self.add()

    def images(self, keys: list[int]) -> torch.Tensor:
        return torch.stack([pictures(1, seed=1000 * self.seed + key)[0] for key in keys])

    @property
    def names(self) -> list[str]:
        return sorted({*self.labels.values()})

    def learn(self, labels: list[str]) -> None:
        keys = [*range(self.number, self.number + len(labels))]
        self.number += len(keys)
        self.model.add(self.images(keys), labels)
        self.labels.update(zip(keys, labels, strict=True))

    def add(self) -> None:
        new = [f"new {self.classes + i}" for i in range(self.random.randint(1, 3))]
        self.classes += len(new)
        self.learn([name for name in [*new, *self.names] for _ in range(self.random.randint(1, 4))])

    def correct(self) -> None:
        crowded = [key for key, name in self.labels.items() if [*self.labels.values()].count(name) > 1]
        if crowded and len(self.names) > 1:
            key = self.random.choice(crowded)
            right = self.random.choice([name for name in self.names if name != self.labels[key]])
            self.model.correct(self.images([key]), [right], was=[self.labels[key]])
            self.labels[key] = right

    def remove(self) -> None:
        if len(self.names) > 1:
            name = self.random.choice(self.names)
            keys = [key for key, own in self.labels.items() if own == name]
            self.random.shuffle(keys)
            self.model.remove(name, None if self.head.get("sums") == "per_class" else self.images(keys))
            self.labels = {key: own for key, own in self.labels.items() if own != name}

    def rename(self) -> None:
        name, new = self.random.choice(self.names), f"new {self.classes}"
        self.classes += 1
        self.model.rename(name, new)
        self.labels = {key: new if own == name else own for key, own in self.labels.items()}

    def merge(self) -> None:
        if len(self.names) > 2:
            pair, new = self.random.sample(self.names, 2), f"new {self.classes}"
            self.classes += 1
            self.model.merge(pair, new)
            self.labels = {key: new if own in pair else own for key, own in self.labels.items()}

    def change(self) -> None:
        before = dict(self.labels)
        kind = self.random.choice([self.add, self.correct, self.remove, self.rename, self.merge])
        kind()
        if self.labels != before and self.random.random() < 0.3:
            self.model.undo()
            self.labels = before

    def at_once(self) -> CDLForImageClassification:
        keys = [*self.labels]
        model = model_with(self.head)
        model.add(self.images(keys), [self.labels[key] for key in keys])
        return model


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", range(50))
def test_any_changes_in_any_order_give_the_model_of_the_final_images(name: str, seed: int) -> None:
    album = Album(HEADS[name], seed)
    for _ in range(8):
        album.change()
    assert {*logits(album.model)} == {*album.names}
    assert_same(album.model, album.at_once())
