"""The distillation terms: when each is zero, what it ignores, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_contract import arguments, images, model_of, stream
from torch.nn import functional as F
from transformers import DeiTConfig, Dinov2WithRegistersConfig, IJepaConfig, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.distill import TERMS, Objective
from hf_cdl.distill.dist import pearson_distance
from hf_cdl.distill.objective import kd_loss, same_tokens
from hf_cdl.distill.similarity import similarities
from hf_cdl.runs.run import Run
from hf_cdl.types import CDLOutput, ModelShape

SHAPE = ModelShape(8, 3)
LABELS = torch.tensor([0, 3, 1, 2, 2, 0])


def term_of(name: str, student: ModelShape = SHAPE, teacher: ModelShape = SHAPE, **fields: Any) -> Any:
    set_seed(0)
    return TERMS[name](TERMS[name].config_class(**fields), student, teacher)


def logits(seed: int, classes: int = 4) -> torch.Tensor:
    return torch.randn(6, classes, generator=torch.Generator().manual_seed(seed)) * 2


def value(term: Any, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return term(CDLOutput(logits=student, kd_logits=student), CDLOutput(logits=teacher), labels)


OF_LOGITS = [("kd", {}), ("kd", {"standardise": True}), ("kdp", {}), ("kd_token", {}), ("dkd", {}), ("dist", {})]


@pytest.mark.parametrize(("name", "fields"), OF_LOGITS)
def test_terms_of_logits_are_zero_for_equal_logits_and_ignore_a_shift_of_a_row(name: str, fields: dict) -> None:
    term = term_of(name, **fields)
    ours, theirs, shift = logits(1), logits(2), torch.arange(6.0)[:, None]
    assert abs(value(term, theirs, theirs)) < 1e-5
    assert value(term, ours, theirs) > 0.1
    torch.testing.assert_close(value(term, ours + shift, theirs - shift), value(term, ours, theirs))


def test_kdp_labels_teaches_the_kd_head_the_labels() -> None:
    z = torch.randn(len(LABELS), 9)
    kd = torch.randn(len(LABELS), 9, requires_grad=True)
    term = term_of("kdp_labels", weight=0.25)
    output = CDLOutput(logits=z, kd_logits=kd)
    loss = Objective(0.75, [("kdp_labels", term)])(output, None, LABELS + 3, slice(3, 7))["loss"]
    expected = 0.75 * F.cross_entropy(z[:, 3:7], LABELS) + 0.25 * F.cross_entropy(kd[:, 3:7], LABELS)
    torch.testing.assert_close(loss, expected)


def test_label_smoothing_is_cross_entropy_to_labels_mixed_with_all_classes() -> None:
    """In the objective the weights combine: w CE(smoothed by epsilon) + (1 - w) CE smooths by w epsilon."""
    z = logits(1, classes=9)
    cut = z[:, 3:7]
    mixed = 0.7 * F.one_hot(LABELS, 4) + 0.3 / 4
    term = term_of("label_smoothing", weight=0.4, epsilon=0.3)
    torch.testing.assert_close(value(term, cut, cut), -(mixed * cut.log_softmax(1)).sum(1).mean())
    losses = Objective(0.6, [("label_smoothing", term)])(CDLOutput(logits=z), None, LABELS + 3, slice(3, 7))
    torch.testing.assert_close(losses["loss"], F.cross_entropy(cut, LABELS, label_smoothing=0.4 * 0.3))


def test_standardised_kd_ignores_the_scale_of_a_row_and_plain_kd_does_not() -> None:
    ours, theirs, scale = logits(1), logits(2), torch.arange(1.0, 7.0)[:, None]
    for standardise in (True, False):
        term = term_of("kd", standardise=standardise)
        scaled = value(term, ours * scale, theirs / scale)
        assert torch.isclose(scaled, value(term, ours, theirs), rtol=1e-4) == standardise


def test_pearson_s_distance_ignores_scale_and_shift_of_a_row_and_is_two_for_the_opposite() -> None:
    a, b, scale = logits(1), logits(2), torch.arange(1.0, 7.0)[:, None]
    torch.testing.assert_close(pearson_distance(3 * scale * a - scale, b), pearson_distance(a, b))
    torch.testing.assert_close(pearson_distance(-a, a), torch.tensor(2.0))
    want = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]).mean()
    torch.testing.assert_close(pearson_distance(a, b), want)


def test_dist_is_rows_plus_columns() -> None:
    ours, theirs = logits(1), logits(2)
    p, q = (torch.softmax(z / 3, dim=1) for z in (ours, theirs))
    want = 9 * (0.5 * pearson_distance(p, q) + 0.7 * pearson_distance(p.T, q.T))
    torch.testing.assert_close(value(term_of("dist", beta=0.5, gamma=0.7, temperature=3.0), ours, theirs), want)
    alone = value(term_of("dist", beta=2.0), ours[:1], theirs[:1], LABELS[:1])
    torch.testing.assert_close(alone, 2 * pearson_distance(*(torch.softmax(z[:1], dim=1) for z in (ours, theirs))))


def test_dkd_with_beta_one_minus_p_is_kd() -> None:
    """KL(p || q) = TCKD + (1 - p_y) NCKD, sample by sample, with the teacher's probability p_y of the label."""
    ours, theirs, tau = logits(1), logits(2), 4.0
    for row in range(6):
        z_s, z_t, y = ours[row : row + 1], theirs[row : row + 1], LABELS[row : row + 1]
        p = torch.softmax(z_t / tau, dim=1)[0, y].item()
        term = term_of("dkd", alpha=1.0, beta=1 - p, temperature=tau)
        torch.testing.assert_close(value(term, z_s, z_t, y), kd_loss(z_s, z_t, tau), atol=1e-6, rtol=1e-4)


def test_dkd_s_two_parts_see_the_label_and_the_others() -> None:
    theirs = logits(2)
    confident = theirs + 3 * F.one_hot(LABELS, 4)  # another score of the label alone
    assert value(term_of("dkd", alpha=0.0), confident, theirs) < 1e-5
    assert value(term_of("dkd", beta=0.0), confident, theirs) > 0.1
    huge = 1e4 * F.one_hot(LABELS, 4).float()
    assert torch.isfinite(value(term_of("dkd"), huge, -huge))


@pytest.mark.parametrize(("name", "fields"), [("dkd", {}), ("dist", {}), ("kd", {"standardise": True})])
def test_terms_that_compare_classes_refuse_a_task_of_one_class(name: str, fields: dict) -> None:
    with pytest.raises(ValueError, match=rf"The term {name}.* this task has 1\. Use larger tasks"):
        value(term_of(name, **fields), logits(1, classes=1), logits(2, classes=1), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("name", [name for name in TERMS if name != "kd"])
def test_impossible_fields_are_refused_by_the_term_s_name(name: str) -> None:
    with pytest.raises(ValueError, match="needs weight"):
        term_of(name, weight=-1.0)


# ---- terms on features ----


def test_similarity_is_the_mean_squared_difference_of_all_cosines() -> None:
    ours, theirs = torch.randn(5, 8) * 3 + 1, torch.randn(5, 12) - 2
    cosines = []
    for features in (ours, theirs):
        standard = (features - features.mean(0)) / features.std(0, correction=0)
        cosines.append([[F.cosine_similarity(a, b, dim=0) for b in standard] for a in standard])
    wanted = sum((cosines[0][i][j] - cosines[1][i][j]) ** 2 for i in range(5) for j in range(5)) / 25
    term = term_of("similarity", ModelShape(8, 3), ModelShape(12, 5))
    got = term(CDLOutput(features=ours), CDLOutput(features=theirs), LABELS)
    torch.testing.assert_close(got, torch.as_tensor(wanted))
    bent = theirs * torch.rand(12).add(0.1) + torch.randn(12)  # another scale and mean of each dimension
    torch.testing.assert_close(term(CDLOutput(features=ours), CDLOutput(features=bent), LABELS), got)
    turned = bent[:, torch.randperm(12)].repeat(1, 2)  # other coordinates, twice as wide
    assert term(CDLOutput(features=turned), CDLOutput(features=theirs), LABELS) < 1e-9


def test_similarity_has_a_finite_gradient_for_one_image_and_for_a_dimension_that_does_not_vary() -> None:
    term = term_of("similarity")
    for ours in (torch.randn(1, 8), torch.cat([torch.randn(6, 7), torch.ones(6, 1)], dim=1), torch.ones(6, 8)):
        ours.requires_grad_()
        term(CDLOutput(features=ours), CDLOutput(features=torch.randn(len(ours), 8)), LABELS).backward()
        assert ours.grad is not None and torch.isfinite(ours.grad).all()


def test_a_dimension_that_hardly_varies_is_divided_by_a_hundredth_of_the_mean_deviation() -> None:
    """By hand: deviations 1 and 0.001, so the second is divided by 0.005005 + 0.000001 and is 0.19976 of the first."""
    signs = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    features = signs * torch.tensor([1.0, 1e-3]) + torch.tensor([5.0, -2.0])
    unlike = (1 - 0.19976**2) / (1 + 0.19976**2)  # of two images that differ in it alone: 0.92327, not 0
    wanted = torch.tensor([[1, -unlike, unlike, -1], [-unlike, 1, -1, unlike]])
    torch.testing.assert_close(similarities(features)[:2], wanted, atol=1e-4, rtol=0)


# ---- terms on hidden states ----


def hidden(width: int, depth: int, tokens: int = 17, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, tokens, width, generator=generator) for _ in range(depth + 1))


def test_fitnets_is_zero_where_the_projection_hits_the_teacher() -> None:
    term = term_of("fitnets", ModelShape(8, 3), ModelShape(12, 5))
    states = hidden(8, 3)
    teacher = CDLOutput(hidden_states=(None, term.projection(states[-1]).detach()))
    assert term(CDLOutput(hidden_states=states), teacher, LABELS) == 0


@pytest.mark.parametrize(("ours", "theirs"), [(3, 5), (5, 3), (4, 4)])
def test_review_kd_compares_the_deepest_layers_of_any_depths(ours: int, theirs: int) -> None:
    term = term_of("review_kd", ModelShape(8, ours), ModelShape(12, theirs))
    student, teacher = hidden(8, ours), hidden(12, theirs, seed=1)
    count = min(ours, theirs)
    assert len(term.abf) == count
    assert term.needs == {role: tuple(range(-1, -count - 1, -1)) for role in ("student", "teacher")}
    whole = term(CDLOutput(hidden_states=student), CDLOutput(hidden_states=teacher), LABELS)
    kept = [(None,) * (len(states) - count) + states[-count:] for states in (student, teacher)]
    assert term(*(CDLOutput(hidden_states=states) for states in kept), LABELS) == whole
    parameters = list(term.parameters())
    gradients = torch.autograd.grad(whole, parameters, allow_unused=True)
    assert all(g is not None for g in gradients), "an unused parameter stops distributed training"


def test_other_numbers_of_tokens_are_matched_by_the_grid_of_patches() -> None:
    ramp = torch.arange(4.0).repeat(4)[None, :, None]  # a 4 x 4 grid, growing from left to right
    cls = torch.full((1, 1, 1), 9.0)
    ours, theirs = same_tokens(torch.cat([cls, ramp], dim=1), torch.zeros(1, 1 + 4, 1))
    assert ours.flatten().tolist() == [9.0, 0.5, 2.5, 0.5, 2.5] and theirs.shape == ours.shape
    ours, theirs = same_tokens(torch.cat([cls, ramp], dim=1), torch.zeros(1, 64, 1))  # a teacher without CLS
    assert ours.shape == theirs.shape == (1, 64, 1) and ours.min() == 0 and ours.max() == 3
    ours, theirs = same_tokens(ramp, torch.cat([cls, ramp], dim=1))
    assert torch.equal(ours, ramp) and torch.equal(theirs, ramp)
    same = torch.randn(2, 7, 3)
    assert same_tokens(same, same)[0] is same
    with pytest.raises(ValueError, match="7 of them are no square grid"):
        same_tokens(same, torch.randn(2, 5, 3))


def test_a_hidden_state_that_was_not_asked_for_is_a_clear_error() -> None:
    term = term_of("fitnets")
    with pytest.raises(ValueError, match="hidden state -1 was not computed"):
        term(CDLOutput(logits=logits(1)), CDLOutput(logits=logits(2)), LABELS)


COUNTS = {"fitnets": 1, "review_kd": 3}


@pytest.mark.parametrize("names", [["kd"], ["fitnets"], ["review_kd"], ["kdp", "fitnets"], ["fitnets", "review_kd"]])
def test_only_the_hidden_states_asked_for_are_kept(names: list[str], tmp_path: Path) -> None:
    """Of 3 layers; the KD token of kdp takes no part."""
    student = model_of("coda", width=32, kd_prompt={} if "kdp" in names else None)
    teacher = model_of("coda", width=48)
    task = next(stream())
    teacher.begin_task(task.class_names)
    terms = [(name, term_of(name, student.shape, teacher.shape)) for name in names]
    trainer = CDLTrainer(student, arguments(tmp_path, max_steps=1), objective=Objective(0.5, terms), teacher=teacher)
    kept: dict[str, Any] = {}
    for role, model in (("student", student), ("teacher", teacher)):
        model.register_forward_hook(lambda module, args, output, role=role: kept.__setitem__(role, output))
    trainer.learn(task)
    want = max(COUNTS.get(name, 0) for name in names)
    for output in kept.values():
        states = output.hidden_states
        assert (states is None) == (want == 0)
        found = [state for state in states or () if state is not None]
        assert len(found) == want and all(state.shape[1] == 17 for state in found)


@pytest.mark.parametrize("kind", [DeiTConfig, Dinov2WithRegistersConfig, IJepaConfig])
def test_hidden_states_are_cls_and_patches_in_every_family(kind: Any, tmp_path: Path) -> None:
    """A teacher of any family and patch size teaches a ViT student."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8}
    config = kind(hidden_size=24, image_size=16, **sizes)
    set_seed(0)
    teacher = CDLForImageClassification(CDLConfig(backbone_config=config))
    student = model_of("coda", kd_prompt={})
    for model in (teacher, student):
        model.begin_task(["cat", "dog"])
    ours = student(images(), output_hidden_states=True)
    theirs = teacher(images(), output_hidden_states=True)
    patches = 4 if kind is IJepaConfig else 5
    assert {state.shape[1] for state in theirs.hidden_states} == {patches}
    for name in COUNTS:
        loss = term_of(name, student.shape, teacher.shape)(ours, theirs, LABELS[:5])
        assert torch.isfinite(loss) and loss > 0


def test_the_hidden_state_is_the_layer_s_output_before_the_final_norm() -> None:
    model = model_of("coda", kd_prompt={}).eval()
    model.begin_task(["cat", "dog"])
    with torch.no_grad():
        output = model(images(), output_hidden_states=[-1])
        backbone: Any = model.backbone
        torch.testing.assert_close(backbone.layernorm(output.hidden_states[-1])[:, 0], output.features)


# ---- the terms' own layers ----


def trainer_of(folder: Path, run: Run, seed: int = 0, epochs: int = 2, student: Any = None) -> CDLTrainer:
    set_seed(seed)
    student = model_of("coda", width=32) if student is None else student
    teacher = model_of("coda", width=48)
    for task in stream():
        teacher.begin_task(task.class_names)
    terms = [("fitnets", term_of("fitnets", student.shape, teacher.shape, weight=1.0))]
    args = arguments(folder, num_train_epochs=epochs, save_strategy="epoch")
    return CDLTrainer(student, args, objective=Objective(0.5, terms), teacher=teacher, run=run)


def test_a_projector_is_trained_kept_for_resuming_and_left_out_of_the_student_s_files(tmp_path: Path) -> None:
    first, second = stream()
    whole = trainer_of(tmp_path, Run(tmp_path / "whole", {}))
    start = whole.objective.terms["fitnets"].projection.weight.detach().clone()  # type: ignore[union-attr]
    whole.learn(first)
    learnt = whole.objective.terms["fitnets"].projection.weight.detach().clone()  # type: ignore[union-attr]
    assert not torch.equal(start, learnt)
    whole.evaluate_seen()
    whole.learn(second)

    cut = trainer_of(tmp_path, Run(tmp_path / "cut", {}))
    cut.learn(first)
    run = cut.run
    assert run is not None
    folder: Any = run.checkpoint("student")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any("scaffold" in name or "fitnets" in name for name in file.keys())  # noqa: SIM118
    assert not any("scaffold" in path.name for path in run.folder.rglob("student/**/*"))

    # A new process between the tasks: the student from its files, the projector initialised again, then restored.
    resumed = trainer_of(tmp_path, run, student=CDLForImageClassification.from_pretrained(folder))
    with torch.no_grad():
        resumed.objective.terms["fitnets"].projection.weight.zero_()  # type: ignore[union-attr]
    resumed.learn(first)  # done: returns at once
    resumed.evaluate_seen()
    resumed.learn(second)
    want, got = whole.model.state_dict(), resumed.model.state_dict()
    assert any("scaffold" in name for name in want)
    assert all(torch.equal(value, got[name]) for name, value in want.items())
    assert sorted(path.name for path in (run.folder / "work" / "scaffold").iterdir()) == [
        "student-task-02.safetensors"
    ]


def test_a_phase_that_was_cut_off_goes_on_with_its_projector(tmp_path: Path) -> None:
    task = next(stream())
    whole = trainer_of(tmp_path, Run(tmp_path / "whole", {}))
    whole.learn(task)

    class Stop(Exception):
        pass

    cut = trainer_of(tmp_path, Run(tmp_path / "cut", {}))
    plain = cut.compute_loss

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if cut.state.global_step == 4:
            raise Stop
        return plain(*args, **kwargs)

    cut.compute_loss = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        cut.learn(task)
    assert cut.run is not None
    resumed = trainer_of(tmp_path, cut.run, seed=5)
    resumed.learn(task)
    want, got = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in want.items())
