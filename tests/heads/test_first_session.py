"""First-session adaptation: prompts or backbone learn only on the first task, then a head is fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import killed_and_taken, make_recipe, train, write_recipe
from safetensors.torch import load_file
from test_contract import SMALL, arguments, images, model_of, stream, vit
from torch.nn import functional as F
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.distill import TERMS, Objective
from hf_cdl.prompts import PROMPTS
from hf_cdl.types import Task

SESSION: dict[str, Any] = {
    "head": {"type": "ridge", "standardise": "first_task", "strength": 10.0},
    "first_session": {"type": "linear", "standardise": "first_task"},
}


def adapted(method: str, **fields: Any) -> CDLForImageClassification:
    return model_of(method, **{**SESSION, **fields})


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def pixels_and_labels(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    items = [task.train[i] for i in range(len(task.train))]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


@pytest.mark.parametrize("method", PROMPTS)
def test_prompts_learn_on_the_first_task_alone_and_ridge_is_the_joint_solution(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    trainer = CDLTrainer(model, arguments(tmp_path))
    first, second = stream()
    new = state_of(model)
    trainer.learn(first)
    one = state_of(model)
    assert any(
        name.startswith("pool") and not torch.equal(value, new.get(name, value * 0)) for name, value in one.items()
    )
    assert len([line for line in trainer.state.log_history if "loss/ce" in line]) == 12
    trainer.learn(second)
    two = state_of(model)
    fixed = {name for name in two if not name.startswith("head.")} | {n for n in two if ".standard." in n}
    assert all(torch.equal(two[name], one[name]) for name in fixed)
    assert not any(name.startswith("session_head") for name in two)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert trainer.state.log_history == []

    model.eval()
    parts = [pixels_and_labels(task) for task in (first, second)]
    with torch.no_grad():
        bare = model._run(model.backbone, parts[0][0]).last_hidden_state[:, 0]
        features = [model(pixels).features for pixels, _ in parts]
        logits = [model(pixels).logits for pixels, _ in parts]
    assert not torch.allclose(bare, features[0], atol=1e-3), "the features are those of the prompts"
    mean, std = features[0].mean(0), features[0].std(0, unbiased=False)
    x = ((torch.cat(features) - mean) / std).double()
    y = F.one_hot(torch.cat([labels for _, labels in parts])).double()
    weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y)
    torch.testing.assert_close(torch.cat(logits).double() / 10, x @ weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_teacher_s_answers_are_a_share_of_ridge_s_targets(fitted: bool, tmp_path: Path) -> None:
    """Its probabilities at the temperature, or a fitted head's scores unchanged; there is no training step."""
    parts: dict[str, Any] = {"head": {"type": "ridge", "strength": 10.0, "soft_targets": 0.4, "temperature": 2.0}}
    student = CDLForImageClassification(CDLConfig(backbone_config=vit(32), **parts))
    head: dict[str, Any] = {"head": {"type": "ridge"}} if fitted else {}
    teacher = CDLForImageClassification(CDLConfig(backbone_config=vit(48), **head))
    learner = CDLTrainer(teacher, arguments(tmp_path / "t"), role="teacher")
    trainer = CDLTrainer(student, arguments(tmp_path), teacher=teacher)
    tasks, targets, features = list(stream()), [], []
    for task in tasks:
        learner.learn(task)
        trainer.learn(task)
        pixels, labels = pixels_and_labels(task)
        with torch.no_grad():
            said = teacher.eval()(pixels).logits[:, task.classes]
            features.append(student.eval()(pixels).features.double())
        soft = said / 10 if fitted else (said / 2).softmax(dim=-1)
        hard = F.one_hot(labels - task.first_class, len(task.class_names))
        rows = torch.zeros(len(labels), sum(len(task.class_names) for task in tasks), dtype=torch.float64)
        rows[:, task.classes] = 0.6 * hard.double() + 0.4 * soft.double()
        targets.append(rows)
    x, y = torch.cat(features), torch.cat(targets)
    weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y)
    with torch.no_grad():
        logits = torch.cat([student(pixels_and_labels(task)[0]).logits for task in tasks])
    torch.testing.assert_close(logits.double() / 10, x @ weight, atol=1e-3, rtol=1e-3)
    alone = CDLTrainer(CDLForImageClassification(CDLConfig(backbone_config=vit(32), **parts)), arguments(tmp_path))
    with pytest.raises(ValueError, match="soft_targets need a teacher"):
        alone.learn(tasks[0])
    assert CDLTrainer(student, arguments(tmp_path)).answer(tasks) == trainer.answer(tasks), "to measure needs none"


def test_a_backbone_can_learn_on_the_first_task_alone(tmp_path: Path) -> None:
    set_seed(1)
    config = CDLConfig(backbone_config=vit(32), train_backbone=True, **SESSION)
    model = CDLForImageClassification(config)
    trainer = CDLTrainer(model, arguments(tmp_path, learning_rate=1e-3))
    states = [state_of(model.backbone)]
    for task in stream():
        trainer.learn(task)
        states.append(state_of(model.backbone))
    new, one, two = states
    assert not all(torch.equal(one[name], new[name]) for name in new)
    assert all(torch.equal(two[name], one[name]) for name in one)


def distilled(folder: Path, term: str | None, teacher: Any) -> CDLTrainer:
    model = adapted("coda")
    terms = []
    if term is not None:
        set_seed(2)
        terms.append((term, TERMS[term](TERMS[term].config_class(), model.shape, teacher.shape)))
    return CDLTrainer(model, arguments(folder), Objective(0.5, terms), teacher=teacher if terms else None)


def test_the_teacher_is_asked_in_the_first_session_alone(tmp_path: Path) -> None:
    teacher = adapted("dualprompt", width=48)
    teach = CDLTrainer(teacher, arguments(tmp_path / "t"), role="teacher")
    trainers = [distilled(tmp_path / str(term), term, teacher) for term in (None, "kd", "fitnets")]
    calls: list[int] = []
    for task in stream():
        teach.learn(task)
        hook = teacher.head.register_forward_hook(lambda *_, index=task.index: calls.append(index))
        for trainer in trainers:
            trainer.learn(task)
        hook.remove()
    assert calls == [0] * 24
    prompts = [trainer.model.pool.blocks[0].prompt for trainer in trainers]
    assert not torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[0], prompts[2])


def test_a_teacher_after_its_first_session_teaches_later_tasks(tmp_path: Path) -> None:
    """Its prompts belong to no task: DualPrompt has one expert, whatever the task."""
    teacher, student = adapted("dualprompt", width=48), model_of("coda")
    term = TERMS["kd"](TERMS["kd"].config_class(), student.shape, teacher.shape)
    teach = CDLTrainer(teacher, arguments(tmp_path / "t"), role="teacher")
    learn = CDLTrainer(student, arguments(tmp_path / "s"), Objective(0.5, [("kd", term)]), teacher=teacher)
    for task in stream():
        teach.learn(task)
        learn.learn(task)
    with torch.no_grad():
        assert torch.equal(teacher.eval()(images(), task_id=1).logits, teacher(images()).logits)


def test_a_loaded_model_learns_its_second_task_as_if_never_saved(tmp_path: Path) -> None:
    first, second = stream()
    trainer = CDLTrainer(adapted("coda"), arguments(tmp_path))
    trainer.learn(first)
    trainer.model.save_pretrained(tmp_path / "model")
    trainer.learn(second)
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "model")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = CDLTrainer(loaded, arguments(tmp_path))
    again.seen.append(first)
    again.learn(second)
    want = trainer.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images()).logits, trainer.model.eval()(images()).logits)


def test_its_head_is_never_saved_and_comes_back_after_saving(tmp_path: Path) -> None:
    model = adapted("coda")
    model.begin_task(["cat", "dog"])
    assert model.session_head is not None
    trains = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"pool", "session_head"}
    model.save_pretrained(tmp_path)
    assert model.session_head is not None
    assert not any(name.startswith("session_head") for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"head": {"type": "linear"}}, "needs a trained head, a fitted `head` .got linear."),
        ({"first_session": {"type": "ncm"}}, r"first_session \(ncm\) needs a trained head"),
        (
            {"mapping": {}, "teacher_pool": {"prompt": {"type": "l2p"}, "hidden_size": 32, "num_layers": 4}},
            "and no prompt mapping",
        ),
        ({"prompt": {"type": "none"}}, "prompts, lora or train_backbone"),
        ({"first_session": None}, "head of type ridge is fitted to fixed features"),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], said: str) -> None:
    prompt = {"type": "coda", **SMALL["coda"]}
    with pytest.raises(ValueError, match=said):
        CDLForImageClassification(CDLConfig(backbone_config=vit(32), **{"prompt": prompt, **SESSION, **fields}))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_teacher_is_taken_over(tmp_path: Path) -> None:
    """With a term that has its own layers, and a teacher with its own first session."""
    recipe = make_recipe(tmp_path, distill=[{"type": "fitnets", "weight": 0.5}])
    for role in ("teacher", "student"):
        recipe[role].update(SESSION)
    recipe["train"]["num_train_epochs"] = 6
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    whole = tmp_path / "whole"
    said = "student (coda on the first task, ridge head + fitnets)"
    for folder in killed_and_taken(file, whole, "student-task-01", said):
        for part in ("teacher/task-01", "student/task-01", "student/task-03"):
            ours, theirs = (load_file(place / part / "model.safetensors") for place in (folder, whole))
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), (folder.name, part)
        found = json.loads((folder / "results.json").read_text())["roles"]["student"]
        assert found["train_seconds"][1] < found["train_seconds"][0]


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    """Every image counts once in the statistics and sums, for tasks with an odd number of images."""
    recipe = make_recipe(tmp_path, teacher=None, distill=[], ce_weight=1.0)
    recipe["data"] |= {"max_train_per_class": 7, "classes_per_task": [3, 2, 1]}
    recipe["student"].update(SESSION)
    recipe["train"] |= {"optim": "sgd", "dataloader_drop_last": True}
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(file, "--output_dir", one, "--train.per_device_train_batch_size", 4)[0] == 0
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29547")
    code, output = train(file, "--output_dir", two, "--train.per_device_train_batch_size", 2, launcher=launcher)
    assert code == 0, output
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (one, two))
    assert ours["head.standard.count"] == theirs["head.standard.count"] == 21
    for name, value in ours.items():
        other = theirs[name]
        if value.dtype == torch.int64 and value.ndim:  # sums, in bits of float64
            value, other = value.view(torch.float64), other.view(torch.float64)
        torch.testing.assert_close(other, value, atol=2e-3, rtol=2e-3, msg=name)
