"""Models where not everything is on the CPU: nothing mixes devices, and the answers are the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from second_device import second_device
from test_contract import CLASSES, METHODS, Dummy, model_of, vit
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{name} head": {"head": {"type": name, "standardise": "first_task"}} for name in HEADS},
    "ridge, all chosen": {"head": {"type": "ridge", "strength": "auto", "scale": "auto", "known": 0.9}},
    "lda, all chosen": {"head": {"type": "lda", "scale": "auto", "known": 0.9}},
    "sums per class": {"head": {"type": "ridge", "sums": "per_class", "known": 0.9}},
    "random features": {"head": {"type": "ridge", "features": 20, "own_features": True}},
}


@pytest.fixture(autouse=True)
def newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMPTS, "dummy", Dummy)


def learnt(model: Any, device: torch.device | str) -> torch.Tensor:
    """Logits on the CPU of a model that begins two tasks on a device and learns them with one step each."""
    set_seed(3)
    model.to(device)
    draw = torch.Generator().manual_seed(4)
    pixels = torch.empty(0)
    for index, names in enumerate(CLASSES):
        model.begin_task(names)
        first = model.num_labels - len(names)
        pixels = torch.randn(12, 3, 16, 16, generator=draw).to(device)
        labels = (torch.arange(12) % len(names) + first).to(device)
        if not model.fitted:
            output = model.train()(pixel_values=pixels, labels=labels, task_id=index)
            losses = [output.loss, output.prompt_loss, None if output.kd_logits is None else output.kd_logits.mean()]
            torch.stack([loss for loss in losses if loss is not None]).sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
        with torch.no_grad():
            output = model.eval()(pixel_values=pixels)
            if model.unmeasured:
                model.measure(output)
            if model.fitted:
                model.accumulate(output, labels)
        model.end_task()
        assert {value.device.type for value in model.state_dict().values()} == {torch.device(device).type}
    with torch.no_grad():
        return model(pixel_values=pixels).logits.cpu()


def assert_same(make: Any) -> None:
    ours = learnt(make(), "cpu")
    with second_device() as device:
        torch.testing.assert_close(learnt(make(), device), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("query", ["two_pass", "one_pass"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_learns_its_second_task_on_another_device(method: str, query: str) -> None:
    assert_same(lambda: model_of(method, query=query))


@pytest.mark.parametrize("parts", ["KD prompts", "mapping"])
def test_a_student_with_parts_of_its_own_does(parts: str) -> None:
    fields: dict[str, Any] = {"kd_prompt": {"length": 4, "alpha": 0.3}}
    if parts == "mapping":
        pool = model_of("coda", width=48, query_width=32).pool_config
        fields = {"mapping": {"components": 3, "length": 4}, "teacher_pool": pool}
    assert_same(lambda: model_of("coda", **fields))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_with_any_head_does(name: str) -> None:
    def make() -> CDLForImageClassification:
        set_seed(1)
        return CDLForImageClassification(CDLConfig(backbone_config=vit(32), **VARIANTS[name]))

    assert_same(make)


def test_the_second_device_refuses_what_a_gpu_refuses() -> None:
    with second_device() as device:
        ones = torch.ones(3, device=device)
        assert ones.device == device and (ones + 1).sum().item() == 6
        with pytest.raises(RuntimeError, match="on one device"):
            ones.add(torch.ones(3))
        with pytest.raises(TypeError, match="cpu"):
            ones.numpy()
