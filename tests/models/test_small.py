"""Small checkpoints: only prompts and heads; backbones are loaded from a folder or the Hub's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import interrupt_when, make_backbone, make_recipe, python, train, write_recipe
from safetensors import safe_open
from transformers import AutoModelForImageClassification, ViTModel, set_seed

from hf_cdl import CDLForImageClassification
from hf_cdl.recipe import RecipeError, build_recipe

CODA = {"type": "coda", "components": 3, "length": 4, "layers": (0, 1)}
COMMIT, NEWER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
ROOT = Path(__file__).parents[2]


def student(backbone: Path | str, **fields: Any) -> CDLForImageClassification:
    set_seed(5)
    model = CDLForImageClassification.from_backbone(str(backbone), prompt=CODA, kd_prompt={}, **fields)
    model.begin_task(["cat", "dog"])
    model.begin_task(["owl"])
    return model.eval()


def teacher(folder: Path, **fields: Any) -> CDLForImageClassification:
    large = make_backbone(folder / "large", 48, 3, 1)
    small = make_backbone(folder / "small", 32, 2, 2)
    set_seed(5)
    model = CDLForImageClassification.from_backbone(str(large), query_name=str(small), prompt=CODA, **fields)
    model.begin_task(["cat", "dog"])
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).logits


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def as_cached(source: Path, cache: Path, commit: str = COMMIT, name: str = "org/tiny") -> None:
    """Put a folder into a Hub cache as if downloaded at that commit, with main pointing to it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("make", [student, teacher], ids=["student", "teacher with the student's query"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "backbone stored in float16"])
def test_the_small_form_is_the_whole_one_to_the_bit(make: Any, half: bool, tmp_path: Path) -> None:
    source = tmp_path if make is teacher else make_backbone(tmp_path / "small")
    if half and make is student:
        ViTModel.from_pretrained(source, add_pooling_layer=False).half().save_pretrained(source)
    whole, small = make(source), make(source, save_backbone=False)
    whole.save_pretrained(tmp_path / "w")
    small.save_pretrained(tmp_path / "s")
    names = stored_names(tmp_path / "s")
    assert names and not any("backbone" in name for name in names)
    assert names < stored_names(tmp_path / "w")
    state = torch.get_rng_state()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "s")
    assert torch.equal(torch.get_rng_state(), state), "loading moves no random generator"
    expected = AutoModelForImageClassification.from_pretrained(tmp_path / "w")
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and value.dtype == torch.float32, name
    assert torch.equal(logits(loaded), logits(whole))
    frozen = [parameter.requires_grad for name, parameter in loaded.named_parameters() if "backbone" in name]
    assert frozen and not any(frozen)

    for model in (loaded, expected):  # both learn the next task in the same way
        torch.manual_seed(9)
        model.begin_task(["bee"])
    assert torch.equal(logits(loaded), logits(expected))
    loaded.config.save_backbone = True  # a small one can become complete
    loaded.save_pretrained(tmp_path / "made whole")
    shutil.rmtree(tmp_path / "small")
    again = CDLForImageClassification.from_pretrained(tmp_path / "made whole")
    assert torch.equal(logits(again), logits(expected))


def test_a_backbone_of_the_hub_is_fetched_at_its_commit_from_the_cache(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "student"
    as_cached(make_backbone(tmp_path / "old"), cache)
    code = """
import sys, torch
from hf_cdl import CDLForImageClassification
model = CDLForImageClassification.from_backbone("org/tiny", prompt={"type": "l2p", "layers": [0]}, save_backbone=False)
model.begin_task(["cat", "dog"])
model.save_pretrained(sys.argv[1])
"""
    python(code, folder, env={"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})
    assert json.loads((folder / "config.json").read_text())["backbone_revision"] == COMMIT
    as_cached(make_backbone(tmp_path / "new", seed=1), cache, NEWER)  # main moves to a newer commit
    options: dict[str, Any] = {"cache_dir": cache, "local_files_only": True}
    model = AutoModelForImageClassification.from_pretrained(folder, **options)
    old = ViTModel.from_pretrained(tmp_path / "old", add_pooling_layer=False).state_dict()
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in old.items())

    shutil.rmtree(cache / "models--org--tiny" / "snapshots" / COMMIT)
    gone = rf"what was learnt alone.*'org/tiny' \(revision {COMMIT}\).*backbone_name='HUB ID OR FOLDER'"
    with pytest.raises(ValueError, match=gone):
        AutoModelForImageClassification.from_pretrained(folder, **options)
    moved = AutoModelForImageClassification.from_pretrained(folder, backbone_name=str(tmp_path / "old"))
    assert torch.equal(logits(moved), logits(model))


def test_a_folder_that_is_gone_or_has_changed_is_an_error(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "backbone")
    student(backbone, save_backbone=False).save_pretrained(tmp_path / "s")
    other = make_backbone(tmp_path / "other", seed=8)
    with pytest.raises(ValueError, match="Its weights are others now: fingerprint .*say where the same weights are"):
        CDLForImageClassification.from_pretrained(tmp_path / "s", backbone_name=str(other))
    backbone.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="There is no folder .*backbone_name='HUB ID OR FOLDER'"):
        CDLForImageClassification.from_pretrained(tmp_path / "s")
    found = CDLForImageClassification.from_pretrained(tmp_path / "s", backbone_name=str(tmp_path / "moved"))
    found.save_pretrained(tmp_path / "s2")  # and remembers its new place
    assert torch.equal(logits(CDLForImageClassification.from_pretrained(tmp_path / "s2")), logits(found))
    teacher(tmp_path, save_backbone=False).save_pretrained(tmp_path / "t")
    shutil.rmtree(tmp_path / "small")
    with pytest.raises(ValueError, match="Its query_backbone is .*There is no folder .*query_name="):
        CDLForImageClassification.from_pretrained(tmp_path / "t")


def test_what_could_not_be_loaded_again_is_not_saved_small(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "backbone")
    with pytest.raises(ValueError, match="train_backbone is true: what it learns would be lost"):
        student(backbone, save_backbone=False, train_backbone=True)
    tuned = student(backbone, train_backbone=True)
    tuned.config.save_backbone = False
    with pytest.raises(ValueError, match="would be lost"):
        tuned.save_pretrained(tmp_path / "s")
    nameless = student(backbone)
    nameless.config.update({"backbone_name": None, "save_backbone": False})
    with pytest.raises(ValueError, match="backbone_name does not say where its weights are"):
        nameless.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_nothing_pickled_is_loaded(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "backbone")
    model = student(backbone)
    model.save_pretrained(tmp_path / "s")
    for folder, load in ((backbone, student), (tmp_path / "s", CDLForImageClassification.from_pretrained)):
        (folder / "model.safetensors").unlink()
        torch.save(model.backbone.state_dict(), folder / "pytorch_model.bin")
        with pytest.raises((OSError, ValueError), match="model.safetensors"):
            load(folder)


def test_the_small_form_of_the_quickstart_s_student_is_small(tmp_path: Path) -> None:
    recipe = build_recipe({**quickstart(), "save_backbone": False})
    model = CDLForImageClassification.from_backbone(
        str(ROOT / recipe.student.backbone), prompt=recipe.student.prompt, kd_prompt=recipe.student.kd_prompt,
        save_backbone=recipe.save_backbone,
    )  # fmt: skip
    for task in range(5):
        model.begin_task([f"class {task} {number}" for number in range(10)])
    model.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1_000_000


def quickstart() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())


def test_a_recipe_that_trains_a_backbone_does_not_drop_it() -> None:
    content = quickstart()
    content["student"] = {"backbone": content["student"]["backbone"], "train_backbone": True}
    with pytest.raises(RecipeError, match="'save_backbone' is false, but 'student.train_backbone' is true"):
        build_recipe({**content, "distill": [], "ce_weight": 1.0, "save_backbone": False})


@pytest.mark.slow
def test_a_run_with_small_checkpoints_learns_the_same_also_when_it_is_killed(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    whole, small = tmp_path / "whole", tmp_path / "s"
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    code, output = train(file, "--output_dir", whole)
    assert code == 0, output
    arguments = (file, "--output_dir", small, "--save_backbone", "false", "--save_code", "true")
    interrupt_when((small / "teacher" / "task-02").exists, *arguments)
    code, output = train(*arguments)
    assert code == 0, output
    one, two = (json.loads((folder / "results.json").read_text())["roles"] for folder in (whole, small))
    for role, entry in one.items():
        assert entry["accuracy_matrix"] == two[role]["accuracy_matrix"]
        assert not any("backbone" in name for name in stored_names(small / role))
        assert (small / role / "hf_cdl_models_modeling_cdl.py").is_file()
        models = [CDLForImageClassification.from_pretrained(folder / role / "task-03") for folder in (whole, small)]
        assert torch.equal(logits(models[0]), logits(models[1])), role


# ---- saving changes nothing ----


def in_training(backbone: Path, part: str, **fields: Any) -> Any:
    """A model in a first session, or one beside a term's layers."""
    set_seed(5)
    if part == "session_head":
        session = {"head": {"type": "ridge"}, "first_session": {"type": "linear"}}
        model = CDLForImageClassification.from_backbone(str(backbone), prompt=CODA, **session, **fields)
        model.begin_task(["cat", "dog"])
        return model
    model = student(backbone, **fields).train()
    model.scaffold = torch.nn.Linear(5, 5)
    return model


def state_of(model: Any) -> dict[str, Any]:
    """Every attribute, every part and every weight, by identity."""
    named = {f"part {name}": id(part) for name, part in model.named_modules()}
    own = {f"own {key}": (id(value), str(value)) for key, value in vars(model).items() if key != "_modules"}
    return {**own, **named, **{f"weight {name}": id(value) for name, value in model.named_parameters()}}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PARTS = pytest.mark.parametrize("part", ["scaffold", "session_head"])


@PARTS
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_a_checkpoint_in_training_is_that_of_the_model_without_what_only_training_needs(
    small: bool, part: str, tmp_path: Path
) -> None:
    """Also in shards, whose index counts the parameters, and if the caller hands over the weights of all parts."""
    model = in_training(make_backbone(tmp_path / "vit", 32, 2, 2), part, save_backbone=not small)
    before = state_of(model)
    ways: dict[str, Any] = {"one": {}, "shards": {"max_shard_size": "2KB"}}
    for name, options in ways.items():
        model.save_pretrained(tmp_path / name, **options)
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert state_of(model) == before and model.training
    setattr(model, part, None)
    for name, options in ways.items():
        model.save_pretrained(tmp_path / f"bare {name}", **options)
        assert files_of(tmp_path / name) == files_of(tmp_path / f"bare {name}"), name
    assert len(files_of(tmp_path / "shards")) > 3
    assert files_of(tmp_path / "given") == files_of(tmp_path / "one")
    assert logits(CDLForImageClassification.from_pretrained(str(tmp_path / "one"))).isfinite().all()


@PARTS
def test_a_save_that_fails_leaves_the_model_as_it_was_and_never_takes_a_part_away(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_training(make_backbone(tmp_path / "vit", 32, 2, 2), part)
    before, want, during = state_of(model), logits(model.eval()), []

    def fail(*arguments: Any, **options: Any) -> None:
        during.append((state_of(model), logits(model)))
        raise OSError("No space left on device")

    model.train()
    model.eval()
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "full")
    [(then, found)] = during
    before["own training"] = then["own training"]  # changed by eval()
    assert then == before == state_of(model) and getattr(model, part) is not None
    assert torch.equal(found, want), "another thread can use the model meanwhile"


def test_saving_adapters_leaves_the_backbone_s_own_as_they_are(tmp_path: Path) -> None:
    session = {"head": {"type": "ridge"}, "first_session": {"type": "linear"}, "lora": {"r": 2}}
    backbone = make_backbone(tmp_path / "vit", 32, 2, 2)
    model: Any = CDLForImageClassification.from_backbone(str(backbone), **session)
    model.begin_task(["cat", "dog"])
    adapters = model.backbone.peft_config["default"]
    before = dict(vars(adapters))
    model.save_pretrained(tmp_path / "model")
    assert vars(adapters) == before and not adapters.inference_mode
    stored = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert stored["inference_mode"] and stored["base_model_name_or_path"] == str(backbone)
