"""KD token and prompts learn in sessions, by the terms that have a KD head; the fitted head reads that token too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import killed_and_taken, make_recipe, write_recipe
from safetensors.torch import load_file
from test_contract import SMALL, arguments, images, stream, vit
from torch.nn import functional as F
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.distill import TERMS, Objective

PARTS: dict[str, Any] = {
    "head": {"type": "ridge", "standardise": "first_task", "strength": 10.0},
    "first_session": {"type": "linear"},
}
TAUGHT = [name for name, term in TERMS.items() if "kd_prompt" in term.student_parts]
"""The terms that train a KD head on the KD token."""


def model_of(width: int = 32, **fields: Any) -> Any:
    set_seed(1)
    return CDLForImageClassification(CDLConfig(backbone_config=vit(width), **{**PARTS, **fields}))


def student_of(term: str, **fields: Any) -> Any:
    part = {"length": 4, **TERMS[term].student_parts["kd_prompt"]}
    return model_of(**{"prompt": {"type": "coda", **SMALL["coda"]}, "kd_prompt": part, **fields})


def trainer_of(folder: Path, term: str, student: Any, teacher: Any, ce_weight: float, **options: Any) -> CDLTrainer:
    set_seed(2)
    theirs: Any = None if teacher is None else teacher.shape
    made = TERMS[term](TERMS[term].config_class(), student.shape, theirs)
    return CDLTrainer(student, arguments(folder, **options), Objective(ce_weight, [(term, made)]), teacher=teacher)


@pytest.mark.parametrize("term", TAUGHT)
def test_the_term_alone_trains_the_token_and_the_head_reads_both_tokens(term: str, tmp_path: Path) -> None:
    student, teacher = student_of(term), model_of(48, first_session=None)
    teach = CDLTrainer(teacher, arguments(tmp_path / "t"), role="teacher")
    asked = teacher if TERMS[term].needs_teacher else None
    trainer = trainer_of(tmp_path / "s", term, student, asked, ce_weight=0.0, learning_rate=1e-2)
    parts = []
    for task in stream():
        before = student.kd_prompt.token.detach().clone()
        teach.learn(task)
        trainer.learn(task)
        assert (task.index == 0) != torch.equal(student.kd_prompt.token, before), "it learns in the first session"
        items = [task.train[i] for i in range(len(task.train))]
        parts.append((torch.stack([item["pixel_values"] for item in items]), [item["labels"] for item in items]))
    assert not any("kd_head" in name for name in student.state_dict())
    with torch.no_grad():
        found = [student.eval()(pixels) for pixels, _ in parts]
        whole = student._encode(parts[0][0], None, None)
    width = student.shape.hidden_size
    assert found[0].features.shape[1] == 2 * width and found[0].kd_logits is None
    torch.testing.assert_close(found[0].features[:, width:], whole.token)
    assert not torch.allclose(found[0].features[:, width:], found[0].features[:, :width], atol=1e-2)
    features = [output.features.double() for output in found]
    x = (torch.cat(features) - features[0].mean(0)) / features[0].std(0, unbiased=False)
    y = F.one_hot(torch.tensor([label for _, labels in parts for label in labels])).double()
    weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y)
    logits = torch.cat([output.logits for output in found])
    torch.testing.assert_close(logits.double() / 10, x @ weight, atol=1e-3, rtol=1e-3)


def test_in_a_session_each_head_has_its_token_and_tells_the_newest_classes_alone() -> None:
    student = student_of("kdp", later_sessions={"keep": 0.1})
    student.begin_task(["cat", "dog"])
    student.end_session()
    student.begin_task(["cow", "ewe", "pig"])
    with torch.no_grad():
        found = student.train()(images())
        whole = student._encode(images(), None, 1)
    assert found.logits.shape == found.kd_logits.shape == (len(images()), 5)
    assert found.logits[:, :2].isneginf().all() and found.kd_logits[:, :2].isneginf().all()
    width = student.shape.hidden_size
    torch.testing.assert_close(found.logits[:, 2:], student.session_head(whole.features[:, :width]))
    torch.testing.assert_close(found.kd_logits[:, 2:], student.session_kd_head(whole.token))
    trains = {name.split(".")[0] for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trains == {"pool", "kd_prompt", "session_head", "session_kd_head"}


def test_a_later_session_s_rate_is_a_share_of_the_kd_prompts_own() -> None:
    student = student_of("kdp", kd_prompt={"length": 4, "later_rate": 0.1}, later_sessions={"rate": 0.5})
    student.begin_task(["cat", "dog"])
    assert student.rates() == {}
    student.end_session()
    student.begin_task(["cow", "ewe"])
    rates = {name: student.rates().get(p) for name, p in student.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        want = {"kd_prompt": 0.05, "pool": 0.5}.get(name.split(".")[0])
        assert rate == (None if want is None else pytest.approx(want)), name


def test_its_teacher_s_prompts_go_on_changing_so_a_mapping_is_refused() -> None:
    mapped = {"prompt": {"type": "l2p", **SMALL["l2p"]}, "hidden_size": 32, "num_layers": 4}
    with pytest.raises(ValueError, match="and no prompt mapping"):
        model_of(mapping={}, teacher_pool=mapped)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_teacher_is_taken_over(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, distill=[{"type": "kdp", "weight": 0.5}], ce_weight=0.5)
    for role in ("teacher", "student"):
        recipe[role] |= {**PARTS, "later_sessions": {"keep": 0.1, "rate": 0.5}}
    recipe["train"]["num_train_epochs"] = 6
    file, whole = write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "whole"
    for folder in killed_and_taken(file, whole, "student-task-02", "in sessions, ridge head + kdp"):
        for part in ("teacher/task-02", "student/task-01", "student/task-03"):
            ours, theirs = (load_file(place / part / "model.safetensors") for place in (folder, whole))
            assert {*ours} == {*theirs}
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), (folder.name, part)
