"""How known an image is: exact leave-one-out figures, foreign images told, shares kept, and the answer `unknown`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.covariance import OAS
from sklearn.metrics import roc_auc_score
from test_contract import vit
from transformers import ViTImageProcessor, pipeline, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.heads import build_head
from hf_cdl.heads.scatter import shrunk
from hf_cdl.heads.unlearnt import unlearnt
from hf_cdl.training.evaluation import ood_metrics
from hf_cdl.unknown import UNKNOWN, rejected, thresholds

WIDTH, LAYER = 24, 12
HEADS: list[dict[str, Any]] = [
    {"type": "ridge", "strength": 3.0, "known": 0.95},
    {"type": "ridge", "strength": "auto", "scale": "auto", "features": 40, "own_features": True, "known": 0.9},
    {"type": "ridge", "sums": "per_class", "features": 30, "own_features": True, "known": 0.95},
    {"type": "lda", "standardise": "first_task", "scale": "auto", "known": 0.95},
]


def images(classes: list[int], per_class: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (N, 24) around class means, labels, and means of layers (N, 3, 12)."""
    means = 2 * torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([c for c in classes for _ in range(per_class)])
    features = means[labels] + torch.randn(len(labels), WIDTH, generator=generator)
    layers = torch.stack([features[:, k : k + LAYER] * (k + 1) for k in (0, 4, 12)], dim=1)
    return features, labels, layers + torch.randn(layers.shape, generator=generator)


def fitted(head: dict[str, Any], tasks: list[list[int]], per_class: int = 30) -> Any:
    set_seed(1)
    built: Any = build_head(head, WIDTH, LAYER)
    built.init_shared()
    for number, task in enumerate(tasks):
        features, labels, layers = images(task, per_class, seed=10 + number)
        if built.standard is not None and number == 0:
            built.standard.measure(features)
        built.add_task(len(task))
        built.init_task(number)
        first = sum(map(len, tasks[:number]))
        built.accumulate(features, first + torch.tensor([task.index(c) for c in labels.tolist()]), layers=layers)
        built.end_task()
    return built


def told(built: Any, features: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return built.known_score(features, layers, built(features))


def test_the_shrinkage_is_that_of_oas() -> None:
    """Of scikit-learn's, which leaves out the terms with 2 / D of the paper: so in many dimensions."""
    x = (
        torch.randn(60, 200, generator=torch.Generator().manual_seed(2)).double()
        @ torch.diag(torch.arange(1, 201).double()) ** 0.5
    )
    x = x - x.mean(dim=0)
    found = shrunk(x.T @ x, 60, torch.ones(200).double())
    covariance = torch.linalg.inv(found.factor @ found.factor.T).numpy()
    theirs = OAS(assume_centered=True).fit(x.numpy()).covariance_
    assert np.abs(covariance - theirs).max() < 0.02 * np.abs(theirs).max()


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head['type']} {head.get('sums', '')}")
def test_leave_one_out_distances_are_those_without_the_image(head: dict[str, Any]) -> None:
    """The shrunk covariances without an image, written out; the shares of the shrinkage stay."""
    built = fitted(head, [[0, 1, 2], [3, 4]])
    features, labels, layers = images([3, 4], 30, seed=11)
    x = features if built.standard is None else built.standard(features)
    count = built.of_classes("count")
    total = built.of_classes("total").clone()
    known = built.known
    known.solve(*(value for value in _sums(built)))
    near, around, deep = known._left_out(
        x.double(), layers.double(), labels, built.of_classes("centre").double(), count
    )
    own_sums = total[:, :WIDTH] / built._own
    for row in (0, 17, 45):
        label, one = int(labels[row]), x[row].double()
        n = count.double().clone()
        n[label] -= 1
        sums = own_sums.clone()
        sums[label] -= one
        means, mean = sums / n[:, None], sums.sum(dim=0) / n.sum()
        for part, factor, share, centre, want in (
            ("within", known.within, known._own[0], own_sums[label] / count[label], near[row]),
            ("total", known.total, known._own[1], own_sums.sum(dim=0) / count.sum(), around[row]),
        ):
            covariance = torch.linalg.inv(factor.double() @ factor.double().T)
            gone = one - centre
            images_of = count[label] if part == "within" else count.sum()
            covariance -= share * images_of / (images_of - 1) * torch.outer(gone, gone)
            apart = one - means if part == "within" else (one - mean)[None]
            distances = (apart @ torch.linalg.inv(covariance) * apart).sum(dim=1)
            torch.testing.assert_close(want if part == "within" else want[None], distances, rtol=2e-3, atol=1e-2)
    assert deep.shape == (len(labels), 3)


def _sums(built: Any) -> tuple[torch.Tensor, ...]:
    gram, total, count = built.gram_matrix(), built.of_classes("total"), built.of_classes("count")
    own = built._own
    if built.config.sums == "per_class":
        from hf_cdl.heads.class_sums import unpacked

        grams = unpacked(LAYER, built.of_classes("layer_grams").sum(dim=0))
    else:
        grams = built.layer_gram.view(torch.float64)
    sums = built.of_classes("layer_total").sum(dim=0)
    return gram[:WIDTH, :WIDTH] / own**2, total[:, :WIDTH] / own, count, grams, sums


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head['type']} {head.get('sums', '')}")
def test_images_of_known_classes_keep_their_share_and_others_are_told(head: dict[str, Any]) -> None:
    built = fitted(head, [[0, 1, 2], [3, 4, 5]], per_class=60)
    new = told(built, *(images(list(range(6)), 60, seed=77)[i] for i in (0, 2)))
    for share in (0.8, 0.9, 0.95):
        assert float((new >= built.known.threshold(share)).float().mean()) == pytest.approx(share, abs=0.08)
    features, _, layers = images([10, 11, 12], 60, seed=78)
    noise = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(3))
    for foreign in (
        told(built, features, layers),
        told(built, noise, torch.randn(60, 3, LAYER)),
    ):
        assert ood_metrics(new, foreign, built.known.threshold(0.95))["auroc"] > 95
    typical = built.known.mean.expand(60, WIDTH), built.known.layer_means.expand(60, 3, LAYER)
    assert ood_metrics(new, told(built, *typical), 0.0)["auroc"] > 95, "too typical is foreign too"


def without(head: dict[str, Any], built: Any, label: int, classes: int) -> Any:
    """A head that never learnt one of the classes 0, 1 ... of `built`; what `built` is fitted to is taken over."""
    rest = [c for c in range(classes) if c != label]
    other: Any = build_head(head, WIDTH, LAYER)
    other.init_shared()
    other.add_task(len(rest))
    other.init_task(0)
    features, labels, layers = images([*range(classes)], 30, seed=10)
    kept = labels != label
    rows = torch.tensor([rest.index(c) for c in labels[kept].tolist()])
    other.accumulate(features[kept], rows, layers=layers[kept])
    other.end_task()
    for name in ("gauge", "quantiles"):
        getattr(other.known, name).copy_(getattr(built.known, name))
    return other


def test_what_a_class_never_learnt_would_get_is_what_a_head_without_it_says() -> None:
    head = {"type": "ridge", "strength": 3.0, "known": 0.95}
    built = fitted(head, [[0, 1, 2, 3]])
    features, labels, layers = images([0, 1, 2, 3], 30, seed=10)
    found = unlearnt(built, features, labels, layers)
    assert found is not None and len(found) == 120
    for label in range(4):
        own = labels == label
        want = told(without(head, built, label, 4), features[own], layers[own])
        torch.testing.assert_close(found[label * 30 : label * 30 + 30], want, rtol=1e-3, atol=1e-2)
    measured = float((found >= built.known.threshold(0.95)).float().mean())
    assert built.known.passing(0.95) == pytest.approx(measured, abs=0.02)


@pytest.mark.parametrize("kind", ["ridge", "lda"])
def test_scores_without_a_class_are_those_of_a_head_that_never_learnt_it(kind: str) -> None:
    """Exactly for ridge; the shrinkage of lda's covariance is a share of a little other sizes."""
    head = {"type": kind, "known": 0.95} | (
        {"strength": 3.0} if kind == "ridge" else {"shrinkage": 0.2, "scale": 10.0}
    )
    built = fitted(head, [[*range(10)]])
    features, labels, _ = images([*range(10)], 30, seed=10)
    for label in (0, 7):
        own = labels == label
        rest = [c for c in range(10) if c != label]
        found = built.scaled(built.class_left_out(features[own], label)[:, rest]).float()
        want = without(head, built, label, 10)(features[own])
        assert (found - want).abs().max() < (1e-4 if kind == "ridge" else 0.05) * want.abs().max()


def test_a_few_images_move_what_is_told_only_in_part() -> None:
    built = fitted(HEADS[0], [[0, 1, 2]], per_class=100)
    before = built.known.quantiles.clone()
    features, labels, layers = images([0, 1, 2], 2, seed=5)
    built.accumulate(features + 1, labels, layers=layers + 1)
    built.end_task()
    moved = (built.known.quantiles - before).abs().max()
    assert 0 < moved < 0.2 * (before[-1] - before[0])


@pytest.mark.parametrize(("classes", "per_class"), [([0], 1), ([0], 2), ([0, 1], 1), ([0, 1, 2], 1)])
def test_the_smallest_heads_learn_and_tell_numbers(classes: list[int], per_class: int) -> None:
    built = fitted(HEADS[0], [classes], per_class=per_class)
    found = told(built, *(images(classes, 5, seed=3)[i] for i in (0, 2)))
    assert found.isfinite().all()
    assert built.known.fitted == (len(classes) * per_class > 1)


def test_areas_under_curves_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(4)
    known, others = torch.randn(50, generator=generator).round(decimals=1), torch.randn(70, generator=generator) - 1
    others = others.round(decimals=1)
    truth = [1] * 50 + [0] * 70
    found = ood_metrics(known, others, -0.5)
    assert found["auroc"] == pytest.approx(100 * float(roc_auc_score(truth, torch.cat([known, others]))))
    assert found["passing"] == pytest.approx(100 * float((others >= -0.5).float().mean()))
    assert ood_metrics(known, known, 0.0)["auroc"] == pytest.approx(50)


# ---- a model, and the pipeline ----


def model_with(folder: Path, **fields: Any) -> CDLForImageClassification:
    """A model with an image processor, which has learnt two classes of noise images."""
    set_seed(1)
    head = {"type": "ridge", "features": 40, "own_features": True, "known": 0.9, **fields}
    model = CDLForImageClassification(CDLConfig(backbone_config=vit(32), head=head, patch_mean=True)).eval()
    pixels = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    pixels[:20, 0] += 1
    model.add(pixels, ["owl"] * 20 + ["fox"] * 20)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8))


def test_the_same_is_told_whatever_the_batch_and_whatever_else_is_asked(tmp_path: Path) -> None:
    model = model_with(tmp_path)
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole, shown = model(pixels), model(pixels, output_hidden_states=[-1])
        alone = torch.cat([model(image[None]).known for image in pixels])
        every = model(pixels, output_hidden_states=True)
        again = CDLForImageClassification.from_pretrained(tmp_path).eval()(pixels)
    torch.testing.assert_close(alone, whole.known, rtol=1e-4, atol=1e-3)
    assert torch.equal(whole.known, shown.known) and torch.equal(whole.known, again.known)
    assert whole.hidden_states is None and [state is None for state in shown.hidden_states] == [True] * 3 + [False]
    torch.testing.assert_close(whole.layers[:, 2], every.hidden_states[3][:, 1:].mean(dim=1))
    torch.testing.assert_close(whole.layers[:, 0], every.hidden_states[0][:, 1:].mean(dim=1))
    model.drop_sums()
    with torch.no_grad():
        assert torch.equal(model(pixels).known, whole.known), "needs no sums"


def test_the_pipeline_answers_unknown_when_asked(tmp_path: Path) -> None:
    model = model_with(tmp_path)
    classify: Any = pipeline("image-classification", model=str(tmp_path))
    strange = Image.new("RGB", (16, 16), (0, 255, 0))
    plain = classify(strange)
    assert {answer["label"] for answer in plain} == {"owl", "fox"}, "off by default"
    found = classify(strange, reject=True)
    assert found[0]["label"] == UNKNOWN and found[1:] == plain and 0.9 <= found[0]["score"] <= 1
    assert [answer["label"] for answer in classify(strange, reject=0.5, top_k=1)] == [UNKNOWN]
    always: Any = pipeline("image-classification", model=str(tmp_path), reject=True)
    assert always(strange)[0]["label"] == UNKNOWN and always(strange, reject=False) == plain
    assert [answers[0]["label"] for answers in always([strange, strange], batch_size=2)] == [UNKNOWN] * 2
    least = thresholds(model, {"owl": 0.999})
    assert least[0] == model.head.known.threshold(0.999) < least[1] == model.head.known.threshold(0.9)  # type: ignore
    only = plain[0]["label"]
    assert (classify(strange, reject={only: 1 - 1e-9})[0]["label"] == UNKNOWN) == (found[0]["score"] == 1)


def test_a_pipeline_rejects_by_the_model_as_it_is_now(tmp_path: Path) -> None:
    model = model_with(tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    classify: Any = pipeline("image-classification", model=model, image_processor=processor, reject={"fox": 0.8})
    model.add(torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(4)) - 1, ["bat"] * 30)
    model.remove("owl", None)
    dark, unlike = Image.new("RGB", (16, 16), (0, 0, 0)), Image.new("RGB", (16, 16), (0, 255, 0))
    for image in (dark, unlike, picture()):
        with torch.no_grad():
            found = model(**processor(image, return_tensors="pt"))
        least = thresholds(model, {"fox": 0.8})[found.logits.argmax()]
        assert (classify(image)[0]["label"] == UNKNOWN) == bool(found.known < least)
    model.rename("fox", "vixen")
    with pytest.raises(ValueError, match="reject names 'fox', which the model has no class of"):
        classify(dark)


def test_what_is_no_number_is_unknown() -> None:
    known, logits = torch.tensor([float("nan"), 1.0]), torch.zeros(2, 3)
    assert rejected(torch.zeros(3), known, logits).tolist() == [True, False]


def test_a_share_may_be_a_number_of_numpy(tmp_path: Path) -> None:
    model = model_with(tmp_path)
    assert torch.equal(thresholds(model, np.float32(0.75)), thresholds(model, 0.75))
    for share in (True, np.bool_(True), np.float32("nan"), "0.95"):
        with pytest.raises(ValueError, match="reject of 'owl' is .*; give a share"):
            thresholds(model, {"owl": share})


def test_who_cannot_tell_says_so(tmp_path: Path) -> None:
    model_with(tmp_path / "none", known=None, own_features=False, features=None)
    with pytest.raises(ValueError, match="cannot tell which images are of none of its classes"):
        pipeline("image-classification", model=str(tmp_path / "none"), reject=True)
    model = model_with(tmp_path / "owls")
    with pytest.raises(ValueError, match="reject is 95; give a share above 0 and below 1, such as 0.95"):
        thresholds(model, 95)
    with pytest.raises(ValueError, match="reject names 'olw', which the model has no class of; did you mean 'owl'"):
        thresholds(model, {"olw": 0.9})
    with pytest.raises(ValueError, match="reject of 'owl' is 'high'; give a share"):
        thresholds(model, {"owl": "high"})
    for name in ("Unknown", UNKNOWN):
        model.rename("owl" if name == "Unknown" else "Unknown", name)
        with pytest.raises(ValueError, match=f"has a class called '{name}'"):
            thresholds(model, True)
    fresh = CDLForImageClassification(CDLConfig(backbone_config=vit(32), head={"type": "ridge", "known": 0.9}))
    fresh.begin_task(["a", "b"])
    with pytest.raises(ValueError, match="cannot tell unknown images yet"):
        thresholds(fresh, True)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"known": 1.0}, "A head's known is 1.0; give a share above 0 and below 1, such as 0.95"),
        ({"known": 95.0}, "A head's known is 95.0; give a share"),
        ({"known": float("nan")}, "A head's known is nan; allowed: a finite number"),
        (
            {"known": 0.95, "features": 50},
            "read from the own features, but it has random ones alone. Set own_features",
        ),
    ],
)
def test_bad_shares_are_refused(head: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_head({"type": "ridge", **head}, WIDTH, LAYER)


def test_a_model_with_a_kd_token_tells_too() -> None:
    set_seed(0)
    model = CDLForImageClassification(
        CDLConfig(
            backbone_config=vit(32),
            head={"type": "ridge", "known": 0.9},
            kd_prompt={},
            first_session={"type": "linear"},
        )
    ).eval()
    model.begin_task(["cat", "dog"])
    model.end_session()
    pixels, labels = torch.randn(40, 3, *2 * (model.config.backbone_config.image_size,)), torch.arange(40) % 2
    with torch.no_grad():
        model.accumulate(model(pixels), labels)
        model.end_task()
        found = model(pixels)
        far = model(50 * torch.randn_like(pixels))
    assert found.known.mean() > 0.4 and far.known.mean() < found.known.mean()


# ---- classes that are dropped, empty, or learnt with a teacher's answers ----

FAR_OFF = 5.0
"""Features are seldom centred, and only then do the means of classes matter to sums of squares."""


def learnt(head: dict[str, Any], classes: list[int], per_class: int = 60, taught: Any = None) -> Any:
    set_seed(1)
    built: Any = build_head(head, WIDTH, LAYER)
    built.init_shared()
    features, labels, layers = images(classes, per_class, seed=10)
    if built.standard is not None:
        built.standard.measure(features + FAR_OFF)
    built.add_task(len(classes))
    built.init_task(0)
    rows = torch.tensor([classes.index(c) for c in labels.tolist()])
    built.accumulate(features + FAR_OFF, rows, taught, layers=layers + FAR_OFF)
    built.end_task()
    return built


def share_kept(built: Any, classes: list[int]) -> float:
    features, _, layers = images(classes, 60, seed=77)
    return float((told(built, features + FAR_OFF, layers + FAR_OFF) >= built.known.threshold(0.95)).float().mean())


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head['type']} {head.get('sums', '')}")
def test_classes_dropped_without_their_images_leave_no_mean_in_the_scatter(head: dict[str, Any]) -> None:
    """Their scatter is taken to be like that of the others, so what is told is nearly as if they were never learnt."""
    built, never = learnt(head, [0, 1, 2, 3, 4, 5]), learnt(head, [0, 1, 2])
    built.keep(0, [0, 1, 2, 4])
    built.keep(0, [0, 1, 2])
    built.end_task()
    assert share_kept(built, [0, 1, 2]) > 0.93
    if built.standard is not None:  # by all the images of the first task
        return
    features = images([0, 1, 2], 60, seed=77)[0] + FAR_OFF
    for name in ("within", "total"):
        ours, theirs = (
            ((features - h.known.mean) @ getattr(h.known, name)).square().sum(dim=1) for h in (built, never)
        )
        assert float((ours / theirs).mean()) == pytest.approx(1, abs=0.15), name
    ours, theirs = (h.known._deep(features[:, None, :LAYER].expand(-1, 3, -1)).mean() for h in (built, never))
    assert float(ours / theirs) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("head", HEADS[:2] + HEADS[3:], ids=lambda head: head["type"])
def test_nothing_is_near_to_a_class_without_images(head: dict[str, Any]) -> None:
    built, other = learnt(head, [0, 1, 2, 3]), learnt(head, [0, 1, 2, 3])
    built.add_task(1)
    built.init_task(1)
    built.end_task()
    origin = torch.zeros(5, WIDTH), torch.zeros(5, 3, LAYER)
    near = [torch.cdist((origin[0] - h.known.mean) @ h.known.within, h.of_classes("centre")) for h in (built, other)]
    torch.testing.assert_close(*(value.amin(dim=1) for value in near))


def test_a_teacher_s_answers_do_not_mix_the_means_of_classes() -> None:
    head = {"type": "ridge", "strength": 3.0, "features": 30, "own_features": True, "known": 0.95}
    taught = 3 * torch.rand(180, 3, generator=torch.Generator().manual_seed(1))
    built, labels_alone = learnt({**head, "soft_targets": 0.7}, [0, 1, 2], taught=taught), learnt(head, [0, 1, 2])
    for name in ("within", "total", "mean"):
        torch.testing.assert_close(getattr(built.known, name), getattr(labels_alone.known, name))
    assert not torch.equal(built.of_classes("weight"), labels_alone.of_classes("weight"))
    assert share_kept(built, [0, 1, 2]) > 0.9


@pytest.mark.parametrize("away", [1e3, 1e4, 1e5])
def test_features_far_from_the_origin_are_learnt_as_well(away: float) -> None:
    """Beside random features the own ones are scaled in float32, and what is taken out must be what was added."""
    set_seed(1)
    built: Any = build_head({**HEADS[1], "strength": 1e3}, WIDTH, LAYER)
    built.init_shared()
    features, labels, layers = images([0, 1, 2], 40, seed=10)
    built.add_task(3)
    built.init_task(0)
    built.accumulate(features + away, labels, layers=layers)
    built.end_task()
    found = unlearnt(built, features + away, labels, layers)
    assert found is not None and float((found >= built.known.threshold(0.9)).float().mean()) < 0.1


def test_a_covariance_that_rounding_made_indefinite_leaves_its_diagonal() -> None:
    scatter = torch.diag(torch.tensor([100.0] * 10 + [-1.0])).double()
    found = shrunk(scatter, 10**6, torch.ones(11).double())
    assert found.own == 0.0 and found.factor.isfinite().all()


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head['type']} {head.get('sums', '')}")
def test_new_classes_of_few_images_leave_the_earlier_ones_known(head: dict[str, Any]) -> None:
    """What a head says of earlier images changes with new classes, and so does what it is measured by."""
    set_seed(1)
    built: Any = build_head({**head, "known": 0.95}, WIDTH, LAYER)
    built.init_shared()
    for number, (task, per_class) in enumerate((([0, 1], 100), ([2, 3], 8), ([4, 5], 8))):
        features, labels, layers = images(task, per_class, seed=10 + number)
        if built.standard is not None and number == 0:
            built.standard.measure(features)
        built.add_task(2)
        built.init_task(number)
        built.accumulate(features, labels - task[0] + 2 * number, layers=layers)
        built.end_task()
        earlier, foreign = (
            told(built, *(images(classes, 60, seed=77)[i] for i in (0, 2))) for classes in ([0, 1], [16, 17, 18])
        )
        found = ood_metrics(earlier, foreign, built.known.threshold(0.95))
        assert float((earlier >= built.known.threshold(0.95)).float().mean()) > 0.8
        assert found["passing"] < 3 and found["auroc"] > 99


def test_what_is_carried_over_is_the_change_of_the_same_images() -> None:
    built = fitted(HEADS[0], [[0, 1, 2]], per_class=100)
    gauge = built.known.gauge.clone()
    generator = torch.Generator().manual_seed(6)
    before = torch.randn(400, 6, generator=generator).double()
    built.known.carry(before, before)
    torch.testing.assert_close(built.known.gauge, gauge)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.2, -0.2])
    built.known.carry(before, before + shift.double())
    torch.testing.assert_close(built.known.gauge[0, :-1], gauge[0, :-1] + shift)
    torch.testing.assert_close(built.known.gauge[1], gauge[1])
    built.known.carry(before, 0.5 * before)
    torch.testing.assert_close(built.known.gauge[1, :-1], (gauge[1, :-1] * 0.5).clamp(min=1e-2), rtol=0.01, atol=0.0)


def test_a_model_left_without_images_is_whole(tmp_path: Path) -> None:
    model = CDLForImageClassification(CDLConfig(backbone_config=vit(32), head={"type": "ridge", "known": 0.9})).eval()
    model.begin_task(["a"])
    model.end_task()
    model.save_pretrained(tmp_path / "new")
    CDLForImageClassification.from_pretrained(tmp_path / "new")
    pixels = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.add(pixels, ["a"] * 20)
    model.begin_task(["c"])
    model.remove("a", pixels)
    model.save_pretrained(tmp_path / "left")
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "left").eval()
    loaded.add(pixels, ["c"] * 20)
    assert loaded(pixels).known.isfinite().all()


def test_no_class_goes_from_a_head_without_sums(tmp_path: Path) -> None:
    model = model_with(tmp_path)
    model.drop_sums()
    with pytest.raises(ValueError, match="head has no sums"):
        model.remove("owl")
    assert model.tasks == [["owl", "fox"]]
