"""VPT against a loop over the layers written as in the paper; the position of its tokens, and what refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_contract import images, vit
from transformers import BeitConfig, Dinov2WithRegistersConfig, DINOv3ViTConfig, IJepaConfig, set_seed

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.prompts import PROMPTS
from hf_cdl.prompts.vpt import VPT

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16}
SIZES |= {"patch_size": 4, "initializer_range": 0.2}
BACKBONES = {
    "vit": vit(32),
    "ijepa": IJepaConfig(**SIZES, intermediate_size=64),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2),
    "dinov3_vit": DINOv3ViTConfig(**SIZES, intermediate_size=64, num_register_tokens=2, pos_embed_rescale=None),
}


def model_on(backbone: Any, **fields: Any) -> Any:
    set_seed(3)
    prompt = {"type": "vpt", "length": 3, **fields.pop("prompt", {})}
    model: Any = CDLForImageClassification(CDLConfig(backbone_config=backbone, prompt=prompt, **fields)).eval()
    model.begin_task(["cat", "dog"])
    with torch.no_grad():
        model.pool.prompt.mul_(5)
    return model


@pytest.mark.parametrize("which", [None, (0,), (1, 2)])
def test_features_are_those_of_a_loop_over_the_layers(which: tuple[int, ...] | None) -> None:
    model = model_on(vit(32), prompt={"layers": which})
    own = dict(zip(range(3) if which is None else which, model.pool.prompt, strict=True))
    with torch.no_grad():
        sequence, there = model.backbone.embeddings(images()), 0
        for number, layer in enumerate(model.backbone.layers):
            if number in own:
                tokens = own[number].expand(len(sequence), -1, -1)
                sequence, there = torch.cat([sequence[:, :1], tokens, sequence[:, 1 + there :]], dim=1), 3
            sequence = layer.forward(sequence)
        wanted = model.backbone.layernorm(sequence)[:, 0]
        torch.testing.assert_close(model(images()).features, wanted, atol=1e-5, rtol=1e-5)
    bare = model._run(model.backbone, images()).last_hidden_state[:, 0]
    assert (wanted - bare).abs().max() > 0.05, "the tokens change nothing"


@pytest.mark.parametrize("which", [(1,), (0,), None])
@pytest.mark.parametrize("family", BACKBONES)
def test_hidden_states_are_of_cls_and_patches_alone(family: str, which: tuple[int, ...] | None) -> None:
    """Even with a KD token and registers; before the first tokens they equal those of a model without VPT."""
    model = model_on(BACKBONES[family], kd_prompt={"length": 4}, prompt={"layers": which})
    plain = CDLForImageClassification(CDLConfig(backbone_config=BACKBONES[family], kd_prompt={"length": 4})).eval()
    plain.begin_task(["cat", "dog"])
    plain.backbone.load_state_dict(model.backbone.state_dict())
    plain.kd_prompt.load_state_dict(model.kd_prompt.state_dict())  # type: ignore[union-attr]
    with torch.no_grad():
        found, without = (each(images(), output_hidden_states=True).hidden_states for each in (model, plain))
    assert len(found) == len(without) == 4
    for number, (ours, theirs) in enumerate(zip(found, without, strict=True)):
        assert ours.shape == theirs.shape == (5, 16 + (family != "ijepa"), 32)
        assert torch.allclose(ours, theirs, atol=1e-5) == (number <= min(model.pool.layers))


def test_tokens_take_their_place_in_attention() -> None:
    model = model_on(vit(32), prompt={"layers": (1,)}, attn_implementation="eager")
    sizes = [weights.shape[-1] for weights in model(images(), output_attentions=True).attentions]
    assert sizes == [17, 20, 20]


def test_nothing_grows_but_the_heads() -> None:
    model = model_on(vit(32))
    before = {name: value.shape for name, value in model.pool.state_dict().items()}
    model.begin_task(["owl"])
    assert {name: value.shape for name, value in model.pool.state_dict().items()} == before
    assert model.pool.prompt.requires_grad and model.pool.prompt.shape == (3, 3, 32)
    bound = (6 / (768 + 32)) ** 0.5
    set_seed(0)
    fresh = VPT(PROMPTS["vpt"].config_class(length=100), 32, 32, 3)
    fresh.init_shared()
    assert 0.95 * bound < fresh.prompt.abs().max() <= bound


def test_a_relative_position_bias_has_no_place_for_tokens() -> None:
    backbone = BeitConfig(**SIZES, intermediate_size=64, use_relative_position_bias=True)
    with pytest.raises(ValueError, match=r"no place for prompt tokens \(vpt\)"):
        model_on(backbone)


def test_a_pool_that_gives_another_number_of_tokens_is_refused() -> None:
    model = model_on(vit(32))
    model.pool.num_tokens = 2
    with pytest.raises(ValueError, match="gave layer 0 prompts of 3, but its num_tokens is 2"):
        model(images())


@pytest.mark.parametrize("fields", [{"length": 0}, {"layers": ()}, {"layers": (3,)}, {"length": 1.5}])
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="length >= 1|are none|from 0 to 2|whole number"):
        model_on(vit(32), prompt=fields)
