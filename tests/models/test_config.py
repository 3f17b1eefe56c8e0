"""User input of configs and models: fields, class names, labels, inputs. It takes effect, or it is refused."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_backbone
from test_models import images
from tiny_families import SIZES, family_config, stored_backbone
from transformers import AutoModelForImageClassification, PreTrainedConfig, ViTImageProcessorPil, pipeline

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.backbones.families import FAMILIES
from hf_cdl.backbones.loading import build_backbone
from hf_cdl.backbones.lora import LoraOptions
from hf_cdl.heads import build_head
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.prompts import PROMPTS, KDPromptConfig, MappingConfig

TASKS = [["cat", "dog"], ["owl"]]
GERMAN = {0: "Katze", 1: "Hund", 2: "Eule"}
RENAMED = [["Katze", "Hund"], ["Eule"]]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_backbone(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def model(vit: Path) -> CDLForImageClassification:
    made = CDLForImageClassification.from_backbone(str(vit), prompt={"type": "l2p", "layers": (0,)})
    for names in TASKS:
        made.begin_task(names)
    return made.eval()


# ---- class names ----


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("zebra", r"got 'zebra'. So for a task of one class give \['zebra'\]"),
        (b"zebra", "So give a list"),
        ({"a", "b"}, "So give a list: it has an order"),
        (frozenset({"a"}), "it has an order"),
        ({"a": 0}, "it has an order"),
        (None, "got None"),
        (3, "got a int, 3"),
        ([], "at least one class"),
        ((name for name in ()), "at least one class"),
        ([""], "a text with something in it; got ''"),
        (["bee", "  \n"], "a text with something in it"),
        (["bee", 7], "a text with something in it; got 7"),
        ([["bee"]], r"got \['bee'\]"),
        ([None], "got None"),
        (["bee", "bee"], r"\['bee'\] occur more than once"),
        (["bee", "owl"], r"\['owl'\] occur more than once"),
    ],
)
def test_what_are_no_class_names_is_refused_and_changes_nothing(
    names: Any, said: str, model: CDLForImageClassification
) -> None:
    before = [name for name, _ in model.named_parameters()], model.config.to_dict()
    with pytest.raises(ValueError, match=said):
        model.begin_task(names)
    assert before == ([name for name, _ in model.named_parameters()], model.config.to_dict())
    with pytest.raises(ValueError):
        CDLConfig(tasks=[*TASKS, names])


@pytest.mark.parametrize(
    "names",
    [
        ["bee", "fly"],
        ("bee", "fly"),
        (n for n in ("bee", "fly")),
        np.array(["bee", "fly"]),
        (
            "bee",
            "fly",
        ),
    ],
)
def test_names_in_any_order_that_is_one_are_taken(
    names: Any, model: CDLForImageClassification, tmp_path: Path
) -> None:
    model.begin_task(names)
    labels: Any = model.config.id2label
    assert model.tasks[-1] == ["bee", "fly"] and labels[4] == "fly"
    model.save_pretrained(tmp_path)
    assert CDLForImageClassification.from_pretrained(tmp_path)(images()).logits.shape == (4, 5)


@pytest.mark.parametrize(
    "tasks", ["ab", ["cat", "dog"], [["cat"], "dog"], [[1, 2]], [[""]], [[]], None, {"a": ["b"]}, 3]
)
def test_tasks_that_are_none_are_refused(tasks: Any) -> None:
    with pytest.raises(ValueError, match="class"):
        CDLConfig(tasks=tasks)


def test_twenty_thousand_classes_cost_no_time(tmp_path: Path) -> None:
    names = [f"class number {number}" for number in range(21_841)]
    start = time.process_time()
    CDLConfig(tasks=[names])
    assert time.process_time() - start < 0.2
    backbone = make_backbone(tmp_path / "backbone")
    model = CDLForImageClassification.from_backbone(str(backbone), head={"type": "ncm"})
    start = time.process_time()
    for first in range(0, 21_841, 400):
        model.begin_task(names[first : first + 400])
    assert time.process_time() - start < 8
    assert model.config.num_labels == 21_841
    with pytest.raises(ValueError, match=r"\['class number 7'\] occur more than once"):
        CDLConfig(tasks=[names, ["class number 7"]])


# ---- renamed labels ----


def test_renamed_labels_are_the_class_names_from_then_on(
    model: CDLForImageClassification, tmp_path: Path, vit: Path
) -> None:
    model.config.id2label = dict(GERMAN)
    model.config.label2id = {name: number for number, name in GERMAN.items()}
    assert model.tasks == RENAMED
    model.save_pretrained(tmp_path / "both")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "both")
    for load in (CDLForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
        loaded = load(tmp_path / "both")
        assert loaded.tasks == RENAMED and loaded.config.id2label == GERMAN
        assert loaded.config.label2id == {"Katze": 0, "Hund": 1, "Eule": 2}
        assert torch.equal(loaded(images()).logits, model(images()).logits)
    classify = pipeline("image-classification", model=str(tmp_path / "both"), device="cpu")
    assert {line["label"] for line in classify(images_of_one())} == {*GERMAN.values()}
    loaded.begin_task(["Biene"])
    with pytest.raises(ValueError, match=r"\['Hund'\] occur more than once"):
        loaded.begin_task(["Hund"])
    loaded.begin_task(["dog"])  # no class has that name any more
    assert loaded.tasks == [*RENAMED, ["Biene"], ["dog"]]


def images_of_one() -> Any:
    from PIL import Image

    return Image.new("RGB", (40, 40), "red")


def test_every_way_to_rename_works_alike(model: CDLForImageClassification, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    texts = {str(number): name for number, name in GERMAN.items()}
    back = {name: number for number, name in GERMAN.items()}
    load = CDLForImageClassification.from_pretrained
    found = [
        load(tmp_path / "m", id2label=GERMAN),
        load(tmp_path / "m", id2label=GERMAN, label2id=back),
        load(tmp_path / "m", id2label=texts, label2id={name: str(number) for name, number in back.items()}),
        AutoModelForImageClassification.from_pretrained(tmp_path / "m", id2label=GERMAN, label2id=back),
        load(tmp_path / "m", config=CDLConfig.from_pretrained(tmp_path / "m", id2label=GERMAN)),
        load(tmp_path / "m", num_labels=3, id2label=GERMAN),
    ]
    one = load(tmp_path / "m")
    one.config.id2label[0], one.config.id2label[1], one.config.id2label[2] = GERMAN.values()
    two = load(tmp_path / "m")
    two.config.tasks = copy.deepcopy(RENAMED)
    three = load(tmp_path / "m")
    three.config.tasks[0][0], three.config.tasks[0][1], three.config.tasks[1][0] = GERMAN.values()
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": texts}))  # edited by hand
    for number, renamed in enumerate([*found, one, two, three, load(tmp_path / "m")]):
        assert renamed.tasks == RENAMED, number
        renamed.save_pretrained(tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert (config["tasks"], config["id2label"], config["label2id"]) == (RENAMED, texts, back), number
    labels: Any = model.config.id2label
    labels[0] = "Kater"
    model.config.save_pretrained(tmp_path / "config")
    assert CDLConfig.from_pretrained(tmp_path / "config").tasks == [["Kater", "dog"], ["owl"]]


def test_labels_are_read_as_of_any_model(model: CDLForImageClassification, tmp_path: Path) -> None:
    """num_labels, id2label and label2id, loaded by either class, and after another task."""
    model.save_pretrained(tmp_path / "m")
    for load in (CDLForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
        loaded = load(tmp_path / "m")
        config = loaded.config
        assert (config.num_labels, loaded.num_labels) == (3, 3)
        assert config.id2label == {0: "cat", 1: "dog", 2: "owl"}
        assert config.label2id == {"cat": 0, "dog": 1, "owl": 2}
        assert loaded(images()).logits.shape[1] == config.num_labels
        config.num_labels = 3  # some scripts do that; the value is right
        with pytest.raises(ValueError, match="num_labels is 5, but the tasks have 3 classes.*begin_task"):
            config.num_labels = 5
        assert config.num_labels == 3, "nothing changed"
        loaded.begin_task(["bee", "ant"])
        assert (config.num_labels, loaded.num_labels, config.id2label[4]) == (5, 5, "ant")
        assert loaded(images()).logits.shape[1] == 5
        loaded.save_pretrained(tmp_path / "five")
        again = load(tmp_path / "five").config
        assert (again.num_labels, [*again.id2label], again.label2id["bee"]) == (5, [0, 1, 2, 3, 4], 3)
        from_file = CDLConfig.from_pretrained(tmp_path / "five")
        assert (from_file.num_labels, from_file.id2label) == (5, again.id2label)
    assert CDLConfig.from_pretrained(tmp_path / "m").num_labels == 3
    assert CDLConfig().num_labels == 0


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"id2label": {0: "a", 1: "b"}}, "must name all 3 classes, by the numbers 0 to 2"),
        ({"id2label": {0: "a", 1: "b", 2: "c", 3: "d"}}, "must name all 3 classes"),
        ({"id2label": {1: "a", 2: "b", 3: "c"}}, "must name all 3 classes"),
        ({"id2label": {}}, "must name all 3 classes"),
        ({"id2label": {"x": "a", "y": "b", "z": "c"}}, "must name all 3 classes"),
        ({"id2label": ["a", "b", "c"]}, "must name all 3 classes"),
        ({"id2label": {0: "a", 1: "b", 2: "a"}}, "gives 'a' to more than one class"),
        ({"id2label": {0: "a", 1: "b", 2: ""}}, "a text with something in it"),
        ({"id2label": {0: "a", 1: "b", 2: 3}}, "a text with something in it"),
        ({"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 2, "c": 1}}, "contradicts id2label"),
        ({"label2id": {"a": 0, "b": 1, "c": 2}}, "contradicts id2label .*leave label2id out"),
        ({"label2id": {"cat": 0}}, "contradicts id2label"),
        ({"num_labels": 2}, "num_labels is 2, but the tasks have 3 classes"),
        ({"num_labels": 4}, "more classes come with model.begin_task"),
        ({"problem_type": "multi_label_classification"}, "problem_type"),
    ],
)
def test_labels_that_do_not_fit_are_refused_wherever_they_come_from(
    labels: dict[str, Any], said: str, model: CDLForImageClassification, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "m")
    for load in (CDLForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "m", **labels)
    with pytest.raises(ValueError, match=said):
        CDLConfig(tasks=TASKS, **labels)
    with pytest.raises(ValueError, match=said):
        for name, value in labels.items():
            setattr(model.config, name, value)
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_tasks_and_labels_that_were_both_renamed_and_not_alike_are_refused(model: CDLForImageClassification) -> None:
    model.config.tasks = [["a", "b"], ["c"]]
    model.config.id2label = {0: "x", 1: "y", 2: "z"}
    with pytest.raises(ValueError, match="both changed, and not alike|both changed and name other"):
        _ = model.tasks


# ---- fields ----


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"promt": {"type": "coda"}}, "no field 'promt'; did you mean 'prompt'?"),
        ({"heads": {"type": "linear"}}, "did you mean 'head'?"),
        ({"trainbackbone": True}, "did you mean 'train_backbone'?"),
        ({"rank": 4}, r"CDLConfig has no field 'rank'\."),
        ({"temperature": 2.0}, "no field 'temperature'"),
        ({"prompt": None}, "prompt is None; allowed: fields"),
        ({"head": "linear"}, "head is 'linear'; allowed: fields"),
        ({"kd_prompt": True}, "kd_prompt is True; allowed: fields or null"),
        ({"train_backbone": "false"}, "train_backbone is 'false'; allowed: true or false"),
        ({"save_code": 1}, "save_code is 1; allowed: true or false"),
        ({"query": "one-pass"}, "allowed: two_pass, one_pass"),
        ({"query_view": {"size": [8, 8], "scale": [1, 1, float("nan")], "shift": [0, 0, 0]}}, "query_view"),
        ({"query_view": {"size": [8], "scale": [1, 1, 1], "shift": [0, 0, 0]}}, "query_view"),
    ],
)
def test_fields_that_a_model_does_not_have_are_refused(fields: dict[str, Any], said: str, vit: Path) -> None:
    with pytest.raises(ValueError, match=said):
        CDLConfig(**fields)
    with pytest.raises(ValueError, match=said):
        CDLForImageClassification.from_backbone(str(vit), **fields)


def test_arguments_of_loading_that_nobody_knows_are_refused(model: CDLForImageClassification, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    for name, said in (("promt", "did you mean 'prompt'"), ("frozen", r"no field 'frozen'\.")):
        for load in (
            CDLForImageClassification.from_pretrained,
            AutoModelForImageClassification.from_pretrained,
            CDLConfig.from_pretrained,
        ):
            with pytest.raises(ValueError, match=said):
                load(tmp_path / "m", **{name: True})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="follows from the backbone"):
        CDLForImageClassification.from_backbone(str(tmp_path), backbone_config=3)
    with pytest.raises(ValueError, match="made of a CDLConfig; got a dict"):
        CDLForImageClassification({"prompt": {"type": "none"}})  # type: ignore[arg-type]
    model.config.merge = "ema"
    with pytest.raises(ValueError, match="an attribute 'merge', which is not a field .* del model.config.merge"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    config = CDLConfig.from_pretrained(tmp_path / "m", use_cache=False, torch_dtype="float32")  # transformers' own
    assert CDLConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


WRONG = [float("nan"), float("inf"), float("-inf"), -1, 10**39, True, "8", None, [8], {}]
SECTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (kind.config_class, {}) for name, kind in PROMPTS.items()},
    "kd_prompt": (KDPromptConfig, {"layers": [None]}),
    "mapping": (MappingConfig, {}),
    "lora": (LoraOptions, {"targets": [None]}),
}
NUMBERS = [
    (section, name)
    for section, (kind, _) in SECTIONS.items()
    for name, value in vars(kind()).items()
    if isinstance(value, int | float) and not isinstance(value, bool)
] + [("kd_prompt", "layers")]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_a_number_of_a_section_is_one(section: str, name: str, value: Any) -> None:
    if value is None and name == "layers":
        return  # all of them
    with pytest.raises(ValueError, match=rf"{name}"):
        SECTIONS[section][0](**{name: value})


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cosine", "scale"),
        ("ncm", "scale"),
        ("ridge", "strength"),
        ("ridge", "features"),
        ("ridge", "soft_targets"),
        ("ridge", "temperature"),
    ],
)
def test_a_number_of_a_head_is_one(kind: str, name: str, value: Any) -> None:
    if value is None and name == "features":
        return  # none
    with pytest.raises(ValueError):
        build_head({"type": kind, name: value}, 8)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("coda", {"layers": "01"}),
        ("coda", {"layers": 3}),
        ("coda", {"layers": (0, True)}),
        ("coda", {"layers": (0, -1)}),
        ("coda", {"attention": 1}),
        ("coda", {"attention": "no"}),
        ("l2p", {"layers": (0.0,)}),
        ("apt", {"layers": {0, 1}}),
        ("dualprompt", {"expert_layers": None}),
        ("dualprompt", {"reserved_tasks": 10**8}),
        ("l2p", {"pool_size": 10**8}),
        ("coda", {"length": 10**8}),
        ("none", {"length": 4}),
    ],
)
def test_sections_of_the_wrong_kind_or_size_are_refused(kind: str, fields: dict[str, Any], vit: Path) -> None:
    with pytest.raises(ValueError):
        CDLForImageClassification.from_backbone(str(vit), prompt={"type": kind, **fields})


# ---- arguments are not modified ----


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_object_of_the_caller_s_is_changed(kind: str, tmp_path: Path) -> None:
    backbone: Any = family_config(kind)
    random = [name for name in vars(backbone) if "drop" in name and isinstance(vars(backbone)[name], float)]
    for name in random:
        setattr(backbone, name, 0.3)
    for name in FAMILIES[kind].random_positions:
        setattr(backbone, name, 0.2)
    sections: dict[str, Any] = {
        "prompt": {"type": "coda", "layers": [0, 1], "length": 4},
        "kd_prompt": {"length": 4},
        "head": {"type": "cosine"},
        "tasks": [["cat", "dog"], ["owl"]],
    }
    given = copy.deepcopy(sections)
    before = copy.deepcopy(backbone)
    config = CDLConfig(backbone_config=backbone, query_config=backbone, **sections)
    config_before, vars_before = config.to_dict(), vars(copy.deepcopy(config))
    model = CDLForImageClassification(config)
    model.begin_task(["bee"])
    model.config.prompt["layers"].append(2)
    model.set_attn_implementation("eager")
    assert sections == given and vars(backbone) == vars(before)
    assert config.to_dict() == config_before and vars(config).keys() == vars_before.keys()
    assert config._attn_implementation is None and config.backbone_config._attn_implementation is None
    assert all(getattr(model.config.backbone_config, name) == 0 for name in random)
    made = build_backbone(backbone)
    assert vars(backbone) == vars(before) and made.config is not backbone

    model.config.prompt["layers"].pop()
    model.save_pretrained(tmp_path / "m")
    stored = CDLConfig.from_pretrained(tmp_path / "m")
    for name in random:
        setattr(stored.backbone_config, name, 0.3)
    kept = stored.to_dict()
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "m", config=stored, attn_implementation="eager")
    loaded.begin_task(["fly"])
    assert stored.to_dict() == kept and loaded.config is not stored


def test_sections_are_no_one_else_s(vit: Path) -> None:
    teacher = CDLForImageClassification.from_backbone(str(vit), prompt={"type": "coda", "layers": [0, 1]})
    pool = teacher.pool_config
    kept = copy.deepcopy(pool)
    prompt: dict[str, Any] = {"type": "coda", "layers": [0, 1]}
    student = CDLForImageClassification.from_backbone(str(vit), prompt=prompt, mapping={}, teacher_pool=pool)
    student.config.teacher_pool["prompt"]["layers"].append(2)  # type: ignore[index]
    student.config.prompt["layers"].append(2)
    assert pool == kept == teacher.pool_config and prompt == {"type": "coda", "layers": [0, 1]}
    names = [["cat", "dog"]]
    model = CDLForImageClassification.from_backbone(str(vit), tasks=names)
    names[0].append("owl")
    fresh = ["bee"]
    model.begin_task(fresh)
    fresh.append("fly")
    assert model.tasks == [["cat", "dog"], ["bee"]]


# ---- calls ----


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"pixel_values": torch.zeros(2, 4, 32, 32)}, r"shape \(2, 4, 32, 32\).* takes \(B, 3, H, W\)"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"takes \(B, 3, H, W\)"),
        ({"pixel_values": torch.zeros(2, 32, 32, 3)}, r"takes \(B, 3, H, W\)"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "images of 16x16 pixels, but the backbone .* 32x32"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "dtype torch.uint8"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.int64)}, "of floating point"),
        ({"pixel_values": np.zeros((2, 3, 32, 32))}, "is a ndarray"),
        ({"pixel_values": [torch.zeros(3, 32, 32)]}, "is a list"),
        ({"labels": torch.tensor([0, 3])}, "labels go from 0 to 3, but the model knows 3 classes"),
        ({"labels": torch.tensor([-1, 2])}, "labels go from -1 to 2"),
        ({"labels": torch.tensor([0.0, 1.0])}, "give a tensor of 2 whole numbers"),
        ({"labels": torch.tensor([0])}, "give a tensor of 2 whole numbers"),
        ({"labels": torch.tensor([True, False])}, "give a tensor of 2 whole numbers"),
        ({"labels": [0, 1]}, "give a tensor of 2 whole numbers"),
        ({"task_id": 2}, "task_id is 2; the model has 2 tasks, 0 to 1"),
        ({"task_id": -1}, "task_id is -1"),
        ({"task_id": True}, "task_id is True"),
        ({"task_id": "owl"}, "task_id is 'owl'"),
        ({"query": torch.zeros(3, 32)}, "query has shape"),
        ({"query": torch.zeros(32)}, "query has shape"),
        ({"output_hidden_states": [0, 4]}, r"output_hidden_states .*\[0, 4\], but there are 0 to 3"),
        ({"output_attentions": True}, "shown by 'eager' alone"),
    ],
)
def test_inputs_that_have_no_answer_are_refused_in_words(
    inputs: dict[str, Any], said: str, model: CDLForImageClassification
) -> None:
    with pytest.raises(ValueError, match=said):
        model(**{"pixel_values": torch.zeros(2, 3, 32, 32), **inputs})


def test_labels_that_do_not_count_and_all_whole_numbers_are_taken(model: CDLForImageClassification) -> None:
    pixels = torch.zeros(2, 3, 32, 32)
    of_one = model(pixels[:1], torch.tensor([2], dtype=torch.uint8).long()).loss
    torch.testing.assert_close(model(pixels, torch.tensor([-100, 2])).loss, of_one)
    model.config.output_hidden_states = True
    assert len(model(pixels).hidden_states) == 4
    model.set_attn_implementation("eager")
    assert len(model(pixels, output_attentions=True).attentions) == 3


@pytest.mark.parametrize("name", ["flash_attention_2", "sdp", "", None, 3, {"backbone": "eager"}, {"": "flex"}])
def test_an_attention_that_is_none_is_refused(name: Any, model: CDLForImageClassification) -> None:
    with pytest.raises(ValueError, match="allowed: sdpa, eager"):
        model.set_attn_implementation(name)


def test_a_classifier_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    config: PreTrainedConfig = family_config("vit")
    folder = tmp_path / "vit"
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    model = ImageClassifier.from_backbone(str(folder))
    for names, said in (
        ("zebra", r"give \['zebra'\]"),
        ({"a"}, "order"),
        (["a", "a"], "more than once"),
        ([1], "text"),
    ):
        for method in (model.begin_task, model.use_as_is):
            with pytest.raises(ValueError, match=said):
                method(names)  # type: ignore[arg-type]
    model.begin_task(["cat", "dog"])
    for inputs, said in (
        ({"pixel_values": torch.zeros(1, 4, 32, 32)}, "takes"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "floating point"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32), "labels": torch.tensor([2])}, "knows 2 classes"),
    ):
        with pytest.raises(ValueError, match=said):
            model(**inputs)
    assert SIZES["image_size"] == 32
