"""Prompt methods beyond their common contract: which prompts are selected, and what the options change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import images, vit
from transformers import set_seed

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.prompts import PROMPTS, components


def pool_of(kind: str, tasks: int, **fields: Any) -> Any:
    """A pool of width 6 with queries of width 3 on a five-layer backbone, all in U(0, 1)."""
    set_seed(0)
    pool = PROMPTS[kind](PROMPTS[kind].config_class(**fields), 6, 3, 5)
    with torch.no_grad():
        pool.init_shared()
        for task in range(tasks):
            pool.add_task()
            pool.init_task(task)
    return pool


def test_l2p_picks_the_nearest_keys_in_falling_similarity() -> None:
    pool = pool_of("l2p", 1, pool_size=3, length=2, top_k=2)
    pool.key.data[0] = torch.tensor([[1.0, 0, 0], [0, 5, 0], [3, 4, 0]])
    prefix, loss = pool(0, torch.tensor([[0.0, 2, 0]]), 0)  # cosines 0, 1, 0.8
    assert torch.equal(prefix.key[0], pool.prompt[0, [1, 2], 0])
    assert torch.equal(prefix.value[0], pool.prompt[0, [1, 2], 1])
    torch.testing.assert_close(loss, torch.tensor(0.2))
    assert pool.eval()(0, torch.tensor([[0.0, 2, 0]]))[1] is None
    assert pool(1, torch.zeros(1, 3)) == (None, None)


def test_what_is_used_is_what_is_picked_or_weighed() -> None:
    l2p = pool_of("l2p", 1, pool_size=3, length=2, top_k=2)
    l2p.key.data[0] = torch.tensor([[1.0, 0, 0], [0, 5, 0], [3, 4, 0]])
    assert l2p.usage(0, torch.tensor([[0.0, 2, 0]])).tolist() == [[0, 1, 1]] and l2p.usage(1, torch.ones(1, 3)) is None
    dual = pool_of("dualprompt", 2, expert_length=2)
    assert dual.usage(2, dual.blocks[1].key[0][None]).tolist() == [[0, 1]]
    coda, query = pool_of("coda", 2, components=2, layers=(0,)), torch.tensor([[1.0, -2, 3]])
    weights = coda.similarity(0, query)
    assert torch.equal(coda.usage(0, query), weights.abs()) and weights.shape == (1, 4)
    assert pool_of("vpt", 1).usage(0, query) is None


def test_l2p_s_pool_is_shared_by_all_tasks() -> None:
    one, three = pool_of("l2p", 1), pool_of("l2p", 3)
    assert {name: p.shape for name, p in one.named_parameters()} == {n: p.shape for n, p in three.named_parameters()}


def test_dualprompt_trains_the_task_s_expert_and_evaluates_with_the_nearest_key() -> None:
    pool = pool_of("dualprompt", 2, expert_length=2)
    queries = torch.stack([pool.blocks[1].key[0], pool.blocks[0].key[0]]).detach()
    prefix, loss = pool(2, queries, 0)
    assert torch.equal(prefix.key[0, 0], pool.blocks[0].prompt[0, 0]) and loss > 0
    prefix, loss = pool(2, queries)
    assert torch.equal(prefix.value[:, 0], torch.stack([pool.blocks[1].prompt[0, 1], pool.blocks[0].prompt[0, 1]]))
    assert loss is None


@pytest.mark.parametrize("reserved", [0, 3])
def test_dualprompt_s_reserved_tasks_compete_before_they_come(reserved: int) -> None:
    pool = pool_of("dualprompt", 1, expert_length=2, reserved_tasks=reserved)
    seen = pool.blocks[0].prompt[:, :1].detach().clone()
    key = pool_of("dualprompt", 1, expert_length=2, reserved_tasks=3).reserved_key[1, 0]
    picked = pool(2, key[None])[0].key
    assert torch.equal(picked[0], pool.reserved_prompt[1, 0, :1] if reserved else seen[0])
    for task in range(1, 5):
        with torch.no_grad():
            pool.add_task()
            pool.init_task(task)
    if reserved:
        assert torch.equal(pool.blocks[1].key, pool.reserved_key[1]), "a task takes over its reserved expert"
    assert len(pool._experts("key", 0)) == 5
    assert not any("reserved" in name for name, _ in pool.named_parameters())


def test_reserved_experts_are_in_the_checkpoint(tmp_path: Path) -> None:

    prompt = {"type": "dualprompt", "general_layers": (0,), "expert_layers": (1, 2), "reserved_tasks": 3}
    model = CDLForImageClassification(CDLConfig(backbone_config=vit(32), prompt=prompt)).eval()
    model.begin_task(["cat", "dog"])
    model.save_pretrained(tmp_path)
    again = CDLForImageClassification.from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert sum("reserved" in name for name in model.state_dict()) == 2
    assert torch.equal(model(images()).logits, again(images()).logits)
    for either in (model, again):
        either.begin_task(["owl"])
    assert torch.equal(model.pool.blocks[1].key, again.pool.blocks[1].key)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("l2p", {"top_k": 31}, "top_k <= pool_size"),
        ("l2p", {"length": 3}, "even length"),
        ("l2p", {"reduction": "max"}, "allowed: mean, sum"),
        ("l2p", {"layers": (7,)}, "numbers from 0 to 4"),
        ("dualprompt", {"general_length": 5}, "even lengths"),
        ("dualprompt", {"expert_layers": ()}, "at least one of expert_layers"),
        ("dualprompt", {"expert_layers": (1, 2)}, "different numbers"),
        ("dualprompt", {"reduction": "max"}, "allowed: mean, sum"),
    ],
)
def test_impossible_fields_are_refused(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pool_of(kind, 0, **fields)


def test_projections_onto_many_rows_are_those_onto_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.randn(310, 400, generator=torch.Generator().manual_seed(0))
    earlier, draws = drawn[:300] * 3, drawn[300:]
    at_once = components.orthogonalise(draws, earlier)
    monkeypatch.setattr(components, "_FEW", 300)
    one_by_one = components.orthogonalise(draws, earlier)
    assert (at_once - one_by_one).abs().max() < 1e-6
    assert not torch.equal(at_once, one_by_one), "another way of rounding: two ways were compared"


@pytest.mark.parametrize("attention", [True, False])
def test_beside_many_earlier_rows_coda_learns_as_by_a_graph_through_all_of_them(
    attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, query, found = pool_of("coda", 3, components=2, length=4, attention=attention), torch.rand(4, 3), {}
    pool.requires_grad_(False).blocks[-1].requires_grad_(True)
    for few in (0, 1000):
        monkeypatch.setattr(components, "_FEW", few)
        pool.zero_grad()
        prefix, _ = pool(1, query)
        (prefix.key.square().sum() + prefix.value.sin().sum()).backward()
        grads = {name: p.grad for name, p in pool.named_parameters() if p.grad is not None}
        found[few] = (prefix.key.detach(), prefix.value.detach()), grads
    assert all(map(torch.equal, found[0][0], found[1000][0]))
    assert found[0][1].keys() == found[1000][1].keys() == {n for n, _ in pool.named_parameters() if "blocks.2" in n}
    for name, grad in found[0][1].items():
        assert grad[1].any()
        torch.testing.assert_close(grad, found[1000][1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("learns", ["query", "earlier"])
def test_a_gradient_through_earlier_rows_is_never_cut(learns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, query, found = pool_of("coda", 3, components=2, length=4), torch.rand(4, 3), []
    if learns == "query":
        pool.blocks[:2].requires_grad_(False)
        query.requires_grad_(True)
    for few in (0, 1000):
        monkeypatch.setattr(components, "_FEW", few)
        pool.zero_grad()
        query.grad = None
        pool(1, query)[0].key.square().sum().backward()
        found.append([value.grad for value in (query, *pool.blocks[0].parameters()) if value.grad is not None])
    assert len(found[0]) == (1 if learns == "query" else 3)
    assert all(map(torch.equal, *found))
