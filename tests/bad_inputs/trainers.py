"""Mistaken uses of trainers, their arguments and terms in Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoImageProcessor,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from bad_inputs.models import INF, NAN, begun, fresh
from bad_inputs.parts import GONE, Parts
from bad_inputs.runner import WAY, Row, rows
from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, StreamConfig, TaskStream
from hf_cdl.distill import TERMS, Objective
from hf_cdl.types import ModelShape, Task


def call(name: str, act: Callable[[Parts], Any], *says: str) -> Row:
    def make(parts: Parts) -> Callable[[], Any]:
        Path("work").mkdir()  # as every Trainer does
        Path("names.txt").write_text("cat\ndog\n")
        return lambda: act(parts)

    return Row(name, make, says, WAY)


def stream(parts: Parts, **fields: Any) -> TaskStream:
    return TaskStream(
        StreamConfig(path=str(parts.data), classes_per_task=2),
        AutoImageProcessor.from_pretrained(parts.student),
        **fields,
    )


def first_split(parts: Parts) -> Any:
    return stream(parts)[0].train


def trainer(parts: Parts, args: Any = None, learnt: bool = False, **fields: Any) -> CDLTrainer:
    args = args or CDLTrainingArguments("work", use_cpu=True, num_train_epochs=1, report_to="none")
    made = CDLTrainer(fresh(parts), args, **fields)
    if learnt:
        made.learn(stream(parts)[0])
    return made


def made(name: str, fields: dict[str, Any], *says: str) -> Row:
    return call(f"a trainer with {name}", lambda parts: trainer(parts, **fields), *says)


def asked(name: str, act: Callable[[CDLTrainer, Parts], Any], *says: str, learnt: bool = False) -> Row:
    return call(f"a trainer that {name}", lambda parts: act(trainer(parts, learnt=learnt), parts), *says)


def configured_term(kind: str, says: str, **fields: Any) -> Row:
    return call(f"the term {kind} of {fields}", lambda parts: TERMS[kind].config_class(**fields), kind, says)


def launched(variable: str, value: str, *says: str) -> Row:
    """Training arguments in the environment of `accelerate launch`."""

    def act(parts: Parts) -> None:
        os.environ[variable] = value
        CDLTrainingArguments("work", use_cpu=True)

    return call(f"arguments beside {variable}={value}", act, variable, *says)


def sharded_by(**fields: Any) -> Callable[[Parts], Any]:
    args = {"use_cpu": True, "report_to": "none", "shard_teacher": True}
    return lambda parts: trainer(parts, CDLTrainingArguments("work", **args), **fields)


def two_gpus(parts: Parts) -> None:
    args = CDLTrainingArguments("work", use_cpu=True, report_to="none")
    args._n_gpu = 2  # what transformers counts where two are visible to one process
    trainer(parts, args).learn(stream(parts)[0])


class Mine(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = True


def class_means(parts: Parts) -> CDLForImageClassification:
    return CDLForImageClassification.from_backbone(parts.student, head={"type": "ncm"})


def foreign_callback(parts: Parts) -> None:
    args = CDLTrainingArguments("work", use_cpu=True, eval_strategy="epoch", report_to="none")
    made = trainer(parts, args)
    made.add_callback(Mine())
    made.learn(stream(parts)[0])


def late_evaluation(parts: Parts, **fields: Any) -> None:
    once = {"use_cpu": True, "num_train_epochs": 1, "report_to": "none", **fields}
    trainer(parts, CDLTrainingArguments("work", **once)).learn(stream(parts)[0])


def evaluated_on(parts: Parts, of: Callable[[Any], Any]) -> None:
    """A trainer that stops early on a user's own dataset."""
    args = CDLTrainingArguments("work", use_cpu=True, eval_strategy="epoch", early_stopping_patience=1)
    task = stream(parts)[0]
    trainer(parts, args, eval_dataset=of(task)).learn(task)


def labelled(split: Any, place: int, label: Any) -> list[dict[str, Any]]:
    """The items of a split as a list, one of them with another label; GONE: without any."""
    items = [split[index] for index in range(len(split))]
    items[place] = {**items[place], "labels": label}
    if label is GONE:
        del items[place]["labels"]
    return items


class Lazy:
    """Items of a user's own dataset, with views."""

    def __init__(self, items: list[dict[str, Any]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return self.items[key[0] if isinstance(key, tuple) else key]


def relabelled(task: Task, place: int, label: Any) -> Task:
    return replace(task, train=Lazy(labelled(task.train, place, label)))


def ignorant_teacher(parts: Parts) -> None:
    student, teacher = fresh(parts), fresh(parts)
    term = TERMS["kd"](TERMS["kd"].config_class(), student.shape, teacher.shape)
    args = CDLTrainingArguments("work", use_cpu=True)
    CDLTrainer(student, args, Objective(0.5, [("kd", term)]), teacher, train_dataset=stream(parts)).train()


def plain() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


def taught_by(parts: Parts, teacher: Any) -> CDLTrainer:
    student = fresh(parts)
    return trainer(parts, objective=named_for(student.shape, "kd"), teacher=teacher)


def measured_by(parts: Parts, compute_metrics: Any) -> None:
    made = trainer(parts, learnt=True, compute_metrics=compute_metrics)
    made.evaluate(stream(parts)[0].test)


def beside(parts: Parts, images: Any = GONE, terms: str = "", ratio: int = 1) -> None:
    """Learn a task with these unlabelled images, by default its own, and this term."""
    student, teacher, task = fresh(parts), fresh(parts), stream(parts)[0]
    teacher.begin_task(task.class_names)
    kind = TERMS[terms] if terms else None
    named_terms = [(terms, kind(kind.config_class(), student.shape, teacher.shape))] if kind else []
    args = CDLTrainingArguments("work", use_cpu=True, num_train_epochs=1, report_to="none")
    taught = CDLTrainer(student, args, Objective(1.0, named_terms), teacher if kind else None)
    taught.learn(replace(task, unlabelled=task.train if images is GONE else images, unlabelled_ratio=ratio))


def named(*names: Any) -> Objective:
    return named_for(ModelShape(8, 3), *names)


def named_for(shape: ModelShape, *names: Any) -> Objective:
    return Objective(0.5, [(name, TERMS["kd"](TERMS["kd"].config_class(), shape, shape)) for name in names])


def listed_names(parts: Parts) -> None:
    with open("names.txt") as file:
        fresh(parts).begin_task(file)  # type: ignore[arg-type]


TRAINERS = [
    made("a role that is misspelt", {"role": "techer"}, "techer", "did you mean 'teacher'"),
    made("a baseline that is misspelt", {"role": "linear_haed"}, "linear_haed", "did you mean 'linear_head'"),
    made("a split that is misspelt", {"eval_split": "vali"}, "vali", "validation"),
    made("a negative number of tasks", {"num_tasks": -3}, "num_tasks"),
    made("a share of tasks", {"num_tasks": 1.5}, "num_tasks"),
    made(
        "arguments of another kind", {"args": Seq2SeqTrainingArguments("work", use_cpu=True)}, "CDLTrainingArguments"
    ),
    made("a number for an objective", {"objective": 0.5}, "objective"),
    made("a word for a teacher", {"teacher": "dino"}, "teacher"),
    call(
        "a trainer with a teacher that nothing asks",
        lambda parts: trainer(parts, teacher=fresh(parts)),
        "teacher",
        "leave the teacher out",
    ),
    call(
        "a trainer with a weight of the cross-entropy that no loss reads",
        lambda parts: CDLTrainer(class_means(parts), CDLTrainingArguments("work", use_cpu=True), Objective(0.5)),
        "objective",
        "no effect",
    ),
    asked("measures before it learnt", lambda made, parts: made.evaluate(), "learn"),
    asked("measures the tasks before it learnt", lambda made, parts: made.evaluate_seen(), "learn"),
    asked("learns None", lambda made, parts: made.learn(None), "None", "Task|tasks"),  # type: ignore[arg-type]
    asked("learns a stream", lambda made, parts: made.learn(stream(parts)), "TaskStream"),  # type: ignore[arg-type]
    asked("answers nothing", lambda made, parts: made.answer([]), "empty"),
    asked("measures a number", lambda made, parts: made.evaluate(5), "int", learnt=True),
    asked("measures a dict", lambda made, parts: made.evaluate({}), "dict", learnt=True),
    asked(
        "measures classes that it does not know",
        lambda made, parts: made.evaluate(stream(parts)[1].test),
        "label",
        learnt=True,
    ),
    asked("predicts a number", lambda made, parts: made.predict(5), "int", "predict", learnt=True),
    asked(
        "predicts classes that it does not know",
        lambda made, parts: made.predict(stream(parts)[1].test),
        "label",
        learnt=True,
    ),
    *(
        asked(
            f"{taker}s the label {label!r} at {place}",
            lambda made, parts, taker=taker, label=label, place=place: getattr(made, taker)(
                labelled(stream(parts)[0].test, place, label)
            ),
            "label",
            repr(label),
            type(label).__name__,
            "0 to 1",
            learnt=True,
        )
        for taker in ("evaluate", "predict")
        for label in ("cat", 0.5, None, True)
        for place in (0, 2)
    ),
    asked(
        "measures a label in the middle that is unknown",
        lambda made, parts: made.evaluate(labelled(stream(parts)[0].test, 2, 7)),
        "label 7",
        "0 and 1",
        learnt=True,
    ),
    asked(
        "predicts labels of some items",
        lambda made, parts: made.predict(labelled(stream(parts)[0].test, 2, GONE)),
        "some items",
        "none",
        learnt=True,
    ),
    *(
        asked(
            f"learns the label {label!r} at {place}",
            lambda made, parts, label=label, place=place: made.learn(relabelled(stream(parts)[0], place, label)),
            "label",
            "task-01.train" if place == 0 else "The dataset",
            "0 to 1|0 and 1",
        )
        for label in ("cat", 0.5, None, True, 3, -1)
        for place in (0, 2)
    ),
    asked(
        "learns a list of items",
        lambda made, parts: made.learn(replace(stream(parts)[0], train=labelled(stream(parts)[0].test, 0, 0))),
        "task-01.train",
        "list",
    ),
    asked("predicts before it learnt", lambda made, parts: made.predict(stream(parts)[0].test), "learn", "predict"),
    asked(
        "measures without a key",
        lambda made, parts: made.evaluate(stream(parts)[0].test, ignore_keys=["query"]),
        "ignore_keys",
        learnt=True,
    ),
    asked("trains on nothing", lambda made, parts: made.train(), "train_dataset", "TaskStream"),
    made("a plain dataset to train on", {"train_dataset": [{"pixel_values": 1, "labels": 0}]}, "list", "TaskStream"),
    made("an empty list to train on", {"train_dataset": []}, "empty list", "TaskStream"),
    call(
        "a trainer with tasks in another order",
        lambda parts: trainer(parts, train_dataset=[*stream(parts)][::-1]),
        "train_dataset",
        "order",
    ),
    call(
        "a trainer that resumes what nothing stored",
        lambda parts: trainer(parts, train_dataset=stream(parts)).train(resume_from_checkpoint=True),
        "resume_from_checkpoint",
        "run",
    ),
    call(
        "a trainer that resumes a folder",
        lambda parts: trainer(parts, train_dataset=stream(parts)).train(resume_from_checkpoint="work/checkpoint-3"),
        "resume_from_checkpoint",
    ),
    call(
        "a trainer with a trial",
        lambda parts: trainer(parts, train_dataset=stream(parts)).train(trial={"learning_rate": 1}),
        "trial",
    ),
    call(
        "a trainer of a plain classifier",
        lambda parts: CDLTrainer(plain(), CDLTrainingArguments("work", use_cpu=True)),
        "ViTForImageClassification",
        "from_backbone",
    ),
    call("a teacher that cannot be asked", lambda parts: taught_by(parts, nn.Linear(3, 3)), "Linear", "pixel_values"),
    made("a run's folder for the run", {"run": "folder"}, "run", "folder", "Run"),
    made("a processor that cannot be saved", {"processing_class": object()}, "processing_class", "save_pretrained"),
    made("a callback that is not in a list", {"callbacks": TrainerCallback()}, "callbacks", "list"),
    made("a callback that is none", {"callbacks": [print]}, "callbacks", "TrainerCallback"),
    call(
        "a fitted head beside what follows a loss",
        lambda parts: CDLTrainer(
            class_means(parts), CDLTrainingArguments("work", use_cpu=True, eval_strategy="epoch"), callbacks=[Mine()]
        ),
        "no loss",
        "eval_strategy and callbacks",
    ),
    call(
        "what is stored without a run",
        lambda parts: trainer(parts, CDLTrainingArguments("work", use_cpu=True, save_strategy="steps", save_steps=3)),
        "save_steps",
        "run=Run",
    ),
    made("a word to evaluate on", {"eval_dataset": "nonsense"}, "eval_dataset", "nonsense"),
    *(
        call(
            f"metrics that give {wrong!r}",
            lambda parts, wrong=wrong: measured_by(parts, lambda found: wrong),
            "compute_metrics",
            "dict",
        )
        for wrong in (None, 0.5, {1: 0.5}, {"recall": "high"}, {"recall": [0.5, 1.0]})
    ),
    made("metrics that are none", {"compute_metrics": "accuracy"}, "compute_metrics", "EvalPrediction"),
    *(
        made(f"transformers' {name}", {name: object()}, name)
        for name in (
            *("data_collator", "model_init", "compute_loss_func", "optimizers", "optimizer_cls_and_kwargs"),
            "preprocess_logits_for_metrics",
        )
    ),
    *(
        asked(f"is asked for {name}", lambda made, parts, name=name: getattr(made, name)(), name)
        for name in ("hyperparameter_search", "push_to_hub", "create_model_card", "evaluation_loop", "prediction_step")
    ),
    call(
        "a trainer with images for evaluation in a dict",
        lambda parts: evaluated_on(parts, lambda task: {"a": task.test}),
        "eval_dataset",
        "dict",
    ),
    call(
        "a stop by test images that are given",
        lambda parts: evaluated_on(parts, lambda task: task.test),
        "eval_dataset",
    ),
    call("a teacher that knows less than its student", ignorant_teacher, "teacher", "0 classes"),
    call(
        "transformers' arguments with a field of no effect",
        lambda parts: trainer(parts, TrainingArguments("work", use_cpu=True, label_names=["x"])),
        "label_names",
    ),
    call(
        "transformers' arguments that go by a loss",
        lambda parts: trainer(
            parts,
            TrainingArguments(
                "work", use_cpu=True, eval_strategy="epoch", save_strategy="best", metric_for_best_model="loss"
            ),
        ),
        "metric_for_best_model",
        "accuracy",
    ),
    call(
        "a trainer that measures images that are missing",
        lambda parts: trainer(parts, eval_split="validation").learn(stream(parts)[0]),
        "eval_split",
        "validation",
    ),
    call("a callback of one's own that could stop by test images", foreign_callback, "Mine", "validation"),
    call(
        "an evaluation after the last epoch",
        lambda parts: late_evaluation(parts, eval_strategy="epoch", eval_delay=2),
        "eval_delay",
    ),
    call(
        "an evaluation after the last step",
        lambda parts: late_evaluation(parts, eval_strategy="steps", eval_steps=1, eval_delay=500),
        "eval_delay",
    ),
    call("unlabelled images that nothing learns from", lambda parts: beside(parts), "unlabelled", "no term"),
    call("no unlabelled images", lambda parts: beside(parts, [], "pseudo_labels"), "task-01.unlabelled", "no images"),
    call("a share of unlabelled images", lambda parts: beside(parts, terms="kd", ratio=0), "unlabelled_ratio"),
    call("pseudo-labels of nothing", lambda parts: beside(parts, None, "pseudo_labels"), "pseudo_labels"),
    configured_term("pseudo_labels", "threshold", threshold=1.2),
    call("an objective of no weight", lambda parts: trainer(parts, None, True, objective=Objective(0.0)), "ce_weight"),
    call("an objective of a word", lambda parts: Objective("1"), "ce_weight"),  # type: ignore[arg-type]
    *(
        call(f"an objective with a term named {name!r}", lambda parts, name=name: named(name), repr(name), "'kd'")
        for name in ("loss", "ce", "prompt", "training", "", 3, "a.b")
    ),
    call("an objective with two terms of one name", lambda parts: named("kd_2", "kd", "kd"), "kd_2", "another name"),
    call("an objective of a class", lambda parts: Objective(1.0, [("kd", TERMS["kd"])]), "kd"),  # type: ignore[list-item]
    call("an image for a role that is misspelt", lambda parts: first_split(parts).seen_by("teahcer"), "teahcer"),
    call(
        "a processor of a role that is misspelt",
        lambda parts: TaskStream(StreamConfig(path=str(parts.data)), {"studnt": object()}),  # type: ignore[dict-item]
        "studnt",
    ),
    configured_term("kd", "temperature", temperature=NAN),
    configured_term("kd", "temperature", temperature="2"),
    configured_term("kd", "weight", weight=INF),
    configured_term("kd", "weight", weight=True),
    configured_term("kd", "standardise", standardise="no"),
    configured_term("dkd", "beta", beta=NAN),
    configured_term("dist", "beta", beta=NAN),
    configured_term("dual_path", "lambda_y", lambda_y=NAN),
    configured_term("dual_path", "beta_o", beta_o=NAN),
    configured_term("dual_path", "head_init", head_init="x"),
    configured_term("dual_path", "copy_rate", copy_rate=NAN),
    configured_term("dual_path", "warmup_steps", warmup_steps=1.5),
    launched("ACCELERATE_MIXED_PRECISION", "bf16", "bf16", "recipe"),
    launched("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    launched("ACCELERATE_USE_FSDP", "true", "fsdp", "shard_teacher"),
    launched("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed", "shard_teacher"),
    call("a teacher shared out to one process", sharded_by(role="teacher"), "shard_teacher", "accelerate launch"),
    call("a trainer that shares out no teacher", sharded_by(), "shard_teacher", "no teacher"),
    call("a trainer that sees two GPUs in one process", two_gpus, "2 GPUs", "accelerate launch --num_processes 2"),
    launched("ACCELERATE_DYNAMO_BACKEND", "EAGER", "torch_compile"),
    call("begin_task of an open file", listed_names, "TextIOWrapper", "list"),
    begun("one name in two ways of Unicode's", ["\u00e9", "e\u0301"], "\u00e9"),
]

ROWS = rows("trainer", TRAINERS)
