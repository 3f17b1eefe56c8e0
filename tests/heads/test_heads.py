"""Heads: the contract of all of them (iterates HEADS), and that fitted ones equal the joint solution of all tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import python, thinned
from safetensors.torch import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_contract import CLASSES, arguments, images, stream, vit
from torch.nn import functional as F
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer
from hf_cdl.heads import HEADS, build_head
from hf_cdl.heads.base import FittedConfig, FittedHead
from hf_cdl.heads.calibration import RecentImages, fit_scale
from hf_cdl.heads.class_means import NearestMeanHead
from hf_cdl.heads.lda import LdaConfig
from hf_cdl.heads.validation import directions

# Fields that a head is tested with, in addition to its defaults.
VARIANTS: list[dict[str, Any]] = [
    *({"type": kind} for kind in HEADS),
    *({"type": kind, "standardise": "first_task"} for kind in HEADS),
    {"type": "cosine", "scale": 4.0, "learn_scale": False},
    {"type": "ridge", "features": 40, "standardise": "first_task", "strength": 0.1},
    {"type": "ridge", "sums": "per_class", "features": 30, "own_features": True},
    {"type": "ridge", "strength": "auto", "scale": "auto", "balanced": True},
    {"type": "lda", "features": 40, "standardise": "first_task", "shrinkage": 0.5},
]
FITTED, TRAINED = ([head for head in VARIANTS if HEADS[head["type"]].fitted == fitted] for fitted in (True, False))


def name_of(head: dict[str, Any]) -> str:
    return " ".join(map(str, head.values()))


def model_with(head: dict[str, Any], **fields: Any) -> CDLForImageClassification:
    set_seed(1)
    return CDLForImageClassification(CDLConfig(backbone_config=vit(32), head=head, **fields))


def learnt(head: dict[str, Any], folder: Path, **fields: Any) -> CDLTrainer:
    """A model with that head that has learnt two tasks."""
    trainer = CDLTrainer(model_with(head, **fields), arguments(folder))
    for task in stream():
        trainer.learn(task)
    trainer.model.eval()
    return trainer


# ---- every head ----


@pytest.mark.parametrize("head", thinned(VARIANTS, 3), ids=name_of)
@pytest.mark.filterwarnings("ignore")  # torch.export warns about its own internals
def test_a_head_learns_two_tasks_and_is_exported(head: dict[str, Any], tmp_path: Path) -> None:
    trainer = learnt(head, tmp_path)
    task = trainer.seen[-1]
    pixels = torch.stack([task.train[i]["pixel_values"] for i in range(len(task.train))])
    labels = torch.tensor([task.train[i]["labels"] for i in range(len(task.train))])
    with torch.no_grad():
        logits = trainer.model(pixels).logits[:, task.classes]
    assert (logits.argmax(-1) == labels - task.first_class).float().mean() > 0.7  # of two classes
    model = trainer.model
    with torch.no_grad():
        whole = model(images()).logits
        alone = torch.cat([model(image[None]).logits for image in images()])
    assert (alone - whole).abs().max() < 5e-6 * whole.abs().max()  # ten times what rounding leaves
    model.requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes={"pixel_values": {0: batch}})
    torch.testing.assert_close(program.module()(images(5))["logits"], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", TRAINED, ids=name_of)
def test_a_second_task_trains_its_own_block_and_what_is_shared(head: dict[str, Any]) -> None:
    model = model_with(head).train()
    for names in CLASSES:
        model.begin_task(names)
    model(images()).logits.square().sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("head.blocks.0") for name in names)
    assert any(name.startswith("head.blocks.1") for name in names)


LOADER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from test_heads import new_task
from hf_cdl import CDLForImageClassification
torch.set_num_threads(int(sys.argv[2]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = CDLForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        before = model(load_file(folder / "images.safetensors")["images"]).logits
    save_file({"before": before, "after": new_task(model)}, folder / "logits.safetensors")
"""


def new_task(model: Any) -> torch.Tensor:
    """The logits after one more task."""
    set_seed(5)
    model.begin_task(["fox", "hen"])
    if model.fitted:
        features = torch.randn(9, 32, generator=torch.Generator().manual_seed(4))
        model.head.accumulate(features, model.num_labels - 2 + torch.arange(9) % 2)
    model.end_task()
    with torch.no_grad():
        return model.eval()(images()).logits


@pytest.mark.slow
def test_a_loaded_head_answers_and_grows_in_another_process_as_if_never_saved(tmp_path: Path) -> None:
    want = {}
    for head in VARIANTS:
        name, model = name_of(head), learnt(head, tmp_path / "work").model
        folder = tmp_path / "models" / name
        model.save_pretrained(folder)
        save_file({"images": images()}, folder / "images.safetensors")
        with torch.no_grad():
            want[name] = {"before": model(images()).logits, "after": new_task(model)}
    python(LOADER, tmp_path / "models", torch.get_num_threads())
    for name, logits in want.items():
        found = load_file(tmp_path / "models" / name / "logits.safetensors")
        assert torch.equal(found["before"], logits["before"]), name
        assert torch.equal(found["after"], logits["after"]), name


def test_a_ridge_head_without_its_sums_answers_as_before_and_cannot_learn(tmp_path: Path) -> None:
    model = learnt({"type": "ridge", "features": 200, "standardise": "first_task"}, tmp_path / "work").model
    for name in ("whole", "small"):
        model.save_pretrained(tmp_path / name)
        model.drop_sums()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "small")]
    assert sizes[0] - sizes[1] > 8 * 200 * 200
    small = CDLForImageClassification.from_pretrained(tmp_path / "small").eval()
    whole = CDLForImageClassification.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        assert torch.equal(small(images()).logits, whole(images()).logits)
    for one in (model, small):
        with pytest.raises(
            ValueError, match="can answer, but learn no further task. Load the checkpoint that still has"
        ):
            one.begin_task(["fox"])
    small.save_pretrained(tmp_path / "again")  # it stays one without them
    assert not CDLForImageClassification.from_pretrained(tmp_path / "again").head.config.sums
    assert new_task(whole).shape[-1] == len(small.config.id2label) + 2
    with pytest.raises(ValueError, match="Only a ridge or lda head keeps such sums; this one is ncm"):
        model_with({"type": "ncm"}).drop_sums()


@pytest.mark.parametrize(
    "head",
    [{"type": "ridge", "strength": "auto", "scale": "auto", "features": 40, "own_features": True}, {"type": "lda"}],
)
@pytest.mark.parametrize("sums", [True, "per_class"])
def test_what_a_head_chose_outlives_its_sums(head: dict[str, Any], sums: bool | str, tmp_path: Path) -> None:
    model = learnt({**head, "sums": sums}, tmp_path / "work").model
    chosen, want = model.head.choices(), model(images()).logits
    model.drop_sums()
    model.save_pretrained(tmp_path / "small")
    small = CDLForImageClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(small(images()).logits, want)
    assert small.head.choices() == chosen and all(chosen.values())  # type: ignore[operator]
    kept = {name.rpartition(".")[2] for name, value in small.head.named_buffers() if not value.is_floating_point()}
    assert kept == {"chosen"}, "of the sums nothing is left"


@pytest.mark.parametrize(
    ("fields", "has_teacher", "wrong"),
    [
        ({}, False, []),
        ({"strength": 10.0, "soft_targets": 0.5, "sums": True}, True, []),
        ({"strength": 10.0, "soft_targets": 0.5}, False, ["soft_targets"]),
        ({"soft_targets": "half", "sums": False}, False, ["soft_targets", "sums"]),
    ],
)
def test_a_head_says_what_is_wrong_with_a_recipe(fields: dict[str, Any], has_teacher: bool, wrong: list[str]) -> None:
    assert [field for field, _ in HEADS["ridge"].check_recipe(fields, has_teacher)] == wrong
    assert all(kind.check_recipe({}, has_teacher) == [] for kind in HEADS.values())


def test_a_teacher_s_answers_are_probabilities_and_a_fitted_one_s_the_scores_without_their_scale() -> None:
    head: Any = build_head({"type": "ridge", "strength": 10.0, "soft_targets": 0.5, "temperature": 2.0}, 4)
    logits = torch.tensor([[2.0, 4.0], [0.0, -6.0]])
    odds = torch.tensor([[1.0, torch.e], [torch.e**3, 1.0]])
    torch.testing.assert_close(head.targets(logits, None), odds / odds.sum(-1, keepdim=True))
    fitted: Any = build_head({"type": "ncm", "scale": 4.0}, 4)
    assert torch.equal(head.targets(logits, fitted), torch.tensor([[0.5, 1.0], [0.0, -1.5]]))


def test_a_checkpoint_holds_all_fields_of_its_head() -> None:
    config = model_with({"type": "ridge", "strength": 7.0}).config
    fields = {"strength": 7.0, "features": None, "standardise": None, "soft_targets": 0.0, "temperature": 1.0}
    fields |= {"own_features": False, "balanced": False, "known": None}
    assert config.head == {"type": "ridge", "scale": 10.0, "sums": True, **fields}
    with pytest.raises(ValueError, match="Head type 'ridge' has no field lambda; it has standardise, scale, "):
        build_head({"type": "ridge", "lambda": 1}, 8)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"type": "linear", "standardise": "always"}, "standardise is 'always'; allowed: null, first_task"),
        ({"type": "cosine", "scale": 0.0}, "needs scale > 0; got 0.0"),
        ({"type": "ncm", "scale": 0.0}, "needs scale > 0 or auto; got 0.0"),
        ({"type": "ridge", "strength": 0.0}, "needs strength > 0 or auto; got 0.0"),
        ({"type": "ridge", "features": 0}, "needs features >= 1 or null; got 0"),
        ({"type": "ridge", "own_features": True}, "own_features would have no effect"),
        ({"type": "ridge", "sums": "some"}, "sums are 'some'; allowed: true, false, per_class"),
        ({"type": "ridge", "strength": "much"}, "strength is 'much'; allowed: "),
        ({"type": "ridge", "soft_targets": 0.5}, "Give the strength as a number, or leave soft"),
        ({"type": "lda", "shrinkage": 0.0}, "needs shrinkage above 0 to 1, or auto; got 0.0"),
    ],
)
def test_impossible_options_are_refused(head: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_head(head, 8)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("head", [*FITTED, {"type": "linear", "standardise": "first_task"}], ids=name_of)
def test_features_that_are_no_numbers_are_named_and_not_the_strength(head: dict[str, Any], number: float) -> None:
    built: Any = build_head(head, 8)
    built.add_task(2)
    built.init_shared()
    built.init_task(0)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    features = torch.randn(6, 8)
    features[2, 3] = features[5, 0] = number
    fit_to = built.accumulate if isinstance(built, FittedHead) else lambda x, _: built.standard.measure(x)
    with pytest.raises(FloatingPointError, match="features of 2 of 6 images are NaN or infinite"):
        fit_to(features, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items()), "nothing was added"


def test_what_is_no_number_never_becomes_a_solution_of_ridge() -> None:
    built: Any = build_head({"type": "ridge", "strength": 10.0, "soft_targets": 0.5}, 4)
    built.add_task(2)
    features, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    with pytest.raises(FloatingPointError, match="The teacher's answers are NaN or infinite"):
        built.accumulate(features, labels, torch.full((6, 2), float("nan")))
    built.accumulate(features, labels, torch.full((6, 2), 0.5))
    built.gram.view(torch.float64)[1, 2] = float("inf")
    with pytest.raises(FloatingPointError, match="sums of the ridge head are NaN or infinite in 1 of 5 tensors: gram"):
        built.end_task()


# ---- the fitted ones are the joint solution ----


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """300 features of 10 classes, anisotropic and far from zero, so that the Gram matrix is badly conditioned."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (300,), generator=generator)
    centres = torch.randn(10, 24, generator=generator)
    mix = torch.randn(24, 24, generator=generator) * torch.logspace(-3, 2, 24)
    return (centres[labels] + torch.randn(300, 24, generator=generator)) @ mix + 30, labels


def build_fitted(head: dict[str, Any]) -> FittedHead:
    built = build_head(head, 24)
    assert isinstance(built, FittedHead)
    return built


def fit(
    head: dict[str, Any], tasks: Iterator[list[int]] | list[list[int]], batch: int = 32
) -> tuple[FittedHead, list[int]]:
    """A head fitted to the data, task by task; and its classes in the order of its logits."""
    features, labels = data()
    set_seed(3)
    built = build_fitted(head)
    built.init_shared()
    if built.standard is not None:
        built.standard.measure(features[:100])
    order: list[int] = []
    for task in tasks:
        built.add_task(len(task))
        built.init_task(len(built.blocks) - 1)
        own = torch.cat([(labels == c).nonzero()[:, 0] for c in task])
        own = own[torch.randperm(len(own))]
        for rows in own.split(batch):
            built.accumulate(features[rows], torch.tensor([(order + task).index(c) for c in labels[rows].tolist()]))
        built.end_task()
        order = [*order, *task]
    return built, order


def joint(head: FittedHead) -> torch.Tensor:
    """(300, 10) scores of a head that learns all data at once, computed without the head's own sums.

    Ridge by least squares, lda by scikit-learn.
    """
    features, labels = data()
    mapped = head.prepare(features).double()
    if head.config_class is LdaConfig:
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=head.choice_made)
        theirs.fit(mapped.numpy(), labels.numpy())
        return torch.from_numpy(theirs.decision_function(mapped.numpy()) - np.log(theirs.priors_))  # ours are equal
    if head.config_class is FittedConfig:
        means = torch.stack([mapped[labels == c].sum(0) for c in range(10)])
        return mapped @ F.normalize(means, dim=-1).T
    root = head.choice_made**0.5  # type: ignore[operator]
    stacked = torch.cat([mapped, root * torch.eye(mapped.shape[1], dtype=torch.float64)])
    targets = torch.cat([F.one_hot(labels, 10), torch.zeros(mapped.shape[1], 10, dtype=torch.int64)])
    weight = torch.linalg.lstsq(stacked, targets.double(), driver="gelsd").solution
    counts = labels.bincount().double().sqrt()
    return mapped @ (weight * counts.mean() / counts if head.config.balanced else weight)


@pytest.mark.parametrize("count", [1, 2, 5, 10])
@pytest.mark.parametrize("head", FITTED, ids=name_of)
def test_the_tasks_and_their_order_do_not_matter(head: dict[str, Any], count: int) -> None:
    features, _ = data()
    for seed in range(3):
        classes = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
        built, order = fit({**head, "scale": 1.0}, [classes[i::count] for i in range(count)])
        want = joint(built)[:, order]
        error = (built(features) - want).abs().max() / want.abs().max()
        assert error < 1e-5, f"order {order}: {error}"


def test_soft_targets_are_a_share_of_the_targets_whatever_the_tasks() -> None:
    """Within each task the teacher's outputs replace a fraction of the labels; nothing changes beyond the task."""
    features, labels = data()
    answers = torch.randn(300, 10, generator=torch.Generator().manual_seed(5)).softmax(dim=-1)
    head = build_fitted({"type": "ridge", "strength": 10.0, "soft_targets": 0.3})
    targets = torch.zeros(300, 10, dtype=torch.float64)
    for number, task in enumerate(([0, 1, 2, 3], [4, 5, 6, 7, 8, 9])):
        head.add_task(len(task))
        head.init_task(number)
        own = torch.cat([(labels == c).nonzero()[:, 0] for c in task])
        local = labels[own] - task[0]
        head.accumulate(features[own], labels[own], answers[own][:, task])
        head.end_task()
        targets[own, task[0] : task[-1] + 1] = (
            0.7 * F.one_hot(local, len(task)).double() + 0.3 * answers[own][:, task].double()
        )
    root = torch.cat([features.double(), 10**0.5 * torch.eye(24, dtype=torch.float64)])
    want = torch.linalg.lstsq(root, torch.cat([targets, torch.zeros(24, 10)]), driver="gelsd").solution
    torch.testing.assert_close(head(features).double() / 10, features.double() @ want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"soft_targets is 0\.3, but there are no answers of a teacher"):
        head.accumulate(features, labels)


def test_float32_sums_would_not_do() -> None:
    """The test data are hard enough to show it: the solution from a Gram matrix in float32 is wrong."""
    features, labels = data()
    head, order = fit({"type": "ridge", "strength": 0.1}, [list(range(10))])
    gram = features.T @ features + 0.1 * torch.eye(24)
    weight = torch.linalg.solve(gram, features.T @ F.one_hot(labels, 10).float())
    want = joint(head)
    assert (features @ weight - want).abs().max() / want.abs().max() > 1e-4


@pytest.mark.parametrize("head", FITTED, ids=name_of)
def test_the_scale_makes_the_scores_logits_and_moves_no_answer(head: dict[str, Any]) -> None:
    features, labels = data()
    plain, _ = fit({**head, "scale": 1.0}, [list(range(10))])
    scaled, _ = fit({**head, "scale": 4.0}, [list(range(10))])
    assert torch.equal(4 * plain(features), scaled(features))
    usual, order = fit(head, [list(range(10))])
    right = (usual(features).argmax(dim=-1) == labels).float().mean()
    off = [(model(features).softmax(dim=-1).amax(dim=-1).mean() - right).abs() for model in (plain, usual)]
    assert off[1] < max(off[0] / 2, 0.05), "the confidence is nearer to the accuracy"


@pytest.mark.parametrize("head", FITTED, ids=name_of)
def test_its_size_does_not_depend_on_the_number_of_images(head: dict[str, Any]) -> None:
    built, _ = fit(head, [list(range(10))])
    before = {name: value.shape for name, value in built.state_dict().items()}
    for _ in range(5):
        built.accumulate(data()[0], data()[1])
    assert {name: value.shape for name, value in built.state_dict().items()} == before
    assert not list(built.parameters())


def test_a_change_of_dtype_does_not_round_what_ridge_has_summed() -> None:
    kept, _ = fit({"type": "ridge"}, [[0, 1, 2], [3, 4]])
    cast, _ = fit({"type": "ridge"}, [[0, 1, 2], [3, 4]])
    cast.to(torch.bfloat16).to(torch.float32)
    for head in (kept, cast):
        head.end_task()
    assert torch.equal(kept(data()[0]), cast(data()[0]))


def test_a_strength_that_is_too_small_for_the_features_is_refused() -> None:
    head = build_fitted({"type": "ridge", "strength": 1e-12})
    head.add_task(2)
    head.accumulate(torch.full((4, 24), 1e4), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(FloatingPointError, match="strength 1e-12 is too small .* raise head.strength"):
        head.end_task()


@pytest.mark.parametrize("count", [12, 60, 300])
def test_the_strength_is_that_of_the_least_generalised_cross_validation(count: int) -> None:
    """Against the definition, by the hat matrix of the images, also for fewer images than features."""
    features, labels = data()
    features = (features[:count] - features.mean(0)) / features.std(0) + torch.randn(count, 24)
    head: Any = build_fitted({"type": "ridge", "strength": "auto"})
    head.add_task(10)
    head.init_shared()
    head.accumulate(features, labels[:count])
    head.end_task()
    x, y = features.double(), F.one_hot(labels[:count], 10).double()

    def error(strength: float) -> float:
        hat = x @ torch.linalg.solve(x.T @ x + strength * torch.eye(24).double(), x.T)
        left = torch.eye(count).double() - hat
        if left.diagonal().sum() < count / 2:
            return float("inf")
        return ((left @ y).square().sum() / left.diagonal().sum().square()).item()

    tried = {10 ** (step / 4): error(10 ** (step / 4)) for step in range(-12, 17)}
    best = max(strength for strength, found in tried.items() if found <= 1.001 * min(tried.values())) / 2
    assert head.choice_made == pytest.approx(best)
    assert head.choices() == {"strength": head.choice_made}
    weight = torch.linalg.solve(x.T @ x + best * torch.eye(24).double(), x.T @ y).T
    torch.testing.assert_close(head.blocks[0].weight.double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "different"), [(1, 1), (7, 7), (20, 9), (30, 30)])
def test_few_images_have_the_directions_of_their_gram_matrix(count: int, different: int) -> None:
    """Also if some are the same; and nothing else that is drawn changes."""
    before = torch.get_rng_state()
    x = torch.randn(different, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.repeat(-(-count // different), 1)[:count]
    gram = x.T @ x
    values, vectors = directions(gram, count)
    assert len(values) == count, "not all 60"
    torch.testing.assert_close(values, torch.linalg.eigvalsh(gram)[-count:], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64))
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, gram, atol=1e-9, rtol=1e-9)
    assert torch.equal(torch.get_rng_state(), before)


def test_balanced_weights_answer_a_class_of_few_images_as_often_as_the_others() -> None:
    """Three images of one class against sixty of each other one, all of the same spread."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(4, 24, generator=generator)

    def images(count: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.repeat_interleave(torch.arange(4), torch.tensor(count))
        return centres[labels] + 0.7 * torch.randn(len(labels), 24, generator=generator), labels

    learnt, (test, labels) = images([60, 60, 60, 3]), images([200] * 4)
    recall = {}
    for balanced in (False, True):
        head = build_fitted({"type": "ridge", "strength": 10.0, "balanced": balanced})
        head.add_task(4)
        head.init_shared()
        head.accumulate(*learnt)
        head.end_task()
        right = head(test).argmax(dim=1) == labels
        recall[balanced] = [float(right[labels == c].float().mean()) for c in range(4)]
    assert recall[False][3] < 0.3 < 0.8 < recall[True][3]
    assert min(recall[True][:3]) > 0.8
    equal, plain = (fit({"type": "ridge", "balanced": balanced}, [[0, 1], [2, 3]])[0] for balanced in (True, False))
    features, _ = data()
    counts = torch.cat([block.count for block in plain.blocks]).double().sqrt()  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(
        equal(features).double(), plain(features).double() * counts.mean() / counts, atol=1e-4, rtol=0
    )


def test_own_and_random_features_side_by_side() -> None:
    features, _ = data()
    both, alone = (
        fit({"type": "ridge", "features": 30, "own_features": own}, [list(range(10))])[0] for own in (True, False)
    )
    ours = both.prepare(features)
    torch.testing.assert_close(ours[:, :24], features * (4 * 30 / (2 * 24)) ** 0.5)
    assert torch.equal(ours[:, 24:], alone.prepare(features))


# ---- confidence ----


@pytest.mark.parametrize("head", FITTED, ids=name_of)
def test_leave_one_out_scores_are_those_of_heads_fitted_without_the_image(head: dict[str, Any]) -> None:
    """Up to the shrinkage of lda and the counts of balanced weights, which the image has a small part in."""
    features, labels = data()
    loose = head["type"] == "lda" or head.get("balanced")
    fixed = {"strength": 5.0} if head["type"] == "ridge" else {"shrinkage": 0.3} if head["type"] == "lda" else {}
    built, order = fit({**head, "scale": 1.0, **fixed}, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    assert order == [*range(10)]
    rows = torch.arange(0, 300, 23)
    found = built.leave_one_out(built.prepare(features[rows]), labels[rows])
    for row, scores in zip(rows.tolist(), found, strict=True):
        built.accumulate(features[[row]], labels[[row]], sign=-1)
        built.end_task()
        want = built(features[[row]])[0].double()
        built.accumulate(features[[row]], labels[[row]])
        assert (scores.double() - want).abs().max() < (0.03 if loose else 2e-4) * want.abs().max()


@pytest.mark.parametrize("head", FITTED, ids=name_of)
def test_a_scale_that_is_fitted_makes_the_confidence_the_accuracy(head: dict[str, Any]) -> None:
    """On images that the head has not seen, whatever the size of its scores."""
    features, labels = data()
    noisy = features + 8 * torch.randn(features.shape, generator=torch.Generator().manual_seed(7)) * features.std(0)
    set_seed(3)
    built = build_fitted({**head, "scale": "auto"})
    built.init_shared()
    if built.standard is not None:
        built.standard.measure(noisy[:200])
    for number, task in enumerate(([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])):
        built.add_task(5)
        built.init_task(number)
        own = torch.tensor([c in task for c in labels[:200].tolist()])
        built.accumulate(noisy[:200][own], labels[:200][own])
        built.end_task()
    assert built.choices()["scale"] == pytest.approx(float(built.scale))
    probability = built(noisy[200:]).softmax(dim=-1)
    confidence, answer = probability.max(dim=-1)
    assert abs(confidence.mean() - (answer == labels[200:]).float().mean()) < 0.15


def test_the_fitted_scale_makes_the_mean_confidence_the_accuracy_and_a_few_images_move_it_little() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (2000,), generator=generator)
    scores = torch.randn(2000, 4, generator=generator) * 0.1 + 0.1 * F.one_hot(labels, 4)
    confidence = (fit_scale(scores, labels) * scores).softmax(dim=1).amax(dim=1).mean()
    assert float(confidence) == pytest.approx(float((scores.argmax(dim=1) == labels).float().mean()), abs=1e-3)
    head: Any = build_fitted({"type": "ncm", "scale": "auto"})
    head.add_task(10)
    head.init_task(0)
    head.accumulate(*data())
    head.end_task()
    before = float(head.scale)
    head.accumulate(data()[0][:5], (data()[1][:5] + 1) % 10)
    head.end_task()
    assert 0.7 * before < float(head.scale) < before


def test_a_head_without_leave_one_out_scores_has_no_fitted_scale() -> None:
    class Own(NearestMeanHead):
        leave_one_out = FittedHead.leave_one_out

    Own(FittedConfig(scale=2.0), 8)
    with pytest.raises(ValueError, match="Own has no leave_one_out scores, which scale: auto is fitted to"):
        Own(FittedConfig(scale="auto"), 8)


def test_features_kept_for_the_scale_are_thinned_evenly() -> None:
    recent = RecentImages()
    for start in range(0, 90_000, 1000):
        recent.add(torch.arange(start, start + 1000)[:, None].float(), torch.arange(start, start + 1000))
    features, labels = recent.take() or pytest.fail("nothing kept")
    assert torch.equal(features[:, 0].long(), labels)
    assert 10_000 <= len(labels) <= 20_000
    assert labels.diff().unique().tolist() == [8]
    assert recent.take() is None


@pytest.mark.parametrize("head", FITTED, ids=name_of)
def test_logits_with_a_fitted_scale_keep_the_order_of_the_scores(head: dict[str, Any]) -> None:
    features, labels = data()
    plain, _ = fit({**head, "scale": 1.0}, [list(range(10))])
    auto, _ = fit({**head, "scale": "auto"}, [list(range(10))])
    scores, logits = plain(features), auto(features)
    assert torch.equal(scores.argsort(dim=1), logits.argsort(dim=1))
    assert logits.mean(dim=1).abs().max() < 1e-2 * logits.std()


# ---- standardised features ----


@pytest.mark.parametrize("kind", HEADS)
def test_statistics_are_the_first_task_s_and_stay(kind: str, tmp_path: Path) -> None:
    trainer = CDLTrainer(model_with({"type": kind, "standardise": "first_task"}), arguments(tmp_path, bf16=False))
    first, second = stream()
    trainer.learn(first)
    standard: Any = trainer.model.head.standard
    pixels = torch.stack([first.train[i]["pixel_values"] for i in range(len(first.train))])
    with torch.no_grad():
        features = trainer.model(pixels).features  # the backbone is frozen and has no prompts
    torch.testing.assert_close(standard.mean, features.mean(0))
    torch.testing.assert_close(standard.std, features.std(0, unbiased=False))
    assert standard.count == len(pixels)
    before = {name: value.clone() for name, value in standard.state_dict().items()}
    trainer.learn(second)
    assert all(torch.equal(value, before[name]) for name, value in standard.state_dict().items())


def test_given_statistics_are_kept(tmp_path: Path) -> None:
    model = model_with({"type": "linear", "standardise": "first_task"})
    standard: Any = model.head.standard
    given = torch.randn(50, 32) * 3 + 1
    standard.measure(given)
    CDLTrainer(model, arguments(tmp_path, num_train_epochs=1)).learn(next(stream()))
    torch.testing.assert_close(standard.mean, given.mean(0))
    assert standard.count == 50


@pytest.mark.parametrize("kind", HEADS)
def test_statistics_of_a_file_are_taken_once_and_belong_to_the_checkpoint(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    given = {"mean": torch.randn(32), "std": torch.rand(32) + 0.5}
    save_file(given, file)
    model = model_with({"type": kind, "standardise": str(file)})
    CDLTrainer(model, arguments(tmp_path, num_train_epochs=1)).learn(next(stream()))
    standard: Any = model.head.standard
    torch.testing.assert_close(standard.mean, given["mean"])
    torch.testing.assert_close(standard.std, given["std"])
    model.save_pretrained(tmp_path / "model")
    file.unlink()
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "model")
    pixels = torch.stack([next(stream()).train[i]["pixel_values"] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(pixels).logits, model.eval()(pixels).logits)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"mean": torch.full((8,), float("nan")), "std": torch.ones(8)}, "NaN or infinite in 1 of 2 tensors: mean"),
        ({"mean": torch.zeros(8), "std": torch.full((8,), float("inf"))}, "NaN or infinite in 1 of 2 tensors: std"),
        ({"mean": torch.zeros(8), "std": -torch.ones(8)}, "a std that is not a deviation: below 0"),
        ({"mean": torch.zeros(8), "std": torch.zeros(8)}, "a std that is not a deviation: below 0"),
        (None, "cannot be read"),
    ],
)
def test_statistics_that_are_none_are_refused(found: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"no tensors") if found is None else save_file(found, file)
    with pytest.raises(ValueError, match=said):
        build_head({"type": "linear", "standardise": str(file)}, 8).init_shared()


@pytest.mark.parametrize("wrong", [None, {"mean": torch.zeros(8), "std": torch.ones(8)}, {"mean": torch.zeros(32)}])
def test_a_file_of_statistics_that_does_not_fit_is_said_when_the_model_is_made(wrong: Any, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    if wrong is not None:
        save_file(wrong, file)
    with pytest.raises(ValueError, match="needs mean and std of shape .32,.* or first_task"):
        model_with({"type": "linear", "standardise": str(file)})


def test_statistics_do_not_depend_on_the_batches_and_a_constant_dimension_is_no_danger() -> None:
    features = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 2 + 100
    features[:, 3] = 7.0
    standards = []
    for size in (40, 16, 3, 1):
        standard: Any = build_head({"type": "linear", "standardise": "first_task"}, 24).standard
        for part in features.split(size):
            standard.measure(part)
        standards.append(standard)
    for standard in standards:
        torch.testing.assert_close(standard.mean, features.mean(0))
        torch.testing.assert_close(standard.std, features.std(0, unbiased=False), atol=1e-4, rtol=1e-4)
    moved = features.clone()
    moved[:, 3] += 0.02
    assert (standards[0](moved) - standards[0](features)).abs().max() < 2


def test_each_head_of_a_kd_student_has_the_statistics_of_what_it_reads(tmp_path: Path) -> None:
    prompt = {"type": "coda", "components": 3, "length": 4, "layers": (0, 2)}
    head = {"type": "linear", "standardise": "first_task"}
    model = model_with(head, prompt=prompt, kd_prompt={"length": 4})
    model.begin_task(CLASSES[0])
    pixels = torch.stack([next(stream()).train[i]["pixel_values"] for i in range(24)])
    with torch.no_grad():
        output = model.eval()(pixels)
    model.measure(output)
    for part, features in ((model.head, output.features), (model.kd_head, output.kd_features)):
        torch.testing.assert_close(part.standard.mean, features.mean(0))  # type: ignore[union-attr]
    assert not torch.allclose(output.features, output.kd_features, atol=1e-2)


# ---- cosine ----


def test_cosine_logits_ignore_lengths_and_their_scale_trains_only_if_asked() -> None:
    features = torch.randn(6, 24)
    for learn in (True, False):
        head: Any = build_head({"type": "cosine", "scale": 4.0, "learn_scale": learn}, 24)
        head.init_shared()
        head.add_task(5)
        head.init_task(0)
        logits = head(features)
        want = 4 * F.cosine_similarity(features[:, None], head.blocks[0].weight[None], dim=-1)
        torch.testing.assert_close(logits, want)
        head.blocks[0].weight.data *= torch.arange(1.0, 6.0)[:, None]
        torch.testing.assert_close(head(features * 3), logits)
        assert ("scale" in dict(head.named_parameters())) == learn
