"""Plugins: a user's own methods, in a file that a recipe names."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, make_recipe, python, write_recipe
from test_docs import code_blocks
from torch import nn

from hf_cdl import CDLForImageClassification, CDLTrainer
from hf_cdl.commands import card, train, verify
from hf_cdl.distill import TERMS
from hf_cdl.distill.kd import KD
from hf_cdl.distill.objective import Term, TermConfig
from hf_cdl.heads import HEADS
from hf_cdl.heads.base import Head
from hf_cdl.prompts import PROMPTS
from hf_cdl.prompts.coda import Coda
from hf_cdl.recipe import RecipeError, build_recipe, load_plugins, load_recipe

OWN = ROOT / "recipes" / "own_methods.py"
[README] = [block for block in code_blocks((ROOT / "README.md").read_text(), "yaml") if "plugins" in block]
SECTIONS: dict[str, Any] = yaml.safe_load(README)
"""The recipe of the README; backbones and data are smaller here."""


def forget() -> None:
    """Restore the state of a process without plugins, since other tests iterate the registries."""
    for registry in (PROMPTS, TERMS, HEADS):
        for name in registry.added:
            registry.pop(name)  # type: ignore[call-overload]
        registry.added.clear()
    for name in [name for name in sys.modules if name.startswith("hf_cdl_plugins")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    kept: list[Any] = [(registry, dict(registry)) for registry in (PROMPTS, TERMS, HEADS)]
    yield
    forget()
    for registry, entries in kept:
        registry.update(entries)


def own_recipe(folder: Path, **fields: Any) -> dict[str, Any]:
    recipe = make_recipe(folder, plugins=[str(OWN)], output_dir=str(folder / "run"))
    recipe["data"]["classes_per_task"] = 3
    for role in ("student", "teacher"):
        recipe[role] = {**SECTIONS[role], "backbone": recipe[role]["backbone"]}
    return {**recipe, "distill": SECTIONS["distill"], **fields}


def interrupt(self: CDLTrainer) -> None:
    raise KeyboardInterrupt


def test_a_run_with_own_methods_is_trained_resumed_and_loaded(tmp_path: Path, capsys: Any) -> None:
    """The example in the docs: a pool, a term and a head from a file that the recipe names."""
    file = write_recipe(tmp_path / "own.yaml", own_recipe(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CDLTrainer, "evaluate_seen", interrupt)
        assert train.main([str(file), "--train.logging_steps", "1"]) == 130
    assert train.main([str(file), "--train.logging_steps", "1"]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["finished"] and results["recipe"]["distill"] == SECTIONS["distill"]
    logged = json.loads((tmp_path / "run/logs/student-task-02.json").read_text())
    assert all(entry["loss/logit_regression"] > 0 for entry in logged[:-1]) and len(logged) > 2

    student = tmp_path / "run" / "student"
    model = CDLForImageClassification.from_pretrained(student)
    assert {**model.config.prompt, "layers": [0, 1]} == SECTIONS["student"]["prompt"]
    assert model.config.head == {**SECTIONS["student"]["head"], "standardise": None}
    [use] = [line for line in said.splitlines() if "pipeline(" in line]
    assert f"load_plugins(['{OWN}'])" in use.replace("'\"'\"'", "'")

    load = f"from hf_cdl import CDLForImageClassification as M; M.from_pretrained({str(student)!r})"
    with pytest.raises(AssertionError) as failed:
        python(load)
    last = str(failed.value).strip().splitlines()[-1]
    assert "Unknown prompt type 'prefix'; allowed: none, coda" in last
    assert "once the file that calls PROMPTS.register has run: import it first" in last
    python(f"import sys; sys.path.insert(0, {str(OWN.parent)!r}); import own_methods\n{load}")

    forget()
    for main in (card.main, verify.main):
        assert main([str(tmp_path / "run")]) == 2
        assert "'student.prompt.type' is 'prefix'; allowed: none, coda" in capsys.readouterr().err
    assert verify.main([str(tmp_path / "run"), "--plugins", str(OWN)]) == 0
    assert card.main([str(tmp_path / "run"), "--plugins", str(OWN)]) == 0
    assert "prompts (`prefix`) and a `dropout_linear` head" in (tmp_path / "run/student/README.md").read_text()


@pytest.mark.parametrize(
    ("role", "part", "values", "said"),
    [
        ("student", "prompt", {"lenght": 3}, "unknown field 'student.prompt.lenght'; did you mean 'length'?"),
        ("student", "prompt", {"length": [1]}, "'student.prompt.length' is [1], but should be a valid integer"),
        ("teacher", "prompt", {"length": 0}, "teacher.prompt: prefix needs length >= 1; got 0."),
        ("student", "head", {"dropout": 1}, "student.head: dropout_linear needs dropout from 0 to below 1; got 1.0."),
    ],
)
def test_fields_of_own_methods_are_checked_like_the_package_s(
    tmp_path: Path, role: str, part: str, values: dict[str, Any], said: str
) -> None:
    recipe = own_recipe(tmp_path)
    recipe[role] = {**recipe[role], part: {**SECTIONS[role][part], **values}}
    with pytest.raises(RecipeError) as raised:
        load_recipe([str(write_recipe(tmp_path / "own.yaml", recipe))], "")
    assert str(raised.value).splitlines()[1:] == [f"- {said}"]


def test_what_own_methods_need_is_refused_where_it_lacks(tmp_path: Path) -> None:
    load_plugins([str(OWN)])
    for change, said in (
        ({"teacher": None}, "'distill.0' (logit_regression) has no teacher to learn from"),
        ({"distill": [{"type": "logit_regression", "weight": -1}]}, "logit_regression needs weight >= 0; got -1.0."),
        ({"save_code": True}, "'save_code' is true, but 'student.head.type' dropout_linear is a plugin's"),
        ({"ce_weight": 0, "distill": [{"type": "logit_regression", "weight": 0}]}, "nothing would be learnt"),
    ):
        with pytest.raises(RecipeError) as raised:
            build_recipe(own_recipe(tmp_path / "x", **change))
        assert said in str(raised.value)


def test_what_one_method_asks_of_a_recipe_its_own_class_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugins([str(OWN)])
    kind: Any = TERMS["logit_regression"]
    asked = []

    def check_recipe(cls: Any, *asks: Any) -> list[tuple[str, str]]:
        asked.extend(asks)
        return [("teacher.query", "is what it is; set it to self")]

    monkeypatch.setattr(kind, "check_recipe", classmethod(check_recipe))
    monkeypatch.setattr(HEADS["dropout_linear"], "check_recipe", lambda fields, taught: [("dropout", f"is {taught}")])
    with pytest.raises(RecipeError) as raised:
        build_recipe(own_recipe(tmp_path))
    said = ["- 'teacher.query' is what it is; set it to self", "- 'student.head.dropout' is True"]
    assert str(raised.value).splitlines()[1:] == said
    assert [(asks.prompted, asks.query) for asks in asked] == [(True, None)] * 2, "prefix asks no query"


def test_without_the_plugin_the_recipe_is_refused(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "own.yaml", own_recipe(tmp_path, plugins=[]))
    with pytest.raises(RecipeError, match="'student.prompt.type' is 'prefix'; allowed: none, coda"):
        load_recipe([str(file)], "")


def test_a_model_with_code_has_no_part_of_a_plugin(tmp_path: Path) -> None:
    load_plugins([str(OWN)])
    backbone = make_recipe(tmp_path)["student"]["backbone"]
    with pytest.raises(ValueError, match="save_code is true, but the code of prefix is a plugin's"):
        CDLForImageClassification.from_backbone(backbone, prompt={"type": "prefix"}, save_code=True)


def test_plugins_of_one_name_are_both_run_and_once_each(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"import pathlib\nwith pathlib.Path({str(tmp_path / 'ran')!r}).open('a') as f: f.write('{folder}')\n"
        )
    files = [str(tmp_path / folder / "mine.py") for folder in ("a", "b", "a")]
    load_plugins(files)
    load_plugins(files)
    assert (tmp_path / "ran").read_text() == "ab"


def test_a_plugin_that_failed_can_be_run_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = OWN.read_text()
    file.write_text(f"{text}\nraise KeyError('later')\n")
    with pytest.raises(RecipeError, match="mine.py' failed at line .*KeyError: 'later'"):
        load_plugins([str(file)])
    file.write_text(text)
    load_plugins([str(file)])
    assert PROMPTS["prefix"].__module__.endswith(".mine")


# ---- register ----


@dataclass(frozen=True)
class MineConfig(TermConfig):
    pass


class Mine(KD):
    config_class = MineConfig


@dataclass(frozen=True)
class Loose:
    weight: float = 1.0


@dataclass(frozen=True)
class Typed(TermConfig):
    type: str = "x"


@dataclass(frozen=True)
class Bare:
    length: int = 1


def test_a_class_is_registered_by_decorator_or_call() -> None:
    assert TERMS.register("mine", Mine) is Mine and TERMS["mine"] is Mine
    assert TERMS.register("mine", Mine) is Mine, "again is no other"
    assert TERMS.register("mine_too")(Mine) is Mine and list(TERMS)[-2:] == ["mine", "mine_too"]


@pytest.mark.parametrize("name", ["", "a b", "my-term", "1st", 3, None, "keys", "forward", "none", "training"])
def test_a_name_that_is_no_word_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a prompt pool; allowed are words"):
        PROMPTS.register(name)


@pytest.mark.parametrize("name", ["loss", "ce", "prompt"])
def test_a_term_is_not_named_as_a_loss_of_the_objective(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be the name of a distillation term"):
        TERMS.register(name, Mine)
    assert name not in TERMS


@pytest.mark.parametrize(
    ("registry", "kind", "said"),
    [
        (TERMS, MineConfig, "which is no distillation term: allowed are classes derived from hf_cdl.distill.obj"),
        (TERMS, Coda, "which is no distillation term"),
        (HEADS, "linear", "got 'linear', which is no head"),
        (TERMS, type("Half", (Term,), {"config_class": MineConfig}), "Half lacks forward, which every distillation"),
        (HEADS, type("Half", (Head,), {}), "Half lacks add_task, init_task, which every head has"),
        (TERMS, type("Loose", (KD,), {"config_class": Loose}), r"\(Loose\) is not derived from .*TermConfig"),
        (TERMS, type("Named", (KD,), {"config_class": Typed}), r"\(Typed\) has a field 'type'"),
        (PROMPTS, type("Odd", (Coda,), {"config_class": dict}), "config_class is <class 'dict'>; allowed is a data"),
        (PROMPTS, type("Flat", (Coda,), {"config_class": Bare}), r"\(Bare\) has no layers"),
    ],
)
def test_a_class_without_what_the_contract_needs_is_refused(registry: Any, kind: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        registry.register("mine", kind)
    assert "mine" not in registry


def test_an_annotation_of_a_function_s_own_is_refused() -> None:
    class Inner(nn.Module):
        pass

    config = dataclasses.make_dataclass("Local", [("inner", "Inner", None)], bases=(TermConfig,), frozen=True)
    with pytest.raises(ValueError, match="has an annotation that is unknown where the class is defined: .*Inner"):
        TERMS.register("mine", type("Deep", (KD,), {"config_class": config}))


def test_a_taken_name_is_refused_but_for_the_same_class_defined_again() -> None:
    with pytest.raises(ValueError, match="got Mine, but the name is taken by hf_cdl.distill.kd.KD; choose a name"):
        TERMS.register("kd", Mine)
    TERMS.register("mine", Mine)
    again = type("Mine", (KD,), {"config_class": MineConfig, "__module__": __name__})
    assert TERMS.register("mine", again) is again and TERMS["mine"] is again


@pytest.mark.parametrize("registry", [PROMPTS, TERMS, HEADS], ids=lambda registry: registry.name)
def test_the_package_s_own_keep_the_contract(registry: Any) -> None:
    for name, kind in dict(registry).items():
        assert registry.register(name, kind) is kind
