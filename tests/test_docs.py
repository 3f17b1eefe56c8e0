"""The docs are correct: recipes can be built, tables match the code, links have targets. Guides: test_guides.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from test_imports import ALLOWED

from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS = ("hf_cdl", "recipes", "tests", "docs", "benchmarks", "model_cards")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCS += [file for folder in FOLDERS[1:] for file in (ROOT / folder).rglob("*.md")]
GUIDES = sorted([*(ROOT / "docs" / "guides").glob("*.md"), *(ROOT / "docs" / "start").glob("*.md")])
MADE = {f"docs/reference/{name}.md" for name in ("options", "commands")} | {
    "docs/contributing.md",
    "docs/changelog.md",
    "docs/guides/student_for_life.md",
}
"""Pages that the build makes."""


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]


def by_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130 and len(README.split()) <= 1_000


@pytest.mark.parametrize("page", GUIDES, ids=by_path)
def test_a_guide_is_short(page: Path):
    assert len(page.read_text().split()) <= 900


def test_the_python_of_the_docs_compiles():
    blocks = [(file, block) for file in DOCS for block in code_blocks(file.read_text(), "python")]
    assert len(blocks) >= 2
    for file, block in blocks:
        compile(block, by_path(file), "exec")


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "papers").glob("*.md")), ids=by_path)
def test_the_recipe_on_a_paper_s_page_can_be_built(page: Path, tmp_path: Path):
    """It is a part that is merged into the quickstart."""
    for block in code_blocks(page.read_text(), "yaml"):
        (tmp_path / "part.yaml").write_text(block)
        recipe = load_recipe([str(ROOT / "recipes" / "quickstart.yaml"), str(tmp_path / "part.yaml")], "")
        written = yaml.safe_load(block)
        assert [term["type"] for term in written.get("distill", [])] == [
            term["type"] for term in recipe.distill if "distill" in written
        ]


def test_every_row_of_papers_is_on_a_page():
    rows = [row[0] for row in table_rows((ROOT / "docs" / "papers.md").read_text())[2:]]
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "papers").glob("*.md"))
    assert sorted(re.findall(r"^<!-- row: (.*) -->$", pages, re.MULTILINE)) == sorted(rows)


def test_all_pages_are_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("nav:")[-1]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/]+\.md", nav)) == pages | {page.removeprefix("docs/") for page in MADE}


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
        if target.resolve().relative_to(ROOT).as_posix() in MADE:
            continue  # mkdocs build --strict follows these
        assert target.exists(), f"{by_path(file)} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_file_names_the_machine_it_was_written_on_or_a_package_index():
    # The brackets keep these patterns from finding themselves.
    forbidden = r"(?<!\w)/wor[k]/|/tmp/[w]/|/roo[t]/|/hom[e]/|\.\./share[d]\b|pypi\.or[g]|pythonhoste[d]|npmj[s]"
    forbidden += r"|download\.pytorc[h]|index-ur[l]|find-link[s]"
    kinds = {".py", ".md", ".yaml", ".json", ".toml", ".txt", ".tsv", ".cfg", ".ipynb"}
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
