"""Invalid recipe files and command lines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bad_inputs.parts import Parts
from bad_inputs.runner import WAY, Act, Command, Row, command, rows

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def file(name: str, content: str | bytes | Callable[[Parts], Any], *says: str, way: str = WAY) -> Row:
    """recipe.yaml with this content: appended to a valid recipe if it begins with +; or a callable that creates it."""

    def make(parts: Parts) -> Command:
        recipe = Path("recipe.yaml")
        if callable(content):
            content(parts)
        elif isinstance(content, bytes):
            recipe.write_bytes(content)
        else:
            parts.write()
            recipe.write_text((recipe.read_text() if content.startswith("+") else "") + content.removeprefix("+"))
        return command("train", recipe)

    return Row(name, make, says or ("recipe.yaml",), way)


def _sparse(parts: Parts) -> None:
    with open("recipe.yaml", "wb") as stream:
        stream.truncate(2 * 2**30)


def _loop(parts: Parts) -> None:
    Path("recipe.yaml").write_text("base: other.yaml\n")
    Path("other.yaml").write_text("base: recipe.yaml\n")


FILES = [
    file("of wrong syntax", "name: [a, b\nseed: 3\n"),
    file("with tabs", "name: a\ndata:\n\tpath: b\n", way="tab|\\\\t|space|YAML"),
    file("with a colon in a value", "name: a: b\n", way="YAML"),
    file("with a field twice", "+seed: 1\nseed: 2\n", "seed", way="twice|duplicate|repeat|once|more than"),
    file("with a section twice", "+train: {use_cpu: true}\n", "train", way="twice|duplicate|repeat|once|more than"),
    file(
        "with a nested field twice", "+card: {license: mit, license: gpl}\n", "license", way="twice|dupl|repeat|once"
    ),
    file("with a field of a term twice", "+baselines: [{type: a, type: b}]\n", "type", way="twice|dupl|repeat|once"),
    file("with a field twice, once in quotes", "+card:\n  license: mit\n  'license': gpl\n", "license", "lines"),
    file("with a number as a field", "+3: x\n", "3"),
    file("with a null field", "+null: x\n", "None|null"),
    file("with on for a field", "+on: x\n", "True|on"),
    file("with a list as a field", "+? [a, b]\n: x\n", "recipe.yaml", way="YAML|key|field"),
    file("empty", ""),
    file("of comments alone", "# nothing\n"),
    file("a list", "- name: a\n"),
    file("a word", "quickstart\n"),
    file("of two documents", "name: a\n---\nname: b\n", way="YAML|one"),
    file("with a Python object", "+plugins: !!python/object/apply:os.system ['touch footprint']\n", way="YAML|tag"),
    file("an alias bomb", BOMB, way="YAML|alias|anchor|large|unknown field"),
    file("with an alias to itself", "+card: &c {license: *c}\n", way="YAML|alias|anchor|itself"),
    file("nested too deeply", f"name: {'[' * 5000}{']' * 5000}\n", way="YAML|deep|nest"),
    file("with a wide character", "name: \x07bell\n", way="YAML|character"),
    file("binary", bytes(range(256)) * 10, way="UTF-8"),
    file("in UTF-16", "name: ä\n".encode("utf-16"), way="UTF-8|YAML"),
    file("a PNG", lambda parts: shutil.copy(parts.photos / "train" / "ant" / "0.png", "recipe.yaml"), way="UTF-8"),
    file("a folder", lambda parts: os.mkdir("recipe.yaml"), way="directory|file"),
    file("missing", lambda parts: None, way="No such file"),
    file("a pipe", lambda parts: os.mkfifo("recipe.yaml"), way="file"),
    file("a device", lambda parts: os.symlink("/dev/zero", "recipe.yaml"), way="file"),
    file("a dangling link", lambda parts: os.symlink("gone", "recipe.yaml"), way="No such file"),
    file("of 2 GB", _sparse, way="large|big|bytes|MB|MiB|YAML"),
    file("its own base", "base: recipe.yaml\n", way="its own base"),
    file("with a base that has it as base", _loop, "recipe.yaml|other.yaml", way="its own base"),
    file("with a base that is missing", "base: gone.yaml\n", "gone.yaml", way="No such file"),
    file("with a list of bases", "base: [a.yaml, b.yaml]\n", "base"),
    file("with a folder as base", "base: .\n", "recipe", way="directory|file"),
]


TEST_SPLIT = "hf_cdl/compare/test_split.py"


def words(name: str, *arguments: Any, says: tuple[str, ...], way: str = WAY, script: str = "train") -> Row:
    """A command line; recipe.yaml in the current folder is valid, and `{done}` is a finished run."""

    def make(parts: Parts) -> Act:
        parts.put_recipe()
        return command(script, *(str(word).replace("{done}", str(parts.done)) for word in arguments))

    return Row(name, make, says, way)


TRAIN = [
    words("no value", "recipe.yaml", "--seed", says=("--seed",)),
    words("an empty value", "recipe.yaml", "--output_dir", "", says=("--output_dir",), way="write null"),
    words("an empty value after =", "recipe.yaml", "--seed=", says=("--seed",), way="write null"),
    words("an unknown field", "recipe.yaml", "--sead", 3, says=("sead",), way="did you mean 'seed'"),
    words("an unknown nested field", "recipe.yaml", "--train.lr", 3, says=("train.lr",), way="learning_rate|unknown"),
    words("a single dash", "recipe.yaml", "-seed", 3, says=("-seed",), way="--seed|--field"),
    words("a file behind a field", "--seed", 3, "recipe.yaml", says=("recipe.yaml",), way="--field"),
    words("two values", "recipe.yaml", "--seed", 3, 4, says=("'4'",), way="--field"),
    words("a flag without value", "recipe.yaml", "--save_code", "--seed", 1, says=("save_code",), way="VALUE|bool"),
    words(
        "a nested flag without value",
        "--data.flip",
        "--data.path",
        "data",
        says=("--data.flip",),
        way="VALUE",
        script="recipes/train.py",
    ),
    words("no recipe", "--seed", 3, says=("RECIPE.yaml",), way="--example quickstart"),
    words("an example that there is not", "--example", "flowers", says=("--example",), way="quickstart"),
    words("a value with a field twice", "recipe.yaml", "--card", "{a: 1, a: 2}", says=("card", "'a'"), way="twice"),
    words("a dash alone", "-", says=("'-'",), way="--field"),
    words("an empty word", "recipe.yaml", "", says=("recipe",), way="directory|folder|--field"),
    words("two dashes alone", "recipe.yaml", "--", "x", says=("--|''",), way="--field|unknown field"),
    words("a value of wrong syntax", "recipe.yaml", "--distill", "[{type: kd", says=("distill",), way="YAML"),
    words("a field of a field without any", "recipe.yaml", "--seed.value", 3, says=("seed",), way="no fields|integer"),
    words("a term that is not there", "recipe.yaml", "--distill.3.weight", 1, says=("distill",), way="from 0"),
    words("a field of a list", "recipe.yaml", "--distill.weight", 1, says=("distill",), way="from 0"),
    words("a term before the first", "recipe.yaml", "--distill.-1.weight", 1, says=("distill",), way="from 0"),
    words("a wrong type", "recipe.yaml", "--data.flip", "often", says=("data.flip",)),
    words("an alias bomb as value", "recipe.yaml", "--card", f"{{{BOMB}}}".replace("\n", ", "), says=("card",)),
    words("two recipes, one missing", "recipe.yaml", "gone.yaml", says=("gone.yaml",), way="No such file"),
    words("an output folder that is a file", "recipe.yaml", "--output_dir", "recipe.yaml", says=("recipe.yaml",)),
    words("an output folder with other files", "recipe.yaml", "--output_dir", "data", says=("data",), way="another"),
    words(
        "an output folder below a file",
        "recipe.yaml",
        "--output_dir",
        "recipe.yaml/a",
        says=("recipe.yaml",),
        way="folder",
    ),
    words(
        "an output folder nobody may write", "recipe.yaml", "--output_dir", "/proc/x", says=("/proc/x",), way="folder"
    ),
]

OTHERS = [
    *(
        words(f"{script} without words", says=(missing,), way="required|usage|RUN|FOLDER", script=script)
        for script, missing in {
            "add": "student",
            "card": "run",
            "push": "run",
            "verify": "RUN",
            "shrink": "backbone",
            "compare": "SPEC",
            "recipes/make_digits.py": "folder",
            "recipes/pretrain.py": "--data",
        }.items()
    ),
    *(
        words(f"{script} with an unknown option", *before, "--colour", "red", says=("colour",), script=script)
        for script, before in {
            "add": ("{done}", "photos"),
            "card": ("{done}",),
            "push": ("{done}",),
            "verify": ("{done}",),
            "shrink": ("student", "small"),
            "compare": ("recipe.yaml",),
            "recipes/make_digits.py": ("digits",),
        }.items()
    ),
    *(
        words(f"{script} of a folder that is no run", "data", says=("data",), way="no run|run.json", script=script)
        for script in ("card", "push", "verify")
    ),
    *(
        words(
            f"{script} of a folder that is missing",
            "gone",
            says=("gone",),
            way="no run|no such|run.json",
            script=script,
        )
        for script in ("card", "push", "verify")
    ),
    words("hf-cdl add without data", "{done}", says=("data",), way="required", script="add"),
    words("hf-cdl add with options first", "--revision", "x", "a", "b", says=("first",), script="add"),
    words("hf-cdl add with an empty folder", "a", "b", "--output_dir", "", says=("output_dir", "empty"), script="add"),
    *(
        words(f"hf-cdl {verb} of nothing", "", says=("RUN", "empty"), script=verb)
        for verb in ("card", "push", "verify")
    ),
    *(
        words(f"hf-cdl card for {name!r}", "{done}", "--repo_id", name, says=("--repo_id",), script="card")
        for name in ("a b", "", "a/b/c", "a" * 95)
    ),
    words("hf-cdl card with two runs", "{done}", "{done}", says=("done",), script="card"),
    words(
        "hf-cdl push with perhaps",
        "{done}",
        "--push_teacher",
        "perhaps",
        says=("push_teacher",),
        way="true|choose|invalid",
        script="push",
    ),
    words("hf-cdl push with a wrong name", "{done}", "--hub_model_id", "a/b/c", says=("hub_model_id",), script="push"),
    words("hf-cdl shrink into a full folder", "student", "data", says=("data", "not empty"), script="shrink"),
    words(
        "hf-cdl shrink to no layers",
        "student",
        "small",
        "--layers",
        0,
        says=("--layers",),
        way="has 2",
        script="shrink",
    ),
    words(
        "hf-cdl shrink to more layers",
        "student",
        "small",
        "--layers",
        3,
        says=("--layers",),
        way="has 2",
        script="shrink",
    ),
    words(
        "hf-cdl shrink to half a layer",
        "student",
        "small",
        "--layers",
        1.5,
        says=("--layers",),
        way="int",
        script="shrink",
    ),
    words("hf-cdl shrink to no size", "student", "small", "--size", 0, says=("--size",), script="shrink"),
    words("hf-cdl shrink to a negative size", "student", "small", "--size", -16, says=("--size",), script="shrink"),
    words(
        "hf-cdl shrink to no whole patches",
        "student",
        "small",
        "--size",
        20,
        says=("--size",),
        way="multiple",
        script="shrink",
    ),
    words("hf-cdl shrink of nothing", "./gone", "small", says=("gone",), script="shrink"),
    words("hf-cdl shrink of a folder without model", "data", "small", says=("data",), script="shrink"),
    words("hf-cdl shrink of a table", "data/train.parquet", "small", says=("data/train.parquet",), script="shrink"),
    words("make_digits.py into a full folder", "data", says=("data", "not empty"), script="recipes/make_digits.py"),
    words("make_digits.py into a file", "recipe.yaml", says=("recipe.yaml",), script="recipes/make_digits.py"),
    words("hf-cdl compare of a recipe", "recipe.yaml", says=("recipe.yaml",), way="missing|allowed", script="compare"),
    words("hf-cdl compare of nothing", "gone.yaml", says=("gone.yaml",), way="No such file", script="compare"),
    words("hf-cdl compare with no jobs", "recipe.yaml", "--jobs", 0, says=("--jobs",), script="compare"),
    words("test_split alone", says=("SPEC",), script=TEST_SPLIT),
    words(
        "test_split of nothing",
        "gone.yaml",
        "a",
        "b",
        says=("gone.yaml",),
        script=TEST_SPLIT,
    ),
    words(
        "test_split of a recipe",
        "recipe.yaml",
        "a",
        "b",
        says=("recipe.yaml",),
        script=TEST_SPLIT,
    ),
    words(
        "pretrain.py of nothing",
        "--data",
        "gone",
        "--stream",
        "data",
        "--output",
        "new",
        says=("gone",),
        script="recipes/pretrain.py",
    ),
    words("the plan of a recipe with a typo", "recipe.yaml", "--plan", "--sead", 3, says=("sead",)),
    words("the demo of nothing", "gone", says=("gone",), way="offline|folder", script="demo"),
    words("the demo of a folder of data", "data", says=("data",), script="demo"),
    words("the demo without words", says=("where",), way="required", script="demo"),
]


def in_place() -> None:
    Path("runs/comparisons").mkdir(parents=True)
    Path("runs/comparisons/spec").write_text("mine")


def spec(
    name: str, changes: dict[str, Any], *says: str, way: str = WAY, before: Callable[[], Any] = lambda: None
) -> Row:
    """A comparison with these fields, run after `before()`."""

    def make(parts: Parts) -> Act:
        parts.put_recipe()
        variants = {
            "alone": {"rows": {"student": "alone"}},
            "other": {"rows": {"student": "other"}, "set": {"ce_weight": 0.2}},
        }
        content = {
            "recipe": str(Path("recipe.yaml").absolute()),
            "seeds": [0, 1],
            "split": "test",
            "variants": variants,
        }
        Path("spec.yaml").write_text(yaml.safe_dump({**content, **changes}))
        before()
        return command("compare", "spec.yaml", "--jobs", 1)

    return Row(name, make, says, way)


SPECS = [
    spec("without seeds", {"seeds": []}, "seeds", way="empty"),
    spec("with a seed twice", {"seeds": [1, 1]}, "seeds", way="twice"),
    spec("with a word as seed", {"seeds": "all"}, "seeds"),
    spec("without variants", {"variants": {}}, "variants"),
    spec("of a missing recipe", {"recipe": "gone.yaml"}, "gone.yaml", way="No such file"),
    spec("of an unknown metric", {"metric": "acuracy"}, "acuracy", way="allowed"),
    spec("with a contrast of nothing", {"contrasts": [["alone", "othr"]]}, "othr", way="did you mean"),
    spec("with a role of nothing", {"variants": {"a": {"rows": {"pupil": "a"}}}}, "pupil", way="student"),
    spec("with a variant that leaves the folder", {"variants": {"../a": {"rows": {"student": "a"}}}}, "../a"),
    spec("with a wrong field", {"variants": {"a": {"rows": {"student": "a"}, "set": {"sead": 1}}}}, "sead"),
    spec("with yes for a seed", {"seeds": [True]}, "seeds"),
    spec("with a number as a variant", {"variants": {7: {"rows": {"student": "a"}}}}, "7", way="quotes"),
    spec("with a variant called as a table", {"variants": {"table.csv": {"rows": {"student": "a"}}}}, "table.csv"),
    spec("with a variant called as its FLOPs", {"variants": {"flops.json": {"rows": {"student": "a"}}}}, "flops.json"),
    spec("in place of a file", {}, "runs/comparisons/spec", before=in_place),
    spec("below a file", {}, "runs/comparisons/spec", before=lambda: Path("runs").write_text("mine")),
    spec("with an unknown field", {"variant": {}}, "variant", way="did you mean"),
]

ROWS = rows("recipe file", FILES) + rows("command line", TRAIN, OTHERS) + rows("comparison", SPECS)
