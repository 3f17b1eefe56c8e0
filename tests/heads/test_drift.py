"""Sums that move with the features, against sums over the moved features."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_cdl.heads import build_head
from hf_cdl.heads.drift import Drift, fit_drift

WIDTH, LAYER, CLASSES = 12, 8, 5
HEADS: dict[str, dict[str, Any]] = {
    "ridge": {"type": "ridge", "strength": 0.5},
    "random": {"type": "ridge", "features": 20, "own_features": True, "known": 0.9, "scale": "auto"},
    "per class": {"type": "ridge", "features": 6, "own_features": True, "known": 0.9, "sums": "per_class"},
    "lda": {"type": "lda"},
    "ncm": {"type": "ncm"},
}


def drawn(images: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, width, generator=torch.Generator().manual_seed(seed)) + 0.3


def filled(head: Any, features: torch.Tensor, labels: torch.Tensor, layers: torch.Tensor) -> Any:
    head.init_shared()
    for task in range(2):
        head.add_task((2, 3)[task])
        head.init_task(task)
    head.accumulate(features, labels, None, 1, layers if head.reads_layers else None)
    return head


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return build_head(HEADS[kind], WIDTH, LAYER)


def affine(width: int, seed: int) -> Drift:
    """A map with a known matrix: of so many images that regression finds it."""
    x = drawn(400, width, seed)
    matrix = 0.2 * drawn(width, width, seed + 1)
    return fit_drift(x, x + x @ matrix + 0.5)


@pytest.mark.parametrize(("images", "classes"), [(6, 3), (30, 5), (30, 1), (120, 6)])
def test_the_map_is_a_ridge_regression_judged_on_classes_left_out(images: int, classes: int) -> None:
    """Against maps fitted anew without each class; a single class is judged by leaving out each image."""
    x, labels = drawn(images).double(), torch.arange(images) % classes
    y = x + 0.3 * torch.tanh(x @ drawn(WIDTH, WIDTH, 7).double()) + 0.1
    drift = fit_drift(x, y, labels)

    def matrix(rows: torch.Tensor, strength: float) -> tuple[torch.Tensor, ...]:
        own, moved = x[rows], (y - x)[rows]
        mean, shift = own.mean(dim=0), moved.mean(dim=0)
        square = (own - mean).T @ (own - mean) + strength * torch.eye(WIDTH, dtype=torch.float64)
        return torch.linalg.solve(square, (own - mean).T @ (moved - shift)), mean, shift

    whole, mean, shift = matrix(torch.arange(images), drift.strength)
    torch.testing.assert_close(drift.into @ drift.out, whole, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close((drift.mean, drift.shift), (mean, shift))
    folds = labels if classes > 1 else torch.arange(images)

    def error(strength: float) -> float:
        told = 0.0
        for fold in folds.unique():
            a, m, d = matrix(folds != fold, strength)
            told += float((y - x - (x - m) @ a - d)[folds == fold].square().sum())
        return told

    step = 10 ** (1 / 3)
    assert error(drift.strength) <= min(error(drift.strength * step), error(drift.strength / step)) * (1 + 1e-9)
    assert drift.explained == pytest.approx(1 - error(drift.strength) / error(1e15), abs=1e-6)


def test_views_of_an_image_do_not_tell_of_each_other() -> None:
    """Copies of every image would make any map look good, if copies of an image left out were among the others."""
    x, labels = drawn(24).double().repeat(4, 1), (torch.arange(24) // 6).repeat(4)
    noise = drawn(24, seed=5).double().repeat(4, 1)
    assert fit_drift(x, x + noise).explained > 0.2, "by images alone"
    assert fit_drift(x, x + noise, labels).explained < 0.05


@pytest.mark.parametrize("kind", HEADS)
def test_moved_sums_are_those_of_the_moved_features(kind: str) -> None:
    """To the bit of rounding, whatever the head keeps; so the solution is that of all moved images at once."""
    features, labels = drawn(60), torch.arange(60) % CLASSES
    layers = torch.stack([drawn(60, LAYER, seed) for seed in (3, 4, 5)], dim=1)
    head = filled(made(kind), features, labels, layers)
    mapped = head.prepare(features).double()
    drift = affine(mapped.shape[1], 20)
    of_layers = [affine(LAYER, 30 + number) for number in range(3)] if head.reads_layers else []
    head.move(drift, of_layers)
    moved = drift.sums(mapped, torch.ones(60))
    matrix = drift.into @ drift.out
    torch.testing.assert_close(moved, mapped + (mapped - drift.mean) @ matrix + drift.shift)

    want = filled(made(kind), features, labels, layers)
    found = {name: value.clone() for name, value in head.numbers().items()}
    fresh = filled(made(kind), features[:0], labels[:0], layers[:0])
    fresh.update(moved.float() if kind == "ncm" else moved, labels, None, 1)
    if head.reads_layers:
        shifted = [one.sums(layers[:, n].double(), torch.ones(60)) for n, one in enumerate(of_layers)]
        fresh.update_layers(torch.stack(shifted, dim=1), labels, 1)
    for name, value in fresh.numbers().items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-5, msg=name)
    before = [name for name, value in want.numbers().items() if not torch.equal(value, found[name])]
    assert any("total" in name for name in before), "the map does something"


@pytest.mark.parametrize("kind", HEADS)
def test_features_that_stay_leave_the_sums_as_they_are(kind: str) -> None:
    features, labels = drawn(60), torch.arange(60) % CLASSES
    layers = torch.stack([drawn(60, LAYER, seed) for seed in (3, 4, 5)], dim=1)
    head = filled(made(kind), features, labels, layers)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    mapped = head.prepare(drawn(20, seed=9))
    same = fit_drift(mapped, mapped)
    assert (same.change, same.explained) == (0, 0)
    head.move(same, [fit_drift(layers[:, n], layers[:, n]) for n in range(3)] if head.reads_layers else [])
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_directions_that_were_not_seen_move_by_the_mean_alone() -> None:
    x = torch.zeros(8, 4)
    x[:, 0] = torch.arange(8.0)
    drift = fit_drift(x, x + torch.tensor([0.0, 1.0, 0.0, 0.0]))
    point = torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    torch.testing.assert_close(
        drift.sums(point.double(), torch.ones(1)), torch.tensor([[0.0, 1.0, 5.0, 0.0]]).double()
    )


@pytest.mark.parametrize("images", [1, 2])
def test_a_single_image_moves_all_by_its_own_change(images: int) -> None:
    x = drawn(1).repeat(images, 1)
    drift = fit_drift(x, x + 2)
    torch.testing.assert_close(
        drift.sums(torch.zeros(1, WIDTH).double(), torch.ones(1)), torch.full((1, WIDTH), 2.0).double()
    )


def test_a_smooth_change_seen_on_some_images_moves_others_nearer() -> None:
    """The others lie elsewhere, as those of earlier classes do."""
    seen, others = drawn(200), drawn(100, seed=1) + 1.0
    matrix = 0.2 * drawn(WIDTH, WIDTH, 3)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(0.3 * x @ matrix)

    drift = fit_drift(seen, moved(seen))
    want = moved(others).double()
    found = drift.sums(others.double(), torch.ones(len(others)))
    assert (found - want).norm() < 0.3 * (others - want).norm()
    assert drift.explained > 0.9 and drift.change > 0
