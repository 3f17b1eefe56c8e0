"""The composite model: families, attention, freezing, heads, the KD token, and the behaviour Trainer and Hub need."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import thinned
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import SIZES, TINY, family_config, stored_backbone
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
    set_seed,
)

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.backbones import families as bb
from hf_cdl.backbones.loading import build_backbone, digest, load_backbone
from hf_cdl.data.views import Preprocess, query_view
from hf_cdl.models.query_view import to_query_view
from hf_cdl.types import KV

CODA = {"type": "coda", "components": 3, "length": 4, "layers": (0, 1, 2)}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_backbone(tmp_path_factory.mktemp("vit"))


def student(folder: Path, **fields: Any) -> CDLForImageClassification:
    set_seed(5)
    defaults: dict[str, Any] = {"prompt": CODA, "kd_prompt": {}}
    model = CDLForImageClassification.from_backbone(str(folder), **{**defaults, **fields})
    model.begin_task(["cat", "dog"])
    model.begin_task(["owl"])
    return model.eval()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


APT: dict[str, Any] = {"prompt": {"type": "apt"}, "head": {"type": "weight_normalised"}}
DUAL = {"type": "dualprompt", "general_layers": (0,), "expert_layers": (1, 2)}
TEACHER = {"prompt": CODA, "hidden_size": 48, "num_layers": 4}
WAYS: dict[str, dict[str, Any]] = {
    "coda": {},
    "l2p": {"prompt": {"type": "l2p", "layers": (0, 2)}},
    "dualprompt": {"prompt": DUAL},
    "apt": APT,
    "one-pass": {"query": "one_pass"},
    "mapping": {"kd_prompt": None, "mapping": {}, "teacher_pool": TEACHER},
    "KD token alone": {"prompt": {"type": "none"}, "kd_prompt": {"length": 0}},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: stored_backbone(tmp_path_factory.mktemp(kind), kind) for kind in TINY}


def test_every_family_has_its_tiny_config() -> None:
    assert [*TINY] == [*bb.FAMILIES]


@pytest.mark.parametrize(("kind", "way"), thinned(itertools.product(TINY, WAYS), 3))
def test_every_family_takes_every_kind_of_prompt(
    kind: str, way: str, families: dict[str, Path], tmp_path: Path
) -> None:
    model = student(families[kind], **WAYS[way])
    plain = AutoModel.from_pretrained(families[kind], **bb.family(model.backbone.config).init).eval()
    with torch.no_grad():
        inputs = bb.extra_inputs(plain.config, images())
        feature = bb.pool(plain, plain(images(), **inputs).last_hidden_state)
        # the query pass is the plain backbone: no prompts, no KD token
        torch.testing.assert_close(model.compute_query(images()), feature)
        model.train()  # APT answers with its merged prompt in evaluation: zeros until a task is learnt
        assert not torch.allclose(model(images()).features, feature, atol=1e-3), "prompts must change the features"
        model.eval()
        logits = model(images()).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(images()).logits, logits, atol=1e-5, rtol=1e-4)
        model.set_attn_implementation("sdpa")
    model.train()
    output = model(images(), task_id=1)
    (output.logits.square().sum() + output.kd_logits.square().sum() + (output.prompt_loss or 0)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == parameter.requires_grad, name
    model.end_task()
    model.save_pretrained(tmp_path / "student")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(loaded(images()).logits, model.eval()(images()).logits)


@pytest.mark.parametrize(("own", "query"), [(kind, "vit") for kind in TINY] + [("vit", k) for k in TINY])
def test_a_query_backbone_of_any_family_is_in_the_checkpoint(
    own: str, query: str, families: dict[str, Path], tmp_path: Path
) -> None:
    model = CDLForImageClassification.from_backbone(
        str(families[own]), query_name=str(families[query]), prompt=CODA
    ).eval()  # fmt: skip
    model.begin_task(["cat", "dog"])
    model.config.update({"backbone_name": None, "query_name": None})  # so that nothing is downloaded
    model.save_pretrained(tmp_path)
    loaded = CDLForImageClassification.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_weights_under_the_names_of_another_family_are_fetched_and_their_fingerprint_checked(
    families: dict[str, Path], tmp_path: Path
) -> None:
    """As in older checkpoints of two families."""
    model = CDLForImageClassification.from_backbone(
        str(families["vit"]), query_name=str(families["dinov2"]), prompt=CODA
    )  # fmt: skip
    model.begin_task(["cat", "dog"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {
        name.replace("query_backbone.encoder.layer", "query_backbone.layers"): value
        for name, value in load_file(file).items()
    }
    save_file({name: torch.zeros_like(v) if name.startswith("query_") else v for name, v in state.items()}, file)
    loaded = CDLForImageClassification.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(ValueError, match="Its query_backbone is .*fingerprint"):
        CDLForImageClassification.from_pretrained(tmp_path, query_digest="0" * 16)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_made_with_tasks_has_no_weight_left_as_memory_was(way: str, vit: Path) -> None:
    fields: dict[str, Any] = {"prompt": CODA, "kd_prompt": {}, **WAYS[way]}
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        config = CDLConfig(backbone_config=family_config("vit"), tasks=[["cat", "dog"], ["owl"]], **fields)
        model = CDLForImageClassification(config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]


@pytest.mark.parametrize("kind", TINY)
def test_on_several_devices_no_layer_is_cut_in_two(kind: str) -> None:
    model = CDLForImageClassification(CDLConfig(backbone_config=family_config(kind)))
    assert {type(layer).__name__ for layer in bb.layers(model.backbone)} <= {*(model._no_split_modules or ())}


@pytest.mark.parametrize("kind", ["clip_vision_model", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_the_feature_is_what_the_family_s_own_pooler_gives(kind: str, families: dict[str, Path]) -> None:
    """With its final norm, which CLIP and BEiT apply after the last hidden state."""
    plain = AutoModel.from_pretrained(families[kind]).eval()
    with torch.no_grad():
        wanted = plain(images()).pooler_output
        torch.testing.assert_close(student(families[kind]).compute_query(images()), wanted)


@pytest.mark.parametrize("kind", TINY)
def test_without_prompts_a_model_is_its_backbone_with_a_head(kind: str, families: dict[str, Path]) -> None:
    bare = student(families[kind], prompt={"type": "none"}, kd_prompt=None)
    with torch.no_grad():
        torch.testing.assert_close(bare(images()).features, bare.compute_query(images()))


QUERIES = ("two_pass", "one_pass")


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("kind", TINY)
def test_every_family_serves_and_checkpoints(kind: str, query: str, families: dict[str, Path], tmp_path: Path) -> None:
    model = student(families[kind], query=query)
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    picture = smooth_picture()
    with torch.no_grad():
        want = model(processor(picture, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]
    answer = pipeline("image-classification", model=str(tmp_path), device="cpu")(picture)
    scores = {line["label"]: line["score"] for line in answer}
    assert scores == pytest.approx({name: float(want[i]) for i, name in enumerate(["cat", "dog", "owl"])}, abs=1e-6)

    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().activation_checkpointing_enable()
        model.train().zero_grad()
        output = model(images())
        (output.logits.sum() + output.kd_logits.square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


COMPILED = [("vit", "two_pass"), ("beit", "one_pass")]


@pytest.mark.parametrize(
    ("kind", "query"),
    [  # a model takes two seconds: the fast tier has one of each query
        pytest.param(kind, query, marks=() if (kind, query) in COMPILED else pytest.mark.slow)
        for kind in bb.FAMILIES
        for query in QUERIES
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own imports
def test_every_family_compiles(kind: str, query: str, families: dict[str, Path]) -> None:
    model = student(families[kind], query=query)
    with torch.no_grad():
        plain = model(images()).logits
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images()).logits
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", bb.FAMILIES)
def test_a_feature_depends_on_every_patch(kind: str, families: dict[str, Path]) -> None:
    """ViT-MAE would let a quarter of them through."""
    model, pixels = student(families[kind], prompt={"type": "none"}, kd_prompt=None), images(1).requires_grad_()
    model(pixels).features.square().sum().backward()
    side = SIZES["patch_size"]
    assert (F.max_pool2d(pixels.grad.abs().sum(dim=1, keepdim=True), side) > 0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["beit", "dinov3_vit"])
def test_a_frozen_backbone_has_no_randomness(kind: str, tmp_path: Path) -> None:
    """BEiT has dropout, DINOv3 rescales positions at random; the query must be the un-prompted feature in training."""
    drops = {"attention_dropout": 0.3, "attention_probs_dropout_prob": 0.3, "drop_path_rate": 0.3}
    config = family_config(kind, **drops)
    build_backbone(config, frozen=False).save_pretrained(tmp_path)
    model = student(tmp_path, kd_prompt=None).train()
    torch.testing.assert_close(model.compute_query(images()), model.compute_query(images()))
    torch.testing.assert_close(model(images(), task_id=1).logits, model(images(), task_id=1).logits)
    tuned = student(tmp_path, kd_prompt=None, prompt={"type": "none"}, train_backbone=True).train()
    assert not torch.allclose(tuned(images()).logits, tuned(images()).logits)


def test_dinov3_keeps_its_patch_positions_beside_the_kd_token(tmp_path: Path) -> None:
    # RoPE rotates the last tokens of the sequence as patches: a KD token at the end would shift it by one patch.
    model = student(stored_backbone(tmp_path, "dinov3_vit"), prompt={"type": "none"})
    seen: list[torch.Tensor] = []
    layer = bb.layers(model.backbone)[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(images())
        model._run(model.backbone, images())
    hook.remove()
    with_token, without = seen
    assert with_token.shape[1] == without.shape[1] + 1
    patches = (SIZES["image_size"] // SIZES["patch_size"]) ** 2
    torch.testing.assert_close(with_token[:, -patches:], without[:, -patches:])  # the last tokens are all patches
    torch.testing.assert_close(with_token[:, 1], model.kd_prompt.token.expand(4, -1))  # type: ignore[union-attr]


def test_beit_with_relative_position_bias_takes_prompts_but_no_kd_token(tmp_path: Path) -> None:
    config = family_config("beit", use_relative_position_bias=True)
    build_backbone(config).save_pretrained(tmp_path)
    for implementation in ("sdpa", "eager"):
        model = student(tmp_path, kd_prompt=None)
        model.set_attn_implementation(implementation)
        assert model(images()).logits.shape == (4, 3)
    with pytest.raises(ValueError, match="relative position bias"):
        student(tmp_path)


@pytest.mark.parametrize("kind", ["swin", "resnet", "convnext", "siglip_vision_model", "yolos"])
def test_a_family_that_would_ignore_prompts_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'{kind}' is not supported.*Supported types: .*vit"):
        CDLForImageClassification.from_backbone(str(tmp_path))


def test_prefix_attention_is_softmax_over_the_longer_sequence(vit: Path) -> None:
    """Compare with hand-written attention of one layer, with prefixes before, after, and added to CLS."""
    model = student(vit, prompt={"type": "none"}, kd_prompt=None)
    layer: Any = bb.layers(model.backbone)[0].attention
    hidden = torch.randn(2, 17, 32)
    extra = {where: KV(torch.randn(2, 3, 32), torch.randn(2, 3, 32), where) for where in ("prepend", "append")}
    added = KV(torch.randn(1, 1, 32), torch.randn(1, 1, 32), "add_to_cls")
    got, _ = layer(hidden, prefix={0: [added, extra["prepend"], extra["append"]]})

    query, key, value = (proj(hidden) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    key, value = (torch.cat([x[:, :1] + a, x[:, 1:]], 1) for x, a in ((key, added.key), (value, added.value)))
    before, after = extra["prepend"], extra["append"]
    key = torch.cat([before.key, key, after.key], 1)
    value = torch.cat([before.value, value, after.value], 1)
    heads = [x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (query, key, value)]
    weights = (heads[0] @ heads[1].transpose(-1, -2) / 8**0.5).softmax(-1)
    want = layer.o_proj((weights @ heads[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_an_attention_that_ignores_prompts_cannot_slip_in(vit: Path) -> None:
    model = student(vit)
    with pytest.raises(ValueError, match="would ignore the prompts; allowed: sdpa, eager"):
        model.set_attn_implementation("flash_attention_2")
    model.backbone.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="which ignores prompts"):
        model(images())


def test_autocast_and_hidden_states_agree_with_the_plain_forward(vit: Path) -> None:
    model = student(vit)
    with torch.no_grad():
        plain = model(images())
        hidden = model(images(), output_hidden_states=True).hidden_states
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images()).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images()).logits, half, atol=0.05, rtol=0.02)  # with gradients enabled
    assert len(hidden) == 4 and hidden[0].shape == (4, 17, 32)  # CLS, 16 patches, no KD token
    torch.testing.assert_close(half.float(), plain.logits, atol=0.15, rtol=0.05)


def test_evaluation_blends_both_heads_and_training_does_not(vit: Path) -> None:
    model = student(vit, kd_prompt={"alpha": 0.3})
    with torch.no_grad():
        output = model(images())
        cls = model.head(output.features)
    torch.testing.assert_close(output.logits, 0.7 * cls + 0.3 * output.kd_logits)
    torch.testing.assert_close(model.train()(images()).logits, cls)


def test_the_kd_token_can_start_as_the_cls_token(vit: Path) -> None:
    model = student(vit, kd_prompt={"token_init": "cls", "prompt_init": "normal"})
    embedded = model.backbone.embeddings(images())[0, 0]
    torch.testing.assert_close(model.kd_prompt.token.data, embedded)  # type: ignore[union-attr]
    assert model.kd_prompt.prompt.abs().max() < 0.2  # type: ignore[union-attr]


def test_a_teacher_with_the_student_s_query_backbone_answers_alone_after_loading(vit: Path, tmp_path: Path) -> None:
    large = stored_backbone(tmp_path / "large", "dinov2")
    set_seed(0)
    model = CDLForImageClassification.from_backbone(str(large), query_name=str(vit), prompt=CODA)
    model.begin_task(["cat", "dog"])
    model.save_pretrained(tmp_path / "teacher")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "teacher")
    small = student(vit)
    with torch.no_grad():
        torch.testing.assert_close(loaded.compute_query(images()), small.compute_query(images()))
        assert torch.equal(loaded(images()).logits, model.eval()(images()).logits)
        torch.testing.assert_close(
            loaded(images(), query=small.compute_query(images())).logits, loaded(images()).logits
        )


LARGE = ViTImageProcessorPil(size={"height": 48, "width": 48}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
SMALL = ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False, rescale_factor=1 / 128)


def teacher_of_another_view(folder: Path, vit: Path, **fields: Any) -> CDLForImageClassification:
    large = stored_backbone(folder, "dinov2")
    set_seed(0)
    view = query_view(LARGE, SMALL)
    model = CDLForImageClassification.from_backbone(str(large), query_name=str(vit), query_view=view, **fields)
    model.begin_task(["cat", "dog"])
    return model.eval()


def smooth_picture() -> Image.Image:
    return Image.merge("RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.new("L", (256, 256), 99)])


def test_a_query_view_is_what_the_student_s_processor_makes() -> None:
    for own, query in ((LARGE, SMALL), (SMALL, LARGE)):
        first, second = (Preprocess(processor).evaluation([smooth_picture()]).float() for processor in (own, query))
        view = query_view(own, query)
        assert view is not None
        error = (to_query_view(first, **view) - second).abs()
        assert error.max() < 0.1 * second.std()  # resized twice
    same_size = ViTImageProcessorPil(size={"height": 48, "width": 48}, do_rescale=False)
    view = query_view(LARGE, same_size)
    assert view is not None
    first, second = (Preprocess(processor).evaluation([smooth_picture()]).float() for processor in (LARGE, same_size))
    torch.testing.assert_close(to_query_view(first, **view), second, atol=1e-3, rtol=1e-5)
    assert to_query_view(first.bfloat16(), **view).dtype == torch.bfloat16


def test_a_teacher_of_another_view_answers_alone_after_loading(vit: Path, tmp_path: Path) -> None:
    model = teacher_of_another_view(tmp_path / "large", vit, prompt=CODA)
    model.save_pretrained(tmp_path / "teacher")
    LARGE.save_pretrained(tmp_path / "teacher")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "teacher").eval()
    pixels, wanted = (Preprocess(processor).evaluation([smooth_picture()]) for processor in (LARGE, SMALL))
    assert loaded.config.query_view["size"] == [32, 32]
    with torch.no_grad():
        query, theirs = loaded.compute_query(pixels), student(vit).compute_query(wanted)
        assert F.cosine_similarity(query, theirs) > 0.99
        assert F.cosine_similarity(query, student(vit).compute_query(F.interpolate(pixels, (32, 32)))) < 0.9
        logits = model(pixels).logits
        assert torch.equal(loaded(pixels).logits, logits)
    classify = pipeline("image-classification", model=str(tmp_path / "teacher"), device="cpu")
    scores = {line["label"]: line["score"] for line in classify(smooth_picture())}
    torch.testing.assert_close(torch.tensor([scores["cat"], scores["dog"]]), logits.softmax(-1)[0])


@pytest.mark.filterwarnings("ignore")  # torch.export warns about its own internals
@pytest.mark.slow
def test_a_teacher_of_another_view_exports_for_any_batch_size(vit: Path, tmp_path: Path) -> None:
    model = teacher_of_another_view(tmp_path / "large", vit, prompt=CODA).requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    pixels = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (pixels[:3],), dynamic_shapes={"pixel_values": {0: batch}})
    torch.testing.assert_close(program.module()(pixels).logits, model(pixels).logits)


def test_loading_freezes_again_and_a_fine_tuned_backbone_trains(vit: Path, tmp_path: Path) -> None:
    student(vit).save_pretrained(tmp_path / "a")
    names = {
        n for n, p in CDLForImageClassification.from_pretrained(tmp_path / "a").named_parameters() if p.requires_grad
    }
    assert names == {n for n, p in student(vit).named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone") for name in names)

    tuned = student(vit, prompt={"type": "none"}, kd_prompt=None, train_backbone=True)
    tuned.save_pretrained(tmp_path / "b")
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "b")
    trains = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in loaded.named_parameters() if name.startswith("backbone.layers")} < trains


def test_a_classifier_s_checkpoint_is_a_backbone(tmp_path: Path) -> None:
    config = ViTConfig(**SIZES, intermediate_size=64, id2label={number: str(number) for number in range(7)})
    classifier = ViTForImageClassification(config)
    classifier.save_pretrained(tmp_path)
    model = student(tmp_path, prompt={"type": "none"}, kd_prompt=None)
    with torch.no_grad():
        want = classifier.vit(images()).last_hidden_state[:, 0]
        torch.testing.assert_close(model(images()).features, want)
    assert model.config.num_labels == 3


@pytest.mark.parametrize("kind", TINY)
def test_a_checkpoint_of_ours_is_the_backbone_that_it_has_become(
    kind: str, families: dict[str, Path], tmp_path: Path
) -> None:
    fields = {"prompt": {"type": "none"}, "kd_prompt": None}
    tuned = student(families[kind], train_backbone=True, **fields)
    with torch.no_grad():
        for parameter in tuned.backbone.parameters():
            parameter.add_(0.01)
    tuned.save_pretrained(tmp_path / "tuned")
    plain = load_backbone(str(tmp_path / "tuned"))
    assert digest(plain) == digest(tuned.backbone) != digest(load_backbone(str(families[kind])))
    plain.save_pretrained(tmp_path / "plain")
    for folder in ("tuned", "plain"):
        model = student(tmp_path / folder, **fields).eval()
        with torch.no_grad():
            assert torch.equal(model(images()).features, tuned.eval()(images()).features)


def test_an_incomplete_or_missing_checkpoint_is_refused(vit: Path, tmp_path: Path) -> None:
    model = ViTModel(family_config("vit"), add_pooling_layer=False)
    state = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path / "lacking", state_dict=state)
    with pytest.raises(ValueError, match="lacks 16 weights"):
        CDLForImageClassification.from_backbone(str(tmp_path / "lacking"))
    family_config("vit").save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="weights of backbone .* cannot be loaded"):
        CDLForImageClassification.from_backbone(str(tmp_path / "empty"))
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be loaded.*cut short"):
        CDLForImageClassification.from_backbone(str(tmp_path / "cut"))
    with pytest.raises(ValueError, match="There is no folder"):
        CDLForImageClassification.from_backbone(str(tmp_path / "nowhere"))


def test_wrong_sections_are_refused_with_what_is_allowed(vit: Path) -> None:
    with pytest.raises(ValueError, match="Unknown prompt type 'foo'; allowed: none, coda"):
        student(vit, prompt={"type": "foo"})
    with pytest.raises(ValueError, match="has no field lenght; it has components, length"):
        student(vit, prompt={"type": "coda", "lenght": 3})
    with pytest.raises(ValueError, match="different numbers from 0 to 2"):
        student(vit, prompt={"type": "coda", "layers": (0, 3)})
    with pytest.raises(ValueError, match="Unknown head type 'foo'; allowed: linear, weight_normalised"):
        student(vit, head={"type": "foo"})
    with pytest.raises(ValueError, match="has only 3 layers"):
        student(vit, kd_prompt={"layers": 4})
    model = student(vit)
    with pytest.raises(ValueError, match=r"\['dog'\] occur more than once"):
        model.begin_task(["bee", "dog"])
    assert model.config.tasks == [["cat", "dog"], ["owl"]], "a refused task leaves the model as it was"
    with pytest.raises(ValueError, match="at least one class"):
        model.begin_task([])
    fresh = CDLForImageClassification(CDLConfig(backbone_config=family_config("vit")))
    with pytest.raises(ValueError, match="call begin_task"):
        fresh(images())


def test_the_class_mean_head_is_the_nearest_class_mean(vit: Path) -> None:
    model = CDLForImageClassification.from_backbone(str(vit), head={"type": "ncm"}).eval()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    features = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20) % 5
    model.begin_task(["a", "b"])
    model.head.accumulate(features[labels < 2], labels[labels < 2])  # type: ignore[operator]
    model.begin_task(["c", "d", "e"])
    rest = labels >= 2
    for start in (0, 7):  # in any batches
        part = torch.arange(20)[rest][start : 7 if start == 0 else None]
        model.head.accumulate(features[part], labels[part])  # type: ignore[operator]
    means = torch.stack([F.normalize(features[labels == c], dim=-1).mean(0) for c in range(5)])
    want = F.cosine_similarity(features[:, None], means[None], dim=-1)
    torch.testing.assert_close(model.head(features), 10 * want)
    assert sum(buffer.numel() for buffer in model.head.buffers()) == 5 * 33, "its size does not grow with the images"


def test_the_pipeline_names_the_classes_and_files_hold_no_scaffold(vit: Path, tmp_path: Path) -> None:
    model = student(vit)
    model.scaffold = torch.nn.Linear(3, 3)
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert model.scaffold is not None
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any("scaffold" in name for name in file.keys())  # noqa: SIM118
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    answer = classify(Image.new("RGB", (50, 20), "red"))
    assert {line["label"] for line in answer} == {"cat", "dog", "owl"}


@pytest.mark.parametrize("query", ["two_pass", "one_pass"])
def test_a_copied_model_is_independent(vit: Path, query: str) -> None:
    model = student(vit, query=query)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.kd_prompt.token[::2].add_(5)  # type: ignore[union-attr]
        assert not torch.allclose(twin(images()).logits, model(images()).logits, atol=1e-3)


# ---- the mean of the patches ----


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind not in ("ijepa", "beit")])
def test_heads_read_the_mean_of_the_patches_beside_the_feature(kind: str, tmp_path: Path) -> None:
    """Prompts, registers and a distillation token are no patches."""
    place = str(stored_backbone(tmp_path, kind))
    fields: dict[str, Any] = {"prompt": {"type": "vpt", "length": 3}} if kind == "vit" else {}
    models = [CDLForImageClassification.from_backbone(place, patch_mean=mean, **fields) for mean in (False, True)]
    for model in models:
        model.begin_task(["a", "b"])
        model.eval()
    if fields:
        models[1].pool.load_state_dict(models[0].pool.state_dict())  # type: ignore[union-attr]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone, both = (model(pixels, output_hidden_states=[-1]) for model in models)
    assert both.features.shape == (2, 64)
    torch.testing.assert_close(both.features[:, :32], alone.features)
    last = alone.hidden_states[-1]  # CLS and patches
    backbone = models[0].backbone
    if kind in ("dinov2", "dinov2_with_registers"):
        last = backbone.layernorm(last)
    elif kind == "dinov3_vit":
        last = backbone.norm(last)
    elif kind != "clip_vision_model":
        last = backbone.layernorm(last)
    patches = last[:, 1:].mean(dim=1)
    want = backbone.post_layernorm(patches) if kind == "clip_vision_model" else patches
    torch.testing.assert_close(both.features[:, 32:], want)


def test_the_features_with_patch_mean_are_those_of_transformers_own_dinov2_classifier(tmp_path: Path) -> None:
    theirs = Dinov2ForImageClassification(family_config("dinov2")).eval()
    theirs.dinov2.save_pretrained(tmp_path)
    ours = CDLForImageClassification.from_backbone(tmp_path, patch_mean=True)
    ours.begin_task(["a", "b"])
    read: list[torch.Tensor] = []
    theirs.classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs(pixels)
        torch.testing.assert_close(ours.eval()(pixels).features, read[0])


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("ijepa", {}, "patch_mean would have no effect: the feature of this ijepa backbone is the mean"),
        ("beit", {}, "patch_mean would have no effect"),
        ("vit", {"kd_prompt": {"length": 0}}, "the model has KD prompts, whose head reads one token"),
    ],
)
def test_a_mean_of_patches_without_use_is_refused(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CDLForImageClassification(CDLConfig(backbone_config=family_config(kind), patch_mean=True, **fields))


def test_a_head_on_patches_too_is_saved_and_loaded(tmp_path: Path) -> None:
    model = CDLForImageClassification.from_backbone(
        str(stored_backbone(tmp_path / "vit")), patch_mean=True, head={"type": "ridge", "standardise": "first_task"}
    )
    pixels = torch.randn(6, 3, 32, 32)
    model.add(pixels, ["a", "b"] * 3)
    model.save_pretrained(tmp_path / "model")
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model.eval()(pixels).logits)
