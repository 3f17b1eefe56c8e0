"""The last layer's tokens that are read are those of a pass that computes all of them, and no others are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import tiered
from tiny_families import TINY, stored_backbone
from transformers import set_seed

from hf_cdl import CDLForImageClassification
from hf_cdl.backbones import families as bb
from hf_cdl.backbones.last_layer import tokens_read

WAYS: dict[str, dict[str, Any]] = {
    "coda": {"prompt": {"type": "coda", "components": 3, "length": 4, "layers": (0, 2)}, "kd_prompt": {}},
    "coda, one pass": {"prompt": {"type": "coda", "layers": (1, 2)}, "query": "one_pass"},
    "apt in the last layer": {"prompt": {"type": "apt"}, "kd_prompt": {}},
    "tokens": {"prompt": {"type": "vpt", "length": 3, "layers": (0, 2)}},
    "tokens and the KD token": {"prompt": {"type": "vpt", "length": 3, "layers": (1,)}, "kd_prompt": {}},
    "l2p, one pass, and the KD token": {
        "prompt": {"type": "l2p", "pool_size": 4, "length": 2, "top_k": 2, "layers": (2,)},
        "kd_prompt": {},
        "query": "one_pass",
    },
    "none": {"prompt": {"type": "none"}},
}
ROWS = [
    (kind, way, attention, checkpointing)
    for kind in TINY
    for way in WAYS
    for attention in ("sdpa", "eager")
    for checkpointing in (False, True)
]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: stored_backbone(tmp_path_factory.mktemp(kind), kind) for kind in TINY}


def model_of(folder: Path, **fields: Any) -> CDLForImageClassification:
    set_seed(5)
    model = CDLForImageClassification.from_backbone(str(folder), **{"prompt": {"type": "none"}, **fields})
    model.begin_task(["cat", "dog"])
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def found(model: Any, **asked: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Outputs and gradients of a training step, and the number of tokens in the last layer's MLP of each pass."""
    seen: list[int] = []
    hook = bb.layers(model.backbone)[-1].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))  # type: ignore[union-attr]
    model.train().zero_grad()
    output = model(images(), **asked)
    values = {name: output[name] for name in ("logits", "kd_logits", "features", "kd_features") if name in output}
    sum(value.square().sum() for value in values.values()).backward()  # type: ignore[union-attr]
    hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in values.items()}, **gradients}, seen


def check(model: Any, reads_patches: bool = False) -> None:
    whole, all_tokens = found(model, output_hidden_states=[-1])
    whole = {name: value.clone() for name, value in whole.items()}
    read, tokens = found(model)
    assert tokens == all_tokens if reads_patches else {*tokens} == {2}, "tokens that nobody reads were computed"
    assert {*read} == {*whole} and all_tokens[-1] > 2
    for name, value in read.items():
        torch.testing.assert_close(value, whole[name], atol=2e-5, rtol=1e-4, msg=f"{name} differs")


@pytest.mark.parametrize(("kind", "way", "attention", "checkpointing"), tiered(ROWS))
def test_what_is_read_equals_that_of_all_tokens(
    kind: str, way: str, attention: str, checkpointing: bool, families: dict[str, Path]
) -> None:
    model = model_of(families[kind], **WAYS[way])
    model.set_attn_implementation(attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    check(model, reads_patches=kind in ("ijepa", "beit"))  # the means of patches are their features


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "clip_vision_model", "beit"])
def test_cls_of_a_plain_backbone_is_read_alone(kind: str, families: dict[str, Path]) -> None:
    model = model_of(families[kind])
    model.backbone.config.use_mean_pooling = False  # of BEiT
    model.train()
    model.backbone.requires_grad_(True)
    check(model)


def test_all_tokens_are_computed_where_they_are_read(families: dict[str, Path]) -> None:
    model = model_of(families["vit"], prompt={"type": "none"})
    assert tokens_read(model.backbone, None) == tokens_read(model.backbone, None, [0, -2]) == (0, 1)
    assert tokens_read(model.backbone, -1, []) == (0, -1)
    for states in (True, [3], [-1], [0, 3]):
        assert tokens_read(model.backbone, None, states) is None
    model.backbone.set_attn_implementation("sdpa")  # which knows neither prompts nor other keys
    assert tokens_read(model.backbone, None) is None
    check(model_of(families["vit"], patch_mean=True), reads_patches=True)
    with torch.no_grad():
        eager = model_of(families["vit"]).eval()
        eager.set_attn_implementation("eager")
        shown = eager(images(), output_attentions=True).attentions
    assert [weights.shape[-2:] for weights in shown] == [(17, 17)] * 3


def test_a_relative_position_bias_is_over_all_tokens(tmp_path: Path) -> None:
    fields = {"use_relative_position_bias": True, "use_mean_pooling": False}
    model = model_of(stored_backbone(tmp_path, "beit", **fields), prompt={"type": "coda", "layers": (0, 2)})
    check(model, reads_patches=True)


def test_one_image_is_answered_alike_wherever_its_weights_lie(families: dict[str, Path]) -> None:
    """Products of a matrix and a single row depend on the alignment of the matrix in memory."""
    model = model_of(families["vit"]).eval()
    with torch.no_grad():
        known = model(images()[:1]).features
        for parameter in model.backbone.parameters():
            moved = torch.empty(parameter.numel() + 17)[1 : 1 + parameter.numel()].view_as(parameter)
            parameter.data = moved.copy_(parameter)
        assert torch.equal(model(images()[:1]).features, known)
