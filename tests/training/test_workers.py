"""Processes that load images: how many there are where nobody says, and that they change nothing but the time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import arguments, model_of, stream
from transformers import TrainerCallback, TrainingArguments, set_seed

from hf_cdl import CDLTrainer, CDLTrainingArguments
from hf_cdl.training import arguments as room
from hf_cdl.training.arguments.workers import MOST, useful_workers

TASK = next(stream())


class Drawn(TrainerCallback):
    """What the process's random numbers are at each step, which dropout would use."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def on_step_begin(self, *args: Any, **more: Any) -> None:
        self.states.append(torch.get_rng_state())


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """As if the arguments had found a GPU and cores enough."""
    monkeypatch.setattr(room, "useful_workers", lambda device: workers)


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [
        ("cpu", 64, 1, 0),
        ("mps", 8, 1, 0),
        ("cuda", 1, 1, 0),
        ("cuda", 2, 1, 1),
        ("cuda", 4, 1, 3),
        ("cuda", 64, 1, MOST),
        ("cuda", 16, 4, 3),
        ("cuda", 2, 4, 0),
    ],
)
def test_a_gpu_gets_the_cores_that_are_left(
    device: str, cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(cores)}, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert useful_workers(device) == workers


def test_only_who_does_not_say_gets_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (made := arguments(tmp_path)).dataloader_num_workers == 0 and not made.dataloader_persistent_workers
    on_a_gpu(monkeypatch, 5)
    made = arguments(tmp_path)
    assert made.chose_workers and (made.dataloader_num_workers, made.dataloader_persistent_workers) == (5, True)
    for number in (0, 3):
        made = arguments(tmp_path, dataloader_num_workers=number)
        assert not made.chose_workers and made.dataloader_num_workers == number
        assert not made.dataloader_persistent_workers
    theirs = CDLTrainingArguments.of(TrainingArguments(str(tmp_path), use_cpu=True))
    assert theirs.dataloader_num_workers == 0, "transformers' own arguments say so"


def test_no_more_than_there_are_batches_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The images of a small task are loaded before a process has begun."""
    on_a_gpu(monkeypatch, 2)  # torch warns of more than this machine has cores
    images = len(TASK.train)
    for batch, workers in ((images, 0), (images - 1, 1), (images // 4, 2)):
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, **sizes))
        trainer.seen, trainer.train_dataset = [TASK], TASK.train  # type: ignore[assignment]
        found = trainer.get_train_dataloader()
        assert (found.num_workers, found.persistent_workers) == (workers, workers > 0)
        assert trainer._loader(TASK.train, classes=TASK.classes).num_workers == workers
        assert trainer.args.dataloader_num_workers == 2
    told = arguments(tmp_path, dataloader_num_workers=2, per_device_train_batch_size=images)
    trainer = CDLTrainer(model_of("coda"), told)
    trainer.seen, trainer.train_dataset = [TASK], TASK.train  # type: ignore[assignment]
    assert trainer.get_train_dataloader().num_workers == 2, "told is told"


@pytest.mark.slow
def test_what_is_learnt_does_not_depend_on_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor do the random numbers that dropout would draw, epoch by epoch."""
    found = []
    for workers in (0, 2):
        on_a_gpu(monkeypatch, workers)
        set_seed(0)
        drawn = Drawn()
        args = arguments(tmp_path, num_train_epochs=3, per_device_train_batch_size=5)
        trainer = CDLTrainer(model_of("coda"), args, callbacks=[drawn])
        trainer.learn(TASK)
        answers = trainer.predict(TASK.test).predictions
        found.append(([*trainer.model.state_dict().values()], drawn.states, [torch.from_numpy(answers)]))
    for ours, theirs in zip(*found, strict=True):
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
