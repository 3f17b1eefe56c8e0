"""Images without labels in the objective: who sees which images, and the masks, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_contract import images, model_of
from torch.nn import functional as F

from hf_cdl.distill import TERMS, Objective
from hf_cdl.distill.objective import TermConfig, first_images
from hf_cdl.distill.similarity import similarities
from hf_cdl.types import CDLOutput, ModelShape

SHAPE = ModelShape(8, 3)
LABELS = torch.tensor([3, 4])
"""Of the first two of six images; the task's classes are 3, 4 and 5."""
TASK = slice(3, 6)


def outputs() -> tuple[CDLOutput, CDLOutput]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        CDLOutput(
            logits=torch.randn(6, 8, generator=generator),
            kd_logits=torch.randn(6, 8, generator=generator),
            features=torch.randn(6, 5, generator=generator),
            prompt_loss=torch.tensor(0.25),
            similarities=((torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)),),
            hidden_states=(None, torch.randn(6, 5, 8, generator=generator)),
        )
        for _ in range(2)
    )
    return student, teacher


def term(name: str, **fields: Any) -> Any:
    return TERMS[name](TERMS[name].config_class(**fields), SHAPE, SHAPE)


def losses(*terms: tuple[str, Any], ce_weight: float = 1.0) -> dict[str, torch.Tensor]:
    return Objective(ce_weight, terms)(*outputs(), LABELS, TASK)


def test_cross_entropy_and_terms_that_need_labels_see_the_labelled_images_alone() -> None:
    blind = [name for name, kind in TERMS.items() if not kind.reads_unlabelled]
    assert {"dkd", "kdp_labels", "label_smoothing", "os_prompt"} <= {*blind}
    student, teacher = (first_images(output, 2) for output in outputs())
    for name in blind:
        mine = term(name)
        alone = Objective(1.0, [(name, mine)])(student, teacher, LABELS, TASK)
        both = losses((name, mine))
        assert all(torch.equal(both[key], alone[key]) for key in alone), name
    assert losses()["ce"] == F.cross_entropy(outputs()[0].logits[:2, TASK], LABELS - 3)
    assert losses()["prompt"] == 0.25


def test_terms_that_can_do_without_labels_take_the_mean_over_both() -> None:
    student, teacher = outputs()
    kl = F.kl_div(
        (student.logits[:, TASK] / 2).log_softmax(1), (teacher.logits[:, TASK] / 2).softmax(1), reduction="none"
    ).sum(1)
    torch.testing.assert_close(losses(("kd", term("kd")))["kd"], 4 * kl.mean())
    torch.testing.assert_close(
        losses(("similarity", term("similarity")))["similarity"],
        F.mse_loss(similarities(student.features), similarities(teacher.features)),
    )


def test_a_threshold_masks_unlabelled_images_of_which_the_teacher_is_not_sure() -> None:
    """By hand: the teacher says 0.9 / 0.1, 0.5 / 0.5, 0.7 / 0.3, 0.2 / 0.8; the first image has a label."""
    theirs = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.2, 0.8]]).log()
    ours = torch.zeros(4, 2)  # one half each
    divergence = [sum(p * math.log(2 * p) for p in row) for row in theirs.exp().tolist()]
    student, teacher = CDLOutput(logits=ours, kd_logits=ours), CDLOutput(logits=theirs)
    labels = torch.tensor([1])
    for threshold, counted in ((0.0, [0, 1, 2, 3]), (0.65, [0, 2, 3]), (0.75, [0, 3]), (0.95, [0])):
        wanted = sum(divergence[i] for i in counted) / 4
        for name in ("kd", "kdp", "kd_token", "prompt_mapping"):
            found = term(name, temperature=1.0, threshold=threshold)(student, teacher, labels)
            assert found.item() == pytest.approx(wanted, abs=1e-6), (name, threshold)
    sharp = CDLOutput(logits=torch.tensor([[0.0, 9.0], [2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]))
    each = [math.log(1 + math.exp(-gap)) for gap in (2.0, 1.0, 3.0)]  # the classes are 0 (of a tie), 0 and 1
    for threshold, counted in ((0.0, [0, 1, 2]), (0.65, [1, 2]), (0.75, [2]), (0.95, [])):
        found = term("pseudo_labels", threshold=threshold)(sharp, teacher, labels)
        assert found.item() == pytest.approx(sum(each[i] for i in counted) / 3, abs=1e-6), threshold


def test_a_masked_image_gives_no_gradient_and_the_teacher_none_at_all() -> None:
    student, teacher = outputs()
    ours, theirs = student.logits[:, TASK].requires_grad_(), teacher.logits[:, TASK].requires_grad_()
    sure = theirs.softmax(1).amax(1)
    threshold = sure[2:].sort().values[1:3].mean().item()
    for name, first in (("kd", 0), ("pseudo_labels", 2)):
        loss = term(name, threshold=threshold)(CDLOutput(logits=ours), CDLOutput(logits=theirs.detach()), LABELS)
        (gradient,) = torch.autograd.grad(loss, ours)
        learnt = [number >= first and (number < 2 or sure[number] >= threshold) for number in range(6)]
        assert (gradient.abs().sum(1) > 0).tolist() == learnt and 0 < sum(learnt[2:]) < 4, name


def test_the_share_of_images_that_count_is_logged_and_no_loss() -> None:
    teacher = outputs()[1].logits[2:, TASK].softmax(1).amax(1)
    for threshold in (teacher.min().item() + 1e-4, teacher.max().item() + 1e-4):
        found = losses(("kd", term("kd", weight=1.0, threshold=threshold)))
        assert found["kd/counted"] == (teacher >= threshold).float().mean()
        torch.testing.assert_close(found["loss"], found["ce"] + found["prompt"] + found["kd"])
    assert "kd/counted" not in losses(("kd", term("kd")))


def test_thresholds_are_probabilities() -> None:
    for name in ("kd", "kdp", "pseudo_labels"):
        for wrong in (-0.1, 1.5):
            with pytest.raises(ValueError, match="threshold from 0 to 1"):
                term(name, threshold=wrong)


def test_an_objective_says_what_needs_unlabelled_images() -> None:
    terms = [("kd", term("kd", threshold=0.5)), ("pseudo_labels", term("pseudo_labels")), ("dkd", term("dkd"))]
    assert Objective(1.0, terms).needs_unlabelled == ["kd.threshold", "pseudo_labels"]
    assert Objective(1.0, terms).reads_unlabelled
    assert not Objective(1.0, [("kd", term("kd", weight=0.0)), ("dkd", term("dkd"))]).reads_unlabelled


def test_a_class_that_reads_them_has_a_teacher() -> None:
    class Alone(TERMS["kd"]):
        needs_teacher = False

    class Blind(TERMS["dkd"]):
        needs_unlabelled = True

    assert "reads_unlabelled" in (Alone.check_class() or "") and "needs_unlabelled" in (Blind.check_class() or "")
    assert TermConfig().weight == 1.0


@pytest.mark.parametrize("query", ["two_pass", "one_pass"])
@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda"])
def test_the_pool_s_own_loss_is_of_the_labelled_images(method: str, query: str) -> None:
    """The keys of a task are drawn to its own images; the prompts of all images are chosen as ever."""
    model = model_of(method, query=query)
    model.begin_task(["a", "b"])
    model.train()
    whole, some = (model(images(), task_id=0, **more) for more in ({}, {"labelled": 2}))
    assert torch.equal(whole.logits, some.logits)
    alone = model(images()[:2], task_id=0)
    if method != "coda":  # whose penalty is of its parameters alone, and off
        torch.testing.assert_close(some.prompt_loss, alone.prompt_loss)
        assert not torch.allclose(some.prompt_loss, whole.prompt_loss)
