"""Sessions after the first: what learns goes on learning under a fitted head, whose sums follow the features."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import killed_and_taken, make_recipe, train, write_recipe
from safetensors.torch import load_file
from test_contract import SMALL, Pictures, arguments, images, stream, vit
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.commands.settings_without_effect import without_sessions
from hf_cdl.distill import TERMS, Objective
from hf_cdl.heads.drift import fit_drift
from hf_cdl.prompts import PROMPTS
from hf_cdl.training.sharding import check_shardable
from hf_cdl.types import Task

HEAD = {"type": "ridge", "standardise": "first_task", "strength": 10.0}
FIRST = {"type": "linear", "standardise": "first_task"}
STEPS: dict[str, Any] = {
    "num_train_epochs": CDLTrainingArguments.num_train_epochs,
    "per_device_train_batch_size": 8,
}
LEARNS: dict[str, dict[str, Any]] = {
    **{method: {"prompt": {"type": method, **SMALL.get(method, {})}} for method in PROMPTS},
    "kd_prompt": {"prompt": {"type": "coda", **SMALL["coda"]}, "kd_prompt": {"length": 4}},
    "lora": {"lora": {"r": 2}},
    "backbone": {"train_backbone": True},
}


def model_of(learns: str, width: int = 32, head: dict[str, Any] = HEAD, **later: Any) -> Any:
    set_seed(1)
    config = CDLConfig(
        backbone_config=vit(width), head=head, first_session=FIRST, later_sessions=later, **LEARNS[learns]
    )
    return CDLForImageClassification(config)


def pixels_and_labels(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    items = [task.train[i] for i in range(len(task.train))]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


def features_of(model: Any, task: Task) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixels_and_labels(task)[0]).features.double()


def anchors_of(model: Any, task: Task) -> torch.Tensor:
    """Prepared features of the images as they are and in the first three views after the epochs that train."""
    data, images = task.train, range(len(task.train))
    keys = [*images, *((index, 4 + view) for view in range(3) for index in images)]  # there are 4 epochs
    with torch.no_grad():
        features = model.eval()(torch.stack([data[key]["pixel_values"] for key in keys])).features
    return model.head.prepare(features)


def trained(folder: Path, model: Any, **options: Any) -> CDLTrainer:
    trainer = CDLTrainer(model, arguments(folder, **{"learning_rate": 1e-3, **options}))
    for task in stream():
        trainer.learn(task)
    return trainer


@pytest.mark.parametrize("learns", LEARNS)
def test_what_learnt_goes_on_and_the_newest_sums_are_exact(learns: str, tmp_path: Path) -> None:
    """The sums are those of the second task's images under the final features, beside the moved ones of the first."""
    model = model_of(learns)
    trainer = CDLTrainer(model, arguments(tmp_path, learning_rate=1e-2))
    first, second = stream()
    trainer.learn(first)
    before, sums = features_of(model, first), {name: value.clone() for name, value in model.head.numbers().items()}
    trainer.learn(second)
    after, new = features_of(model, first), features_of(model, second)
    assert not torch.allclose(before, after, atol=1e-4), "something learnt"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    mapped = model.head.prepare(new.float()).double()
    moved = model.head.numbers()["gram"] - mapped.T @ mapped
    assert not torch.allclose(moved, sums["gram"], atol=1e-3)
    labels = pixels_and_labels(second)[1] - second.first_class
    want = torch.zeros(len(second.class_names), mapped.shape[1]).double().index_add(0, labels, mapped)
    torch.testing.assert_close(model.head.numbers()["blocks.1.total"], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("learns", ["coda", "lora"])
def test_the_sums_move_as_the_features_of_the_task_did(learns: str, tmp_path: Path) -> None:
    sums = {}
    for drift in ("linear", "none"):
        model = model_of(learns, drift=drift)
        trainer = CDLTrainer(model, arguments(tmp_path / drift, learning_rate=1e-2))
        first, second = stream()
        trainer.learn(first)
        total, count = model.head.numbers()["blocks.0.total"].clone(), model.head.blocks[0].count.clone()
        was = anchors_of(model, second)
        trainer.learn(second)
        moved = fit_drift(was, anchors_of(model, second), pixels_and_labels(second)[1].repeat(4))
        sums[drift] = model.head.numbers()["blocks.0.total"].clone()
        want = moved.sums(total, count) if drift == "linear" else total
        torch.testing.assert_close(sums[drift], want, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(sums["linear"], sums["none"], atol=1e-2)


def test_a_session_that_changes_nothing_leaves_the_joint_solution(tmp_path: Path) -> None:
    model = model_of("lora")
    trainer = trained(tmp_path, model, learning_rate=1e-30)
    x = torch.cat([model.head.prepare(features_of(model, task).float()).double() for task in stream()])
    labels = torch.cat([pixels_and_labels(task)[1] for task in stream()])
    y = torch.nn.functional.one_hot(labels).double()
    weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y)
    solved = torch.cat([value for name, value in model.head.numbers().items() if name.endswith("weight")])
    torch.testing.assert_close(solved.double().T, weight, atol=1e-6, rtol=1e-5)
    assert trainer.model is model


def test_keep_holds_the_features(tmp_path: Path) -> None:
    far = []
    for keep in (0.0, 100.0):
        model = model_of("lora", keep=keep)
        trainer = CDLTrainer(model, arguments(tmp_path / str(keep), learning_rate=1e-2))
        first, second = stream()
        trainer.learn(first)
        before = features_of(model, second)  # the session sees these images
        trainer.learn(second)
        far.append(float((features_of(model, second) - before).norm()))
        lines = [line for line in trainer.state.log_history if "loss/ce" in line]
        assert all(("loss/keep" in line) == (keep > 0) for line in lines) and lines
    assert far[1] < 0.5 * far[0]


KEPT = {"task": slice(0, 8), "unlabelled": slice(8, None), "both": slice(None)}
"""Of batches of 8 images and the 16 unlabelled ones beside them."""


@pytest.mark.parametrize("keep_on", KEPT)
def test_keep_holds_the_features_of_the_images_it_is_told_of(keep_on: str, tmp_path: Path) -> None:
    """A teacher, which no term shows unlabelled images, trains on them where their features are held."""
    others: Any = Pictures(range(5, 8))
    first, second = (replace(task, unlabelled=others, unlabelled_ratio=2) for task in stream())
    model = model_of("lora", keep=2.0, keep_on=keep_on, anchors="both")
    trainer = CDLTrainer(model, arguments(tmp_path, max_steps=2), role="teacher")
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda own, _, given: sizes.append(len(given["pixel_values"])) if own.training else None, with_kwargs=True
    )
    for task in (first, second):
        trainer.learn(task)
    assert sizes == [8, 8, *[8 if keep_on == "task" else 24] * 2]

    session: Any = model.later_session(2)
    model.begin_task(["x", "y"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    pixels = torch.stack([others[number]["pixel_values"] for number in range(24)])
    now, rows = model.eval()(pixel_values=pixels), KEPT[keep_on]
    with torch.no_grad():
        was = session.before(pixel_values=pixels[rows]).features
    kept = session.with_keep({"loss": torch.tensor(1.0)}, now, pixels, 8, nullcontext)
    want = torch.nn.functional.mse_loss(model.head.standard(now.features[rows]), model.head.standard(was))
    assert want > 1e-3
    torch.testing.assert_close(kept["keep"], want)
    torch.testing.assert_close(kept["loss"], 1 + 2 * want)
    (gradient,) = torch.autograd.grad(kept["keep"], now.features)
    moves = gradient.abs().sum(dim=1) > 0
    assert moves[rows].all() and moves.sum() == len(was)


def test_the_rate_is_that_of_later_sessions(tmp_path: Path) -> None:
    model = model_of("lora", rate=0.1)
    trainer = CDLTrainer(model, arguments(tmp_path, learning_rate=1e-3, lr_scheduler_type="constant"))
    rates: list[Counter[float]] = []
    for task in stream():
        trainer.learn(task)
        rates.append(Counter())
        optimizer: Any = trainer.optimizer
        for group in optimizer.param_groups:
            rates[-1][group["lr"]] += len(group["params"])
    assert {*rates[0]} == {1e-3}
    assert {*rates[1]} == {1e-3, 1e-4} and rates[1][1e-3] == 2, "the session's own head keeps the full rate"


def test_no_session_beyond_the_last_one(tmp_path: Path) -> None:
    model = model_of("coda", until=2)
    assert [model.trains(task) for task in range(4)] == [True, True, False, False]
    trained(tmp_path, model)
    assert len(model.pool.blocks) == 2
    model.begin_task(["x", "y"])
    assert model.session_head is None and len(model.pool.blocks) == 2
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tasks_without_a_later_session_are_named() -> None:
    """One task has none, nor have those after the last."""
    tasks, models = [*stream()], {"teacher": model_of("coda", until=2), "student": model_of("coda")}
    assert not [*without_sessions(tasks, models)]
    (teacher, student) = without_sessions(tasks[:1], models)
    assert teacher.startswith("teacher.later_sessions has no effect on 1 task") and student.startswith("student.")
    (teacher,) = without_sessions([replace(tasks[1], index=2)], models)
    assert teacher.startswith("teacher.later_sessions")


def test_anchors_are_views_that_no_step_has_trained_on(tmp_path: Path) -> None:
    """Of a phase that is given by its steps, too: two an epoch."""
    trainer, task = CDLTrainer(model_of("coda"), arguments(tmp_path, max_steps=9, **STEPS)), next(stream())
    asked: list[Any] = []
    images = type("Asked", (), {"__len__": lambda _: len(task.train), "__getitem__": lambda _, key: pick(key)})()

    def pick(key: Any) -> Any:
        asked.append(key)
        return task.train[key]

    epochs = -(-9 // -(-len(task.train) // STEPS["per_device_train_batch_size"]))
    assert len([*trainer._anchors(replace(task, train=images))]) > 0
    assert {key[1] for key in asked if isinstance(key, tuple)} == {epochs, epochs + 1, epochs + 2}


def test_a_teacher_teaches_in_every_session(tmp_path: Path) -> None:
    teacher, student = model_of("lora", width=48), model_of("lora")
    term = TERMS["similarity"](TERMS["similarity"].config_class(), student.shape, teacher.shape)
    teach = CDLTrainer(teacher, arguments(tmp_path / "t"), role="teacher")
    learn = CDLTrainer(student, arguments(tmp_path / "s"), Objective(0.0, [("similarity", term)]), teacher=teacher)
    steps = []
    for task in stream():
        teach.learn(task)
        learn.learn(task)
        steps.append(len([line for line in learn.state.log_history if "loss/similarity" in line]))
    assert all(steps) and len(steps) == 2


def test_a_loaded_model_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    first, second = stream()
    model = model_of("coda", keep=0.5)
    trainer = CDLTrainer(model, arguments(tmp_path))
    trainer.learn(first)
    model.save_pretrained(tmp_path / "model")
    trainer.learn(second)
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "model")
    again = CDLTrainer(loaded, arguments(tmp_path))
    again.seen.append(first)
    again.learn(second)
    want = model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images()).logits, model.eval()(images()).logits)


def test_a_changed_model_says_what_is_not_exact_any_more(tmp_path: Path) -> None:
    model = model_of("lora", head={**HEAD, "sums": "per_class"})
    trained(tmp_path, model)
    pixels, labels = pixels_and_labels(next(iter(stream())))
    names = [model.config.id2label[int(label)] for label in labels]
    with pytest.raises(ValueError, match="features moved in sessions"):
        model.correct(pixels[:1], [names[-1]], [names[0]])
    with pytest.raises(ValueError, match="features moved in sessions"):
        model.remove(names[0], pixels[[name == names[0] for name in names]])
    model.remove(names[0])
    model.add(pixels[:2], ["new", "new"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"first_session": None, "head": {"type": "linear"}}, "later_sessions continue a first session"),
        ({"later_sessions": {"until": 1}}, "until >= 2"),
        ({"later_sessions": {"keep": -1.0}}, "keep >= 0"),
        ({"later_sessions": {"keep_on": "both"}}, "keep_on is .both., but has no effect, as keep is 0"),
        ({"later_sessions": {"keep": 1.0, "keep_on": "all"}}, "keep_on"),
        ({"later_sessions": {"drift": "square"}}, "drift"),
        ({"later_sessions": {"tasks": 3}}, "tasks"),
        ({"head": {**HEAD, "soft_targets": 0.5}}, "with soft_targets the class sums are not those of images"),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], said: str) -> None:
    whole = {"head": HEAD, "first_session": FIRST, "later_sessions": {}, **LEARNS["coda"], **fields}
    with pytest.raises(ValueError, match=said):
        CDLForImageClassification(CDLConfig(backbone_config=vit(32), **whole))


def test_a_sharded_teacher_cannot_have_them() -> None:
    with pytest.raises(ValueError, match="the teacher has later_sessions"):
        check_shardable(model_of("coda"), 2, trained=True)
    check_shardable(model_of("coda"), 2)


@pytest.mark.parametrize("fields", [{"anchors": "both"}, {"keep": 0.1, "keep_on": "both"}])
def test_what_reads_unlabelled_images_needs_some(fields: dict[str, Any], tmp_path: Path) -> None:
    trainer = CDLTrainer(model_of("lora", **fields), arguments(tmp_path))
    with pytest.raises(ValueError, match=f"{[*fields][-1]} is both, but task-01 has no unlabelled images"):
        trainer.learn(next(iter(stream())))


@pytest.mark.filterwarnings("ignore:frozen_bf16 is true, but this machine:UserWarning")
@pytest.mark.parametrize("half", [False, True])
def test_the_drift_is_measured_in_the_precision_of_what_is_summed(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task's images move the sums, and are then summed: both by the same features, to the bit."""
    model, after, summed = model_of("lora", head={**HEAD, "known": 0.95}), [], []
    update, layers = model.head.update, model.head.update_layers

    def measured(before: torch.Tensor, now: torch.Tensor, labels: torch.Tensor) -> Any:
        after.append((before, now))
        return fit_drift(before, now, labels)

    monkeypatch.setattr("hf_cdl.models.sessions.fit_drift", measured)
    monkeypatch.setattr(model.head, "update", lambda x, *rest: (summed.append(x.double()), update(x, *rest)))
    monkeypatch.setattr(model.head, "update_layers", lambda x, *rest: (summed.append(x.double()), layers(x, *rest)))
    trainer = CDLTrainer(model, arguments(tmp_path, learning_rate=1e-3, frozen_bf16=half))
    first, second = stream()
    trainer.learn(first)
    was = [torch.cat(summed[0::2]), torch.cat(summed[1::2])]
    summed.clear()
    trainer.learn(second)
    now = [torch.cat(summed[0::2]), *torch.cat(summed[1::2]).unbind(1)]
    assert len(after) == len(now) == 1 + was[1].shape[1]
    images = len(now[0])  # their augmented views come after them
    assert all(torch.equal(measured[:images], sums) for (_, measured), sums in zip(after, now, strict=True))
    assert not torch.equal(*after[0]), "something learnt"


class Unlabelled:
    """Images of a task without their labels, in whose place stands one that must not be read."""

    def __init__(self, task: Task):
        self.data = task.train

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return {"pixel_values": self.data[key]["pixel_values"], "labels": 0}


def test_unlabelled_anchors_move_the_sums(tmp_path: Path) -> None:
    first, second = (replace(task, unlabelled=Unlabelled(task), unlabelled_ratio=1) for task in stream())
    model = model_of("lora", anchors="unlabelled")
    trainer = CDLTrainer(model, arguments(tmp_path, learning_rate=1e-2))
    trainer.learn(first)
    total, count = model.head.numbers()["blocks.0.total"].clone(), model.head.blocks[0].count.clone()
    was = model.head.prepare(features_of(model, second).float())
    trainer.learn(second)
    moved = fit_drift(was, model.head.prepare(features_of(model, second).float()))
    found = model.head.numbers()["blocks.0.total"]
    torch.testing.assert_close(found, moved.sums(total, count), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, total, atol=1e-2)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_teacher_is_taken_over(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, distill=[{"type": "similarity"}])
    for role in ("teacher", "student"):
        recipe[role] |= {"head": HEAD, "first_session": FIRST, "later_sessions": {"keep": 0.1, "rate": 0.5}}
    recipe["train"]["num_train_epochs"] = 6
    file, whole = write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "whole"
    for folder in killed_and_taken(file, whole, "student-task-02", "in sessions, ridge head"):
        for part in ("teacher/task-02", "student/task-01", "student/task-03"):
            ours, theirs = (load_file(place / part / "model.safetensors") for place in (folder, whole))
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), (folder.name, part)
        drift = json.loads((folder / "results.json").read_text())["roles"]["student"]["drift"]
        assert drift[0] == {} and all({*of_task} == {"change", "explained", "strength"} for of_task in drift[1:])


@pytest.mark.slow
def test_two_processes_move_what_one_does(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, teacher=None, distill=[], ce_weight=1.0)
    recipe["data"] |= {"max_train_per_class": 7, "classes_per_task": [2, 2, 2]}
    recipe["student"] |= {"head": HEAD, "first_session": FIRST, "later_sessions": {"keep": 0.1}}
    recipe["train"] |= {"optim": "sgd", "dataloader_drop_last": True}
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(file, "--output_dir", one, "--train.per_device_train_batch_size", 4)[0] == 0
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29549")
    code, output = train(file, "--output_dir", two, "--train.per_device_train_batch_size", 2, launcher=launcher)
    assert code == 0, output
    drifts = [json.loads((f / "results.json").read_text())["roles"]["student"]["drift"] for f in (one, two)]
    for ours, theirs in zip(*drifts, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-2, abs=1e-3)
