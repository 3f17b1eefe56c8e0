"""Recipes: every shipped one parses, and all problems are reported together, before anything is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_cdl.data.names import ROLES
from hf_cdl.recipe import BASELINES, Recipe, build_recipe, idle_arguments, load_recipe
from hf_cdl.recipe.files import RecipeError, merge, read_yaml
from hf_cdl.training.arguments import CDLTrainingArguments

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))  # complete ones; subfolders have parts (test_benchmarks.py) and comparisons
MINIMAL: dict[str, Any] = {
    "name": "x",
    "data": {"path": "somewhere"},
    "teacher": {"backbone": "big", "prompt": {"type": "coda", "length": 8}},
    "student": {"backbone": "small", "prompt": {"type": "coda"}},
    "distill": [{"type": "kdp", "weight": 0.5}],
}


def changed(**fields: Any) -> dict[str, Any]:
    """MINIMAL with fields set by dotted names (`__` for the dot)."""
    recipe = copy.deepcopy(MINIMAL)
    for name, value in fields.items():
        *path, last = name.split("__")
        section = recipe
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return recipe


def problems(recipe: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as error:
        build_recipe(recipe)
    first, *lines = str(error.value).split("\n- ")
    assert first == "The recipe cannot be run:"
    return lines


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def load(file: Path, *arguments: str) -> Recipe:
    return load_recipe([str(file), *arguments], "unused.yaml")


# ---- shipped recipes ----


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_shipped_recipe_parses(file: Path) -> None:
    recipe = load(file)
    assert recipe.name
    assert build_recipe(recipe.as_dict()) == build_recipe({**recipe.as_dict(), "output_dir": None})


def test_quickstart_is_the_default() -> None:
    assert RECIPES / "quickstart.yaml" in FILES
    recipe = load_recipe([], RECIPES / "quickstart.yaml")
    assert (recipe.name, recipe.folder) == ("quickstart", Path("runs/quickstart"))
    assert load_recipe(["--seed", "3"], RECIPES / "quickstart.yaml").seed == 3


# ---- refused recipes ----

MAPPING = {"type": "prompt_mapping"}
LINEAR, RIDGE = {"type": "linear"}, {"type": "ridge"}
PLAIN = {"model": "classifier", "backbone": "resnet"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epochs": 3}, "unknown field 'epochs'; allowed: name, data, student"),
        ({"studnet": {}}, "unknown field 'studnet'; did you mean 'student'?"),
        ({"data__label_colum": "x"}, "unknown field 'data.label_colum'; did you mean 'label_column'?"),
        ({"student__bacbone": "x"}, "unknown field 'student.bacbone'; did you mean 'backbone'?"),
        ({"student__prompt": {"type": "coda", "lenght": 4}}, "unknown field 'student.prompt.lenght'"),
        ({"student__prompt": {"type": "codda"}}, "'student.prompt.type' is 'codda'; allowed: none, coda"),
        ({"student__prompt": {"length": 4}}, "'student.prompt.type' is None; allowed"),
        (
            {"student__head": {"type": "mlp"}},
            "'student.head.type' is 'mlp'; allowed: linear, weight_normalised",
        ),
        (
            {"student__head": {"typ": "ncm"}},
            "'student.head.type' is None; allowed: linear, weight_normalised",
        ),
        ({"student__head": {"type": "linear", "width": 3}}, "unknown field 'student.head.width'"),
        ({"student__prompt": {"type": "none", "length": 4}}, "unknown field 'student.prompt.length'"),
        ({"student__prompt": {"type": ["coda"]}}, "'student.prompt.type' is ['coda']; allowed: none, coda"),
        ({"student__kd_prompt": {"lenght": 4}}, "unknown field 'student.kd_prompt.lenght'"),
        ({"distill": [{"type": "kdp", "tau": 4}]}, "unknown field 'distill.0.tau'"),
        ({"distill": [{"type": "dkdd"}]}, "'distill.0.type' is 'dkdd'; allowed: kd, dkd"),
        ({"distill": ["kdp"]}, "'distill' is ['kdp'], but should be a valid dictionary"),
        ({"train__learning_rat": 1}, "unknown field 'train.learning_rat'; did you mean 'learning_rate'?"),
        ({"teacher__train": {"epoch": 1}}, "unknown field 'teacher.train.epoch'"),
        ({"student__train": {"lr": 1}}, "unknown field 'student.train.lr'"),
    ],
)
def test_unknown_names_at_every_level(fields: dict[str, Any], said: str) -> None:
    assert any(line.startswith(said) for line in problems(changed(**fields))), problems(changed(**fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": 3}, "'name' is 3, but should be a valid string"),
        ({"seed": "one"}, "'seed' is 'one', but should be a valid integer"),
        ({"ce_weight": "much"}, "'ce_weight' is 'much', but should be a valid number"),
        ({"data": "icons"}, "data must have fields, but is 'icons'"),
        ({"student": "vit"}, "student must have fields, but is 'vit'"),
        ({"student": None}, "'student' is None"),
        ({"data__classes_per_task": 1.5}, "'data.classes_per_task' is 1.5, but should be a valid integer"),
        ({"data__crop_scale": [0.5]}, "'data.crop_scale' is [0.5]"),
        ({"data__eval_split": "train"}, "'data.eval_split' is 'train', but should be 'test' or 'validation'"),
        ({"data__flip": 2}, "data: "),
        ({"student__prompt": "coda"}, "'student.prompt' is 'coda'"),
        ({"student__prompt": {"type": "coda", "length": 7}}, "student.prompt: CODA-Prompt needs"),
        ({"student__train_backbone": "perhaps"}, "'student.train_backbone' is 'perhaps'"),
        ({"teacher__query": "both"}, "'teacher.query' is 'both', but should be 'student', 'self' or 'one_pass'"),
        ({"distill": {"type": "kdp"}}, "'distill' is {'type': 'kdp'}, but should be a valid list"),
        ({"distill": [{"type": "kdp", "weight": -1}]}, "distill.0: A KD head needs weight >= 0"),
        ({"distill": [{"type": "kdp", "temperature": "hot"}]}, "'distill.0.temperature' is 'hot'"),
        (
            {"baselines": ["knn"]},
            "'baselines' is ['knn'], but should be 'nearest_class_mean', 'linear_head' or 'ridge_head'",
        ),
        ({"train": 3}, "'train' is 3, but should be a valid dictionary"),
        ({"train__learning_rate": "fast"}, "'train.learning_rate' is 'fast', but should be a valid number"),
        ({"train__lr_scheduler_type": "zigzag"}, "'train.lr_scheduler_type' is 'zigzag'; allowed: linear"),
        (
            {"train__max_steps": 3, "train__epoch_cosine": True},
            "'train.epoch_cosine' counts epochs",
        ),
        ({"train__max_steps": 3, "train__lr_steps": [1]}, "'train.lr_steps' counts epochs; set num_train_epochs"),
        ({"train__lr_steps": [1], "train__epoch_cosine": True}, "'train.epoch_cosine' is a schedule beside lr_steps"),
        (
            {"train__lr_steps": [1], "train__lr_scheduler_type": "linear"},
            "'train.lr_steps' is a schedule",
        ),
        ({"train__lr_steps": [3, 2]}, "'train.lr_steps' is [3, 2], but must be ascending"),
        ({"train__lr_steps": [0]}, "'train.lr_steps' is [0], but must be ascending"),
        ({"train__lr_steps": [2], "train__lr_decay": 0}, "'train.lr_decay' is 0.0, but must be"),
        ({"student__model": "resnet"}, "'student.model' is 'resnet', but should be 'cdl' or 'classifier'"),
        ({"data__crop_padding": -1}, "data: "),
        (
            {"student__train": {"gradient_accumulation_steps": 0}},
            "'student.train.gradient_acc",
        ),
        ({"train__seed": 3}, "'train.seed': set 'seed' at the top level of the recipe"),
        ({"student__train": {"output_dir": "x"}}, "'student.train.output_dir': set 'output_dir' at the top"),
    ],
)
def test_wrong_values(fields: dict[str, Any], said: str) -> None:
    assert any(line.startswith(said) for line in problems(changed(**fields))), problems(changed(**fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teacher": None}, "'distill.0' (kdp) has no teacher to learn from"),
        ({"distill": [{"type": "kdp"}, {"type": "kd_token"}]}, "'distill.1' (kd_token) wants another 'kd_prompt'"),
        ({"student__train_backbone": True}, "'student.train_backbone' with prompts"),
        ({"teacher__kd_prompt": {}}, "'teacher.kd_prompt': only a student has it"),
        ({"distill": [{"type": "kd"}], "student__kd_prompt": {}}, "'student.kd_prompt' is set, but no term"),
        ({"student__head": {"type": "ncm"}}, "'student.head.type' ncm is fitted without training"),
        ({"teacher__head": {"type": "ncm"}}, "'teacher.head.type' ncm is fitted without training"),
        ({"student__first_session": LINEAR}, "'student.first_session' is set, but 'student.head.type' linear"),
        ({"student__first_session": RIDGE}, "'student.first_session.type' ridge is not trained; use one of linear"),
        ({"student__first_session": {"type": "mlp"}}, "'student.first_session.type' is 'mlp'; allowed: linear"),
        (
            {"student": {"backbone": "x", "head": RIDGE, "first_session": LINEAR}, "distill": [{"type": "kd"}]},
            "'student.first_session' has nothing",
        ),
        (
            {"student__head": RIDGE, "student__first_session": LINEAR, "distill": [{"type": "prompt_mapping"}]},
            "'distill.0' (prompt_mapping) maps the teacher's prompts, which continue to change",
        ),
        ({"teacher__head": {**RIDGE, "lambda": 1}}, "unknown field 'teacher.head.lambda'"),
        ({"teacher__head": {**RIDGE, "strength": -1}}, "teacher.head: A ridge head needs strength > 0"),
        ({"teacher": {**PLAIN, "first_session": LINEAR}}, "'teacher.first_session': a model: classifier has none"),
        ({"distill": [MAPPING], "teacher__query": "self"}, "'teacher.query' is 'self', but a mapping"),
        ({"distill": [MAPPING], "teacher__prompt": {"type": "none"}}, "'teacher.prompt.type' is none, but a mapping"),
        ({"distill": [MAPPING, {"type": "kdp"}]}, "the terms want mapping and kd_prompt, which both train"),
        ({"distill": [{"type": "os_prompt"}]}, "'distill.0' (os_prompt) compares one-pass queries with keys"),
        ({"data__path": None}, "'data.path' is missing"),
        ({"student": {**PLAIN, "prompt": {"type": "coda"}}}, "'student.prompt': a model: classifier has none"),
        ({"teacher": {**PLAIN, "train_backbone": True}}, "'teacher.train_backbone': a model: classifier has none"),
        ({"student__pretrained": False}, "'student.pretrained' is false, but only a model: classifier"),
        ({"teacher__train": None}, "'teacher.train' is null, but only a teacher that is a model: classifier"),
        ({"student": {**PLAIN, "train": None}}, "'student.train' is null, but only a teacher"),
        ({"teacher": {**PLAIN, "train": None, "pretrained": False}}, "'teacher.train' is null, but 'teacher.pretr"),
        (
            {"teacher": {**PLAIN, "train": None}, "teacher_from": "x"},
            "'teacher_from' uses a run's trained teacher, 'teacher.",
        ),
        ({"student": PLAIN}, "'distill.0' (kdp) trains a KD head, which a model: classifier has not"),
        ({"teacher": PLAIN, "distill": [{"type": "review_kd"}]}, "'distill.0' (review_kd) compares hidden states"),
        ({"student": PLAIN, "baselines": ["linear_head"]}, "'baselines' are of a frozen backbone"),
        ({"student": PLAIN}, "'teacher.query' is student, but a model: classifier answers no queries"),
        ({"data__classes_per_task": [["a", "b"], ["b"]]}, "data: "),
    ],
)
def test_impossible_combinations(fields: dict[str, Any], said: str) -> None:
    assert any(line.startswith(said) for line in problems(changed(**fields))), problems(changed(**fields))


def test_all_problems_in_one_message() -> None:
    recipe = changed(
        nmae="x",
        seed="one",
        data__classes_per_task="ten",
        teacher__prompt={"type": "codda"},
        teacher__train={"bf17": True},
        student__prompt={"type": "coda", "length": 7, "layer": [0]},
        student__train_backbone=True,
        distill=[{"type": "kdp", "wieght": 1}, {"type": "x"}],
        train={"learning_rate": "fast", "num_epochs": 3},
    )
    del recipe["name"]
    found = problems(recipe)
    for name in (
        "nmae",
        "'name' is missing",
        "seed",
        "data.classes_per_task",
        "teacher.prompt.type",
        "teacher.train.bf17",
        "student.prompt.layer",
        "CODA-Prompt needs",
        "student.train_backbone",
        "distill.0.wieght",
        "distill.1.type",
        "train.learning_rate",
        "train.num_epochs",
    ):
        assert sum(name in line for line in found) >= 1, name
    assert len(found) == len(set(found))


def test_problems_of_the_shared_training_arguments_are_said_once() -> None:
    assert len(problems(changed(train={"learning_rat": 1}))) == 1
    [line] = problems(changed(train={"save_strategy": True}))  # YAML's `yes`
    assert line.startswith("'train.save_strategy' is True, but should be 'no', 'steps', 'epoch' or 'best'")


@pytest.mark.parametrize("field", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_no_is_a_word_where_it_is_one_of_the_words(field: str, file: Path) -> None:
    """YAML reads it as false: on the command line, in a file, and for one model."""
    assert load(file, f"--train.{field}", "no").train[field] == "no"
    assert build_recipe(changed(train={field: False})).train[field] == "no"
    own = load(file, f"--student.train.{field}", "no").student.train
    assert own is not None and own[field] == "no"


def test_the_precision_is_the_recipe_s_and_not_the_launcher_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("no", "bf16", "fp16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
        if value == "no":
            assert not build_recipe(changed()).train
        else:
            assert all("ACCELERATE_MIXED_PRECISION" in line and value in line for line in problems(changed()))
        own = {"bf16": True, "use_cpu": True}
        assert build_recipe(changed(train=own)).train == own, "it goes before the launcher's"
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv(variable, "false")
        assert build_recipe(changed())
        monkeypatch.setenv(variable, "true")
        assert all(variable in line for line in problems(changed()))
        monkeypatch.delenv(variable)


def test_every_role_of_a_recipe_is_known() -> None:
    assert {*ROLES} == {"student", "teacher", *BASELINES}


def test_a_student_that_trains_has_a_loss_with_a_weight() -> None:
    for terms in ([], [{"type": "kd", "weight": 0}]):
        [line] = problems(changed(ce_weight=0, distill=terms))
        assert "'ce_weight' is 0 and no term of 'distill' has a weight above 0" in line
    assert build_recipe(changed(ce_weight=0)) and build_recipe(changed(ce_weight=0, distill=[{"type": "kd"}]))
    fitted = {"student__prompt": {"type": "none"}, "student__head": {"type": "ncm"}}
    [line] = problems(changed(ce_weight=0, distill=[], **fitted))
    assert "'ce_weight' is 0, but no loss trains a student whose head is fitted; leave it out" in line
    assert build_recipe(changed(ce_weight=1, distill=[], **fitted))


@pytest.mark.parametrize("value", ["1:30", "1:30.5"])
def test_minutes_are_no_number(value: str, file: Path) -> None:
    """YAML 1.1 would read them as 90 and 90.5; strings may look like that."""
    with pytest.raises(RecipeError, match=f"'train.num_train_epochs' is '{value}', but should be a valid number"):
        load(file, "--train.num_train_epochs", value)
    assert load(file, "--name", value).name == value


# ---- accepted recipes ----


def test_defaults() -> None:
    recipe = build_recipe({"name": "x", "data": {"path": "p"}, "student": {"backbone": "b"}})
    assert (recipe.teacher, recipe.distill, recipe.ce_weight, recipe.seed) == (None, [], 1.0, 0)
    assert (recipe.student.prompt, recipe.student.head) == ({"type": "none"}, {"type": "linear"})
    assert recipe.student.kd_prompt is None and not recipe.student.train_backbone
    assert recipe.baselines == ["nearest_class_mean"]
    assert recipe.folder == Path("runs/x")


def test_a_classifier_has_no_baselines_by_default() -> None:
    recipe = build_recipe(changed(student=PLAIN, teacher={**PLAIN, "train": None}, distill=[{"type": "kd"}]))
    assert recipe.baselines == [] and recipe.student.pretrained
    assert recipe.teacher is not None and recipe.teacher.train is None
    assert recipe.training_args("teacher") == {"data_seed": 0, "seed": 0}


def test_a_term_gives_the_student_the_parts_it_needs() -> None:
    assert build_recipe(MINIMAL).student.kd_prompt == {}
    assert build_recipe(changed(student__kd_prompt={"length": 4})).student.kd_prompt == {"length": 4}
    assert build_recipe(changed(distill=[{"type": "kd"}])).student.kd_prompt is None


def test_training_arguments_of_a_role_go_before_those_of_both() -> None:
    recipe = build_recipe(
        changed(seed=7, train={"learning_rate": 0.1, "num_train_epochs": 3}, teacher__train={"learning_rate": 0.2})
    )
    assert recipe.training_args("teacher")["learning_rate"] == 0.2
    assert recipe.training_args("student")["learning_rate"] == 0.1
    for role in ("teacher", "student"):
        arguments = recipe.training_args(role)
        assert (arguments["num_train_epochs"], arguments["seed"], arguments["data_seed"]) == (3, 7, 7)


def test_as_dict_builds_the_same_recipe_again() -> None:
    recipe = build_recipe(changed(output_dir="there", seed=3, data__classes_per_task=[2, 3]))
    known = yaml.safe_load(yaml.safe_dump(_plain(recipe.as_dict())))
    assert "output_dir" not in known
    again = build_recipe(known)
    assert again.as_dict() == recipe.as_dict()
    assert again.folder == Path("runs/x") and recipe.folder == Path("there")


def _plain(value: Any) -> Any:
    """Tuples as lists, as in a file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_values_become_what_the_field_is() -> None:
    """The checked value is the one used: a number in quotes, or 8.0 for an integer field."""
    recipe = build_recipe(
        changed(
            student__prompt={"type": "coda", "length": 6.0, "components": "4", "layers": [0, 1.0]},
            student__kd_prompt={"length": 4.0},
            distill=[{"type": "kdp", "weight": "0.25"}],
            train={"per_device_train_batch_size": 8.0, "learning_rate": "0.1"},
            student__train={"num_train_epochs": "3"},
        )
    )
    assert recipe.student.prompt == {"type": "coda", "length": 6, "components": 4, "layers": (0, 1)}
    assert type(recipe.student.prompt["length"]) is int and type(recipe.student.prompt["layers"][1]) is int
    assert recipe.student.kd_prompt is not None and type(recipe.student.kd_prompt["length"]) is int
    assert recipe.distill == [{"type": "kdp", "weight": 0.25}]
    assert type(recipe.train["per_device_train_batch_size"]) is int
    assert recipe.training_args("student")["learning_rate"] == 0.1
    assert recipe.training_args("student")["num_train_epochs"] == 3.0


def test_building_a_recipe_leaves_the_dict_alone() -> None:
    content = changed(train={"learning_rate": "0.1"})
    before = copy.deepcopy(content)
    build_recipe(content)
    assert content == before


# ---- command line ----


def test_overrides(file: Path) -> None:
    recipe = load(
        file,
        *("--teacher.prompt.components", "5"),
        "--distill.0.weight=0.25",
        *("--train.learning_rate", "1e-3"),
        *("--train.use_cpu", "true"),
        *("--data.classes_per_task", "[2, 3]"),
        *("--student.revision", "'1234'"),
        *("--output_dir", "a=b"),
    )
    assert recipe.teacher is not None
    assert recipe.teacher.prompt == {"type": "coda", "length": 8, "components": 5}
    assert recipe.distill == [{"type": "kdp", "weight": 0.25}]
    assert recipe.train == {"learning_rate": 0.001, "use_cpu": True}
    assert recipe.data.classes_per_task == [2, 3]
    assert recipe.student.revision == "1234"
    assert recipe.folder == Path("a=b")


def test_an_override_reaches_one_section_only(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    text = yaml.safe_dump({key: MINIMAL[key] for key in ("name", "data")})
    text += "teacher: {backbone: b, prompt: &p {type: coda, length: 8}}\nstudent: {backbone: s, prompt: *p}\n"
    file.write_text(text)
    recipe = load(file, "--student.prompt.length", "4")
    assert recipe.teacher is not None
    assert (recipe.teacher.prompt["length"], recipe.student.prompt["length"]) == (8, 4)


def test_null_takes_a_section_away(file: Path) -> None:
    recipe = load(file, "--teacher", "null", "--distill", "[]")
    assert recipe.teacher is None and recipe.distill == []


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-03"])
def test_numbers_as_people_write_them(file: Path, number: str) -> None:
    """YAML 1.1 reads 1e-3 as a string."""
    recipe = load(file, "--train.learning_rate", number, "--distill.0.weight", number, "--ce_weight", number)
    assert (recipe.train["learning_rate"], recipe.distill[0]["weight"], recipe.ce_weight) == (0.001, 0.001, 0.001)


def test_a_new_type_drops_the_fields_of_the_old_one(file: Path) -> None:
    recipe = load(file, "--teacher.prompt.type", "none", "--distill.0.type", "kd", "--distill.0.temperature", "3")
    assert recipe.teacher is not None and recipe.teacher.prompt == {"type": "none"}
    assert recipe.distill == [{"type": "kd", "temperature": 3}]
    same = load(file, "--teacher.prompt.type", "coda").teacher
    assert same is not None and same.prompt == {"type": "coda", "length": 8}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed"], "--seed has no value; write --seed VALUE"),
        (["--save_code", "--seed", "1"], "--save_code has no value .--seed is the next field.; write --save_code VAL"),
        (["--seed", "1", "loose"], "Unexpected argument 'loose'"),
        (["-seed", "1"], "Unexpected argument '-seed'.*Did you mean --seed?"),
        (
            ["--card", "{license: mit, license: gpl}"],
            "the field 'license' is given twice, in line 1; leave one of them",
        ),
        (["--seed", "[1"], "The value of --seed, '\\[1', is not valid YAML"),
        (["--distill.1.weight", "1"], "--distill.1.weight: 'distill' is a list of 1; count from 0"),
        (["--distill.kdp.weight", "1"], "'distill' is a list of 1; count from 0"),
        (["--name.first", "1"], "--name.first: 'name' holds 'x', which has no fields"),
        (["--student.prompt.lenght", "4"], "unknown field 'student.prompt.lenght'; did you mean 'length'"),
    ],
)
def test_bad_arguments(file: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load(file, *arguments)


def test_values_that_begin_with_dashes(file: Path) -> None:
    assert load(file, "--train.max_steps", "-1", "--name=--odd").name == "--odd"


# ---- files ----


def test_a_field_that_stands_twice_is_refused_with_its_lines(tmp_path: Path, file: Path) -> None:
    text = file.read_text()
    (twice := tmp_path / "twice.yaml").write_text(f"{text}\ncard: {{license: mit}}\nce_weight: 1\n'ce_weight': 0\n")
    count = twice.read_text().count("\n")
    with pytest.raises(
        RecipeError, match=f"twice.yaml.*'ce_weight' is given twice, in lines .* and {count}; leave one"
    ):
        load(twice)


def test_fields_that_are_merged_may_be_set_again(tmp_path: Path) -> None:
    card = "card: &card {license: mit, data_license: cc0}\nplugins: []\n"
    (merged := tmp_path / "merged.yaml").write_text(card + "extra: {<<: *card, license: gpl}\n")
    assert read_yaml(merged)["extra"] == {"license": "gpl", "data_license": "cc0"}


def test_base_is_overridden_section_by_section(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    own = folder / "own.yaml"
    own.write_text(
        "base: ../r.yaml\nname: own\nteacher: {prompt: {components: 4}}\nstudent: {prompt: {type: none}}\n"
        "distill: [{type: kd, temperature: 3}]\n"
    )
    recipe = load(own)
    assert recipe.name == "own" and recipe.teacher is not None
    assert recipe.teacher.backbone == "big"
    assert recipe.teacher.prompt == {"type": "coda", "length": 8, "components": 4}
    assert recipe.student.backbone == "small" and recipe.student.prompt == {"type": "none"}
    assert recipe.distill == [{"type": "kd", "temperature": 3}]
    second = tmp_path / "second.yaml"
    second.write_text("base: more/own.yaml\nname: second\n")
    assert load(second).as_dict() == {**recipe.as_dict(), "name": "second"}


def test_several_files_are_merged_from_left_to_right(tmp_path: Path, file: Path) -> None:
    pair, term, last = (tmp_path / f"{name}.yaml" for name in ("pair", "term", "last"))
    pair.write_text("base: size.yaml\nname: pair\nteacher: {backbone: huge}\n")
    (tmp_path / "size.yaml").write_text("name: size\ntrain: {num_train_epochs: 3}\n")
    term.write_text("name: term\ndistill: [{type: kd}]\nteacher: {prompt: {length: 4}}\n")
    last.write_text("train: {num_train_epochs: 5}\n")
    recipe = load(file, str(pair), str(term), str(last), "--train.learning_rate", "0.5")
    assert recipe.name == "x-pair-term"  # a file's name goes before its base's; a file without a name adds nothing
    assert recipe.folder == Path("runs/x-pair-term")
    assert recipe.teacher is not None and recipe.teacher.backbone == "huge"
    assert recipe.teacher.prompt == {"type": "coda", "length": 4}
    assert recipe.student.backbone == "small" and recipe.distill == [{"type": "kd"}]
    assert recipe.train == {"num_train_epochs": 5, "learning_rate": 0.5}
    assert load(term, str(pair), str(file)).name == "term-pair-x"
    assert load(file, str(pair), "--name", "own").name == "own"


def test_one_unusable_file_of_several_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot read the recipe .*nowhere.yaml: No such file"):
        load(file, str(tmp_path / "nowhere.yaml"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("student: {bacbone: x}\n")
    with pytest.raises(RecipeError, match="unknown field 'student.bacbone'; did you mean 'backbone'"):
        load(file, str(wrong))


# ---- protocol ----


def test_the_cdl_protocol_is_what_its_authors_do() -> None:
    recipe, default = build_recipe(changed(protocol="cdl")), build_recipe(MINIMAL)
    assert (recipe.normalise, recipe.data.class_order_seed) == (False, None)
    assert (default.protocol, default.normalise) == ("default", True)
    for role in ("teacher", "student"):
        arguments = CDLTrainingArguments("work", **recipe.training_args(role))
        assert arguments.epoch_cosine and arguments.dataloader_drop_last
        arguments = CDLTrainingArguments("work", **default.training_args(role))
        assert not arguments.epoch_cosine and not arguments.dataloader_drop_last
    assert build_recipe(recipe.as_dict()) == recipe


def test_a_recipes_own_choice_goes_before_the_protocols() -> None:
    recipe = build_recipe(
        changed(
            protocol="cdl",
            normalise=True,
            train={"epoch_cosine": False, "learning_rate": 0.1},
            teacher__train={"dataloader_drop_last": False},
        )
    )
    assert recipe.normalise
    assert recipe.training_args("student")["dataloader_drop_last"] is True
    assert recipe.training_args("teacher")["dataloader_drop_last"] is False
    assert recipe.training_args("student")["epoch_cosine"] is False
    assert build_recipe(changed(protocol="cdl")).train["epoch_cosine"] is True  # the preset itself is unchanged


@pytest.mark.parametrize("protocol", ["CDL", ["cdl"], None])
def test_an_unknown_protocol_is_refused(protocol: Any) -> None:
    assert f"'protocol' is {protocol!r}, but should be 'default' or 'cdl'" in problems(changed(protocol=protocol))


def test_merge_leaves_its_arguments_alone() -> None:
    base, override = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}}
    assert merge(base, override) == {"a": {"b": 1, "d": 3}, "c": 2}
    assert (base, override) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "Cannot read the recipe .*r.yaml: No such file"),
        ("name: [x\n", "r.yaml is not valid YAML"),
        ("- a\n- b\n", "must hold fields like 'name: ...', but holds list"),
        ("", "must hold fields like 'name: ...', but holds NoneType"),
        ("base: nowhere.yaml\n", "Cannot read the recipe .*nowhere.yaml: No such file"),
        ("base: r.yaml\n", "r.yaml is its own base"),
        ("base: 3\n", "base' is 3"),
        (b"\xff\xfe\x00", "is not a text file"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=said):
        load(file)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        load(tmp_path)


# ---- training arguments without a training loss ----


def fitted(**fields: Any) -> dict[str, Any]:
    student = {"backbone": "small", "prompt": {"type": "none"}, "head": {"type": "ridge"}}
    return {"name": "x", "data": {"path": "somewhere"}, "student": student, "baselines": [], **fields}


@pytest.mark.parametrize(
    ("recipe", "idle"),
    [
        (fitted(train={"learning_rate": 0.1, "dataloader_num_workers": 2}), ["train.learning_rate"]),
        (fitted(train={"learning_rate": 0.1}, baselines=["linear_head"]), []),
        (fitted(train={"learning_rate": 0.1}, teacher=MINIMAL["teacher"]), []),
        (fitted(train={"use_cpu": True, "per_device_eval_batch_size": 8}), []),
    ],
)
def test_shared_training_arguments_without_effect_are_named(recipe: dict[str, Any], idle: list[str]) -> None:
    assert idle_arguments(build_recipe(recipe)) == idle


def test_a_fitted_model_has_no_training_arguments_of_its_own() -> None:
    recipe = fitted()
    recipe["student"]["train"] = {"num_train_epochs": 3, "use_cpu": True}
    (problem,) = problems(recipe)
    assert "student.train.num_train_epochs" in problem and "no effect" in problem
    recipe["student"] |= {"prompt": {"type": "coda"}, "first_session": LINEAR}
    assert (build_recipe(recipe).student.train or {})["num_train_epochs"] == 3
