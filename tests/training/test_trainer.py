"""CDLTrainer: schedule, data order, accumulation, mixed precision, its forward passes, NaN and infinite losses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_data
from test_contract import Pictures, arguments, model_of, stream, vit
from transformers import Trainer, TrainerCallback, ViTConfig, ViTImageProcessorPil, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.data import StreamConfig, TaskStream
from hf_cdl.data.sampler import ViewSampler
from hf_cdl.data.views import query_view
from hf_cdl.distill import TERMS, Objective
from hf_cdl.runs.run import Run
from hf_cdl.training import task_trainer
from hf_cdl.training.memory import peak_memory
from hf_cdl.types import Task

TASK = next(stream())


def pair(folder: Path, term: str = "kdp", **extra: Any) -> tuple[CDLTrainer, CDLTrainer]:
    kind = TERMS[term]
    parts: dict[str, Any] = kind.student_parts
    student_model = model_of("coda", width=32, **parts)
    teacher_model = model_of("coda", width=48, query_width=32)
    assert teacher_model.query_backbone is not None
    teacher_model.query_backbone.load_state_dict(student_model.backbone.state_dict())
    teacher = CDLTrainer(teacher_model, arguments(folder / "t", **extra), role="teacher")
    objective = Objective(0.5, [(term, kind(kind.config_class(), student_model.shape, teacher_model.shape))])
    return teacher, CDLTrainer(
        student_model, arguments(folder / "s", **extra), objective=objective, teacher=teacher_model
    )


def losses(trainer: CDLTrainer, name: str = "loss/loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def test_a_step_of_the_student_makes_one_query_one_teacher_and_one_student_pass(tmp_path: Path) -> None:
    teacher, student = pair(tmp_path, num_train_epochs=1)
    teacher.learn(TASK)
    calls: dict[str, int] = {}

    def count(name: str, module: Any) -> Any:
        return module.register_forward_hook(lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1))

    hooks = [
        count("student backbone", student.model.backbone),
        count("teacher backbone", teacher.model.backbone),
        count("teacher query", teacher.model.query_backbone),
    ]
    modes: list[bool] = []
    hooks.append(teacher.model.head.register_forward_hook(lambda *_: modes.append(teacher.model.training)))
    teacher.model.train()
    student.learn(TASK)
    steps = student.state.global_step
    assert steps == 3
    assert modes == [False] * steps, "the teacher answers in evaluation mode"
    assert calls == {"student backbone": 2 * steps, "teacher backbone": steps}, (
        "the query is computed once, by the student"
    )
    for hook in hooks:
        hook.remove()


def test_a_teacher_with_another_query_is_asked_for_its_own(tmp_path: Path) -> None:
    set_seed(0)
    student_model = model_of("coda", kd_prompt={})
    teacher_model = model_of("coda", width=48)  # has its own query
    kind = TERMS["kdp"]
    objective = Objective(0.5, [("kdp", kind(kind.config_class(), student_model.shape, teacher_model.shape))])
    student = CDLTrainer(student_model, arguments(tmp_path), objective=objective, teacher=teacher_model)
    assert not student.teacher.shares_query({})
    teacher_model.begin_task(TASK.class_names)
    student.learn(TASK)
    assert losses(student)


class Counted(ViTImageProcessorPil):
    """An image processor that counts the images it produces."""

    def __init__(self, size: int, **fields: Any):
        super().__init__(size={"height": size, "width": size}, **fields)
        self.images = 0

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        self.images += len(images)
        return super().__call__(images=images, **kwargs)

    def counted(self) -> int:
        self.images, count = 0, self.images
        return count


@pytest.mark.parametrize("query", ["student", "self"])
def test_each_model_sees_its_own_view_of_a_sample(tmp_path: Path, query: str) -> None:
    """And no phase computes a view that it does not need."""
    processors = {"student": Counted(16), "teacher": Counted(24, image_mean=[0.0] * 3, image_std=[1.0] * 3)}
    data = StreamConfig(path=str(make_data(tmp_path / "data")), classes_per_task=3)
    task: Any = TaskStream(data, processors)[0]
    images, tests = len(task.train), len(task.test)
    student_model = model_of("coda", kd_prompt={})
    section: Any = {"query_config": vit(32), "query_view": query_view(processors["teacher"], processors["student"])}
    prompt = {"type": "coda", "components": 3, "length": 4, "layers": (0, 2)}
    size: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
    }
    config = CDLConfig(backbone_config=ViTConfig(**size), prompt=prompt, **(section if query == "student" else {}))
    teacher_model = CDLForImageClassification(config)
    if teacher_model.query_backbone is not None:
        teacher_model.query_backbone.load_state_dict(student_model.backbone.state_dict())
    kind = TERMS["kdp"]
    objective = Objective(0.5, [("kdp", kind(kind.config_class(), student_model.shape, teacher_model.shape))])
    teacher = CDLTrainer(teacher_model, arguments(tmp_path / "t", num_train_epochs=1), role="teacher")
    rest = arguments(tmp_path / "s", num_train_epochs=1)
    student = CDLTrainer(student_model, rest, objective=objective, teacher=teacher_model)
    assert not student.teacher.shares_query({})
    for view in task.train.views.values():
        view._levels = None  # the processor computes every view, and counts it
        view.processor.counted()  # discard those of its own check

    sides: dict[str, set[tuple[int, ...]]] = {}
    parts = {
        "student": student_model.backbone,
        "teacher": teacher_model.backbone,
        "query": teacher_model.query_backbone,
    }
    for name, part in parts.items():
        if part is not None:
            part.register_forward_pre_hook(
                lambda _, args, name=name: sides.setdefault(name, set()).add(tuple(args[0].shape[2:]))
            )
    teacher.learn(task)
    assert (processors["teacher"].counted(), processors["student"].counted()) == (images, 0)
    student.learn(task)
    assert (processors["teacher"].counted(), processors["student"].counted()) == (images, images)
    teacher.evaluate_seen()
    assert (processors["teacher"].counted(), processors["student"].counted()) == (tests, 0)
    student.evaluate_seen()
    assert (processors["teacher"].counted(), processors["student"].counted()) == (0, tests)
    want = {"student": {(16, 16)}, "teacher": {(24, 24)}, "query": {(16, 16)}}
    assert sides == {name: want[name] for name, part in parts.items() if part is not None}

    alone = CDLTrainer(model_of("coda"), arguments(tmp_path / "alone", num_train_epochs=1))
    alone.learn(task)
    assert (processors["teacher"].counted(), processors["student"].counted()) == (0, images)
    ncm = CDLForImageClassification(CDLConfig(backbone_config=vit(32), head={"type": "ncm"}))
    CDLTrainer(ncm, arguments(tmp_path / "ncm"), role="nearest_class_mean").learn(task)
    assert (processors["teacher"].counted(), processors["student"].counted()) == (0, images)


def test_the_same_weights_are_asked_twice_if_the_views_differ(tmp_path: Path) -> None:
    """Teacher and student share a backbone and query it separately, because their pixels differ."""
    processors = {"student": Counted(16), "teacher": Counted(16, image_mean=[0.0] * 3)}
    data = StreamConfig(path=str(make_data(tmp_path / "data")), classes_per_task=3)
    student_model, teacher_model = model_of("coda"), model_of("coda")
    teacher_model.load_state_dict(student_model.state_dict())
    term = TERMS["kd"](TERMS["kd"].config_class(), student_model.shape, teacher_model.shape)
    teacher_model.begin_task(["x", "y", "z"])
    student = CDLTrainer(
        student_model, arguments(tmp_path, max_steps=1), Objective(0.5, [("kd", term)]), teacher=teacher_model
    )
    queries: list[torch.Tensor] = []
    for model in (teacher_model, student_model):
        model.register_forward_hook(lambda model, args, output: queries.append(output.query))
    student.learn(TaskStream(data, processors)[0])
    theirs, ours = queries
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_accumulating_two_half_batches_is_one_whole_batch(tmp_path: Path) -> None:
    curves = []
    for batch, accumulation in ((8, 1), (4, 2)):
        teacher, student = pair(
            tmp_path / str(batch), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        teacher.learn(TASK)
        student.learn(TASK)
        curves.append((losses(teacher), losses(student), losses(student, "loss/kdp")))
    for one, two in zip(*curves, strict=True):
        assert len(one) == 12
        assert one == pytest.approx(two, rel=2e-4)


def test_the_rate_falls_after_the_named_epochs(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"lr_steps": [2, 3], "lr_decay": 0.5, "learning_rate": 0.01}
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, num_train_epochs=5, **steps))
    trainer.learn(TASK)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([0.01] * 6 + [0.005] * 3 + [0.0025] * 6)  # three steps an epoch


def test_the_epoch_wise_cosine_is_the_authors(tmp_path: Path) -> None:
    trainer = CDLTrainer(
        model_of("coda"), arguments(tmp_path, num_train_epochs=5, epoch_cosine=True, learning_rate=0.01)
    )
    trainer.learn(TASK)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    per_epoch = 3
    # the scheduler starts one count late: epochs 0 and 1 both run at the full rate
    want = [
        0.01 * math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * 4)) for epoch in range(5) for _ in range(per_epoch)
    ]
    assert rates == pytest.approx(want)


def test_every_task_starts_with_a_new_optimizer(tmp_path: Path) -> None:
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, num_train_epochs=1))
    seen = []
    for task in stream():
        trainer.learn(task)
        optimizer: Any = trainer.optimizer
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert parameters == {id(p) for p in trainer.model.parameters() if p.requires_grad}
        steps = {int(state["step"]) for state in optimizer.state.values()}
        assert steps == {trainer.state.global_step}
        seen.append(parameters)
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_the_kd_prompts_train_at_their_own_rate_after_the_first_task(tmp_path: Path, factor: float) -> None:
    teacher, _ = pair(tmp_path)
    student_model = model_of("coda", width=32, kd_prompt={"later_rate": factor})
    kind: Any = TERMS["kdp"]
    objective = Objective(0.5, [("kdp", kind(kind.config_class(), student_model.shape, teacher.model.shape))])
    student = CDLTrainer(
        student_model, arguments(tmp_path / "s", num_train_epochs=1), objective=objective, teacher=teacher.model
    )
    moved = []
    for task in stream():
        prompts: Any = student_model.kd_prompt
        before = [p.detach().clone() for p in prompts.parameters()]
        teacher.learn(task)
        student.learn(task)
        after = [p.detach() for p in prompts.parameters()]
        moved.append(max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)))
        optimizer: Any = student.optimizer
        rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
        wanted = student.args.learning_rate * (1.0 if task.index == 0 else factor)
        assert [rates[id(p)] for p in prompts.parameters()] == pytest.approx([wanted] * len(after))
    assert moved[0] > 0
    assert (moved[1] > 0) == (factor > 0)
    if factor == 0.1:
        assert moved[1] < moved[0] / 5  # Adam's steps are as long as the rate


def test_the_sampler_is_a_function_of_seed_and_epoch() -> None:
    sampler = ViewSampler(50, seed=3)
    first = list(sampler)
    assert list(sampler) == first and {view for _, view in first} == {0}
    assert sorted(index for index, _ in first) == list(range(50))
    sampler.epoch = 1
    second = list(sampler)
    assert {view for _, view in second} == {1} and [i for i, _ in second] != [i for i, _ in first]
    assert list(ViewSampler(50, seed=4)) != first
    assert [index for index, _ in ViewSampler(5, seed=0, shuffle=False)] == [0, 1, 2, 3, 4]


class Recorder(Pictures):
    def __init__(self, classes: range):
        super().__init__(classes)
        self.asked: list[tuple[int, int]] = []

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(key, tuple):
            self.asked.append(key)
        return super().__getitem__(key)


def test_epoch_e_asks_for_view_e_of_every_sample(tmp_path: Path) -> None:
    split = Recorder(range(3))
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, num_train_epochs=3))
    trainer.learn(Task(0, ("a", "b", "c"), 0, split, None, split))
    assert sorted(split.asked) == [(index, view) for index in range(24) for view in range(3)]
    assert [view for _, view in split.asked] == sorted(view for _, view in split.asked)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_run(tmp_path: Path, seed: int) -> None:
    runs = []
    for attempt in ("a", "b"):
        teacher, student = pair(tmp_path / attempt, seed=seed, data_seed=seed, num_train_epochs=2)
        for task in stream():
            teacher.learn(task)
            student.learn(task)
        runs.append((losses(teacher), losses(student), student.evaluate_seen().row))
    assert runs[0] == runs[1]
    if seed:
        teacher, _ = pair(tmp_path / "other", seed=0, data_seed=0, num_train_epochs=2)
        teacher.learn(next(stream()))
        assert losses(teacher)[:2] != runs[0][0][:2]


def test_bf16_trains_close_to_fp32_and_leaves_no_wrapper_behind(tmp_path: Path) -> None:
    curves = []
    for half in (False, True):
        teacher, student = pair(tmp_path / str(half), bf16=half)
        for task in stream():
            teacher.learn(task)
            student.learn(task)
        curves.append(losses(student))
        for model in (teacher.model, student.model):
            assert not hasattr(model, "_original_forward"), "Accelerate's autocast wrapper is still on"
        model = student.model.eval()
        assert model(pixel_values=torch.randn(2, 3, 16, 16)).logits.dtype == torch.float32
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.1, abs=0.05)


def test_a_loss_that_is_no_number_stops_with_its_name_and_step(tmp_path: Path) -> None:
    teacher, student = pair(tmp_path)
    teacher.learn(TASK)
    with torch.no_grad():
        student.model.kd_prompt.token.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="Loss term ce, kdp is nan") as error:
        student.learn(TASK)
    assert "at step 1 of task 1 · student" in str(error.value)

    teacher, student = pair(tmp_path / "kdp")
    teacher.learn(TASK)
    student.model.begin_task(TASK.class_names)
    with torch.no_grad():
        student.model.kd_head.blocks[0].weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="Loss term kdp is"):
        student.learn(TASK)


@pytest.mark.parametrize(("saves", "raised"), [({"save_strategy": "steps", "save_steps": 2}, 2), ({}, 3)], ids=str)
def test_losses_may_be_looked_at_later_but_before_anything_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: dict[str, Any], raised: int
) -> None:
    """As on a GPU, where looking at each of them would wait for it."""
    monkeypatch.setattr(task_trainer, "steps_together", lambda device: 4)
    run = Run(tmp_path / "run", {"name": "late"}, say=lambda _: None)
    run.bind("0", [list(TASK.class_names)])
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, logging_steps=100, **saves), run=run)
    steps: list[int] = []
    note = trainer._note_losses

    def broken(losses: dict[str, torch.Tensor], weight: float) -> None:
        steps.append(trainer.state.global_step + 1)
        note({name: value * math.nan for name, value in losses.items()}, weight)

    trainer._note_losses = broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="Loss term ce, prompt is nan at step 1 of"):
        trainer.learn(TASK)
    assert steps == [*range(1, raised + 1)]
    assert not [*tmp_path.rglob("checkpoint-*")]


def test_tasks_come_in_order_and_the_teacher_is_not_forgotten(tmp_path: Path) -> None:
    _, second = stream()
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path))
    with pytest.raises(ValueError, match="expected task 1, got task 2"):
        trainer.learn(second)
    kind = TERMS["kd"]
    with pytest.raises(ValueError, match="The terms kd need a teacher"):
        model = model_of("coda")
        term = kind(kind.config_class(), model.shape, model.shape)
        CDLTrainer(model, arguments(tmp_path), objective=Objective(0.5, [("kd", term)]))


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    model = model_of("coda")
    model.begin_task(["x", "y"])
    with pytest.raises(ValueError, match="The model knows 1 task .* does not fit task 1 with classes"):
        CDLTrainer(model, arguments(tmp_path)).learn(TASK)


def test_class_means_need_no_training_and_beat_chance(tmp_path: Path) -> None:
    set_seed(0)
    model = CDLForImageClassification(CDLConfig(backbone_config=vit(32), head={"type": "ncm"}))
    trainer = CDLTrainer(model, arguments(tmp_path), role="nearest_class_mean")
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    for task in stream():
        trainer.learn(task)
    result = trainer.evaluate_seen()
    assert sum(result.row) / 2 > 60, result.row
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


def test_evaluation_knows_no_task_and_counts_every_image_once(tmp_path: Path) -> None:
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, num_train_epochs=1, per_device_eval_batch_size=7))
    tasks = list(stream())
    for task in tasks:
        trainer.learn(task)
    result = trainer.evaluate_seen()
    model = trainer.model.eval()
    for task, right, count in zip(tasks, result.correct, result.counts, strict=True):
        pixels = torch.stack([task.test[i]["pixel_values"] for i in range(len(task.test))])
        labels = torch.tensor([task.test[i]["labels"] for i in range(len(task.test))])
        with torch.no_grad():
            predicted = model(pixels).logits.argmax(-1)  # over all classes
        assert (right, count) == (int((predicted == labels).sum()), len(labels))


def test_evaluate_measures_the_dataset_that_it_is_given(tmp_path: Path) -> None:
    """Among all classes of the model, under the given name; without a dataset the newest task's, as before."""
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, num_train_epochs=1))
    tasks = list(stream())[:2]
    for task in tasks:
        trainer.learn(task)
    lines = len(trainer.state.log_history)
    for task in tasks:
        found = trainer.evaluate(task.test, metric_key_prefix="test")
        assert found == {"test_accuracy": trainer.answer([task])["row"][0]}
    assert len(trainer.state.log_history) == lines
    assert trainer.evaluate().keys() >= {"eval_accuracy"}
    assert "now_accuracy" in trainer.evaluate(metric_key_prefix="now")


def test_what_a_trainer_is_given_stays_as_it_was(tmp_path: Path) -> None:
    args = arguments(tmp_path, num_train_epochs=1)
    before = dict(args.__dict__)
    CDLTrainer(model_of("coda"), args).learn(TASK)
    assert {**args.__dict__, "_n_gpu": before["_n_gpu"]} == before
    teacher, student = pair(tmp_path, num_train_epochs=1)
    teacher.learn(TASK)
    for mode in (True, False):
        fresh = pair(tmp_path, num_train_epochs=1)[1]
        fresh.teacher.model = teacher.model.train(mode)
        fresh.learn(TASK)
        assert teacher.model.training is mode
    assert student.args.save_strategy == "no"


@pytest.mark.parametrize("event", ["on_log", "on_step_begin", "on_epoch_end"])
def test_a_callback_of_a_user_s_sees_validation_images_whatever_it_waits_for(event: str, tmp_path: Path) -> None:
    class Mine(TrainerCallback):
        pass

    setattr(Mine, event, lambda self, args, state, control, **more: None)
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, eval_strategy="epoch"))
    assert trainer._evaluation_images(TASK) is TASK.test, "a curve alone"
    trainer.add_callback(Mine())
    other = Pictures(range(len(TASK.class_names)))
    assert trainer._evaluation_images(dataclasses.replace(TASK, validation=other)) is other
    with pytest.raises(ValueError, match="Mine of the student would choose by test images"):
        trainer.learn(TASK)
    trainer.seen = [TASK]
    with pytest.raises(ValueError, match="task-01 has no images that evaluate.. may read beside Mine"):
        trainer.evaluate()


def test_memory_is_that_of_the_device_that_trains_not_of_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert peak_memory(torch.device("cpu")) > 0 == peak_memory(torch.device("cuda"))


@pytest.mark.parametrize("backbone", [False, True])
def test_weight_decay_is_on_the_parameters_that_trainer_would_have_it_on(backbone: bool, tmp_path: Path) -> None:
    model = CDLForImageClassification(
        CDLConfig(backbone_config=vit(32), prompt={"type": "coda", "layers": [0]}, train_backbone=backbone)
    )
    trainer = CDLTrainer(model, arguments(tmp_path, weight_decay=0.1, max_steps=1))
    for task in stream():
        trainer.learn(task)
    trainer.optimizer = None
    groups = {group["weight_decay"]: {*map(id, group["params"])} for group in trainer.create_optimizer().param_groups}
    decayed = set(Trainer.get_decay_parameter_names(trainer, model))
    trained = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    assert groups[0.1] == {number for name, number in trained.items() if name in decayed}
    assert groups[0.0] == {number for name, number in trained.items() if name not in decayed}
    assert len(groups[0.1]) > 3 and any("norm" in name for name in trained) == backbone
