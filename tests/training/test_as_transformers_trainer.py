"""CDLTrainer is used like transformers' Trainer: train, callbacks, metrics, evaluate, predict, arguments."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_data
from test_contract import Pictures, arguments, model_of, stream, vit
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessorPil
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalPrediction, PredictionOutput
from transformers.utils import logging as hf_logging

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments, StreamConfig, TaskStream
from hf_cdl.distill import TERMS, Objective
from hf_cdl.runs.ledger import read_ledger
from hf_cdl.runs.run import Run
from hf_cdl.training.trainer_contract import KEYWORDS, METHODS

TASKS = list(stream())
EPOCHS: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}


def trainer_of(folder: Path, tasks: Any = None, run: Run | None = None, model: Any = None, **more: Any) -> CDLTrainer:
    """A trainer for tasks of three and two classes: one epoch of 24 and 16 images in batches of 8, 3 and 2 steps."""
    fields = {name: more.pop(name) for name in [*more] if name in CDLTrainingArguments.__dataclass_fields__}
    args = arguments(folder / "work", num_train_epochs=1, per_device_eval_batch_size=7, **fields)
    return CDLTrainer(model or model_of("coda"), args, train_dataset=tasks, run=run, **more)


def recall_of_each_class(found: EvalPrediction) -> dict[str, Any]:
    """A metric that returns NumPy numbers, on predictions over all classes."""
    assert isinstance(found.predictions, np.ndarray) and isinstance(found.label_ids, np.ndarray)
    predicted = found.predictions.argmax(-1)
    recalls = [np.mean(predicted[found.label_ids == label] == label) for label in np.unique(found.label_ids)]
    return {"recall": np.mean(recalls), "classes": found.predictions.shape[1]}


def by_hand(model: Any, split: Any) -> tuple[np.ndarray, np.ndarray]:
    items = [split[number] for number in range(len(split))]
    with torch.no_grad():
        logits = model.eval()(torch.stack([item["pixel_values"] for item in items])).logits
    return logits.numpy(), np.array([item["labels"] for item in items])


# ---- train() ----


def test_train_learns_the_tasks_in_order_as_learn_does(tmp_path: Path) -> None:
    one, other = trainer_of(tmp_path, TASKS), trainer_of(tmp_path)
    curves: list[list[float]] = []
    other_steps = 0
    for task in TASKS:
        other.learn(task)
        other_steps += other.state.global_step
        curves.append([line["loss/loss"] for line in other.state.log_history if "loss/loss" in line])
    found = one.train()
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert one.train_dataset is TASKS and one.seen == TASKS
    losses = [loss for curve in curves for loss in curve]
    assert found.global_step == other_steps == len(losses) == 5
    assert found.training_loss == found.metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    images = sum(len(task.train) for task in TASKS)
    assert found.metrics["train_samples_per_second"] * found.metrics["train_runtime"] == pytest.approx(
        images, rel=0.01
    )
    again = one.train()
    assert (again.global_step, len(one.seen)) == (0, len(TASKS)) and math.isnan(again.training_loss), "all are learnt"


def test_train_takes_a_stream_and_one_task(tmp_path: Path) -> None:
    data = StreamConfig(path=str(make_data(tmp_path / "data")), classes_per_task=3)
    tasks = TaskStream(data, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    trainer = trainer_of(tmp_path, tasks)
    trainer.train()
    assert trainer.model.tasks == [list(task.class_names) for task in tasks]
    assert trainer.num_tasks == len(tasks) == 2
    alone = trainer_of(tmp_path, TASKS[0])
    assert alone.train().global_step == 3


def test_tasks_may_be_given_later(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train_dataset = TASKS[:1]
    assert trainer.train().global_step == 3 and trainer.num_tasks == 1
    trainer.train_dataset = TASKS
    assert trainer.train().global_step == 2 and trainer.num_tasks == 2 and trainer.seen == TASKS
    trainer.train_dataset = TASKS[0].test
    with pytest.raises(ValueError, match="train_dataset is Pictures, but must be a TaskStream"):
        trainer.train()


def test_with_a_run_train_measures_every_task_and_skips_what_the_ledger_has(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(folder, {"name": "tiny"})
    run.bind("stream", [list(task.class_names) for task in TASKS])
    first = trainer_of(tmp_path, TASKS[:1], run)
    assert first.train(resume_from_checkpoint=True).global_step == 3
    run.close()
    run = Run(folder, {"name": "tiny"})
    model = CDLForImageClassification.from_pretrained(str(run.checkpoint("student")))
    second = trainer_of(tmp_path, TASKS, run, model)
    assert second.train().global_step == 2, "of the second task alone"
    entries = json.loads((folder / "run.json").read_text())["entries"]["student"]
    assert [len(entry["row"]) for entry in entries] == [1, 2]
    run.close()


def test_a_head_that_is_fitted_has_no_steps_and_no_loss(tmp_path: Path) -> None:
    model = CDLForImageClassification(CDLConfig(backbone_config=vit(32), head={"type": "ncm"}))
    found = trainer_of(tmp_path, TASKS, model=model).train()
    assert found.global_step == 0 and math.isnan(found.training_loss) and "train_loss" not in found.metrics
    assert found.metrics["train_samples_per_second"] > 0


def test_a_task_that_cannot_be_learnt_is_said_before_the_first_one_is(tmp_path: Path) -> None:
    single = dataclasses.replace(TASKS[1], class_names=TASKS[1].class_names[:1])
    trainer = trainer_of(tmp_path, [TASKS[0], single])
    with pytest.raises(ValueError, match="cannot learn task 2, which has one class"):
        trainer.train()
    assert trainer.seen == [] and trainer.model.tasks == []


def test_a_teacher_learns_the_stream_first_and_then_its_student(tmp_path: Path) -> None:
    teacher, student = model_of("coda", width=48), model_of("coda")
    kd = TERMS["kd"](TERMS["kd"].config_class(), student.shape, teacher.shape)
    objective = Objective(0.5, [("kd", kd)])
    distil = trainer_of(tmp_path, TASKS, model=student, objective=objective, teacher=teacher)
    with pytest.raises(ValueError, match="The teacher knows 0 classes, but task 1 goes up to class 3"):
        distil.train()
    assert student.tasks == [], "nothing was changed"
    trainer_of(tmp_path / "t", TASKS, model=teacher, role="teacher").train()
    distil.train()
    assert distil.seen == TASKS and any("loss/kd" in line for line in distil.state.log_history)


# ---- callbacks and metrics ----


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.begun: list[int] = []
        self.steps: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.begun.append(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.steps.append(state.global_step)


def test_a_user_s_callback_is_called_in_every_task(tmp_path: Path) -> None:
    steps = Steps()
    trainer_of(tmp_path, TASKS, callbacks=[steps]).train()
    assert steps.begun == [3, 2] and steps.steps == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("kind", [ProgressCallback, PrinterCallback])
def test_a_user_s_own_progress_stays_and_trainer_s_goes(
    kind: type[TrainerCallback], quiet: bool, tmp_path: Path
) -> None:
    class Mine(kind):  # type: ignore[misc, valid-type]
        begun = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.begun += 1

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            pass

        on_log = on_train_end = on_step_end

    mine = Mine()
    args = CDLTrainingArguments(str(tmp_path), num_train_epochs=1, report_to="none", use_cpu=True, disable_tqdm=quiet)
    trainer = CDLTrainer(model_of("coda"), args, train_dataset=TASKS, callbacks=(mine,))
    trainer.train()
    assert mine.begun == 2
    kept = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]
    assert kept == [mine], "Trainer's own is replaced by the progress of a task"


class Counter(TrainerCallback, ExportableState):
    """A user's callback with a state, and an argument that is none of its attributes."""

    def __init__(self, start: int = 0) -> None:
        self.steps = start

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.steps += 1


def test_a_user_s_callback_keeps_its_state_from_task_to_task(tmp_path: Path) -> None:
    counter = Counter(10)
    trainer_of(tmp_path, TASKS, callbacks=[counter]).train()
    assert counter.steps == 10 + 3 + 2


def test_a_user_s_callback_beside_evaluation_needs_images_for_validation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, TASKS, callbacks=[Steps()], eval_strategy="epoch")
    with pytest.raises(ValueError, match="Steps of the student would choose by test images"):
        trainer.train()
    assert trainer.seen == []


def test_metrics_are_those_that_one_computes_by_hand(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, TASKS, compute_metrics=recall_of_each_class)
    trainer.train()
    for task in TASKS:
        logits, labels = by_hand(trainer.model, task.test)
        want = recall_of_each_class(EvalPrediction(logits, labels))
        accuracy = 100 * float(np.mean(logits.argmax(-1) == labels))
        found = trainer.evaluate(task.test)
        assert found == pytest.approx({"eval_accuracy": accuracy, **{f"eval_{k}": v for k, v in want.items()}})
        assert type(found["eval_recall"]) is float, "a number that goes into a file"
        found = trainer.predict(task.test).metrics or {}
        assert found["test_recall"] == pytest.approx(want["recall"]) and found["test_classes"] == logits.shape[1]


def test_metrics_are_computed_during_training_and_one_of_our_name_comes_before_ours(tmp_path: Path) -> None:
    shapes = []

    def metrics(found: Any) -> dict[str, float]:
        shapes.append((found.predictions.shape, sorted({*found.label_ids.tolist()})))
        return {"accuracy": 0.25, "eval_own": 3.0}

    trainer = trainer_of(tmp_path, TASKS, compute_metrics=metrics, eval_strategy="epoch")
    trainer.train()
    line = next(line for line in trainer.state.log_history if "eval_accuracy" in line)
    assert (line["eval_accuracy"], line["eval_own"]) == (0.25, 3.0)
    assert shapes == [((24, 3), [0, 1, 2]), ((16, 5), [3, 4])], "all classes, the newest task's images"


def test_images_of_one_s_own_are_evaluated_during_training(tmp_path: Path) -> None:
    """Among all classes, even where a callback may steer by them; the newest task's test images are not used."""
    first = Pictures(range(3))
    trainer = trainer_of(tmp_path, TASKS, eval_dataset=first, callbacks=[Steps()], eval_strategy="epoch")
    seen: list[float] = []
    for task in TASKS:
        trainer.learn(task)
        seen += [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line]
    logits, labels = by_hand(trainer.model, first)
    assert seen[1] == 100 * float(np.mean(logits.argmax(-1) == labels)) == trainer.evaluate()["eval_accuracy"]


def test_a_phase_shorter_than_eval_steps_is_evaluated_at_its_end(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, TASKS[:1], eval_strategy="steps", eval_steps=500)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_accuracy" in line] == [3]


def test_a_run_s_next_task_waits_until_the_last_one_is_measured(tmp_path: Path) -> None:
    """Otherwise its ledger would lack a row permanently and could not be read again."""
    run = Run(tmp_path / "run", {"name": "tiny"})
    run.bind("stream", [list(task.class_names) for task in TASKS])
    trainer = trainer_of(tmp_path, None, run=run)
    first, second = TASKS[:2]
    trainer.learn(first)
    with pytest.raises(ValueError, match=r"task-01 has not been measured yet.*evaluate_seen\(\) after each learn"):
        trainer.learn(second)
    trainer.evaluate_seen()
    trainer.learn(second)
    trainer.evaluate_seen()
    run.close()
    assert [len(entry["row"]) for entry in read_ledger(tmp_path / "run")["entries"]["student"]] == [1, 2]


# ---- evaluate() and predict() ----


def test_a_loaded_model_is_measured_before_a_task_is_learnt(tmp_path: Path) -> None:
    trainer_of(tmp_path, TASKS, model=(model := model_of("coda"))).train()
    model.save_pretrained(tmp_path / "model")
    trainer = trainer_of(tmp_path, model=CDLForImageClassification.from_pretrained(str(tmp_path / "model")))
    logits, labels = by_hand(model, TASKS[0].test)
    assert trainer.evaluate(TASKS[0].test) == {"eval_accuracy": 100 * float(np.mean(logits.argmax(-1) == labels))}
    with pytest.raises(ValueError, match=r"No task has been learnt yet; give it one first: learn\(task\)"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="knows no class yet that evaluate could measure"):
        trainer_of(tmp_path).evaluate(TASKS[0].test)


class Unlabelled(Pictures):
    def __getitem__(self, key: Any) -> dict[str, Any]:
        return {"pixel_values": super().__getitem__(key)["pixel_values"]}


def test_predict_gives_logits_over_all_classes_in_the_order_of_the_dataset(tmp_path: Path) -> None:
    """For 24 images in batches of 7, the last of 3 even if training drops partial ones; whatever task is newest."""
    trainer = trainer_of(tmp_path, TASKS, dataloader_drop_last=True)
    trainer.train()
    mode, lines = trainer.model.training, len(trainer.state.log_history)
    for task in TASKS:
        logits, labels = by_hand(trainer.model, task.test)
        found: Any = trainer.predict(task.test)
        assert found.__class__ is PredictionOutput and found.predictions.shape == (len(task.test), 5)
        np.testing.assert_allclose(found.predictions, logits, atol=1e-5)
        np.testing.assert_array_equal(found.label_ids, labels)
        assert found.metrics["test_accuracy"] == trainer.evaluate(task.test)["eval_accuracy"]
        assert "test_loss" not in found.metrics and found.metrics["test_samples_per_second"] > 0
    trainer.model.train(mode)
    assert len(trainer.state.log_history) == lines
    bare = trainer.predict(Unlabelled(range(3)), metric_key_prefix="now")
    assert bare.label_ids is None and {name.split("_")[0] for name in bare.metrics or {}} == {"now"}
    np.testing.assert_allclose(bare.predictions, by_hand(trainer.model, TASKS[0].test)[0], atol=1e-5)
    with pytest.raises(ValueError, match="The dataset has the label 5, but the model's lie between 0 and 4"):
        trainer.predict(Pictures(range(4, 8)))


class Numbered(torch.utils.data.Dataset):
    """A number of different images of three classes."""

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return {"pixel_values": self.images[key], "labels": key % 3}


def predict_all(folder: Path) -> None:
    """In one of two processes: predictions and metrics of datasets that do not fill both processes' batches."""
    model = CDLForImageClassification.from_pretrained(str(folder / "model"))
    trainer = trainer_of(folder, model=model, compute_metrics=recall_of_each_class)
    for count in (1, 13, 15, 28):
        found = trainer.predict(Numbered(count))
        np.save(folder / f"{count}-{os.environ['RANK']}.npy", found.predictions)
        metrics = {name: value for name, value in (found.metrics or {}).items() if "second" not in name}
        metrics.pop("test_runtime")
        (folder / f"{count}-{os.environ['RANK']}.json").write_text(json.dumps(metrics))


@pytest.mark.slow
def test_two_processes_predict_in_the_order_of_the_dataset(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, TASKS, compute_metrics=recall_of_each_class)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "model")
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29557", __file__, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for count in (1, 13, 15, 28):
        logits, labels = by_hand(trainer.model, data := Numbered(count))
        want = trainer.predict(data).metrics or {}
        for rank in range(2):
            np.testing.assert_allclose(np.load(tmp_path / f"{count}-{rank}.npy"), logits, atol=1e-5)
            found = json.loads((tmp_path / f"{count}-{rank}.json").read_text())
            assert found == pytest.approx({name: want[name] for name in found}), (count, rank)
            assert {"test_accuracy", "test_recall", "test_classes"} == {*found}


# ---- other methods of Trainer ----


def test_every_argument_and_method_of_trainer_s_is_there_or_refused_by_name(tmp_path: Path) -> None:
    theirs = {*inspect.signature(Trainer).parameters}
    ours = {*inspect.signature(CDLTrainer).parameters}
    assert theirs - ours == {*KEYWORDS}, "what is new in transformers is to be used or refused"
    for name in KEYWORDS:
        with pytest.raises(ValueError, match=f"{name} is not an argument of CDLTrainer: "):
            trainer_of(tmp_path, **{name: None})
    trainer = trainer_of(tmp_path)
    for name in METHODS:
        assert hasattr(Trainer, name)
        with pytest.raises(ValueError, match=f"{name} is not a method of CDLTrainer: "):
            getattr(trainer, name)()
    with pytest.raises(TypeError, match="no argument 'train_datset'; did you mean 'train_dataset'"):
        trainer_of(tmp_path, train_datset=TASKS)
    with pytest.raises(TypeError, match="no argument 'processor'; it has model, args, .*processing_class"):
        trainer_of(tmp_path, processor=None)


def test_a_saved_model_is_one_that_can_be_loaded(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    trainer = trainer_of(tmp_path, TASKS[:1], processing_class=processor)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = CDLForImageClassification.from_pretrained(str(tmp_path / "saved"))
    ours, theirs = (by_hand(model, TASKS[0].test)[0] for model in (trainer.model, loaded))
    np.testing.assert_array_equal(ours, theirs)
    assert (tmp_path / "saved" / "preprocessor_config.json").is_file()


# ---- transformers' own arguments ----


def plain(folder: Path, **fields: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **fields)


def spelt_out(folder: Path, **fields: Any) -> CDLTrainingArguments:
    """transformers' defaults, as explicit CDLTrainingArguments."""
    theirs = {"learning_rate": 5e-5, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    theirs |= {"max_grad_norm": 1.0, "lr_scheduler_type": "linear", "save_strategy": "steps", "data_seed": None}
    theirs |= {} if fields.get("logging_strategy", "steps") != "steps" else {"logging_steps": 500}
    theirs |= {} if "max_steps" in fields else {"num_train_epochs": 3.0}
    return CDLTrainingArguments(str(folder), use_cpu=True, **{**theirs, **fields})


CASES: list[dict[str, Any]] = [
    {},
    {"max_steps": 4},
    {"logging_strategy": "epoch", "learning_rate": 0.01},
    {"num_train_epochs": 2, "per_device_train_batch_size": 5, "weight_decay": 0.1, "seed": 7},
    {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine", "warmup_steps": 2, "data_seed": 3},
    {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01, "logging_steps": 1, "bf16": True},
]


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(fields) or "defaults")
def test_transformers_own_arguments_train_as_they_say(fields: dict[str, Any], tmp_path: Path) -> None:
    """Every field has the same effect as in CDLTrainingArguments; unset fields have transformers' defaults."""
    runs = []
    for args in (plain(tmp_path, **fields), spelt_out(tmp_path, **fields)):
        before = dict(args.__dict__)
        torch.manual_seed(0)
        trainer = CDLTrainer(model_of("coda"), args, train_dataset=TASKS[:1])
        trainer.train()
        assert {**args.__dict__, "_n_gpu": before["_n_gpu"]} == before, "what is given stays as it was"
        runs.append((trainer.model.state_dict(), [line.get("learning_rate") for line in trainer.state.log_history]))
    (ours, rates), (theirs, wanted) = runs
    assert rates == wanted and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_all_that_transformers_arguments_can_say_is_taken_over(tmp_path: Path) -> None:
    """One field at a time set to a non-default value, if that is allowed for the field alone."""
    values: dict[str, Any] = {
        "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 0.1, "weight_decay": 0.2, "learning_rate": 0.3,
        "max_grad_norm": 0.4, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 5, "num_train_epochs": 9,
        "gradient_accumulation_steps": 4, "logging_steps": 7, "logging_first_step": True, "save_total_limit": 2,
        "seed": 11, "data_seed": 12, "dataloader_drop_last": True, "dataloader_num_workers": 1,
        "train_sampling_strategy": "sequential", "full_determinism": False, "disable_tqdm": True, "log_level": "error",
    }  # fmt: skip
    args = CDLTrainingArguments.of(plain(tmp_path, **values))
    assert {name: getattr(args, name) for name in values} == values
    with pytest.raises(ValueError, match="push_to_hub is True.* label_names is"):
        CDLTrainingArguments.of(plain(tmp_path, label_names=["x"], push_to_hub=True))


def test_a_progress_bar_stays_as_it_was_set_at_every_log_level(tmp_path: Path) -> None:
    """transformers derives the field from its log level, so a set value may look like the default."""
    before = hf_logging.get_verbosity()
    try:
        for level in (logging.ERROR, logging.INFO):
            hf_logging.set_verbosity(level)
            for disabled in (True, False):
                assert CDLTrainingArguments.of(plain(tmp_path, disable_tqdm=disabled)).disable_tqdm is disabled
    finally:
        hf_logging.set_verbosity(before)


@pytest.mark.parametrize(
    "fields",
    [
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_what_transformers_arguments_derive_is_not_asked_for(fields: dict[str, Any], tmp_path: Path) -> None:
    args = plain(tmp_path, eval_strategy="epoch", save_strategy="epoch", num_train_epochs=1, **fields)
    trainer = CDLTrainer(model_of("coda"), args, train_dataset=TASKS[:1], eval_dataset=Pictures(range(3)))
    trainer.train()
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("accuracy", True)
    with pytest.raises(ValueError, match="metric_for_best_model is 'recall'"):
        CDLTrainingArguments.of(plain(tmp_path, **{**fields, "metric_for_best_model": "recall"}, **EPOCHS))
    with pytest.raises(ValueError, match="greater_is_better is false"):
        found = {**fields, "metric_for_best_model": "accuracy", "greater_is_better": False}
        CDLTrainingArguments.of(plain(tmp_path, **found, **EPOCHS))


if __name__ == "__main__":
    predict_all(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # its threads could abort the process at its end
