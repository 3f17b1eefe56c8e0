"""What a role could not learn is reported before any training, with a solution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_classifier import RESNET
from test_contract import arguments, model_of, vit
from test_steps import Images
from transformers import ResNetConfig, ResNetForImageClassification

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.distill import TERMS, Objective
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.training.checking import check_task
from hf_cdl.types import Task


class Alike(Images):
    """Images of `classes` classes, numbered from `first`."""

    def __init__(self, count: int, classes: int, first: int = 0):
        super().__init__(count, first)
        self.labels = [first + number % classes for number in range(count)]
        tint = torch.randn(9, 3, 1, 1, generator=torch.Generator().manual_seed(1))
        self.images = self.images * 0.1 + tint[self.labels]


def task_of(classes: int, images: int = 8, index: int = 0, first: int = 0) -> Task:
    names = tuple(f"class {first + number}" for number in range(classes))
    return Task(index, names, first, Alike(images, classes, first), None, Alike(images, classes, first))


def bare(head: dict[str, Any], **fields: Any) -> CDLForImageClassification:
    return CDLForImageClassification(CDLConfig(backbone_config=vit(32), head=head, **fields))


def objective_of(student: Any, ce_weight: float, *terms: dict[str, Any]) -> Objective:
    built = []
    for fields in terms:
        kind = TERMS[fields["type"]]
        config = kind.config_class(**{key: value for key, value in fields.items() if key != "type"})
        built.append((fields["type"], kind(config, student.shape, student.shape)))
    return Objective(ce_weight, built)


def classifier() -> ImageClassifier:
    return ImageClassifier(ResNetForImageClassification(ResNetConfig(**RESNET)))


TRAINED: dict[str, Any] = {
    "linear": lambda: bare({"type": "linear"}),
    "cosine": lambda: bare({"type": "cosine"}),
    "prompts": lambda: model_of("apt", head={"type": "weight_normalised"}),
    "backbone": lambda: bare({"type": "linear"}, train_backbone=True),
    "KD head": lambda: model_of("coda", kd_prompt={}),
    "session of prompts": lambda: model_of("coda", head={"type": "ridge"}, first_session={"type": "linear"}),
    "session of lora": lambda: bare({"type": "ncm"}, first_session={"type": "cosine"}, lora={"r": 2}),
    "classifier": classifier,
}


@pytest.mark.parametrize("role", ["teacher", "student", "linear_head"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_task_of_one_class_is_not_learnt_by_comparing_classes(name: str, role: str, tmp_path: Path) -> None:
    model = TRAINED[name]()
    trainer = CDLTrainer(model, arguments(tmp_path, num_train_epochs=1), role=role)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    title = role.replace("_", " ")
    with pytest.raises(ValueError, match=rf"The {title} cannot learn task 1, which has one class \('class 0'\)") as no:
        trainer.learn(task_of(1))
    ways = {"linear_head": "linear_head out of baselines"}
    assert ("first_session" if name.startswith("session") else "head: {type: ridge}") in str(no.value) or (
        ways.get(role, "?") in str(no.value)
    )
    after = model.state_dict()
    assert model.tasks == [] and all(torch.equal(value, after[key]) for key, value in before.items())
    trainer.learn(task_of(2))  # the same trainer continues with a learnable task
    if name.startswith("session"):
        trainer.learn(task_of(1, index=1, first=2))  # after the first session, single classes are fine
        assert trainer.evaluate_seen().counts == [8, 8]
    elif name != "classifier":
        with pytest.raises(ValueError, match=r"cannot learn task 2, which has one class \('class 2'\)"):
            trainer.learn(task_of(1, index=1, first=2))


def test_a_classifier_that_is_used_as_it_is_learns_nothing_and_is_asked_nothing(tmp_path: Path) -> None:
    model = classifier()
    model.model.config.id2label = {0: "class 0"}
    model.model.classifier[-1] = torch.nn.Linear(16, 1)
    model.use_as_is(["class 0"])
    trainer = CDLTrainer(model, arguments(tmp_path), role="teacher")
    trainer.learn(task_of(1))
    assert trainer.evaluate_seen().row == [100.0]


@pytest.mark.parametrize(
    "head",
    [{"type": "ncm"}, {"type": "ridge", "features": 40}, {"type": "ridge", "strength": 10.0, "soft_targets": 0.3}],
)
@pytest.mark.parametrize("standardise", [None, "first_task"])
def test_fitted_heads_learn_classes_one_at_a_time(
    standardise: str | None, head: dict[str, Any], tmp_path: Path
) -> None:
    model, teacher = bare({**head, "standardise": standardise}), bare({"type": "ridge"})
    asked = teacher if "soft_targets" in head else None
    teach, trainer = CDLTrainer(teacher, arguments(tmp_path)), CDLTrainer(model, arguments(tmp_path), teacher=asked)
    for index in range(4):
        task = task_of(1, index=index, first=index)
        for each in (teach, trainer):
            each.learn(task)
        result = trainer.evaluate_seen()
        assert result.counts == [8] * (index + 1)
        assert sum(result.row) / len(result.row) > 60, result.row
        if index == 0:
            assert result.row == result.within_task == [100.0] and result.confidence == 100.0
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_session_of_losses_that_compare_no_classes_learns_from_one(tmp_path: Path) -> None:
    def student() -> CDLForImageClassification:
        return bare({"type": "ridge"}, first_session={"type": "linear"}, lora={"r": 2})

    teacher = bare({"type": "ridge"})
    teacher.begin_task(["class 0"])
    model = student()
    objective = objective_of(model, 0.0, {"type": "similarity"}, {"type": "fitnets"}, {"type": "kd", "weight": 0.0})
    trainer = CDLTrainer(model, arguments(tmp_path, optim="sgd"), objective, teacher)
    before = {key: value.clone() for key, value in model.state_dict().items() if "lora_B" in key}
    trainer.learn(task_of(1))
    after = model.state_dict()
    assert before and all(not torch.equal(value, after[key]) for key, value in before.items())
    for ce_weight, more in ((0.1, ()), (0.0, ({"type": "kd"},)), (0.0, ({"type": "label_smoothing"},))):
        model = student()
        objective = objective_of(model, ce_weight, {"type": "similarity"}, *more)
        with pytest.raises(ValueError, match="leave out first_session"):
            CDLTrainer(model, arguments(tmp_path), objective, teacher).learn(task_of(1))


@pytest.mark.parametrize(
    ("terms", "classes", "images", "batch", "said"),
    [
        ([{"type": "kd", "standardise": True}], 2, 8, 8, "The term kd with standardise .* task has 2.*>= 3"),
        ([{"type": "kd", "standardise": True}], 3, 8, 8, None),
        ([{"type": "kd"}, {"type": "dkd"}, {"type": "dist"}], 2, 8, 8, None),
        ([{"type": "similarity"}], 3, 8, 2, "The term similarity compares the images .* this task has 2"),
        ([{"type": "similarity"}], 2, 2, 64, "The term similarity compares the images .* this task has 2"),
        ([{"type": "similarity"}], 2, 8, 3, None),
        ([{"type": "dist"}], 2, 8, 2, "The term dist with 2 classes .* batch of this task has 2"),
        ([{"type": "dist"}], 3, 8, 1, None),
        (
            [{"type": "dist", "beta": 0.0}],
            3,
            8,
            1,
            "The term dist with 3 classes and beta 0.0 .* batch of this task has 1",
        ),
        ([{"type": "dist", "gamma": 0.0}], 2, 8, 8, "The term dist with gamma 0 compares the classes"),
        ([{"type": "review_kd"}, {"type": "fitnets"}], 2, 1, 1, None),
    ],
)
def test_terms_that_would_be_constant_are_refused(
    terms: list[dict[str, Any]], classes: int, images: int, batch: int, said: str | None, tmp_path: Path
) -> None:
    """Accepted terms have a gradient, refused ones have none."""
    model, teacher = bare({"type": "linear"}), bare({"type": "linear"})
    objective, task = objective_of(model, 0.0, *terms), task_of(classes, images)
    args = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=batch)
    if said is not None:
        with pytest.raises(ValueError, match=f"The student cannot learn task 1. {said}"):
            check_task("student", model, objective, args, task)
        if "standardise" in said:  # the term reports it, too, for use without a trainer
            return
    else:
        check_task("student", model, objective, args, task)
    for each in (model, teacher):
        each.begin_task(task.class_names)
        each.requires_grad_(True)
    pixels = torch.stack([task.train[number]["pixel_values"] for number in range(min(images, batch))])
    labels = torch.tensor([task.train[number]["labels"] for number in range(len(pixels))])
    hidden = {"output_hidden_states": True}
    with torch.no_grad():
        theirs = teacher(pixels + 1, **hidden)
    trained = [p for part in (model, objective) for p in part.parameters() if p.requires_grad]
    loss = objective(model(pixels, **hidden), theirs, labels, task.classes)["loss"]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    size = max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
    assert (size < 1e-3) == (said is not None), size


def test_whole_batches_alone_need_a_whole_batch(tmp_path: Path) -> None:
    fields = {"dataloader_drop_last": True, "per_device_train_batch_size": 9, "num_train_epochs": 1}
    trainer = CDLTrainer(bare({"type": "linear"}), arguments(tmp_path, **fields))
    with pytest.raises(ValueError, match="A task has 8 training images, fewer than a batch of 9, but"):
        trainer.learn(task_of(2))
    trainer.learn(task_of(2, images=9))
    CDLTrainer(bare({"type": "ncm"}), arguments(tmp_path, **fields)).learn(task_of(2))  # a fitted head has no batches


def test_statistics_of_one_image_are_none(tmp_path: Path) -> None:
    trainer = CDLTrainer(bare({"type": "ridge", "standardise": "first_task"}), arguments(tmp_path))
    with pytest.raises(ValueError, match="the deviation of one image is 0"):
        trainer.learn(task_of(1, images=1))
    with pytest.raises(ValueError, match="it has no training images"):
        trainer.learn(task_of(1, images=0))
    trainer.learn(task_of(1, images=2))
    trainer.learn(task_of(1, images=1, index=1, first=1))
    assert trainer.evaluate_seen().counts == [2, 1]


def test_two_gpus_in_one_process_are_refused_where_a_loss_trains(tmp_path: Path) -> None:
    """Trainer would split each batch by nn.DataParallel; a head that is fitted uses one GPU all the same."""
    args = arguments(tmp_path)
    args._n_gpu = 2  # what transformers counts where two are visible and nothing was launched
    trainer = CDLTrainer(bare({"type": "linear"}), args)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="2 GPUs are visible, but one process.*accelerate launch --num_processes 2"):
        trainer.learn(task_of(2))
    after = trainer.model.state_dict()
    assert not trainer.seen and before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    model = bare({"type": "ncm"})
    check_task("student", model, Objective(), args, task_of(2))
