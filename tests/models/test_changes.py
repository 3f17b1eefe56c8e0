"""Changes of a trained classifier equal learning the final images at once, whatever their order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import thinned
from PIL import Image
from test_contract import vit
from transformers import ViTImageProcessor, pipeline, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification

HEADS: dict[str, dict[str, Any]] = {
    "ridge": {"type": "ridge", "strength": 1.0},
    "ridge, strength auto": {"type": "ridge", "strength": "auto"},
    "ridge, random features": {"type": "ridge", "features": 60},
    "ridge, sums per class": {"type": "ridge", "strength": "auto", "sums": "per_class"},
    "ridge, known": {"type": "ridge", "features": 60, "own_features": True, "known": 0.9},
    "ridge, known, sums per class": {"type": "ridge", "sums": "per_class", "known": 0.9},
    "lda": {"type": "lda"},
    "lda, sums per class": {"type": "lda", "sums": "per_class"},
    "ncm": {"type": "ncm"},
}


def model_with(head: dict[str, Any], **fields: Any) -> CDLForImageClassification:
    """In float64: in float32 the features themselves depend on the batch by more than the sums do."""
    set_seed(1)
    return CDLForImageClassification(CDLConfig(backbone_config=vit(32), head=head, **fields)).double().eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


def logits(model: CDLForImageClassification) -> dict[str, torch.Tensor]:
    """Logits of some images by class name, so that the order of the classes does not matter."""
    with torch.no_grad():
        found = model(pictures(20, seed=99).to(model.dtype)).logits
    return {name: found[:, number] for number, name in enumerate(sum(model.tasks, []))}


def assert_same(model: CDLForImageClassification, other: CDLForImageClassification) -> None:
    ours, theirs = logits(model), logits(other)
    assert ours.keys() == theirs.keys()
    size = max(float(value.abs().max()) for value in theirs.values())
    for name, value in ours.items():
        assert float((value - theirs[name]).abs().max()) <= 1e-6 * size, name
    if model.head.reads_layers:  # what z and the quantiles are fitted to are the newest images, so not these
        for name in ("within", "total", "layers", "mean", "layer_means"):
            found, want = (getattr(each.head.known, name) for each in (model, other))
            assert float((found - want).abs().max()) <= 1e-6 * float(want.abs().max()), name


class Album:
    """Images with labels that are changed together with a model, and what it should be in the end."""

    def __init__(self, head: dict[str, Any], seed: int):
        self.random, self.head, self.seed = random.Random(seed), head, seed
        self.model = model_with(head)
        self.labels: dict[int, str] = {}
        self.number = self.classes = 0
        self.before: dict[int, str] | None = None
        self.add()

    def images(self, keys: list[int]) -> torch.Tensor:
        return torch.stack([pictures(1, seed=1000 * self.seed + key)[0] for key in keys])

    @property
    def names(self) -> list[str]:
        return sorted({*self.labels.values()})

    def learn(self, labels: list[str]) -> None:
        keys = [*range(self.number, self.number + len(labels))]
        self.number += len(keys)
        self.model.add(self.images(keys), labels)
        self.labels.update(zip(keys, labels, strict=True))

    def add(self) -> None:
        new = [f"new {self.classes + i}" for i in range(self.random.randint(1, 3))]
        self.classes += len(new)
        self.learn([name for name in [*new, *self.names] for _ in range(self.random.randint(1, 4))])

    def correct(self) -> None:
        crowded = [key for key, name in self.labels.items() if [*self.labels.values()].count(name) > 1]
        if crowded and len(self.names) > 1:
            key = self.random.choice(crowded)
            right = self.random.choice([name for name in self.names if name != self.labels[key]])
            self.model.correct(self.images([key]), [right], was=[self.labels[key]])
            self.labels[key] = right

    def remove(self) -> None:
        if len(self.names) > 1:
            name = self.random.choice(self.names)
            keys = [key for key, own in self.labels.items() if own == name]
            self.random.shuffle(keys)
            self.model.remove(name, None if self.head.get("sums") == "per_class" else self.images(keys))
            self.labels = {key: own for key, own in self.labels.items() if own != name}

    def rename(self) -> None:
        name, new = self.random.choice(self.names), f"new {self.classes}"
        self.classes += 1
        self.model.rename(name, new)
        self.labels = {key: new if own == name else own for key, own in self.labels.items()}

    def merge(self) -> None:
        if len(self.names) > 2:
            pair, new = self.random.sample(self.names, 2), f"new {self.classes}"
            self.classes += 1
            self.model.merge(pair, new)
            self.labels = {key: new if own in pair else own for key, own in self.labels.items()}

    def change(self) -> None:
        before = dict(self.labels)
        kind = self.random.choice([self.add, self.correct, self.remove, self.rename, self.merge])
        kind()
        if self.labels != before and self.random.random() < 0.3:
            self.model.undo()
            self.labels = before

    def at_once(self) -> CDLForImageClassification:
        keys = [*self.labels]
        model = model_with(self.head)
        model.add(self.images(keys), [self.labels[key] for key in keys])
        return model


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", thinned(range(50), 5))
def test_any_changes_in_any_order_give_the_model_of_the_final_images(name: str, seed: int) -> None:
    album = Album(HEADS[name], seed)
    for _ in range(8):
        album.change()
    assert {*logits(album.model)} == {*album.names}
    assert_same(album.model, album.at_once())


# ---- one change ----

LABELS = ["owl", "owl", "owl", "fox", "fox", "hen", "hen", "hen"]


def learnt(head: dict[str, Any], **fields: Any) -> CDLForImageClassification:
    model = model_with(head, **fields)
    model.add(pictures(8), LABELS)
    return model


def trained(**fields: Any) -> CDLForImageClassification:
    model = model_with({"type": "linear"}, **fields).float()
    model.begin_task(["owl", "fox"])
    model.begin_task(["hen"])
    return model


def numbers(model: CDLForImageClassification) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.head.state_dict().items()}


def same_numbers(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_change_says_what_it_did_and_can_be_undone(head: dict[str, Any]) -> None:
    model = learnt(head)
    steps: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: model.add(pictures(3, 1), ["owl", "cat", "cat"]),
            "3 images learnt: 1 new class ('cat'), more images of 'owl'",
        ),
        (lambda: model.correct(pictures(8)[[0]], ["fox"], was=["owl"]), "1 label corrected: 1 from 'owl' to 'fox'"),
        (lambda: model.remove("hen"), "'hen' is removed: the model never answers it again"),
        (lambda: model.rename("fox", "red fox"), "'fox' is called 'red fox' now"),
        (lambda: model.merge(["owl", "fox"], "animal"), "'owl', 'fox' are one class 'animal' now"),
    ]
    before, classes = numbers(model), [*model.tasks]
    for step, said in steps:
        assert str(step()).startswith(said)
        assert not same_numbers(numbers(model), before) or model.tasks != classes
        assert str(model.undo()) == "The last change is undone."
        assert same_numbers(numbers(model), before)
        assert model.tasks == classes
        with pytest.raises(ValueError, match="no change to undo"):
            model.undo()


def test_a_class_removed_without_its_images_still_counts_as_other_ones() -> None:
    """Its column of the targets goes, its images stay: ridge's solution is that of images without any class."""
    model = learnt({"type": "ridge", "strength": 2.0})
    assert str(model.remove("hen")).endswith("its images still count as other ones.")
    with torch.no_grad():
        features = model(pictures(8)).features
        targets = torch.tensor([[name == "owl", name == "fox"] for name in LABELS]).double()
        weight = torch.linalg.solve(features.T @ features + 2 * torch.eye(32).double(), features.T @ targets)
        torch.testing.assert_close(model(pictures(20, 99)).logits, 10 * model(pictures(20, 99)).features @ weight)


def test_a_class_removed_without_its_images_leaves_lda_its_scatter_but_not_its_mean() -> None:
    model = learnt({"type": "lda", "shrinkage": 0.3})
    model.remove("hen")
    with torch.no_grad():
        features, images = model(pictures(8)).features, model(pictures(20, 99))
    labels = torch.tensor([["owl", "fox", "hen"].index(name) for name in LABELS])
    means = torch.stack([features[labels == number].mean(dim=0) for number in range(3)])
    scatter = (features - means[labels]).T @ (features - means[labels]) / 8
    shrunk = 0.7 * scatter + 0.3 * scatter.diagonal().mean() * torch.eye(32).double()
    weight = torch.linalg.solve(shrunk, means[:2].T)
    want = images.features @ weight - (means[:2].T * weight).sum(dim=0) / 2
    torch.testing.assert_close(images.logits, want)


@pytest.mark.parametrize("kind", ["ridge", "lda"])
def test_with_sums_per_class_nothing_of_a_removed_class_is_left_in_any_byte(kind: str) -> None:
    """The checkpoint is the very one of a model that never saw the class."""
    model, never = (model_with({"type": kind, "sums": "per_class"}) for _ in range(2))
    for one in (model, never):
        one.add(pictures(5), LABELS[:5])
    model.add(pictures(3, 5), LABELS[5:])
    assert "nothing of its images is left in the sums" in str(model.remove("hen"))
    assert same_numbers(numbers(model), numbers(never))


def test_a_changed_model_is_saved_and_loaded_and_changes_on(tmp_path: Path) -> None:
    model = learnt({"type": "ridge", "strength": "auto"})
    model.merge(["owl", "fox"], "animal")
    model.add(pictures(2, 5), ["cat", "dog"])
    model.remove("cat")
    model.save_pretrained(tmp_path)
    loaded = CDLForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.tasks == model.tasks == [["animal", "hen"], ["dog"]]
    for one in (model, loaded):
        one.add(pictures(2, 7), ["hen", "bee"])
    assert_same(loaded, model)


def test_images_are_prepared_as_the_pipeline_does(tmp_path: Path) -> None:
    """PIL images and files, by the processor that is stored with the model or given."""
    files = []
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(values).save(files[-1])
    size = {"height": 16, "width": 16}
    processor = ViTImageProcessor(size=size)
    model = CDLForImageClassification(CDLConfig(backbone_config=vit(32), head={"type": "ridge"}))
    names = ["owl", "owl", "fox", "fox", "hen", "hen"]
    with pytest.raises(ValueError, match="No image processor is known for these images"):
        model.add(files, names)
    assert not model.tasks
    model.add([Image.open(file) for file in files], names, processor)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "model")
    loaded.add([str(file) for file in files], names)
    served = pipeline("image-classification", str(tmp_path / "model"), device="cpu")
    assert [served(str(file))[0]["label"] for file in files] == names  # type: ignore[index]
    assert [int(block.count.sum()) for block in loaded.head.blocks] == [12]  # type: ignore[operator, union-attr]


def test_the_first_images_give_the_statistics_of_a_standardised_head() -> None:
    model = learnt({"type": "ridge", "standardise": "first_task"})
    before = model.head.standard.mean.clone()  # type: ignore[union-attr]
    assert float(before.abs().max()) > 0
    model.add(pictures(4, 3), ["cat"] * 4)
    assert torch.equal(model.head.standard.mean, before)  # type: ignore[union-attr]


# ---- trained heads ----


def test_a_trained_head_loses_and_renames_classes_and_says_why_it_can_do_no_more() -> None:
    model = trained()
    want = logits(model)
    model.rename("fox", "red fox")
    assert {**logits(model)}.keys() == {"owl", "red fox", "hen"}
    model.remove("owl")
    found = logits(model)
    assert found.keys() == {"red fox", "hen"}
    torch.testing.assert_close(found["red fox"], want["fox"])
    torch.testing.assert_close(found["hen"], want["hen"])
    for change in (
        lambda: model.add(pictures(1), ["hen"]),
        lambda: model.correct(pictures(1), ["hen"], was=["red fox"]),
        lambda: model.merge(["red fox", "hen"], "animal"),
        lambda: model.remove("hen", images=pictures(2)),
    ):
        with pytest.raises(ValueError, match="this model's head is trained, .* A fitted head"):
            change()
    model.remove("hen")
    assert model.tasks == [["red fox"]]


def test_a_task_whose_prompts_stay_keeps_a_class() -> None:
    model = trained(prompt={"type": "coda", "components": 4, "length": 2, "layers": [0]})
    with pytest.raises(ValueError, match="'hen' is the only class of its task, whose prompts belong to the model"):
        model.remove("hen")
    assert model.tasks == [["owl", "fox"], ["hen"]]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.add(pictures(2), ["owl"]), "images has 2 images, but labels has 1; give the class name of each"),
        (lambda m: m.add(pictures(2), "owl"), "The class names of a task are a list of texts"),
        (lambda m: m.add(pictures(2), [0, 1]), "A class name must be a text"),
        (lambda m: m.add(pictures(2), torch.tensor([0, 1])), "images has 2 images, but labels has 0"),
        (lambda m: m.add("owl.png", ["owl"]), "images is a str; give a list of images"),
        (lambda m: m.add(pictures(2)[:, :2], ["owl", "fox"]), "but the model takes"),
        (lambda m: m.add(pictures(2) * float("nan"), ["owl", "fox"]), "NaN or infinite"),
        (
            lambda m: m.add(["nothing.png"], ["owl"], ViTImageProcessor(size={"height": 16, "width": 16})),
            "nothing.png",
        ),
        (lambda m: m.correct(pictures(1), ["owl"], was=["owl"]), "1 image would have the same label before and after"),
        (lambda m: m.correct(pictures(1), ["owl"], was=["fux"]), "knows no class 'fux'; did you mean 'fox'"),
        (lambda m: m.correct(pictures(1), ["owl"], was=[]), "at least one class"),
        (lambda m: m.correct(pictures(8)[3:5], ["owl"] * 2, was=["fox"] * 2), "'fox' would be left with 0 images"),
        (
            lambda m: m.correct(pictures(2, 77), ["owl"] * 2, was=["hen"] * 2),
            r"images \(2\), 2 cannot have been learnt with",
        ),
        (lambda m: m.remove("bear"), "knows no class 'bear'"),
        (lambda m: m.remove(3), "knows no class 3"),
        (lambda m: m.remove("owl", images=pictures(2)), "give all images that it was learnt from .* 1 of them"),
        (lambda m: m.remove("owl", images=pictures(5)), "these are 2 too many"),
        (lambda m: m.remove("owl", images=pictures(3, 5)), "but not the same ones"),
        (lambda m: m.rename("owl", "hen"), "There is a class 'hen' already; to make one of both, merge them"),
        (lambda m: m.rename("owl", " "), "A class name must be a text with something in it"),
        (lambda m: m.rename("bear", "owl"), "knows no class 'bear'"),
        (lambda m: m.merge(["owl"], "bird"), "at least two different classes"),
        (lambda m: m.merge(["owl", "owl"], "bird"), "at least two different classes"),
        (lambda m: m.merge(["owl", "hen"], "fox"), "There is another class 'fox' already"),
        (lambda m: m.merge("owl", "bird"), "a list"),
        (lambda m: m.merge(["owl", "bear"], "bird"), "knows no class 'bear'"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(change: Callable[[Any], Any], said: str) -> None:
    model = learnt({"type": "ridge"})
    before = numbers(model)
    with pytest.raises((ValueError, FloatingPointError), match=said):
        change(model)
    assert same_numbers(numbers(model), before)
    assert model.tasks == [["owl", "fox", "hen"]]
    assert model.trained_tasks == 1


def test_the_only_class_stays() -> None:
    model = model_with({"type": "ridge"})
    model.add(pictures(2), ["owl", "owl"])
    with pytest.raises(ValueError, match="'owl' is the only class of this model"):
        model.remove("owl")


def test_a_model_in_its_first_session_and_sums_that_are_gone_cannot_change() -> None:
    model = model_with({"type": "ridge"}, first_session={"type": "linear"}, lora={"r": 2})
    with pytest.raises(ValueError, match="first session trains it on its first task"):
        model.add(pictures(2), ["owl", "fox"])
    model.begin_task(["owl", "fox"])
    with pytest.raises(ValueError, match="in the middle of a session"):
        model.rename("owl", "bird")
    gone = learnt({"type": "ridge"})
    gone.drop_sums()
    with pytest.raises(ValueError, match="has no sums"):
        gone.add(pictures(1), ["owl"])
    gone.rename("owl", "bird")
    taught = model_with({"type": "ridge", "strength": 10.0, "soft_targets": 0.5})
    taught.begin_task(["owl", "fox"])
    with pytest.raises(ValueError, match="learnt a teacher's answers"):
        taught.add(pictures(1), ["owl"])


CODA = {"type": "coda", "components": 4, "length": 2, "layers": [0]}
DUAL = {"type": "dualprompt", "general_length": 2, "general_layers": [0], "expert_length": 2, "expert_layers": [1]}
MODELS: dict[str, dict[str, Any]] = {
    "KD head": {"prompt": CODA, "kd_prompt": {}},
    "prompts per task": {"prompt": DUAL},
    "cosine": {"head": {"type": "cosine"}},
    "weight normalised": {"head": {"type": "weight_normalised"}},
    "backbone": {"train_backbone": True},
    "ridge after prompts": {"prompt": CODA, "head": {"type": "ridge"}, "first_session": {"type": "linear"}},
    "class means after prompts": {
        "prompt": DUAL,
        "head": {"type": "ncm"},
        "first_session": {"type": "linear"},
    },
    "ridge after adapters": {"head": {"type": "ridge"}, "first_session": {"type": "linear"}, "lora": {"r": 2}},
}


def weights(model: CDLForImageClassification) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_renames_and_removes_classes_and_is_whole_after_a_failure(
    kind: str, tmp_path: Path
) -> None:
    set_seed(1)
    model = CDLForImageClassification(CDLConfig(backbone_config=vit(32), **MODELS[kind])).eval()
    model.begin_task(["owl", "fox", "hen"])
    model.end_session()
    if model.fitted:
        model.head.accumulate(model(pictures(12).float()).features.detach(), torch.arange(12) % 3)  # type: ignore[operator]
        model.end_task()
        model.trained_tasks = 1
        model.add(pictures(4, 3).float(), ["cat", "cat", "dog", "owl"])
    else:
        model.begin_task(["cat", "dog"])
    before, want = weights(model), logits(model)
    model.rename("fox", "red fox")
    model.remove("cat")
    found = logits(model)
    assert [*found] == ["owl", "red fox", "hen", "dog"]
    for name in () if model.fitted else ("owl", "hen", "dog"):
        torch.testing.assert_close(found[name], want[name])
    model.save_pretrained(tmp_path)
    loaded = CDLForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.tasks == model.tasks
    for name, value in logits(loaded).items():
        torch.testing.assert_close(value, found[name])
    loaded.begin_task(["bee", "cow"])
    model.undo()
    assert same_numbers(weights(model), before)
    with pytest.raises(ValueError, match="trained|NaN or infinite"):
        model.add(pictures(2).float() * float("nan"), ["new", "owl"])
    assert same_numbers(weights(model), before), "a task that was begun is gone"


# ---- what may not have been meant ----


def test_equal_images_and_names_that_differ_in_spelling_are_said() -> None:
    model = learnt({"type": "ridge"})
    twice = pictures(2, 5)[[0, 1, 0]]
    assert "1 of the images is the same as another one, and counted again." in str(model.add(twice, ["cat"] * 3))
    assert "1 image came with different labels" in str(model.add(twice, ["cat", "cat", "owl"]))
    made = model.add(pictures(2, 6), ["Owl", "red-fox"])
    assert made.notes == ("'Owl' is another class than 'owl', as it is spelt differently; to make one, merge them",)
    assert "than 'red-fox'" in str(model.rename("fox", "Red Fox"))
    assert not model.rename("Red Fox", "wolf").notes
    model.add(pictures(3, 8), ["caf\u00e9", "cafe\u0301", "cafe\u0301"])
    assert model.tasks[-1] == ["caf\u00e9"], "two encodings of one text"
    made = model.correct(pictures(8)[[0]], ["hem"], was=["owl"])
    assert "1 new class ('hem')" in made.said and made.images == {"hem": 1, "owl": -1}


def test_a_change_names_the_classes_that_changed() -> None:
    model = learnt({"type": "ridge"})
    assert model.rename("fox", "wolf").classes == {"fox": "wolf"}
    assert model.merge(["owl", "wolf"], "animal").classes == {"owl": "animal", "wolf": "animal"}
    assert model.remove("hen").classes == {"hen": None}
