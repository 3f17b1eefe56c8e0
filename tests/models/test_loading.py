"""Damaged, incomplete or malicious checkpoints and backbones are refused by name, quickly and without much memory."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_backbone
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.backbones import loading as bb
from hf_cdl.backbones.stored import check_stored, weight_files
from hf_cdl.models.classifier import ImageClassifier

RIDGE: dict[str, Any] = {"head": {"type": "ridge"}}
MODELS: dict[str, dict[str, Any]] = {
    "coda": {"prompt": {"type": "coda", "components": 3, "length": 4, "layers": (0, 1)}, "kd_prompt": {}},
    "apt": {"prompt": {"type": "apt"}, "head": {"type": "cosine"}},
    "dualprompt": {
        "prompt": {"type": "dualprompt", "general_layers": (0,), "expert_layers": (1,), "reserved_tasks": 3},
        "head": {"type": "weight_normalised"},
    },
    "ridge": RIDGE,
    "ridge, random features": {"head": {"type": "ridge", "features": 8, "standardise": "first_task"}},
    "ncm": {"head": {"type": "ncm"}},
    "lora": {**RIDGE, "lora": {"r": 2}, "first_session": {"type": "linear"}},
    "small": {"prompt": {"type": "l2p", "layers": (0,)}, "save_backbone": False},
}
LEARNT = [  # one of each kind of part that learns or stores what was learnt
    ("coda", "head.blocks.1.weight"),
    ("coda", "kd_head.blocks.0.bias"),
    ("coda", "pool.blocks.0.key"),
    ("coda", "kd_prompt.token"),
    ("apt", "pool.blocks.1.merged"),
    ("apt", "head.scale"),
    ("dualprompt", "pool.reserved_key"),
    ("dualprompt", "head.norm_weight"),
    ("ridge", "head.gram"),
    ("ridge", "head.blocks.0.total"),
    ("ridge, random features", "head.projection"),
    ("ridge, random features", "head.standard.std"),
    ("ncm", "head.blocks.1.total"),
    ("lora", "backbone.layers.0.attention.q_proj.lora_B.default.weight"),
    ("small", "pool.prompt"),
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone") / "vit")


@pytest.fixture(scope="module")
def checkpoints(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, fields in MODELS.items():
        set_seed(0)
        model = CDLForImageClassification.from_backbone(str(backbone), **fields)
        model.begin_task(["cat", "dog"])
        model.end_session()
        model.begin_task(["owl"])
        model.save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.fixture(autouse=True)
def without_memory() -> Iterator[None]:
    """Check that what is refused here does not allocate the memory it asks for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "kB"


def copy_of(folder: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda state: None) -> Path:
    """A copy of a checkpoint with changed weights."""
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    return place


def with_config(folder: Path, place: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with a changed config.json; fields set to `...` are removed."""
    shutil.copytree(folder, place)
    content = {**json.loads((place / "config.json").read_text()), **fields}
    text = json.dumps({name: value for name, value in content.items() if value is not ...})
    (place / "config.json").write_text(text)
    return place


def stored_name(folder: Path, name: str) -> str:
    """The name in the file of a weight that transformers stores under an older name."""
    return next(key for key in load_file(folder / "model.safetensors") if key in (name, OLDER.get(name)))


OLDER = {
    "backbone.layers.0.attention.q_proj.lora_B.default.weight": (
        "backbone.encoder.layer.0.attention.attention.query.lora_B.default.weight"
    )
}
LOAD = [CDLForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained]


def bare(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if name.startswith("backbone.")]:
        state.pop(name)


def misname(state: dict[str, torch.Tensor]) -> None:
    state["backbone.ln.weight"] = state.pop("backbone.layernorm.weight")


# ---- weights ----


@pytest.mark.parametrize(("model", "name"), LEARNT)
def test_a_checkpoint_without_a_weight_is_refused_by_its_name(
    model: str, name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    stored = stored_name(checkpoints[model], name)
    folder = copy_of(checkpoints[model], tmp_path / "x", lambda state: state.pop(stored))
    for load in LOAD:
        with pytest.raises(ValueError, match=rf"cannot be used. It is .* lacks 1 weight \({name}\)"):
            load(str(folder))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("model", "name"), LEARNT)
def test_a_weight_that_is_no_number_is_refused_by_its_name(
    model: str, name: str, number: float, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        value = state[stored_name(checkpoints[model], name)]
        (value.view(torch.float64) if value.dtype == torch.int64 else value).view(-1)[-1] = number

    folder = copy_of(checkpoints[model], tmp_path / "x", spoil)
    with pytest.raises(ValueError, match=rf"NaN or infinite in 1 of \d+ tensors: {name}\."):
        CDLForImageClassification.from_pretrained(folder)


def test_weights_too_much_and_of_another_shape_are_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def more(state: dict[str, torch.Tensor]) -> None:
        state["head.blocks.2.weight"] = torch.zeros(1, 32)
        state["kd_prompt.token"] = torch.zeros(31)

    folder = copy_of(checkpoints["coda"], tmp_path / "x", more)
    said = r"has 1 that its config does not ask for \(head.blocks.2.weight\); 1 have another shape \(kd_prompt.token "
    with pytest.raises(ValueError, match=said + r"\(31,\) instead of \(32,\)\)"):
        CDLForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="would leave weights at random"):
        CDLForImageClassification.from_pretrained(checkpoints["coda"], ignore_mismatched_sizes=True)
    config = CDLConfig.from_pretrained(checkpoints["coda"])
    config.set_tasks([["cat", "dog"], ["owl"], ["bee"]])
    with pytest.raises(ValueError, match=r"lacks 7 weights \(head.blocks.2.bias"):
        CDLForImageClassification.from_pretrained(checkpoints["coda"], config=config)


def test_a_whole_checkpoint_without_its_backbone_fetches_it_unless_it_was_trained(
    backbone: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    loaded = CDLForImageClassification.from_pretrained(copy_of(checkpoints["coda"], tmp_path / "frozen", bare))
    assert bb.digest(loaded.backbone) == bb.digest(bb.load_backbone(str(backbone)))
    part = copy_of(checkpoints["coda"], tmp_path / "part", lambda s: s.pop("backbone.layernorm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weight \(backbone.layernorm.weight\)"):
        CDLForImageClassification.from_pretrained(part)
    model = CDLForImageClassification.from_backbone(str(backbone), train_backbone=True)
    model.begin_task(["cat", "dog"])
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"lacks \d+ weights \(backbone.embeddings"):
        CDLForImageClassification.from_pretrained(copy_of(tmp_path / "tuned", tmp_path / "tuned, bare", bare))


def test_a_sharded_checkpoint_is_the_same_and_its_gaps_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = CDLForImageClassification.from_pretrained(checkpoints["coda"])
    model.save_pretrained(tmp_path / "s", max_shard_size="30KB")
    index = tmp_path / "s" / "model.safetensors.index.json"
    again = CDLForImageClassification.from_pretrained(tmp_path / "s")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    content = json.loads(index.read_text())
    shard = tmp_path / "s" / content["weight_map"]["kd_prompt.token"]
    state = load_file(shard)
    state.pop("kd_prompt.token")
    save_file(state, shard, metadata={"format": "pt"})
    several = "config.json and every file that model.safetensors.index.json names again"
    with pytest.raises(ValueError, match=rf"lacks 1 weight \(kd_prompt.token\).*{several}"):
        CDLForImageClassification.from_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match=f"do not belong together.*{several}"):
        check_stored("it", 10**9, weight_files(tmp_path / "s"))
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        CDLForImageClassification.from_pretrained(tmp_path / "s")


@pytest.mark.parametrize("cut", [0, 7, 200, 5000])
def test_a_file_that_was_cut_short_is_refused(cut: int, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["coda"], tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cannot be loaded: .* get them again if they were cut short"):
        CDLForImageClassification.from_pretrained(tmp_path / "x")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_backbone_of_no_numbers_is_refused_by_its_weights(number: float, backbone: Path, tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["encoder.layer.1.layernorm_after.weight"][3] = number

    folder = copy_of(backbone, tmp_path / "x", spoil)
    said = rf"The weights of '{folder}' are NaN or infinite in 1 of \d+ tensors: layers.1.layernorm_after.weight"
    for load in (CDLForImageClassification.from_backbone, bb.load_backbone):
        with pytest.raises(ValueError, match=said):
            load(str(folder))
    small = CDLForImageClassification.from_backbone(str(backbone), save_backbone=False)
    small.begin_task(["cat", "dog"])
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=rf"Its backbone is '{folder}', which does not serve: {said}"):
        CDLForImageClassification.from_pretrained(tmp_path / "small", backbone_name=str(folder))
    half = copy_of(backbone, tmp_path / "half", lambda s: s.update({n: v.half() for n, v in s.items()}))
    CDLForImageClassification.from_backbone(str(half))


def test_a_classifier_s_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_channels=3, layer_type="basic")
    config.id2label = {0: "cat", 1: "dog"}
    ResNetForImageClassification(config).save_pretrained(tmp_path / "r")
    assert ImageClassifier.from_pretrained(tmp_path / "r").tasks == [["cat", "dog"]]
    lacking = copy_of(tmp_path / "r", tmp_path / "lacking", lambda state: state.pop("classifier.1.bias"))
    with pytest.raises(ValueError, match=r"lacks 1 weight \(classifier.1.bias\)"):
        ImageClassifier.from_pretrained(lacking)
    nan = copy_of(tmp_path / "r", tmp_path / "nan", lambda state: state["classifier.1.bias"].fill_(float("nan")))
    for load in (ImageClassifier.from_pretrained, ImageClassifier.from_backbone):
        with pytest.raises(ValueError, match="NaN or infinite in 1 of .* classifier.1.bias"):
            load(nan)
    long = copy_of(tmp_path / "r", tmp_path / "long", lambda s: s.update({"classifier.1.bias": torch.zeros(5)}))
    for load in (ImageClassifier.from_pretrained, ImageClassifier.from_backbone):
        with pytest.raises(ValueError, match=r"another shape \(classifier.1.bias \(5,\) instead of \(2,\)\)"):
            load(long)
    for fields, said in (
        ({"num_labels": 10**9, "id2label": ..., "label2id": ...}, "num_labels is 1000000000"),
        ({"depths": [10**9, 1]}, "depths is 1000000000"),
        ({"hidden_sizes": [10**6, 10**6]}, "would hold"),
        ({"id2label": {"5": "cat", "6": "dog"}}, "must name the classes 0, 1"),
    ):
        folder = with_config(tmp_path / "r", tmp_path / str(said), **fields)
        with pytest.raises(ValueError, match=said):
            ImageClassifier.from_pretrained(folder)
        if "name" not in said:
            with pytest.raises(ValueError, match=said):
                ImageClassifier.from_backbone(folder, pretrained=False)


# ---- config.json ----


WIDE = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 30, "model_type": "vit"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tasks": "ab"}, "tasks must be a list of the class names of every task"),
        ({"tasks": [["cat", "dog"], "owl"]}, r"a list of texts; got 'owl'. So for a task of one class give \['owl'\]"),
        ({"tasks": [["cat", 2], ["owl"]]}, "A class name must be a text with something in it; got 2"),
        ({"tasks": None}, "tasks must be a list"),
        ({"tasks": [["cat", "cat"], ["owl"]]}, "occur more than once"),
        ({"id2label": {"0": "a", "1": "b"}}, "must name all 3 classes"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "gives 'a' to more than one class"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, but the tasks have 3 classes"),
        ({"prompt": {"type": "deep"}}, "Unknown prompt type 'deep'; allowed: none, coda"),
        ({"prompt": {}}, "Unknown prompt type in {}"),
        ({"prompt": {"type": ["coda"]}}, "Unknown prompt type in"),
        ({"prompt": []}, r"prompt is \[\]; allowed: fields"),
        ({"prompt": {"type": "coda", "layers": [0, 1], "components": 10**8}}, "would hold 64,000,000,000 numbers"),
        ({"prompt": {"type": "coda", "components": 10**30}}, "components is 1000000000000000000000000000000"),
        ({"prompt": {"type": "coda", "length": float("nan")}}, "length is nan"),
        ({"prompt": {"type": "coda", "layers": [10**8]}}, "different numbers from 0 to 1"),
        ({"kd_prompt": {"length": 2, "layer": 1}}, "kd_prompt has no field layer; it has length, layers"),
        ({"kd_prompt": {"token_init": "zero"}}, "token_init is 'zero'; allowed: uniform, cls"),
        ({"mapping": {}, "kd_prompt": None}, "give teacher_pool=teacher.pool_config"),
        ({"mapping": {}, "teacher_pool": {"prompt": 3}, "kd_prompt": None}, "teacher_pool is {'prompt': 3}"),
        (
            {"mapping": {}, "teacher_pool": {"prompt": {}, "hidden_size": 8, "num_layers": 10**8}},
            "teacher_pool.num_layers is 100000000",
        ),
        ({"teacher_pool": {"prompt": {"type": "apt"}, "hidden_size": 8, "num_layers": 2}}, "the model has none"),
        ({"head": {"type": "linear", "scale": 2}}, "Head type 'linear' has no field scale"),
        ({"head": {"type": "ridge", "features": 10**8}}, "would hold"),
        ({"first_session": {"type": 1}}, "Unknown head type"),
        ({"lora": {"r": 10**8}}, "lora.r is 100000000|lora adapts"),
        ({"lora": {"rank": 8}}, "lora has no field rank|lora adapts"),
        ({"backbone_config": ...}, "backbone_config is not a config, but None"),
        ({"backbone_config": {"hidden_size": 32}}, "backbone_config has no model_type"),
        ({"backbone_config": {"model_type": "vit", "num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"backbone_config": {"model_type": "vit", "hidden_size": 10**8}}, "would hold|cannot be made"),
        ({"backbone_config": {"model_type": "vit", "hidden_size": -8}}, "hidden_size is -8"),
        ({"backbone_config": {"model_type": "vit", "hidden_size": "8"}}, "hidden_size"),
        ({"backbone_config": {"model_type": "vit", "image_size": 10**8}}, "would hold|cannot be made"),
        ({"backbone_config": {"model_type": "vit", "num_labels": 10**9}}, "num_labels is 1000000000"),
        ({"backbone_config": {"model_type": "vit", "layer_norm_eps": float("nan")}}, "layer_norm_eps is nan"),
        ({"backbone_config": {"model_type": "vit", "hidden_act": "none"}}, "cannot be made"),
        ({"backbone_config": {"model_type": "swin"}}, "type 'swin' is not supported"),
        ({"backbone_config": {"model_type": "cdl", "backbone_config": {"model_type": "vit"}}}, "'cdl' is not supp"),
        ({"backbone_config": WIDE}, "describes a model of 6,.* numbers, but its weights are"),
        ({"query_config": {"model_type": "vit", "depths": [10**9]}}, "depths is 1000000000"),
        ({"query_view": {"size": [8, 8], "scale": [1, 1]}}, "query_view"),
        ({"query": "self"}, "query is 'self'; allowed: two_pass, one_pass"),
        ({"save_backbone": "no"}, "save_backbone is 'no'; allowed: true or false"),
        ({"save_backbone": False, "backbone_name": None}, "does not say where its weights are"),
        ({"backbone_name": 5}, "backbone_name is 5; allowed: a text or null"),
        ({"problem_type": "regression"}, "problem_type is 'regression'"),
        ({"model_type": "vit"}, "This is a model of type 'vit', not cdl|hidden|Unrecognized"),
        ({"merge": "ema"}, r"has a field 'merge', which hf_cdl [\d.]+ does not know\. If a newer hf_cdl wrote it"),
        ({"promt": {}}, "did you mean 'prompt'"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(
    fields: dict[str, Any], said: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = with_config(checkpoints["coda"], tmp_path / "x", **fields)
    start = time.process_time()
    with pytest.raises(ValueError, match=said) as error:
        CDLForImageClassification.from_pretrained(folder)
    assert time.process_time() - start < 2
    assert str(folder) in str(error.value) and str(error.value).count("\n") < 6
    if "backbone_config" in fields and fields["backbone_config"] is not WIDE:
        with pytest.raises(ValueError):
            CDLForImageClassification.from_backbone(str(folder))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"cdl"', "\x00\x01", "[" * 100_000, '{"model_type": "cdl", "x": ' + "[" * 990],
    ids=range(9),
)
def test_a_file_that_is_no_config_is_refused(text: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["coda"], tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(text)
    for load in (CDLForImageClassification.from_pretrained, CDLForImageClassification.from_backbone):
        with pytest.raises(ValueError, match="config"):
            load(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="config"):
        ImageClassifier.from_pretrained(tmp_path / "x")


# ---- small checkpoints that build on each other ----


def test_small_checkpoints_that_have_no_backbone_in_the_end_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def on(name: str, **names: str) -> Path:
        return with_config(checkpoints["small"], tmp_path / name, backbone_digest=None, **names)

    paths = {name: str(tmp_path / name) for name in "abcdefghij"}
    on("a", backbone_name=paths["a"])
    on("b", backbone_name=paths["c"])
    on("c", backbone_name=paths["b"])
    for name, after in zip("defghi", "efghij", strict=True):
        on(name, backbone_name=paths[after])
    on("j", backbone_name=str(checkpoints["coda"]))
    for name in "abc":
        for load in (*LOAD, CDLForImageClassification.from_backbone, bb.load_backbone):
            start = time.process_time()
            with pytest.raises(ValueError, match="name each other or themselves as backbone have none: '"):
                load(paths[name])
            assert time.process_time() - start < 2
    with pytest.raises(ValueError, match="more than 4 others in turn"):
        CDLForImageClassification.from_pretrained(paths["d"])
    for name in "kl":  # as if complete: without backbone weights, or with other names
        folder = copy_of(checkpoints["coda"], tmp_path / name, bare if name == "k" else misname)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "backbone_name": str(folder)}))
        with pytest.raises(ValueError, match="have none: '|needs itself"):
            CDLForImageClassification.from_pretrained(folder)
    # h builds on i, which builds on j, which builds on a complete one
    assert bb.digest(CDLForImageClassification.from_pretrained(paths["h"]).backbone)


def test_a_small_checkpoint_s_claim_is_checked_before_anything_is_allocated(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    wide = with_config(checkpoints["small"], tmp_path / "wide", backbone_config=WIDE, prompt={"type": "none"})
    with pytest.raises(ValueError, match="Its backbone is .*describes a model of 6,.* numbers, but its weights are"):
        CDLForImageClassification.from_pretrained(wide)


# ---- revisions ----


def test_a_folder_has_no_revisions(backbone: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    vit, coda = str(backbone), str(checkpoints["coda"])
    for attempt in (
        lambda: CDLForImageClassification.from_backbone(vit, "main"),
        lambda: CDLForImageClassification.from_backbone(vit, query_name=vit, query_revision="main"),
        lambda: CDLForImageClassification.from_pretrained(coda, revision="task-01"),
        lambda: AutoModelForImageClassification.from_pretrained(coda, revision="task-01"),
        lambda: ImageClassifier.from_backbone(vit, "main"),
        lambda: bb.load_backbone(vit, "main"),
        lambda: bb.load_config(vit, "main"),
        lambda: bb.read_config(vit, "main"),
        lambda: bb.commit_of(vit, "main"),
    ):
        with pytest.raises(ValueError, match="is a folder, and a folder has no revisions, but revision is"):
            attempt()
    with pytest.raises(ValueError, match="there is no query_name that it is of"):
        CDLForImageClassification.from_backbone(vit, query_revision="main")
    # a checkpoint that was made on a commit of the Hub's, whose backbone is in a folder now
    moved = with_config(checkpoints["small"], tmp_path / "x", backbone_name="org/vit", backbone_revision="f" * 40)
    loaded = CDLForImageClassification.from_pretrained(moved, backbone_name=vit)
    assert (loaded.config.backbone_name, loaded.config.backbone_revision) == (vit, None)
