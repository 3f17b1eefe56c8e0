"""The docs are correct: recipes parse, options and defaults match the code, links have targets."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_imports import ALLOWED

from hf_cdl import CDLTrainingArguments, StreamConfig
from hf_cdl.backbones.lora import LoraOptions
from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.heads.base import FittedConfig, HeadConfig
from hf_cdl.prompts import PROMPTS, KDPromptConfig, MappingConfig
from hf_cdl.recipe import CardRecipe, ModelRecipe, Recipe, build_recipe, load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS = ("hf_cdl", "recipes", "tests", "docs", "benchmarks", "model_cards")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCS += [file for folder in FOLDERS[1:] for file in (ROOT / folder).rglob("*.md")]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]


def by_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_recipes_of_the_readme_can_be_built():
    recipes = [yaml.safe_load(block) for block in code_blocks(README, "yaml")]
    recipes = [content for content in recipes if "plugins" not in content]  # test_plugins.py trains that one
    assert recipes
    for content in recipes:
        assert build_recipe(content).name == content["name"]


def test_the_command_lines_of_the_readme_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers.yaml").write_text(code_blocks(README, "yaml")[0])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    lines = [line for block in code_blocks(README, "bash") for line in block.replace("\\\n", "").splitlines()]
    commands = [line for line in lines if line.startswith("accelerate launch recipes/train.py")]
    default = ROOT / "recipes" / "quickstart.yaml"
    pushed, *recipes = [load_recipe(shlex.split(line)[3:], default) for line in commands]
    assert pushed.repositories == {"student": "quickstart", "teacher": "quickstart-teacher"}
    names = [*["flowers"] * 3, "quickstart_ridge", "distil_icons", "quickstart_ridge"]
    assert [recipe.name for recipe in recipes] == names
    assert recipes[0].folder == Path("runs/flowers")
    assert recipes[1].student.prompt["length"] == 4
    assert recipes[2].teacher is None and recipes[3].student.head["type"] == "ridge"
    assert recipes[5].student.backbone == str(recipes[4].folder / "student")


def test_the_python_of_the_docs_compiles():
    blocks = [(file, block) for file in DOCS for block in code_blocks(file.read_text(), "python")]
    assert len(blocks) >= 2
    for file, block in blocks:
        compile(block, by_path(file), "exec")


OPTIONS: dict[str, Any] = {
    "`teacher`, `student`": ModelRecipe,
    "`lora`": LoraOptions,
    "`kd_prompt`": KDPromptConfig,
    "`mapping`": MappingConfig,
    "`train`": CDLTrainingArguments,
    "`head: {type: linear}`, `{type: weight_normalised}`": HeadConfig,
    "`head: {type: ncm}`": FittedConfig,
    "`head: {type: cosine}`": HEADS["cosine"].config_class,
    "`head: {type: ridge}`": HEADS["ridge"].config_class,
    "`card`": CardRecipe,
    **{f"`prompt: {{type: {name}}}`": pool.config_class for name, pool in PROMPTS.items()},
    **{f"`distill: {{type: {name}}}`": term.config_class for name, term in TERMS.items()},
}


def default_of(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def as_yaml(text: str, like: Any) -> Any:
    value = yaml.safe_load(text)
    return tuple(value) if isinstance(like, tuple) else value


@pytest.mark.parametrize("section", OPTIONS)
def test_the_options_of_the_readme_are_those_of_the_code(section: str):
    """Every option with its default; of the training arguments those that CDLTrainingArguments changes."""
    [text] = [row[1] for row in table_rows(README) if row[0] == section]
    written = dict(re.findall(r"`(\w+)` \(([^)]*)\)", text))
    fields = {field.name: field for field in dataclasses.fields(OPTIONS[section])}
    for name, value in written.items():
        default = default_of(fields[name])
        assert as_yaml(value, default) == default, f"{name} is {default!r}, README says {value}"
    required = {name for name, field in fields.items() if default_of(field) is dataclasses.MISSING}
    assert all(f"`{name}`" in text for name in required)
    if OPTIONS[section] is not CDLTrainingArguments:
        assert written.keys() | required == fields.keys()


def test_the_fields_of_a_recipe_are_in_the_readme():
    [sentence] = re.findall(r"A recipe has the fields (.*?)In brackets", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == {field.name for field in dataclasses.fields(Recipe)}


def test_the_fields_of_data_are_documented_with_their_defaults():
    rows = table_rows((ROOT / "recipes" / "README.md").read_text())
    fields = {field.name: default_of(field) for field in dataclasses.fields(StreamConfig)}
    written = {row[0].strip("`"): row[1] for row in rows if row[0].strip("`") in fields}
    assert written.pop("path") == "–" and fields.pop("path") is None
    assert {name: as_yaml(value, fields[name]) for name, value in written.items()} == fields


def test_the_import_table_for_people_is_the_one_for_machines():
    rows = table_rows((ROOT / "CONTRIBUTING.md").read_text())
    written = {part: set(re.findall(r"`([\w.]+)`", row[1])) for row in rows for part in re.findall(r"`(\w+)`", row[0])}
    assert {part: written.get(part) for part in ALLOWED} == ALLOWED


def test_every_method_has_its_row_in_papers_and_every_reference_its_method():
    rows = table_rows((ROOT / "docs" / "papers.md").read_text())
    recipes = " ".join(row[3] + row[4] for row in rows)
    for name in [*PROMPTS, *TERMS, *HEADS.keys() - {"linear"}]:
        assert f"{{type: {name}}}" in recipes
    references = {file.stem for file in (ROOT / "tests" / "references").glob("*.json")}
    named: set[str] = set()
    for pattern in {pattern for row in rows for pattern in re.findall(r"`([\w*]+)`", row[-1])}:
        found = {name for name in references if re.fullmatch(pattern.replace("*", ".*"), name)}
        assert found, f"docs/papers.md names {pattern}, but there is no such file in tests/references"
        named |= found
    assert references == named


@pytest.mark.parametrize("file", DOCS, ids=by_path)
def test_links_lead_somewhere(file: Path):
    text = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = file if not path else file.parent / path
        assert target.exists(), f"{by_path(file)} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_file_names_the_machine_it_was_written_on_or_a_package_index():
    # The brackets keep these patterns from finding themselves.
    forbidden = r"(?<!\w)/wor[k]/|/tmp/[w]/|/roo[t]/|/hom[e]/|\.\./share[d]\b|pypi\.or[g]|pythonhoste[d]|npmj[s]"
    forbidden += r"|download\.pytorc[h]|index-ur[l]|find-link[s]"
    kinds = {".py", ".md", ".yaml", ".json", ".toml", ".txt", ".tsv", ".cfg"}
    files = [path for path in ROOT.iterdir() if path.is_file()] + [ROOT / ".ci" / "run"]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    read = [path for path in files if path.suffix in kinds or path.name in ("Makefile", "run", ".gitignore")]
    assert len(read) > 50
    found = [(by_path(path), re.findall(forbidden, path.read_text(encoding="utf-8"))) for path in read]
    assert [pair for pair in found if pair[1]] == []


def test_the_claims_on_security_name_tests_that_are_there():
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, test in named:
        source = "".join(path.read_text() for path in (ROOT / "tests").rglob(file))
        assert f"def {test or 'test'}" in source, f"docs/security.md names {file}::{test}, which is not there"
