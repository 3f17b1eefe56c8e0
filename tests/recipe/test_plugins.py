"""Plugins: a user's own methods, in a file that a recipe names."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from helpers import ROOT, make_recipe, python, write_recipe
from states import States
from test_docs import code_blocks
from torch import nn

from hf_cdl import CDLForImageClassification, CDLTrainer
from hf_cdl.commands import add, card, demo, push, train, verify
from hf_cdl.compare.spec import PlannedRun
from hf_cdl.distill import TERMS
from hf_cdl.distill.kd import KD
from hf_cdl.distill.objective import Term, TermConfig
from hf_cdl.heads import HEADS
from hf_cdl.heads.base import Head, HeadConfig
from hf_cdl.heads.class_means import NearestMeanHead
from hf_cdl.heads.linear import LinearHead
from hf_cdl.prompts import PROMPTS
from hf_cdl.prompts.coda import Coda
from hf_cdl.recipe import RecipeError, build_recipe, load_plugins, load_recipe

OWN = ROOT / "recipes" / "own_methods.py"
[WRITTEN] = code_blocks((ROOT / "docs" / "guides" / "extend.md").read_text(), "yaml")
SECTIONS: dict[str, Any] = yaml.safe_load(WRITTEN)
"""The recipe of the guide; backbones and data are smaller here."""


def forget() -> None:
    """Restore the state of a process without plugins, since other tests iterate the registries."""
    for registry in (PROMPTS, TERMS, HEADS):
        for name in registry.added:
            registry.pop(name)  # type: ignore[call-overload]
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


def interrupt(self: CDLTrainer, *rest: Any) -> None:
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
        said = capsys.readouterr().err
        assert "'student.prompt.type' is 'prefix'; allowed: none, coda" in said
        assert f"name them: --plugins {OWN}\n" in said
    assert demo.main([str(student)]) == 2
    said = capsys.readouterr().err
    assert "after task 2 cannot be loaded. ValueError: Unknown prompt type 'prefix'" in said
    assert "Traceback" not in said and "\\n" not in said and f"name them: --plugins {OWN}\n" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.show", lambda where, *more: 0 if States(where, *more[:2]).classifier(2) else 1)
        assert demo.main([str(student), "--plugins", str(OWN)]) == 0
        forget()
        assert demo.main([str(student), "--plugins", "gone.py"]) == 2
    assert verify.main([str(tmp_path / "run"), "--plugins", str(OWN)]) == 0
    assert card.main([str(tmp_path / "run"), "--plugins", str(OWN)]) == 0
    assert "prompts (`prefix`) and a `dropout_linear` head" in (tmp_path / "run/student/README.md").read_text()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_a_plugin_that_was_edited(tmp_path: Path, capsys: Any) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(OWN.read_text())
    words = [str(write_recipe(tmp_path / "own.yaml", own_recipe(tmp_path, plugins=[str(mine)])))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CDLTrainer, "evaluate_seen", interrupt)
        assert train.main(words) == 130
    ledger = tmp_path / "run" / "run.json"
    before = ledger.read_text()
    mine.write_text(f"{OWN.read_text()}\n# other\n")
    assert train.main(words) == 2
    said = capsys.readouterr().err
    assert f"'plugins' names {mine}, which was edited since the run in" in said and "Put the old content back" in said
    assert ledger.read_text() == before
    assert verify.main([str(tmp_path / "run"), "--plugins", str(mine)]) == 0
    assert f"The plugin {mine} was edited since the run was trained" in capsys.readouterr().err

    older = json.loads(before)
    del older["plugins"]  # as before plugins were recorded
    ledger.write_text(json.dumps(older))
    assert train.main(words) == 0, capsys.readouterr().err
    assert [*json.loads(ledger.read_text())["plugins"]] == [str(mine)]
    assert verify.main([str(tmp_path / "run"), "--plugins", str(mine)]) == 0
    assert "edited" not in capsys.readouterr().err
    mine.write_text(OWN.read_text())
    assert train.main(words) == 2, "also of a finished run"
    planned = PlannedRun("a", 0, tmp_path / "run", words, load_recipe(words, ""), "", None)
    assert planned.results() is None, "hf-cdl compare starts it, which says what is wrong"
    mine.write_text(f"{OWN.read_text()}\n# other\n")
    assert (planned.results() or {})["finished"]


def test_a_teacher_of_an_edited_plugin_is_not_taken_over(tmp_path: Path, capsys: Any) -> None:
    """Its own plugin may lie elsewhere, but under the same name it has the same content."""
    places = [tmp_path / name / "mine.py" for name in ("there", "here")]
    for mine in places:
        mine.parent.mkdir()
        mine.write_text(OWN.read_text())
    there, here = (
        [str(write_recipe(mine.parent / "own.yaml", own_recipe(tmp_path, plugins=[str(mine)])))] for mine in places
    )
    here += ["--teacher_from", str(tmp_path / "run"), "--output_dir", str(tmp_path / "mine")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CDLTrainer, "evaluate_seen", interrupt)
        assert train.main(there) == 130
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for mine, words in ((places[1], here), (places[0], [there[0], *here[1:]])):
        mine.write_text(f"{OWN.read_text()}\n# other\n")
        forget()
        assert train.main(words) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"'teacher_from' is {tmp_path / 'run'}, where {mine} in 'plugins' had other content" in said
        assert "Put the old content back, or leave 'teacher_from' out" in said
        assert not (tmp_path / "mine").exists(), "nothing was begun"
        mine.write_text(OWN.read_text())
    assert before == {path: path.read_bytes() for path in before}
    forget()
    assert "has learnt 1 task so far" in (train.main(here), capsys.readouterr().err)[1], "it would be taken over"
    ledger = tmp_path / "run" / "run.json"
    older = json.loads(ledger.read_text())
    del older["plugins"]  # as before plugins were recorded
    ledger.write_text(json.dumps(older))
    places[1].write_text(f"{OWN.read_text()}\n# other\n")
    forget()
    assert "has learnt 1 task so far" in (train.main(here), capsys.readouterr().err)[1]


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


def test_code_of_a_plugin_is_refused_whenever_it_would_be_saved(tmp_path: Path) -> None:
    load_plugins([str(OWN)])
    backbone = make_recipe(tmp_path)["student"]["backbone"]
    prefix = CDLForImageClassification.from_backbone(backbone, prompt={"type": "prefix"})
    prefix.config.save_code = True
    with pytest.raises(ValueError, match="the code of prefix is a plugin's"):
        prefix.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    rest: dict[str, Any] = {"mapping": {}, "teacher_pool": prefix.pool_config, "save_code": True}
    with pytest.raises(ValueError, match="the code of prefix is a plugin's"):
        CDLForImageClassification.from_backbone(backbone, **rest)


def test_what_is_put_into_a_registry_without_register_is_not_the_package_s_own() -> None:
    assert PROMPTS.added == set()
    PROMPTS["coda"], PROMPTS["mine"] = type("Other", (Coda,), {}), Coda
    assert PROMPTS.added == {"coda", "mine"}
    PROMPTS["coda"] = Coda
    assert PROMPTS.added == {"mine"}


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
    edited = tmp_path / "b" / "mine.py"
    edited.write_text(edited.read_text().replace("'b'", "'c'"))
    load_plugins(files)
    load_plugins(files)
    assert (tmp_path / "ran").read_text() == "abc", "once more where its content is another"


def test_a_plugin_that_failed_can_be_run_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = OWN.read_text()
    file.write_text(f"{text}\nraise KeyError('later')\n")
    with pytest.raises(RecipeError, match="mine.py' failed at line .*KeyError: 'later'"):
        load_plugins([str(file)])
    file.write_text(text)
    load_plugins([str(file)])
    assert PROMPTS["prefix"].__module__.endswith(".mine")


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "raise SystemExit", "raise GeneratorExit('x')"])
def test_a_plugin_that_ends_the_process_is_an_error_of_the_command(tmp_path: Path, capsys: Any, end: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"x = 1\n{end}\n")
    for main in (verify.main, card.main, push.main):
        assert main([str(tmp_path), "--plugins", str(file)]) == 2
        assert re.search(r"error: The plugin '.*mine.py' failed at line 2: \w+Exit", capsys.readouterr().err)


def test_a_plugin_that_was_interrupted_runs_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise KeyboardInterrupt\n")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            load_plugins([str(file)])


@pytest.mark.parametrize("files", ["mine.py", None, {"a": 1}, [1], 3])
def test_plugins_that_are_no_list_are_refused(files: Any) -> None:
    with pytest.raises(RecipeError, match=r"'plugins' is .* a list of Python files; nothing was run. Write it in br"):
        load_plugins(files)


def test_hf_cdl_add_says_that_plugins_are_written_in_brackets(tmp_path: Path, capsys: Any) -> None:
    assert add.main([str(tmp_path), str(tmp_path), "--plugins", "mine.py"]) == 2
    said = capsys.readouterr().err
    assert "'plugins' is 'mine.py', but takes a list" in said and "brackets, also for one: --plugins '[FILE" in said


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
        (TERMS, MineConfig, "which is not a distillation term: allowed are classes derived from hf_cdl.distill.obj"),
        (TERMS, Coda, "which is not a distillation term"),
        (HEADS, "linear", "got 'linear', which is not a head"),
        (TERMS, type("Half", (Term,), {"config_class": MineConfig}), "Half lacks forward, which every distillation"),
        (HEADS, type("Half", (Head,), {}), "Half lacks add_task, init_task, which every head has"),
        (TERMS, type("Loose", (KD,), {"config_class": Loose}), r"\(Loose\) is not derived from .*TermConfig"),
        (TERMS, type("Named", (KD,), {"config_class": Typed}), r"\(Typed\) has a field 'type'"),
        (PROMPTS, type("Odd", (Coda,), {"config_class": dict}), "config_class is <class 'dict'>; allowed is a data"),
        (PROMPTS, type("Flat", (Coda,), {"config_class": Bare}), r"\(Bare\) has no layers"),
        (HEADS, type("Sums", (LinearHead,), {"keeps_sums": True}), "Sums keeps_sums, but .*: define `drop_sums`, or"),
        (
            HEADS,
            type("Taught", (NearestMeanHead,), {"needs_teacher": True}),
            "Taught needs_teacher, .*define `targets`",
        ),
        (
            HEADS,
            type("Asks", (NearestMeanHead,), {"needs_teacher": property(bool)}),
            "Asks needs_teacher, .*`targets`",
        ),
        (
            HEADS,
            type("Trained", (LinearHead,), {"needs_teacher": True}),
            "by terms; derive it from FittedHead, or leave that",
        ),
        (HEADS, type("Fits", (LinearHead,), {"fitted": True}), "has fitted True, which heads derived from FittedHead"),
        (
            HEADS,
            type("Not", (NearestMeanHead,), {"fitted": False}),
            "has fitted False, which heads derived from Fitted",
        ),
        (HEADS, type("Plain", (NearestMeanHead,), {"config_class": HeadConfig}), "the `scale` of FittedConfig"),
        (
            HEADS,
            type("Lazy", (LinearHead,), {"keeps_sums": property(bool)}),
            "has keeps_sums <property.*True or False",
        ),
        (
            HEADS,
            type("Few", (LinearHead,), {"add_task": lambda self: None}),
            r"has add_task\(self\), but it is called",
        ),
        (HEADS, type("Made", (LinearHead,), {"__init__": lambda self: None}), r"called as __init__\(self, config"),
        (
            HEADS,
            type("Own", (LinearHead,), {"check_recipe": lambda *a: []}),
            "check_recipe as .*make it a classmethod",
        ),
        (
            TERMS,
            type("Beside", (KD,), {"needs_teacher": False, "consult": lambda s, a, b: a}),
            "has consult, which only",
        ),
        (
            TERMS,
            type("Parts", (KD,), {"student_parts": {"kd_promt": {}}}),
            "kd_promt.*allowed: fields of kd_prompt or",
        ),
        (TERMS, type("Word", (KD,), {"needs_query": "no"}), "has needs_query 'no'; allowed: True or False"),
        (
            TERMS,
            type("Two", (KD,), {"forward": lambda self, student, teacher: 0}),
            r"has forward\(self, student, teach",
        ),
        (PROMPTS, type("Deaf", (Coda,), {"needs_query": False}), "has a similarity of queries, but not needs_query"),
        (PROMPTS, type("Short", (Coda,), {"forward": lambda self, layer, query: None}), "called as forward.*task_id"),
    ],
)
def test_a_class_without_what_the_contract_needs_is_refused(registry: Any, kind: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        registry.register("mine", kind)
    assert "mine" not in registry


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (("length", int), r"config_class \(Made\) has no default for length; give it one; allowed is a data"),
        (("mode", Colour, Colour.RED), "has mode: <enum 'Colour'>, which cannot be stored as JSON and read again"),
        (("part", Bare | None, None), "has part: .*Bare.*cannot be stored"),
        (("path", Path, Path()), "has path: .*Path.*cannot be stored"),
        (("words", Literal[1, 2], 1), "has words: .*allowed are bool, int"),
        (("rates", tuple, ()), "has rates: <class 'tuple'>"),
    ],
)
def test_fields_that_no_config_can_hold_are_refused(field: Any, said: str) -> None:
    field = (*field[:2], dataclasses.field(default=field[2])) if len(field) == 3 else field
    made = dataclasses.make_dataclass("Made", [field], bases=(TermConfig,), frozen=True, kw_only=True)
    with pytest.raises(ValueError, match=said):
        TERMS.register("mine", type("Made", (KD,), {"config_class": made}))
    kinds = [("a", tuple[int, ...] | None, None), ("b", dict[str, list[float]] | None, None), ("c", Literal["x"], "x")]
    fine = dataclasses.make_dataclass("Fine", kinds, bases=(TermConfig,), frozen=True)
    assert TERMS.register("mine", type("Fine", (KD,), {"config_class": fine}))


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
