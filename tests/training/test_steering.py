"""Accuracy-based decisions during training use validation images, end where they should, and survive kills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import killed_and_taken, make_recipe, make_table, thinned, write_recipe
from safetensors.torch import load_file
from test_arguments import ELSEWHERE, KEEPS, LOADERS, MOVES
from test_contract import CLASSES, Pictures, arguments, model_of
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_cdl import CDLTrainer
from hf_cdl.runs.files import RunError
from hf_cdl.runs.run import Run
from hf_cdl.training.arguments import STEERED
from hf_cdl.training.arguments.table import ARGUMENTS, Used
from hf_cdl.types import Task

BEST = {"eval_strategy": "epoch", "load_best_model_at_end": True}
STEPS = {"eval_strategy": "steps", "eval_steps": 1}
# Name -> arguments with which the accuracy steers the training, and a callback that a user adds.
OPTIONS: dict[str, tuple[dict[str, Any], type[TrainerCallback] | None]] = {
    "the best epoch": (BEST, None),
    "the best step": ({**STEPS, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}, None),
    "the best is stored": ({**BEST, "save_strategy": "best"}, None),
    "plateau": (
        {
            "eval_strategy": "epoch",
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.01},
        },
        None,
    ),
    "few states": ({**BEST, "save_total_limit": 1}, None),
    "a delay": ({"eval_strategy": "epoch", "eval_delay": 1, "early_stopping_patience": 1}, None),
    "named": ({**BEST, "metric_for_best_model": "eval_accuracy", "greater_is_better": True}, None),
    "greedy": (
        {
            "eval_strategy": "epoch",
            "lr_scheduler_type": "greedy",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1},
        },
        None,
    ),
    "early stopping": ({"eval_strategy": "epoch", "early_stopping_patience": 1}, None),
    "early stopping at the best": ({**BEST, "early_stopping_patience": 2, "early_stopping_threshold": 1.0}, None),
    "a callback": ({"eval_strategy": "epoch"}, EarlyStoppingCallback),
}


class Stopper(TrainerCallback, ExportableState):
    """A user's callback: ends a phase after three evaluations if the first was not above the second.

    It counts anew in every phase, but not where one resumes.
    """

    def __init__(self) -> None:
        self.values: list[float] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"values": list(self.values)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.values = self.values if state.global_step else []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.values.append(metrics["eval_accuracy"])
        control.should_training_stop = len(self.values) > 2 and self.values[0] <= self.values[1]


OPTIONS["a callback of one's own"] = ({"eval_strategy": "epoch"}, Stopper)
STEERING = {field for fields, _ in OPTIONS.values() for field in fields}
# The other used fields: a value that has an effect, and other arguments.
OTHERS = {field: (value, beside) for field, (value, beside) in MOVES.items() if field not in STEERING}
OTHERS |= {field: (value, beside) for field, (value, beside, _) in KEEPS.items() if field not in STEERING}
FIXED = {"use_cpu", "disable_tqdm"}
"""Fields that `arguments` sets, to the values with an effect."""
ELSE = {field for field in ELSEWHERE if field not in STEERING}
"""What tests of their own show: precision, memory, workers and trackers, which evaluate nothing."""


class Hard(Pictures):
    """Images that are hard to tell apart, so that the accuracy goes up and down; `turn` gives them wrong labels."""

    def __init__(self, classes: range, seed: int, turn: int = 0):
        super().__init__(classes)
        noise = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(seed))
        self.images = self.images * 0.2 + noise
        self.labels = [classes[(label - classes.start + turn) % len(classes)] for label in self.labels]


def tasks(validation: int | None = 0, test: int = 0) -> Iterator[Task]:
    """Two tasks; the numbers shift the labels of the validation images (None: there are none) and the test images."""
    first = 0
    for index, names in enumerate(CLASSES):
        classes = range(first, first + len(names))
        held_out = None if validation is None else Hard(classes, 1, validation)
        yield Task(index, tuple(names), first, Pictures(classes), held_out, Hard(classes, 2, test))
        first += len(names)


def trainer_of(folder: Path, option: str, run: Run | None = None, **extra: Any) -> CDLTrainer:
    fields, callback = OPTIONS[option]
    set_seed(0)
    extra = {"num_train_epochs": 5, "learning_rate": 0.02, **extra}
    trainer = CDLTrainer(model_of("coda"), arguments(folder / "work", **{**extra, **fields}), run=run)
    if callback is not None:
        trainer.add_callback(callback())
    return trainer


def learnt(trainer: CDLTrainer, stream: Iterator[Task]) -> dict[str, torch.Tensor]:
    for task in stream:
        trainer.learn(task)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def curve(trainer: CDLTrainer) -> list[float]:
    return [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("option", thinned(OPTIONS, 3))
def test_test_labels_change_nothing_and_validation_labels_do(option: str, tmp_path: Path) -> None:
    """With changed test labels the weights are bit-identical; changed validation labels show that the test works."""
    plain = learnt(trainer_of(tmp_path, option), tasks())
    assert same(plain, learnt(trainer_of(tmp_path, option), tasks(test=1)))
    assert not same(plain, learnt(trainer_of(tmp_path, option), tasks(validation=1)))


def test_every_field_that_is_used_is_among_those_that_steer_or_those_that_do_not() -> None:
    """A new field of the table needs a place, and so does a scheduler or saving strategy that uses the accuracy."""
    used = {field for field, row in ARGUMENTS.items() if isinstance(row, Used)}
    assert used == STEERING | OTHERS.keys() | LOADERS.keys() | ELSE
    assert ELSE <= {field for field, place in ELSEWHERE.items() if "test_steering.py" not in place}
    given = [fields for fields, _ in OPTIONS.values()]
    assert {fields.get("lr_scheduler_type") for fields in given} == {None, *STEERED}
    assert {fields.get("save_strategy") for fields in given} == {None, "steps", "best"}
    assert {fields.get("eval_strategy") for fields in given} == {"steps", "epoch"}


@pytest.mark.slow
@pytest.mark.parametrize("field", [field for field in OTHERS if field not in FIXED])
def test_no_other_field_looks_at_labels_that_are_not_trained_on(field: str, tmp_path: Path) -> None:
    """Evaluated during training on test images, with the field at a value that has an effect."""
    value, beside = OTHERS[field]
    fields = {"num_train_epochs": 1, "eval_strategy": "epoch", **beside, field: value}
    if "max_steps" in fields:
        del fields["num_train_epochs"]
    verbosity, learnt_with = logging.get_verbosity(), []
    try:
        for test in (0, 1):
            set_seed(0)
            trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, **fields))
            learnt_with.append(learnt(trainer, islice(tasks(test=test), 1)))
            assert curve(trainer) or field == "eval_delay"
    finally:
        logging.set_verbosity(verbosity)
        torch.use_deterministic_algorithms(False)
    assert same(*learnt_with)


def test_the_accuracy_may_be_named(tmp_path: Path) -> None:
    """By either of its names, and as greater-is-better: nothing changes, and no other metric is measured."""
    plain = trainer_of(tmp_path, "the best epoch")
    want = learnt(plain, islice(tasks(), 1))
    ways: list[dict[str, Any]] = [{"metric_for_best_model": name} for name in ("accuracy", "eval_accuracy")]
    ways += [{"greater_is_better": True}]
    for fields in ways:
        trainer = trainer_of(tmp_path, "the best epoch", **fields)
        assert same(want, learnt(trainer, islice(tasks(), 1))), fields
        assert trainer.state.best_metric == plain.state.best_metric == max(curve(trainer))
        assert trainer.args.greater_is_better is True
    wrong: list[dict[str, Any]] = [{"metric_for_best_model": "eval_loss"}, {"greater_is_better": False}]
    for fields in wrong:
        with pytest.raises(ValueError, match="only accuracy is measured|the best accuracy is the greatest"):
            trainer_of(tmp_path, "the best epoch", **fields)


def test_a_phase_stops_when_it_gets_no_better(tmp_path: Path) -> None:
    """After so many evaluations without an improvement, which must exceed the threshold if one is given."""
    task = next(tasks())
    every = trainer_of(tmp_path, "the best epoch", num_train_epochs=8, load_best_model_at_end=False)
    every.learn(task)
    accuracies = curve(every)
    assert len(accuracies) == 8

    def stop(patience: int, threshold: float) -> int:
        best, worse = 0.0, 0
        for number, value in enumerate(accuracies, 1):
            better = value > best and abs(value - best) > threshold
            best, worse = max(best, value), 0 if better or number == 1 else worse + 1
            if worse >= patience:
                return number
        return len(accuracies)

    found = set()
    for patience, threshold in ((1, 0.0), (3, 0.0), (1, 100.0)):
        fields = {"early_stopping_patience": patience, "early_stopping_threshold": threshold, "num_train_epochs": 8}
        set_seed(0)
        trainer = CDLTrainer(
            model_of("coda"), arguments(tmp_path / "work", eval_strategy="epoch", learning_rate=0.02, **fields)
        )
        trainer.learn(task)
        assert curve(trainer) == accuracies[: stop(patience, threshold)], fields
        found.add(len(curve(trainer)))
    assert len(found) > 1, "the fields change when it stops"


@pytest.mark.parametrize("option", OPTIONS)
def test_without_validation_images_it_is_refused_before_training(option: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, option)
    named = [*map(str, OPTIONS[option][0]), "EarlyStoppingCallback", "Stopper"]
    for task in tasks(validation=None):
        with pytest.raises(ValueError, match="task-0. has no validation images.*data.validation_split") as error:
            trainer.check(task)
        assert any(name in str(error.value) for name in named) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="would choose by test images"):
        trainer.learn(next(tasks(validation=None)))
    assert not trainer.seen and not trainer.model.tasks


def test_a_curve_alone_reads_the_evaluation_split_and_needs_no_validation_images(tmp_path: Path) -> None:
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, eval_strategy="epoch"))
    other = CDLTrainer(model_of("coda"), arguments(tmp_path, eval_strategy="epoch"), eval_split="validation")
    task = next(tasks(validation=None))
    trainer.learn(task)
    trainer.evaluate_seen()
    assert curve(trainer)[-1] == trainer.evaluate_seen().row[0]
    with pytest.raises(ValueError, match="eval_strategy is set, but task-01 has no validation images"):
        other.check(task)


def test_early_stopping_needs_an_evaluation(tmp_path: Path) -> None:
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path))
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ValueError, match="EarlyStoppingCallback goes by the accuracy in training; set eval_strategy"):
        trainer.learn(next(tasks()))


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a run"])
@pytest.mark.parametrize(
    "option", thinned([name for name, (fields, _) in OPTIONS.items() if "load_best_model_at_end" in fields], 3)
)
def test_a_phase_ends_with_its_best_state(option: str, stored: bool, tmp_path: Path) -> None:
    """In every task, even if `save_steps` skips it; with the accuracy of exactly that state."""
    run = Run(tmp_path / "run", {}) if stored else None
    trainer = trainer_of(tmp_path, option, run)
    before_the_end = 0
    for task in tasks():
        trainer.learn(task)
        found = curve(trainer)
        before_the_end += found[-1] < max(found)
        batches = trainer._loader(task.validation)
        right = 0
        with torch.no_grad():
            for batch in batches:
                logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits[:, task.classes]
                right += int((logits.argmax(-1) + task.first_class == batch["labels"]).sum())
        assert 100 * right / len(task.validation or ()) == pytest.approx(max(found))
        assert trainer.state.best_metric == max(found)
        trainer.evaluate_seen()
    assert before_the_end, "the last state was the best every time: this shows nothing"


def test_without_a_run_nothing_is_stored(tmp_path: Path) -> None:
    learnt(trainer_of(tmp_path, "the best epoch"), tasks())
    assert list((tmp_path / "work").rglob("*")) == []


class Watch(TrainerCallback):
    """Records which states are stored after every save, and which of them is recorded as the best."""

    def __init__(self, work: Path):
        self.work, self.found = work, []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = sorted(int(path.name.split("-")[1]) for path in self.work.glob("checkpoint-*"))
        told = json.loads((self.work / f"checkpoint-{state.global_step}/trainer_state.json").read_text())
        assert told["best_model_checkpoint"] == state.best_model_checkpoint
        self.found.append((state.global_step, steps, state.best_model_checkpoint))


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("best", [True, False])
def test_the_newest_states_and_the_best_one_are_kept(limit: int | None, best: bool, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    fields = {"save_total_limit": limit, **({} if best else {"load_best_model_at_end": False})}
    task = next(tasks())
    if best:
        trainer = trainer_of(tmp_path, "the best epoch", run, **fields)
    else:
        trainer = CDLTrainer(
            model_of("coda"), arguments(tmp_path, num_train_epochs=5, save_total_limit=limit), run=run
        )
    watch = Watch(run.work_folder("student", task))
    trainer.add_callback(watch)
    trainer.learn(task)
    assert [step for step, _, _ in watch.found] == [3, 6, 9, 12, 15]
    for step, kept, named in watch.found:
        assert kept[-1] == step
        if best:
            best_step = int(named.rsplit("-", 1)[1])
            assert best_step in kept and Path(named).parent == watch.work
            assert len(kept) <= max(limit or 1, 1 + (best_step != step))
        else:
            assert named is None and len(kept) == min(limit or 1, step // 3)
    assert not watch.work.exists(), "it is of the phase"


def test_save_steps_and_strategies_say_when_a_state_is_stored(tmp_path: Path) -> None:
    saved = {}
    for name, fields in {
        "epoch": {},
        "steps": {"save_strategy": "steps", "save_steps": 2},
        "share": {"save_strategy": "steps", "save_steps": 0.5},
        "no": {"save_strategy": "no"},
    }.items():
        run = Run(tmp_path / name, {})
        trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, num_train_epochs=2, **fields), run=run)
        task = next(tasks())
        watch = Watch(run.work_folder("student", task))
        trainer.add_callback(watch)
        trainer.learn(task)
        saved[name] = [step for step, _, _ in watch.found]
    assert saved == {"epoch": [3, 6], "steps": [2, 4, 6], "share": [3, 6], "no": []}


def test_a_phase_starts_to_count_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "a callback of one's own")
    [counting] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Stopper)]
    metrics = []
    for task in tasks():
        trainer.learn(task)
        metrics.append(trainer.state.best_metric)
        assert counting.values == curve(trainer), "what it counted is of this phase"
    patient = trainer_of(tmp_path, "early stopping")
    for task in tasks():
        patient.learn(task)
        assert patient.state.best_metric == max(curve(patient)[:-1], default=0)
        assert len(curve(patient)) >= 2


class Killed(Exception):
    pass


class Killer(TrainerCallback):
    """Interrupts a phase after its n-th stored state, or after the n-th evaluation."""

    def __init__(self, after: int, event: str):
        self.left, self.event = after, event

    def _count(self, event: str) -> None:
        self.left -= event == self.event
        if self.left == 0:
            raise Killed

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("save")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("step")


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_a_phase_that_is_cut_off_ends_as_if_it_had_not_been(option: str, tmp_path: Path) -> None:
    """After its first and last stored state and between two, in a folder that was moved."""
    whole = Run(tmp_path / "whole", {})
    trainer = trainer_of(tmp_path, option, whole)
    saves = Watch(whole.work_folder("student", next(tasks())))
    trainer.add_callback(saves)
    trainer.learn(next(tasks()))
    want, evaluated = trainer.model.state_dict(), curve(trainer)
    for event, number in {("save", 1), ("save", len(saves.found)), ("step", 4)}:
        folder = tmp_path / f"{event}-{number}"
        cut = Run(folder, {})
        cut.bind("stream", [])
        trainer = trainer_of(tmp_path, option, cut)
        trainer.callback_handler.callbacks.append(Killer(number, event))
        with pytest.raises(Killed):
            trainer.learn(next(tasks()))
        cut._lock.release(force=True)
        moved = folder.rename(folder.with_name(f"{folder.name}-moved"))
        trainer = trainer_of(tmp_path, option, Run(moved, {}))
        trainer.learn(next(tasks()))
        assert same(want, trainer.model.state_dict()), (event, number)
        assert curve(trainer) == evaluated, (event, number)


def test_a_best_state_that_is_gone_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    trainer = trainer_of(tmp_path, "the best epoch", run)

    class Loser(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "train_runtime" in logs:  # the end
                Path(trainer._best_checkpoint or "", "trained.safetensors").unlink()

    trainer.add_callback(Loser())
    with pytest.raises(RunError, match="The best state of task 1 · student, .*learnt again"):
        trainer.learn(next(tasks()))


@pytest.mark.slow
def test_a_kill_does_not_change_a_run_that_ends_with_its_best_epoch(tmp_path: Path) -> None:
    """In real processes: teacher and student stop early and end with their best state on validation images."""
    recipe = make_recipe(tmp_path, baselines=["linear_head"])
    recipe["train"] |= {**BEST, "num_train_epochs": 8, "learning_rate": 0.3, "early_stopping_patience": 3}
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    whole = tmp_path / "whole"
    labels = [c for c in range(6) for _ in range(4)]
    make_table(labels, 6, 20_000).to_parquet(str(tmp_path / "data/validation.parquet"))
    for folder in killed_and_taken(file, whole, "student-task-02", "3 tasks"):
        for weights in whole.rglob("model.safetensors"):
            ours, theirs = load_file(weights), load_file(folder / weights.relative_to(whole))
            assert same(ours, theirs), weights
