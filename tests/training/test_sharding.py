"""A teacher whose layers are shared out to several processes: what it teaches, stores and answers stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, make_backbone, make_data, make_recipe, train, write_recipe
from safetensors.torch import load_file
from test_train import losses, measured

TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
SGD = ("--train.logging_steps", 1, "--train.optim", "sgd")  # Adam's step is rounding noise where a gradient is 0


def differences(one: Path, two: Path, role: str) -> dict[str, float]:
    """The largest difference of each checkpoint of a role, by its file."""
    found = {}
    for file in sorted((one / role).rglob("*.safetensors")):
        name = file.relative_to(one)
        ours, theirs = load_file(file), load_file(two / name)
        assert ours.keys() == theirs.keys(), name
        found[str(name)] = max((ours[key].double() - theirs[key].double()).abs().max().item() for key in ours)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "more", "port"),
    [
        ([{"type": "kd", "weight": 0.5}], (), 29571),
        ([{"type": "kdp", "weight": 0.5}, {"type": "review_kd"}], (), 29572),
    ],
    ids=["kd", "kdp_and_hidden_states"],
)
def test_a_sharded_teacher_teaches_what_a_whole_one_does(
    tmp_path: Path, terms: list[dict[str, Any]], more: tuple[Any, ...], port: int
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", make_recipe(tmp_path, distill=terms))
    one, two = tmp_path / "one", tmp_path / "two"
    code, output = train(recipe, "--output_dir", one, *SGD, *more)
    assert code == 0, output
    sharded = (*SGD, *more, "--train.per_device_train_batch_size", 4, "--train.shard_teacher", "true")
    code, output = train(recipe, "--output_dir", two, *sharded, launcher=(*TWO, str(port)))
    assert code == 0, output
    for role in ("teacher", "student"):
        for task in (1, 2, 3):
            for ours, theirs in zip(losses(one, role, task), losses(two, role, task), strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert max(differences(one, two, role).values()) < 1e-6, differences(one, two, role)
    assert measured(one) == measured(two)
