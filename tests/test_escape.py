"""Names of classes, runs and folders are only text everywhere: cards, consoles, figures, commits, the demo."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from helpers import ROOT, make_backbone, picture, png, run_script, write_recipe
from huggingface_hub import ModelCard
from markup import state_html
from states import Results

from hf_cdl.commands.parsers import VERBS
from hf_cdl.commands.train import main as train_main
from hf_cdl.escape import code, markdown, visible, visible_lines
from hf_cdl.hub.card import card_files, model_card, shared
from hf_cdl.hub.content import commit_message, results_after
from hf_cdl.places import by_name, is_private, shareable
from hf_cdl.runs.pictures import save_plots
from hf_cdl.runs.report import difference_lines, table

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a\n---\nlicense: evil\n\n# Heading",
    "`rm -rf ~`",
    "a | b",
    "\x1b[2J\x1b]0;owned\x07",
    "abc\u202edlog",
    "[click](https://evil.example)",
    "![](https://evil.example/pixel.png)",
    "https://evil.example",
    "www.evil.example",
    "```\n</details>\n",
    "&lt;b&gt;",
    "$$x$$ ~~y~~ __z__ **w**",
    "me@evil.example @me",
    "\r\x00\x9b31m\u2028\ufeff\ud800",
]


@pytest.fixture
def results() -> dict[str, Any]:
    """The quickstart's results, with malicious names of its classes, run and folders."""
    found = json.loads((ROOT / "model_cards" / "quickstart" / "results.json").read_text())
    found["class_names"] = [[f"{name} {task}" for name in NASTY] for task in range(5)]
    found["name"] = "<b>run</b>\n\x1b[31m"
    for entry in found["roles"].values():
        entry["label"] = "<i>label</i>\n| `x`"
    recipe = found["recipe"]
    recipe["data"] |= {"path": "/srv/somebody/projects/<b>`photos`</b>", "known_classes": [[*NASTY], ["/m/01abc"]]}
    recipe["student"]["backbone"] = "/srv/somebody/models/small"
    recipe["teacher"]["backbone"] = "~/models/../large"
    recipe["card"] |= {"license": "mit\nx: y", "data_card": "https://x.example/(a)[b]"}
    recipe["plugins"] = ["/srv/somebody/secret/plugin.py"]
    return found


def acting(text: str) -> list[str]:
    return re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ufeff\ud800-\udfff]", text)


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_text(name: str) -> None:
    assert "\n" not in visible(name) and not acting(visible(name))
    in_markdown = markdown(name)
    assert not acting(in_markdown) and "\n" not in in_markdown and "<" not in in_markdown
    assert not re.search(r"(?<!\\)[`*_\[\]|$@]", in_markdown)
    assert not re.search(r"https?://|www\.", in_markdown)
    fence = re.match("`+", code(name))
    assert fence and max(map(len, re.findall("`+", code(name)[len(fence[0]) : -len(fence[0])])), default=0) < len(
        fence[0]
    )


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("qr-code", "Straße 7", "日本語", "نان", "👩‍👩‍👧", "tench, Tinca tinca", "a (b)", "100 %", "C#"):
        assert visible(name) == markdown(name) == name and code(name) == f"`{name}`"
    assert visible_lines("a\nb\x1b") == "a\nb\\x1b" and markdown("african_elephant") == r"african\_elephant"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_card_with_such_names(results: dict[str, Any], role: str) -> None:
    text = model_card(results, role)
    assert not acting(text) and "/srv/somebody" not in text and "~/models" not in text
    card: Any = ModelCard(text)
    assert card.data.license == r"mit\nx: y" and card.data.to_dict()["pipeline_tag"] == "image-classification"
    block = re.search(r"\n(`{3,})yaml\n(.*?)\n\1\n", card.text, re.DOTALL)
    assert block is not None
    recipe = yaml.safe_load(block[2])
    assert recipe["data"]["known_classes"] == [[*NASTY[:-1], NASTY[-1]], ["/m/01abc"]]
    assert recipe["plugins"] == ["./plugin.py"] and recipe["student"]["backbone"] == "./small"
    outside = card.text.replace(block[0], "")
    assert "<script" not in outside and "<img" not in outside and "](https://evil" not in outside
    rows = [line for line in outside.splitlines() if re.match(r"\| \d \|", line)]
    assert len(rows) == 5 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert "`small` (a folder of the author's)" in text and "`large` (a folder of the author's)" in text
    assert "data card: `https://x.example/(a)[b]`" in text, "no address for a link"


def test_consoles_commits_and_pictures_with_such_names(results: dict[str, Any], tmp_path: Path) -> None:
    assert not acting(text := table(results)) and max(map(len, text.splitlines())) <= 119
    lines = difference_lines([(1, NASTY, 3, 50.0, 60.0)])
    assert len(lines) == 3 and not acting("".join(lines))
    title, message = commit_message(results, "student", 2)
    assert not acting(title + message) and "\n" not in title and len(message.splitlines()) == 3
    save_plots(results, tmp_path)
    assert card_files(results, "student")["accuracy_matrix.png"].startswith(b"\x89PNG")


# ---- what commands print ----

BAD = "x\x1b[2J\u202e\r`<b>\x9b31m"
"""Of a folder's name."""


def put_data(folder: Path, names: list[str], train: int = 3, test: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    for split, count, first in (("train", train, 0), ("test", test, 100)):
        labels = [label for label in range(len(names)) for _ in range(count)]
        cells = [{"bytes": png(picture(label, first + i)), "path": None} for i, label in enumerate(labels)]
        table = Dataset.from_dict({"image": cells, "label": labels}, features=features)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def said_of(capfd: pytest.CaptureFixture[str], names: list[str]) -> str:
    """The printed text, after checking that no name in it has control characters or makes a line of its own."""
    found = capfd.readouterr()
    said = found.out + found.err
    lines = {line for name in names for line in name.splitlines()[1:] if len(line) > 2}
    assert not [c for c in acting(said) if c != "\r"], "beside the carriage returns of progress bars"
    assert "\r" not in found.out and not [line for line in said.splitlines() if line.strip() in lines], said
    return said


def test_a_run_with_such_names_prints_them_as_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From the first line to the table, and in the messages when the data changed or cannot be learnt."""
    names = [name for name in NASTY if "\ud800" not in name] + ["\r\x00\x9b31m\u2028\ufeff"]  # a file has UTF-8
    backbone = str(make_backbone(tmp_path / "backbone"))
    recipe = {
        "name": "a run\n\x1b[31m<b>`",
        "data": {"path": str(put_data(tmp_path / "data", names)), "classes_per_task": 8, "flip": 0.0},
        "student": {"backbone": backbone, "head": {"type": "ncm"}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    file, run = str(write_recipe(tmp_path / "r.yaml", recipe)), str(tmp_path / "run")
    capfd.readouterr()
    assert train_main([file, "--output_dir", run]) == 0
    said = said_of(capfd, names)
    assert r"a run\n\x1b[31m<b>`" in said and "task 2/2" in said and "Try the student on an image:" in said
    assert train_main([file, "--output_dir", run, "--plan"]) == 0
    said_of(capfd, names)
    put_data(tmp_path / "data", [*names, "new\x1b[2J\nline two of it"])
    assert train_main([file, "--output_dir", run]) == 2
    said = said_of(capfd, [*names, "new\nline two of it"])
    assert "The data changed since" in said and r"new\x1b[2J\nline two of it" in said
    put_data(tmp_path / "data", [*names[:8], "alone\x1b[2J\nline two of it"])
    trained = str(write_recipe(tmp_path / "trained.yaml", {**recipe, "student": {"backbone": backbone}}))
    assert train_main([trained, "--output_dir", str(tmp_path / "other")]) == 2
    said = said_of(capfd, ["alone\nline two of it"])
    assert "which has one class" in said and r"alone\x1b[2J\nline two of it" in said
    put_data(tmp_path / "data", names, test=0)
    assert train_main([file, "--output_dir", str(tmp_path / "other")]) == 2
    said_of(capfd, names)


COMMANDS: dict[str, list[str]] = {
    "add": ["{bad}", "{bad}"],
    "correct": ["{bad}", "{bad}"],
    "merge": ["{bad}", "{bad}", "{bad}", "--as", "x"],
    "remove": ["{bad}", "{bad}"],
    "rename": ["{bad}", "{bad}", "x"],
    "undo": ["{bad}"],
    "card": ["{bad}"],
    "compare": ["{bad}"],
    "demo": ["{bad}"],
    "evaluate": ["{bad}", "{bad}"],
    "export": ["{bad}"],
    "predict": ["{bad}", "{bad}"],
    "plan": ["{bad}/r.yaml"],
    "push": ["{bad}"],
    "shrink": ["{backbone}", "{bad}"],
    "train": ["{bad}/r.yaml"],
    "verify": ["{bad}"],
    "hf_cdl/compare/test_split.py": ["{bad}", "variant", "unit"],
    "recipes/make_digits.py": ["{bad}"],
    "recipes/make_foreign.py": ["{bad}"],
    "recipes/pretrain.py": ["--data", "{bad}", "--stream", "{bad}", "--output", "out"],
    "recipes/train.py": ["{bad}/r.yaml"],
}


def test_every_command_is_here() -> None:
    """But for parts of others, and what is run once to make this repository's data."""
    scripts = {by.relative_to(ROOT).as_posix() for by in (ROOT / "recipes").rglob("*.py")}
    others = {f"recipes/{by}/make_data.py" for by in ("quickstart", "emoji")}
    others |= {"recipes/offline_kd/models.py", "recipes/own_methods.py", "recipes/notebooks/execute.py"}
    assert {*VERBS, *scripts} - others == COMMANDS.keys() - {"hf_cdl/compare/test_split.py"}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_names_such_a_folder_as_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A non-empty folder that is neither a run nor a spec."""
    monkeypatch.chdir(tmp_path)
    Path(BAD).mkdir()
    Path(BAD, "r.yaml").write_text(f'"{BAD.encode("unicode_escape").decode()}": 1')
    backbone = make_backbone(tmp_path / "backbone") if name == "shrink" else None
    words = [word.format(bad=BAD, backbone=backbone) for word in COMMANDS[name]]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capfd.readouterr()
    ended = run_script(name if name in VERBS else ROOT / name, words, monkeypatch)
    found = capfd.readouterr()
    assert ended == 2 and "error: " in found.err and "Traceback" not in found.err
    assert not acting(found.out) and not acting(found.err[found.err.index("error: ") :]), found.err
    assert r"x\x1b[2J" in found.err


def test_the_demo_with_such_names() -> None:
    page = state_html(Results("run", [NASTY], [[50.0]]))
    assert "<script" not in page and "<img" not in page and not acting(page)


def test_what_is_pushed_names_no_folder_of_this_machine(results: dict[str, Any]) -> None:
    after = results_after(results, 2)
    text = json.dumps(after)
    assert "somebody" not in text and after["class_names"] == results["class_names"]
    assert after["recipe"]["student"]["backbone"] == "./small" and after["recipe"]["data"]["known_classes"][1] == [
        "/m/01abc"
    ]
    assert shared(after) == after, "twice is once"
    assert results["recipe"]["student"]["backbone"] == "/srv/somebody/models/small", "the run's own stay"


def test_paths_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/srv/me/x", "~/x", "../x", "a/../../x", "C:\\Users\\me\\x", "file:///srv/me/x", "/srv/me/x/"):
        assert is_private(path) and by_name(path) == "x"
    for path in ("org/model", "recipes/quickstart/student", "./x", "task: a", "1e-3", "a..b", "cifar100"):
        assert not is_private(path)
    monkeypatch.chdir(tmp_path)
    Path("org", "model").mkdir(parents=True)
    recipe = {
        "data": {"path": "org/model", "unlabelled": "org/model", "foreign": "org/model"},
        "student": {"backbone": "org/model"},
        "teacher": {"backbone": "org/other"},
    }
    found = shareable(recipe)
    assert found["data"]["path"] == found["student"]["backbone"] == "./org/model", "a folder here, no Hub id elsewhere"
    assert found["data"]["unlabelled"] == found["data"]["foreign"] == "./org/model"
    assert found["teacher"]["backbone"] == "org/other"
