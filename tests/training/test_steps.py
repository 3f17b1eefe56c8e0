"""The gradient of a step is the mean over its images, whatever the split into micro-batches and over processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import thinned
from safetensors.torch import load_file, save_file
from test_contract import MAPPING, arguments, model_of
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.data.sampler import Rounds, ViewSampler
from hf_cdl.distill import TERMS, Objective
from hf_cdl.runs.run import Run
from hf_cdl.types import Task


class Images(torch.utils.data.Dataset):
    """A number of images of three classes, numbered from `first`; all views of an image are equal."""

    def __init__(self, count: int, first: int = 0):
        self.labels = [first + number % 3 for number in range(count)]
        generator = torch.Generator().manual_seed(count + first)
        self.images = (
            torch.randn(count, 3, 16, 16, generator=generator) + torch.tensor(self.labels)[:, None, None, None]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key if isinstance(key, int) else key[0]
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def task_of(images: int, index: int = 0, tests: int = 5) -> Task:
    names = tuple(f"{index} {number}" for number in range(3))
    return Task(index, names, 3 * index, Images(images, 3 * index), None, Images(tests, 3 * index))


# Cases: the student's prompt method, and the recipe's `distill`.
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "labels": ("coda", []),  # plus the pool's orthogonality, which is independent of images
    "kd": ("l2p", [{"type": "kd"}]),  # plus a match loss
    "dkd, lskd": ("apt", [{"type": "dkd"}, {"type": "kd", "standardise": True}]),
    "kdp": ("coda", [{"type": "kdp"}, {"type": "label_smoothing"}]),
    "layers": ("dualprompt", [{"type": "fitnets"}, {"type": "review_kd"}]),
    "mapping": ("coda", [{"type": "prompt_mapping"}]),
    "unlabelled": (
        "l2p",
        [{"type": "kd", "threshold": 0.5}, {"type": "fitnets"}, {"type": "pseudo_labels", "threshold": 0.4}],
    ),
    "dual path": ("coda", [{"type": "dual_path", "warmup_steps": 3, "lambda_y": 0.1}]),
}


def trainer_of(case: str, folder: Path, run: Run | None = None, **train: Any) -> CDLTrainer:
    """A student with a teacher that knows the first task; plain SGD, since Adam amplifies rounding errors."""
    method, distill = CASES[case]
    parts: dict[str, Any] = {}
    for fields in distill:
        parts |= TERMS[fields["type"]].student_parts
    teacher = model_of(method, width=48, query_width=32)
    if "mapping" in parts:
        parts = {"mapping": MAPPING, "teacher_pool": teacher.pool_config}
    student = model_of(method, width=32, **parts)
    if teacher.query_backbone is not None:
        teacher.query_backbone.load_state_dict(student.backbone.state_dict())
    teacher.begin_task(task_of(1).class_names)
    set_seed(2)
    terms = []
    for fields in distill:
        kind = TERMS[fields["type"]]
        config = kind.config_class(**{key: value for key, value in fields.items() if key != "type"})
        terms.append((fields["type"], kind(config, student.shape, teacher.shape)))
    epochs = {} if "max_steps" in train else {"num_train_epochs": 3}
    args = arguments(folder, **{**epochs, "optim": "sgd", "learning_rate": 0.05, **train})
    objective = Objective(0.5, terms)
    return CDLTrainer(student, args, objective, teacher if objective.needs_teacher else None, run=run)


def learnt(case: str, images: int, folder: Path, **train: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The resulting weights of a student and of the terms' layers, and its log."""
    trainer, task = trainer_of(case, folder, **train), task_of(images)
    if case == "unlabelled":
        task = replace(task, unlabelled=Images(7), unlabelled_ratio=2)
    trainer.model.begin_task(task.class_names)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.learn(task)
    after = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for name, value in trainer.model.named_parameters():
        still = value.requires_grad and value.ndim > 1 and torch.equal(value, before[name])
        assert not still, f"{name} learnt nothing"
    return after, trainer.state.log_history


def split(batch: int, accumulated: int) -> dict[str, int]:
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], message: str = "") -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=1e-5, msg=f"{message} {name}")


# ---- the order in which processes learn ----


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 5])
@pytest.mark.parametrize("images", [1, 2, 11, 12, 13, 24])
def test_every_image_counts_once_and_the_processes_keep_step(images: int, batch: int, processes: int) -> None:
    sampler = ViewSampler(images, seed=3)
    sampler.epoch = 2
    rounds, whole = Rounds(sampler, batch, False, processes), Rounds(sampler, batch * processes)
    dealt = [*rounds]
    assert len(dealt) == len(rounds) == whole.count * processes
    seen = []
    for number in range(rounds.count):
        sizes = rounds.sizes(number)
        assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1 and sizes[0] > 0
        for size, keys in zip(sizes, dealt[number * processes :], strict=False):
            assert len(keys) == max(size, 1), "a process without images takes part all the same"
            seen += keys[:size]
    assert seen == [*sampler]
    assert [*whole] == [seen[first : first + batch * processes] for first in range(0, images, batch * processes)]
    dropping = Rounds(sampler, batch, True, processes)
    assert [*dropping] == dealt[: dropping.count * processes]
    assert dropping.count == images // (batch * processes)


# ---- one process ----


def assert_equal_to_a_millionth(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_twelve_images_are_three_times_four(case: str, tmp_path: Path) -> None:
    """One step of 12 images, or of 3 micro-batches of 4: equal weights within 1e-6, whatever their size."""
    whole, _ = learnt(case, 12, tmp_path, **split(12, 1))
    assert_equal_to_a_millionth(whole, learnt(case, 12, tmp_path, **split(4, 3))[0])


@pytest.mark.parametrize(("case", "sizes"), thinned(itertools.product(CASES, [(11, 5), (12, 4), (13, 4)]), 2))
def test_micro_batches_are_one_batch(case: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    """Even if the last one is smaller, or alone in its step: 5 + 5 + 1; 4 + 4 + 4, then 1."""
    images, batch = sizes
    whole, log = learnt(case, images, tmp_path, **split(12, 1))
    parts, parts_log = learnt(case, images, tmp_path, **split(batch, 3))
    assert_close(whole, parts)
    for ours, theirs in zip(log[:-1], parts_log[:-1], strict=True):
        assert theirs == pytest.approx({**ours, "epoch": theirs["epoch"]}, rel=1e-4, abs=1e-5)
        assert theirs["loss"] == pytest.approx(theirs["loss/loss"], rel=1e-4)


def test_clipping_momentum_and_a_schedule_see_the_whole_step(tmp_path: Path) -> None:
    fields = {"max_grad_norm": 0.01, "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine", "weight_decay": 0.1}
    whole, log = learnt("kd", 13, tmp_path, **split(10, 1), **fields)
    parts, parts_log = learnt("kd", 13, tmp_path, **split(5, 2), **fields)
    assert_close(whole, parts)
    for key in ("grad_norm", "learning_rate"):
        assert [line[key] for line in log[:-1]] == pytest.approx([line[key] for line in parts_log[:-1]], rel=1e-4)


def test_bf16_weighs_micro_batches_too(tmp_path: Path) -> None:
    whole, parts = (learnt("kdp", 13, tmp_path, **split(*of), bf16=True)[0] for of in ((10, 1), (5, 2)))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-3, rtol=2e-2, msg=name)


def weights_of(images: int, folder: Path, **train: Any) -> list[float]:
    """The weights of an epoch's micro-batches."""
    trainer, weights = trainer_of("labels", folder, num_train_epochs=1, **train), []
    ask = trainer.compute_loss

    def noting(model: Any, inputs: dict[str, Any], **rest: Any) -> Any:
        weights.append(inputs["weight"])
        return ask(model, inputs, **rest)

    trainer.compute_loss = noting  # type: ignore[method-assign]
    trainer.learn(task_of(images))
    return weights


def test_equal_micro_batches_have_the_weight_one(tmp_path: Path) -> None:
    """So that what was already right stays bit-identical."""
    assert weights_of(13, tmp_path, **split(4, 1)) == [1.0] * 4
    assert weights_of(49, tmp_path, **split(1, 49)) == [1.0] * 49
    assert weights_of(23, tmp_path, **split(3, 3), dataloader_drop_last=True) == [1.0] * 7
    assert weights_of(22, tmp_path, **split(4, 3)) == [1.0] * 3 + [12 / 10, 12 / 10, 6 / 10]


class Cut(Exception):
    pass


def check_that_it_goes_on(folder: Path, batch: int, writer: bool = True, **train: Any) -> None:
    """In the middle of an epoch, before the step with the smaller micro-batch; every step is stored."""
    train = {**split(batch, 2), "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, **train}
    whole = trainer_of("kdp", folder / "whole", Run(folder / "whole", {}, writer), **train)
    whole.learn(task_of(22))
    assert whole.state.global_step == 6
    cut = trainer_of("kdp", folder / "cut", Run(folder / "cut", {}, writer), **train)
    ask, calls = cut.compute_loss, []

    def until(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:  # within the fifth step
            raise Cut
        return ask(*args, **kwargs)

    cut.compute_loss = until
    with pytest.raises(Cut):
        cut.learn(task_of(22))
    again = trainer_of("kdp", folder / "cut", cut.run, **train)
    again.learn(task_of(22))
    assert again.state.global_step == 6
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert again._images == 22 - 8, "the images since it went on: of the rest of the second epoch"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_phase_that_was_cut_off_between_steps_goes_on_with_the_same_weights(workers: int, tmp_path: Path) -> None:
    check_that_it_goes_on(tmp_path, 4, dataloader_num_workers=workers)


@pytest.mark.parametrize(
    ("train", "steps", "images"),
    [
        ({}, 6, 66),
        ({**split(4, 2)}, 9, 66),
        ({"dataloader_drop_last": True}, 3, 48),
        ({"max_steps": 4}, 4, 22 + 22),
        ({"num_train_epochs": 1.5}, 3, 22 + 16),
        ({"dataloader_num_workers": 2}, 6, 66),
    ],
)
def test_steps_and_images_a_second_are_counted(train: dict[str, Any], steps: int, images: int, tmp_path: Path) -> None:
    trainer = trainer_of("labels", tmp_path, **{**split(8, 2), **train})
    trainer.learn(task_of(22))
    last = trainer.state.log_history[-1]
    assert (trainer.state.global_step, trainer._images) == (steps, images)
    assert last["train_samples_per_second"] == pytest.approx(images / last["train_runtime"], abs=1e-3)


# ---- two processes ----

SPLITS = [(12, 4, 2), (13, 3, 2), (11, 5, 1), (12, 3, 2), (13, 5, 1)]
"""Images, and of two processes the batch and how many micro-batches a step has; of 13 images one is left alone.
Of the first, twelve images, the processes see 4 and 4, then 2 and 2."""
LEARNT = [(case, number) for case in CASES for number in range(len(SPLITS) if case in ("labels", "kdp") else 2)]
SIZES = {"train": [7, 1, 8], "tests": [9, 1, 8]}


def fitted(folder: Path, batch: int, run: Run | None = None) -> CDLTrainer:
    """A ridge head on standardised features that learns three tasks of seven, one and eight images."""
    set_seed(3)
    head = {"type": "ridge", "standardise": "first_task"}
    model = CDLForImageClassification(CDLConfig(backbone_config=model_of("coda").config.backbone_config, head=head))
    trainer = CDLTrainer(model, arguments(folder, per_device_eval_batch_size=batch), run=run)
    for index, (images, tests) in enumerate(zip(*SIZES.values(), strict=True)):
        trainer.learn(task_of(images, index, tests))
    return trainer


def answers(trainer: CDLTrainer) -> dict[str, Any]:
    result = trainer.evaluate_seen()
    return {name: getattr(result, name) for name in ("counts", "correct", "row", "within_task", "class_accuracy")}


def work(folder: Path) -> None:
    """In one of two processes: learn every case with each of the splits, in halves, and evaluate."""
    rank = int(os.environ["RANK"])
    for case, number in LEARNT:
        images, batch, accumulated = SPLITS[number]
        weights, log = learnt(case, images, folder, **split(batch, accumulated), logging_steps=2)
        if rank == 0:
            save_file(weights, folder / f"{case}-{number}.safetensors")
            (folder / f"{case}-{number}.json").write_text(json.dumps(log))
    check_that_it_goes_on(folder / "kept", 2, rank == 0)
    trainer = fitted(folder, batch=4)
    found = answers(trainer)
    if rank == 0:
        save_file(trainer.model.state_dict(), folder / "fitted.safetensors")
        (folder / "fitted.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Even with odd numbers of images, or fewer than processes: in training, fitting and evaluation."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29551", __file__, tmp_path]
    tests = os.pathsep.join(sys.path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": tests}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case, number in LEARNT:
        images, batch, accumulated = SPLITS[number]
        weights, log = learnt(case, images, tmp_path, **split(2 * batch * accumulated, 1), logging_steps=2)
        two = load_file(tmp_path / f"{case}-{number}.safetensors")
        assert_close(weights, two, f"{case}, {SPLITS[number]}")
        if images == 12:
            assert_equal_to_a_millionth(weights, two)
            assert_equal_to_a_millionth(learnt(case, images, tmp_path, **split(4, 3), logging_steps=2)[0], two)
        theirs = json.loads((tmp_path / f"{case}-{number}.json").read_text())
        for one, two in zip(log[:-1], theirs[:-1], strict=True):
            assert two == pytest.approx({**one, "epoch": two["epoch"]}, rel=1e-4, abs=1e-5), case
    one = fitted(tmp_path, batch=8)
    assert json.loads((tmp_path / "fitted.json").read_text()) == answers(one)
    assert answers(one)["counts"] == SIZES["tests"]
    two = load_file(tmp_path / "fitted.safetensors")
    assert two["head.standard.count"] == 7
    for name, value in one.model.state_dict().items():
        wide = value.dtype == torch.int64 and value.ndim > 0  # sums, in bits of float64
        pair = [tensor.view(torch.float64) if wide else tensor for tensor in (two[name], value)]
        torch.testing.assert_close(*pair, atol=1e-3, rtol=1e-4, msg=name)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # its threads could abort the process at its end
