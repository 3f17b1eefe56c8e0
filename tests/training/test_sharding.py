"""A teacher whose layers are shared out to several processes: what it teaches, stores and answers stays the same."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import make_backbone, make_recipe, script, start_anew, train, write_recipe
from safetensors.torch import load_file
from test_train import losses, measured
from tiny_families import SIZES, TINY, family_config
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_cdl.backbones.loading import build_backbone
from hf_cdl.training.sharding import _layers

TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
HALVES = ("--train.per_device_train_batch_size", 4)
SHARDED = ("--train.shard_teacher", "true")
ROLES = ("teacher", "student")


def recipe_of(folder: Path, **fields: Any) -> dict[str, Any]:
    """Tasks of 3, 2 and 1 batches that are not full. SGD: Adam's step is rounding noise where a gradient is 0."""
    recipe = make_recipe(folder, **fields)
    recipe["data"] |= {"max_train_per_class": 7, "classes_per_task": [3, 2, 1] if "first" in fields else [2, 2, 2]}
    recipe["train"] |= {"optim": "sgd", "logging_steps": 1}
    return recipe


def classifier(folder: Path) -> Path:
    """A ready classifier of the six classes."""
    torch.manual_seed(5)
    names = dict(enumerate(f"class {letter}" for letter in "abcdef"))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    config = ViTConfig(**SIZES, intermediate_size=64, initializer_range=0.2, **labels)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def both(recipe: dict[str, Any], folder: Path, port: int) -> tuple[Path, Path]:
    """The folders of a run in one process, and in two with a sharded teacher."""
    file, one, two = write_recipe(folder / "recipe.yaml", recipe), folder / "one", folder / "two"
    code, output = train(file, "--output_dir", one)
    assert code == 0, output
    code, output = train(file, "--output_dir", two, *HALVES, *SHARDED, launcher=(*TWO, str(port)))
    assert code == 0, output
    return one, two


def assert_same(one: Path, two: Path, exact: bool = False, roles: Sequence[str] = ROLES) -> None:
    """Losses, weights and results are the same, but for rounding, or to the bit."""
    most = 0.0 if exact else 1e-6
    for role in roles:
        for task in (1, 2, 3):
            if (one / "logs" / f"{role}-task-{task:02d}.json").exists():
                for ours, theirs in zip(losses(one, role, task), losses(two, role, task), strict=True):
                    assert ours == pytest.approx(theirs, rel=most, abs=most)
        files = [file.relative_to(one) for file in sorted((one / role).rglob("*.safetensors"))]
        assert files and files == [file.relative_to(two) for file in sorted((two / role).rglob("*.safetensors"))]
        for file in files:
            ours, theirs = load_file(one / file), load_file(two / file)
            assert ours.keys() == theirs.keys(), file
            for name, value in ours.items():
                other = theirs[name]
                if value.dtype == torch.int64 and value.ndim:  # sums, in bits of float64
                    value, other = value.view(torch.float64), other.view(torch.float64)
                torch.testing.assert_close(other, value, atol=most, rtol=most, msg=f"{file}: {name}")
    assert measured(one) == measured(two)


@pytest.mark.parametrize("kind", TINY)
def test_the_layers_of_every_family_are_found(kind: str) -> None:
    config = family_config(kind)
    layers = _layers(build_backbone(config))
    assert len(layers) == config.num_hidden_layers


@pytest.mark.slow
def test_a_process_holds_a_share_of_a_teacher_that_is_stored_and_answers_whole(tmp_path: Path) -> None:
    """With shard_teacher a process keeps half the bytes of each layer; see sharded_worker.py."""
    backbone = make_backbone(tmp_path / "backbone", 48, 3, 1)
    worker = Path(__file__).with_name("sharded_worker.py")
    started = start_anew(backbone, tmp_path, launcher=(*TWO, "29570"), program=(worker,))
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0 and output.count("all is well") == 2, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("port", "fields"),
    [
        (29571, {"distill": [{"type": "kd", "weight": 0.5}]}),
        (29572, {"distill": [{"type": "kdp", "weight": 0.5}, {"type": "review_kd"}]}),
        (29573, {"distill": [{"type": "kdp", "weight": 0.5}], "teacher": {"query": "self"}}),
        (29574, {"distill": [{"type": "kd", "weight": 0.5}], "teacher": {"prompt": {"type": "none"}}}),
    ],
    ids=["kd", "kdp and hidden states", "a query of its own", "no prompts"],
)
def test_a_sharded_teacher_teaches_what_a_whole_one_does(port: int, fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, distill=fields["distill"])
    recipe["teacher"] |= fields.get("teacher", {})
    assert_same(*both(recipe, tmp_path, port))


@pytest.mark.slow
def test_fitted_heads_and_their_evaluation_are_gathered(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, distill=[], ce_weight=1.0)
    recipe["data"]["classes_per_task"] = [3, 2, 1]
    heads = {"teacher": {}, "student": {"soft_targets": 0.5}}
    for role, more in heads.items():
        recipe[role] |= {"prompt": {"type": "none"}, "head": {"type": "ridge", "strength": 10.0, **more}}
    recipe["train"] = {"use_cpu": True, "per_device_eval_batch_size": 5}
    assert_same(*both(recipe, tmp_path, 29575))


@pytest.mark.slow
def test_a_ready_classifier_is_sharded(tmp_path: Path) -> None:
    """It comes with its classes; a finished task's run loads its checkpoint, and goes on."""
    recipe = recipe_of(tmp_path, distill=[{"type": "kd", "weight": 0.5}])
    recipe["data"]["classes_per_task"] = 6
    recipe["teacher"] = {"model": "classifier", "backbone": str(classifier(tmp_path / "ready")), "train": None}
    recipe["student"]["query"] = "self"
    one, two = both(recipe, tmp_path, 29576)
    assert_same(one, two)
    assert json.loads((two / "teacher" / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]


@pytest.mark.slow
def test_a_killed_run_with_a_sharded_teacher_goes_on_to_the_bit_and_is_taken_over(tmp_path: Path) -> None:
    """Killed in a phase of each role; another run takes over a teacher that was trained whole, and shares it out."""
    recipe = recipe_of(tmp_path)
    recipe["train"]["save_strategy"] = "epoch"
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    whole, cut, taken = tmp_path / "whole", tmp_path / "cut", tmp_path / "taken"
    launcher = (*TWO, "29577")
    code, output = train(file, "--output_dir", whole, *HALVES, launcher=launcher)
    assert code == 0, output
    for role in ROLES:
        process = start_anew(file, "--output_dir", cut, *HALVES, *SHARDED, launcher=launcher)
        states = f"work/{role}-task-02/checkpoint-*"
        while process.poll() is None and not list(cut.glob(states)):
            time.sleep(0.05)
        for one in (*psutil.Process(process.pid).children(recursive=True), process):  # or they would end the phase
            one.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and list(cut.glob(states)), "it was killed in this phase"
    code, output = train(file, "--output_dir", cut, *HALVES, *SHARDED, launcher=launcher)
    assert code == 0 and "Traceback" not in output, output
    assert_same(whole, cut, exact=True)
    code, output = train(file, "--output_dir", taken, *HALVES, *SHARDED, "--teacher_from", whole, launcher=launcher)
    assert code == 0, output
    assert_same(whole, taken, exact=True)
    code, output = script("verify", cut, env={})
    assert code == 0 and output.count("as recorded") == 9, output  # three roles, three tasks
