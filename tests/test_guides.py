"""The code of README and guides: the slow tier runs each page's blocks in their order; all command lines are parsed.

A block is run unless a comment before it, `<!-- not run: WHY -->`, says why not.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import make_backbone, picture
from test_docs import GUIDES, ROOT, by_path

from hf_cdl.commands.parsers import VERBS, read
from hf_cdl.recipe import build_recipe, load_recipe
from hf_cdl.recipe.files import fields_given

PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *GUIDES]
_BLOCK = re.compile(
    r"(<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>bash|python|yaml)\n(?P<code>.*?)^```$", re.S | re.M
)
_MADE_ELSEWHERE = {
    "README.md": "quickstart_ridge",
    "docs/start/quickstart.md": "quickstart_ridge",
}
"""Pages that use runs/quickstart, which a block that is not run makes: a smaller recipe for it."""


def blocks(page: Path, *languages: str) -> list[tuple[str, str, str | None]]:
    """(language, code, why it is not run) of the blocks of a page."""
    found = _BLOCK.finditer(page.read_text())
    return [(one["language"], one["code"], one["why"]) for one in found if one["language"] in languages]


def command_lines(code: str) -> list[list[str]]:
    """The commands of a block, word by word; of a loop the body, with an example in place of each variable."""
    code = re.sub(r"\$\w+/?(?=\W)", "kdp", re.sub(r"\$seed", "0", code.replace("\\\n", " ")))
    lines = [line.strip() for line in code.splitlines()]
    plain = [line for line in lines if line and not line.startswith(("for ", "done"))]
    return [shlex.split(part, comments=True) for line in plain for part in line.split(" && ")]


def place(folder: Path) -> Path:
    """A folder in which the guides can be walked: class folders, small backbones, the repository."""
    for name in ("recipes", "Makefile", "hf_cdl", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for name, depth in (("dinov2-small", 2), ("dinov2-base", 3)):
        make_backbone(folder / "facebook" / name, depth=depth)
    classes = ("tulip", "daisy", "rose", "dog rose", "iris", "lily")
    wanted = {f"images/train/{name}": (kind, range(8)) for kind, name in enumerate(classes)}
    wanted |= {f"images/test/{name}": (kind, range(50, 53)) for kind, name in enumerate(classes)}
    wanted |= {"photos/aster": (20, range(4)), "photos/rose": (2, range(10, 14)), "more/aster": (20, range(4, 8))}
    for name, (kind, numbers) in wanted.items():
        (folder / name).mkdir(parents=True)
        for number in numbers:
            picture(kind, number).save(folder / name / f"{number}.png")
    (folder / "wrong.csv").write_text("image,label,was\nimages/train/rose/0.png,dog rose,rose\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not why for *_, why in blocks(page, "bash", "python"))], ids=by_path
)
def test_a_page_can_be_walked(page: Path, tmp_path: Path):
    place(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    here = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*words: str) -> None:
        done = subprocess.run(words, cwd=tmp_path, env=here, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, f"{words[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    if recipe := _MADE_ELSEWHERE.get(by_path(page)):
        run("hf-cdl", "train", f"recipes/{recipe}.yaml", "--output_dir", "runs/quickstart")
    for language, code, why in blocks(page, "bash", "python"):
        if why is None:
            run(*(("bash", "-euo", "pipefail", "-c") if language == "bash" else ("python", "-c")), code)


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_the_command_lines_of_a_page_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for _, code, _ in blocks(ROOT / "docs" / "guides" / "recipes.md", "yaml"):
        (tmp_path / "flowers.yaml").write_text(code)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for _, code, _ in blocks(page, "bash"):
        for program, *words in command_lines(code):
            if program == "make":
                assert {*words} <= {*targets}
            elif program == "hf-cdl":
                accepted(words)
            elif program == "accelerate":
                accepted(["train", *words[words.index("recipes/train.py") + 1 :]])
            elif program == "python":
                assert not words[0].startswith(("recipes/", "benchmarks/")) or (ROOT / words[0]).exists()
            else:
                assert program in ("pip", "python3", "uv", "source", "mkdir", "acc"), f"what is {program}?"


def accepted(words: list[str]) -> None:
    """Raise an error unless hf-cdl takes a verb and its arguments."""
    verb, *rest = words
    assert verb in VERBS
    files = [word for word in rest if word.endswith(".yaml")]
    if verb not in ("train", "plan") or "--example" in rest:
        read(verb, rest)
    elif files or not rest or rest[0].startswith("--"):
        stored = files and files[0].startswith("runs/")
        if not stored:
            load_recipe([word for word in rest if word != "--plan"], ROOT / "recipes" / "quickstart.yaml")
    else:
        fields_given(rest[1:])


def test_the_recipes_of_the_guides_can_be_built():
    recipes = [yaml.safe_load(code) for page in PAGES for _, code, _ in blocks(page, "yaml")]
    recipes = [recipe for recipe in recipes if not {"plugins", "variants"} & {*recipe}]  # tests of their own
    assert recipes
    for recipe in recipes:
        assert build_recipe(recipe).name == recipe["name"]
