"""Low-rank adapters: they learn only in the first session, are in every checkpoint, and peft can read them, too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, killed_and_taken, make_backbone, make_recipe, picture, write_recipe
from hub_server import HubServer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_contract import MAPPING, arguments, images, model_of, stream, vit
from test_first_session import SESSION, state_of
from test_hub import STUDENT, Said, pusher, saved_run
from test_models import images as larger_images
from tiny_families import TINY, stored_backbone
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, ViTConfig, ViTImageProcessorPil, ViTModel, pipeline, set_seed
from transformers.dynamic_module_utils import get_imports

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.backbones import families as bb
from hf_cdl.backbones.loading import load_config
from hf_cdl.commands import costs as counting
from hf_cdl.commands import plan
from hf_cdl.distill import TERMS, Objective
from hf_cdl.hub import HubError
from hf_cdl.hub.card import model_card
from hf_cdl.recipe import RecipeError, build_recipe
from hf_cdl.recipe.build import build_models, build_objective, build_processors, labels

LORA: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.1}, **SESSION}
# PeftModel asks transformers for a name that transformers wants to drop.
peft_is_late = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adapted(width: int = 32, **fields: Any) -> CDLForImageClassification:
    set_seed(1)
    return CDLForImageClassification(CDLConfig(backbone_config=vit(width), **{**LORA, **fields}))


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".lora_" in name}


def learnt(folder: Path, **fields: Any) -> CDLForImageClassification:
    """A model on a stored backbone after its first session, which has moved its adapters far."""
    model = CDLForImageClassification.from_backbone(str(folder), **{**LORA, **fields})
    model.begin_task(["cat", "dog"])
    set_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.end_session()
    model.head.accumulate(torch.randn(8, 32), torch.arange(8) % 2)  # type: ignore[operator]
    model.end_task()
    return model.eval()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest feature: rounding, as our last layer computes fewer rows."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@peft_is_late
@pytest.mark.parametrize("kind", TINY)
def test_of_every_family_it_starts_as_the_bare_backbone_and_any_form_of_it_is_the_same(
    kind: str, tmp_path: Path
) -> None:
    source, x = stored_backbone(tmp_path / "backbone", kind), larger_images()

    def bare() -> Any:
        return AutoModel.from_pretrained(source, **bb.family(load_config(str(source))).init)

    def features(backbone: Any, plain: Any) -> torch.Tensor:
        inputs = bb.extra_inputs(plain.config, x)
        return bb.pool(plain, backbone(pixel_values=x, **inputs).last_hidden_state)

    new = CDLForImageClassification.from_backbone(str(source), **LORA)
    new.begin_task(["cat", "dog"])
    with torch.no_grad():
        start = features(plain := bare().eval(), plain)
        assert apart(new.eval()(x).features, start) < 1e-6
        for small in (False, True):
            model = learnt(source, save_backbone=not small)
            want = model(x)
            assert not torch.allclose(want.features, start, atol=1e-2)
            folder = tmp_path / f"small {small}"
            model.save_pretrained(folder)
            stored = load_file(folder / "model.safetensors")
            assert sum(".lora_" in name for name in stored) == 3 * 2 * 2
            frozen = [name for name in stored if name.startswith("backbone.") and ".lora_" not in name]
            assert bool(frozen) != small
            loaded, info = CDLForImageClassification.from_pretrained(folder, output_loading_info=True)
            assert not info["unexpected_keys"] and not any(".lora_" in name for name in info["missing_keys"])
            assert torch.equal(loaded.eval()(x).logits, want.logits)
            theirs = PeftModel.from_pretrained(bare(), folder / "adapter").eval()
            assert apart(features(theirs, theirs.base_model.model), want.features) < 1e-6
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(source)


def test_only_adapters_and_the_session_s_head_learn_and_only_on_the_first_task(tmp_path: Path) -> None:
    model = adapted()
    trainer = CDLTrainer(model, arguments(tmp_path))
    new = state_of(model)
    first, second = stream()
    trainer._begin_task(first)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trains} == {"backbone", "session_head"}
    assert {name for name in trains if name.startswith("backbone")} == set(adapters(model))
    trainer.learn(first)
    one = state_of(model)
    assert len([line for line in trainer.state.log_history if "loss/ce" in line]) == 12
    assert all(
        torch.equal(one[name], value) != (".lora_" in name) for name, value in new.items() if "head" not in name
    )
    trainer.learn(second)
    assert all(torch.equal(value, one[name]) for name, value in model.state_dict().items() if "backbone" in name)
    assert not any(parameter.requires_grad for parameter in model.parameters())

    model.eval()
    parts = [task.train for task in (first, second)]
    with torch.no_grad():
        found = [[model(torch.stack([part[i]["pixel_values"] for i in range(len(part))]))] for part in parts]
    x = torch.cat([output.features for [output] in found])
    mean, std = found[0][0].features.mean(0), found[0][0].features.std(0, unbiased=False)
    x = ((x - mean) / std).double()
    y = F.one_hot(torch.tensor([part[i]["labels"] for part in parts for i in range(len(part))])).double()
    weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y)
    logits = torch.cat([output.logits for [output] in found])
    torch.testing.assert_close(logits.double() / 10, x @ weight, atol=1e-3, rtol=1e-3)


def test_they_are_drawn_when_the_first_session_begins() -> None:
    drawn = []
    for seed in (3, 3, 4):
        model = adapted()
        set_seed(seed)
        model.begin_task(["cat", "dog"])
        drawn.append(adapters(model))
    names = [name for name in drawn[0] if ".lora_A." in name]
    assert len(names) == 6
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in names)
    assert all(not value.any() for name, value in drawn[0].items() if ".lora_B." in name)
    made = CDLForImageClassification(CDLConfig(backbone_config=vit(32), tasks=[["cat", "dog"]], **LORA)).eval()
    bare = made.backbone(images()).last_hidden_state[:, 0]
    for name, value in made.backbone.state_dict().items():
        if ".lora_" in name:
            value.zero_()
    assert torch.equal(made.backbone(images()).last_hidden_state[:, 0], bare), "also when built with its tasks"


@pytest.mark.parametrize("term", ["kd", "fitnets"])
def test_a_teacher_helps_in_the_first_session(term: str, tmp_path: Path) -> None:
    """Teacher and student have adapters, and a teacher's terms change what the student's become."""
    found = []
    for name in (None, term):
        teacher, student = adapted(48), adapted()
        teach = CDLTrainer(teacher, arguments(tmp_path / "t"), role="teacher")
        set_seed(2)
        terms = [] if name is None else [(name, TERMS[name](TERMS[name].config_class(), student.shape, teacher.shape))]
        asked = teacher if terms else None
        learn = CDLTrainer(student, arguments(tmp_path / "s"), Objective(0.5, terms), teacher=asked)
        for task in stream():
            teach.learn(task)
            learn.learn(task)
        assert learn.evaluate_seen().row
        found.append(adapters(student))
    assert not any(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    first, _ = stream()
    found = []
    for checkpointing in (False, True):
        model = adapted(lora={"r": 4})
        if checkpointing:
            model.activation_checkpointing_enable()
        CDLTrainer(model, arguments(tmp_path)).learn(first)
        found.append(adapters(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_in_another_dtype_with_its_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    model = learnt(make_backbone(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "model")
    half = CDLForImageClassification.from_pretrained(tmp_path / "model", dtype=dtype).eval()
    assert {value.dtype for value in adapters(half).values()} == {dtype}
    with torch.no_grad():
        want, got = model(images()).features, half(images().to(dtype)).features
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0.1)


def test_the_pipeline_answers_and_a_loaded_model_learns_its_next_task(tmp_path: Path) -> None:
    first, second = stream()
    trainer = CDLTrainer(adapted(), arguments(tmp_path))
    trainer.learn(first)
    trainer.model.save_pretrained(tmp_path / "model")
    trainer.learn(second)
    loaded = CDLForImageClassification.from_pretrained(tmp_path / "model")
    again = CDLTrainer(loaded, arguments(tmp_path))
    again.seen.append(first)
    again.learn(second)
    want = trainer.model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    classify = pipeline("image-classification", model=str(tmp_path / "model"), device="cpu")
    assert {line["label"] for line in classify(picture(0, 0))} == {"cat", "dog", "owl"}


@peft_is_late
def test_merged_by_peft_they_are_a_backbone_and_unmerged_they_are_refused(tmp_path: Path) -> None:
    source, x = stored_backbone(tmp_path / "backbone"), larger_images()
    model = learnt(source)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has low-rank adapters. Merge them first: load the bare backbone"):
        CDLForImageClassification.from_backbone(str(tmp_path / "model"))
    bare = AutoModel.from_pretrained(source, add_pooling_layer=False)
    PeftModel.from_pretrained(bare, tmp_path / "model/adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = CDLForImageClassification.from_backbone(str(tmp_path / "merged"))
    merged.begin_task(["cat"])
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(x).features, model(x).features)


def test_other_layers_can_be_adapted() -> None:
    model = adapted(lora={"r": 2, "alpha": 4, "targets": ["fc1", "o_proj"]})
    assert {name.split(".")[-4] for name in adapters(model)} == {"fc1", "o_proj"}
    assert model.config.lora == {"r": 2, "alpha": 4, "dropout": 0.0, "targets": ("fc1", "o_proj")}
    with pytest.raises(
        ValueError, match=r"lora.targets names query, but the linear layers .* a vit backbone are q_proj"
    ):
        adapted(lora={"targets": ["query", "v_proj"]})
    for wrong in ({"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": ()}):
        with pytest.raises(ValueError, match="lora needs r >= 1, alpha > 0"):
            adapted(lora=wrong)


@pytest.mark.parametrize(("rank", "fits"), [(32, True), (33, False), (10**8, False)])
def test_a_rank_is_not_more_than_the_layer_s_width(rank: int, fits: bool) -> None:
    if fits:
        assert adapters(adapted(lora={"r": rank}))
        return
    with pytest.raises(ValueError, match=f"lora.r is {rank}, but the narrowest layer that it adapts has width 32"):
        adapted(lora={"r": rank})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": {"type": "l2p", "layers": [0]}}, "lora adapts the backbone alone, but the model has prompts too"),
        ({"kd_prompt": {}}, "the model has KD prompts too"),
        ({"mapping": MAPPING, "teacher_pool": model_of("l2p").pool_config}, "the model has a mapping too"),
        ({"train_backbone": True}, "the model has train_backbone too"),
        ({"first_session": None}, "lora learns in a first session: give first_session a trained head"),
        ({"head": {"type": "linear"}}, "needs a trained head, a fitted `head` .got linear."),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adapted(**fields)


def saved_results() -> dict[str, Any]:
    results = json.loads((ROOT / "model_cards" / "quickstart" / "results.json").read_text())
    return {**results, "recipe": build_recipe({**RECIPE, "name": results["name"]}).as_dict()}


RECIPE: dict[str, Any] = {
    "name": "x",
    "data": {"path": "images"},
    "teacher": {"backbone": "t"},
    "student": {"backbone": "s", "lora": {}, "head": {"type": "ridge"}, "first_session": {"type": "linear"}},
    "distill": [{"type": "kd"}],
}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": {"type": "coda"}}, "'student.lora' with prompts: it adapts the backbone in their place"),
        ({"train_backbone": True}, "'student.lora' with train_backbone, which trains what it would adapt"),
        ({"first_session": None}, "'student.lora' learns on the first task alone; set 'student.first_session'"),
        ({"head": {"type": "linear"}}, "'student.first_session' is set, but 'student.head.type' linear is not fitted"),
        ({"model": "classifier"}, "'student.lora': a model: classifier has none"),
        ({"lora": {"rank": 4}}, "unknown field 'student.lora.rank'"),
        ({"lora": {"r": 0}}, "student.lora: lora needs r >= 1"),
        ({"lora": {"targets": "q_proj"}}, "'student.lora.targets' is 'q_proj'"),
        ({"lora": 8}, "'student.lora' is 8, but should be a valid dictionary"),
    ],
)
def test_impossible_recipes_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe({**RECIPE, "student": {**RECIPE["student"], **fields}})
    assert said in str(error.value)


@pytest.mark.parametrize("term", ["kdp", "kd_token", "prompt_mapping"])
def test_terms_that_train_tokens_are_refused_beside_them(term: str) -> None:
    with pytest.raises(RecipeError, match=rf"'distill.0' \({term}\) trains tokens beside 'student.lora'"):
        build_recipe({**RECIPE, "distill": [{"type": term}]})


def test_the_plan_counts_what_the_trainer_does(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, distill=[{"type": "fitnets"}])
    for role in ("teacher", "student"):
        recipe[role] = {"backbone": recipe[role]["backbone"], **LORA}
    built = build_recipe(recipe)
    fakes, costs = counting.measure(built, counting.read_tasks(built))
    teacher, student = 2 * 3 * 2 * 4 * 48, 2 * 2 * 2 * 4 * 32  # A and B of two projections, by layer, rank and width
    assert costs["teacher"].trained == teacher + 48 * 2 + 2
    assert (costs["student"].steps, costs["student"].images) == (2 * 2, 2 * 16)
    sizes = {"teacher": (48, 3, teacher), "student": (32, 2, student)}
    for role, (width, depth, own) in sizes.items():
        bare = ViTModel(ViTConfig.from_pretrained(recipe[role]["backbone"]), add_pooling_layer=False)
        assert (len(bare.layers), bare.config.hidden_size) == (depth, width)
        count = sum(parameter.numel() for parameter in bare.parameters())
        stored = sum(value.numel() for value in fakes[role].state_dict().values())
        cells = plan.cells(role, fakes[role], costs[role], 0, 0)
        assert cells[1] == f"{count / 1e6:,.2f} M" and cells[3] == f"{(stored - count) / 1e6:,.2f} M"
        assert stored - count > own
    processors = build_processors(built)
    models, (task, *_) = build_models(built, processors), TaskStream(built.data, processors)
    for model in models.values():
        model.begin_task(task.class_names)
    options = CDLTrainingArguments(str(tmp_path / "work"), **built.training_args("student"))
    objective = build_objective(built, "student", models)
    trainer = CDLTrainer(models["student"], options, objective, models["teacher"])
    trainer.seen = [task]
    views = [task.train[(number, 0)] for number in range(8)]
    batch = {
        "pixel_values": torch.stack([view["pixel_values"] for view in views]),
        "labels": torch.tensor([view["labels"] for view in views]),
    }
    models["teacher"].eval()
    models["student"].train()
    with FlopCounterMode(display=False, custom_mapping=counting.FUSED) as counter:
        trainer.compute_loss(models["student"], batch).backward()
    assert costs["student"].training_flops == counter.get_total_flops() / 2 / 8


def test_the_card_says_so_and_cites_them() -> None:
    results = saved_results()
    text = model_card(results, "student")
    said = "frozen; low-rank adapters (LoRA) learnt on the first task alone, a `ridge` head on all tasks."
    assert said in " ".join(text.split())
    assert "hu2022lora" in text and "mcdonnell2023ranpac" in text
    del results["recipe"]["student"]["lora"]  # as of a run from before
    assert "hu2022lora" not in model_card(results, "student")


def test_the_recipe_s_readable_name() -> None:
    assert labels(build_recipe(RECIPE))["student"] == "student (LoRA on the first task, ridge head + kd)"
    none = build_recipe({**RECIPE, "student": {"backbone": "s", "lora": None}})
    assert labels(none)["student"] == "student (linear head + kd)"


def test_code_beside_a_checkpoint_asks_for_peft_only_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers refuses remote code whose imports are missing, and most models have no adapters."""
    model = learnt(make_backbone(tmp_path / "backbone"), save_code=True)
    model.save_pretrained(tmp_path / "model")
    files = [*(tmp_path / "model").glob("hf_cdl_*.py")]
    assert tmp_path / "model" / "hf_cdl_backbones_lora.py" in files
    assert not any("peft" in get_imports(file) for file in files)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="needs the package peft: pip install peft"):
        CDLForImageClassification.from_pretrained(tmp_path / "model")


def test_a_checkpoint_s_sub_folder_is_pushed_and_nothing_pickled_in_it(tmp_path: Path) -> None:
    results = saved_run(tmp_path / "run", 2, 2)
    for number in (1, 2):
        folder = tmp_path / "run" / "student" / f"task-{number:02d}" / "adapter"
        folder.mkdir()
        save_file({"a": torch.full((5,), float(number))}, folder / "adapter_model.safetensors")
    with HubServer(tmp_path / "hub") as hub:
        assert pusher(hub, tmp_path / "run", Said()).finish(results)
        for number in (1, 2):
            name = f"task-{number:02d}"
            there = hub.repository(STUDENT).read(name, "adapter/adapter_model.safetensors")
            assert (
                there == (tmp_path / "run" / "student" / name / "adapter" / "adapter_model.safetensors").read_bytes()
            )
        hub.requests.clear()
        assert pusher(hub, tmp_path / "run", Said()).finish(results), "it is recognised as this run's"
        (folder / "adapter_model.bin").write_bytes(b"pickled")
        with pytest.raises(HubError, match=r"adapter_model.bin is not pushed"):
            pusher(hub, tmp_path / "run", Said()).check(results)


@peft_is_late
@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_teacher_is_taken_over(tmp_path: Path) -> None:
    """With dropout, a term that has its own layers, small checkpoints, and a teacher with its own adapters."""
    recipe = make_recipe(tmp_path, distill=[{"type": "fitnets", "weight": 0.5}], save_backbone=False)
    for role in ("teacher", "student"):
        recipe[role] = {"backbone": recipe[role]["backbone"], **LORA}
    recipe["train"]["num_train_epochs"] = 40  # long enough to be interrupted, also on a busy machine
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    whole = tmp_path / "whole"
    said = "student (LoRA on the first task, ridge head + fitnets)"
    for folder in killed_and_taken(file, whole, "student-task-01", said):
        for part in ("teacher/task-01", "student/task-01", "student/task-03", "student"):
            for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
                ours, theirs = (place / part / name for place in (folder, whole))
                assert ours.read_bytes() == theirs.read_bytes(), (folder.name, part, name)
    model = CDLForImageClassification.from_pretrained(whole / "student").eval()
    bare = AutoModel.from_pretrained(recipe["student"]["backbone"], add_pooling_layer=False)
    theirs = PeftModel.from_pretrained(bare, whole / "student" / "adapter").eval()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=x).last_hidden_state[:, 0], model(x).features)
