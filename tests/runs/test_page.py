"""report.html of a run: self-contained, escaped, and true to what the run recorded."""

from __future__ import annotations

import base64
import copy
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_report import RESULTS

from hf_cdl.runs import pictures
from hf_cdl.runs.page import EVALUATION, PAGE, save_page

FULL: dict[str, Any] = {**RESULTS, "recipe": {"data": {"eval_split": "validation"}, "seed": 3}, "versions": {"x": "1"}}


class Reader(HTMLParser):
    """Tags, the addresses that they name, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(folder: Path) -> tuple[str, Reader]:
    page, reader = (folder / PAGE).read_text(encoding="utf-8"), Reader()
    reader.feed(page)
    return page, reader


def test_it_holds_what_was_found_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "student").mkdir()
    pictures.save_plots(FULL, tmp_path)
    save_page(FULL, tmp_path)
    page, reader = read(tmp_path)
    said = re.sub(r"\s+", " ", reader.text)
    assert (
        "Learnt by teacher (CODA-Prompt), student (KDP) and 1 baseline: 6 classes in 3 tasks, one after another"
        in said
    )
    assert "Measured on 60 validation images" in said
    assert "Use the student: 73.3 %, 23.3 points ahead" in said and "Not finished" not in said
    assert "73.3" in said and "since best" in said and "cat, dog" in said and "seed: 3" in said
    embedded = [address for address in reader.addresses if address.startswith("data:image/png;base64,")]
    assert len(embedded) == 2
    assert [a for a in reader.addresses if a not in embedded] == ["results.json", "student"], (
        "links to files beside it"
    )
    assert "script" not in reader.tags and "link" not in reader.tags and "@import" not in page and "url(" not in page


def test_names_with_html_and_control_characters_are_text(tmp_path: Path) -> None:
    results, nasty = copy.deepcopy(FULL), "<script>alert(1)</script>\x1b[2J\u202e&\"'"
    results["class_names"][0][0] = results["name"] = results["roles"]["student"]["label"] = nasty
    results["recipe"]["card"], results["versions"] = nasty, {nasty: nasty}
    results["changes"] = [{"said": nasty}]
    save_page(results, tmp_path)
    page, reader = read(tmp_path)
    assert "script" not in reader.tags and "\x1b" not in page and "\u202e" not in page
    assert page.count(html.escape("<script>alert(1)", quote=False)) >= 5


def test_an_unfinished_run_and_one_without_pictures_say_so(tmp_path: Path) -> None:
    save_page({**FULL, "finished": False}, tmp_path)
    said = read(tmp_path)[1].text
    assert "Not finished" in said and "There are no pictures" in said and "Use the" not in said


def test_baselines_that_are_ahead_are_named(tmp_path: Path) -> None:
    results = copy.deepcopy(FULL)
    results["roles"]["ridge_head"] = {"accuracy_matrix": [[90.0], [90.0, 90.0], [99.0, 99.0, 99.0]]}
    save_page(results, tmp_path)
    assert "Ahead of the student (73.3 %): ridge head 99.0 %." in read(tmp_path)[1].text


def test_it_shows_the_newest_state_that_was_evaluated(tmp_path: Path) -> None:
    for state, content in (("task-02", b"old"), ("task-03", b"new")):
        (tmp_path / EVALUATION / state).mkdir(parents=True)
        (tmp_path / EVALUATION / state / "mistakes.png").write_bytes(content)
    save_page(FULL, tmp_path)
    page, reader = read(tmp_path)
    assert "data:image/png;base64,bmV3" in page and "bGQ" not in page and "Mistakes" in reader.text
    assert EVALUATION in reader.addresses and "state task-03" in reader.text


@pytest.mark.parametrize("newest", ["task-01", "task-02", "task-03"])
def test_of_states_evaluated_together_the_confusions_of_the_last_are_shown(tmp_path: Path, newest: str) -> None:
    """Whatever the order in which a file system lists them."""
    folder = tmp_path / EVALUATION / newest
    folder.mkdir(parents=True)
    states = ("task-01", "task-02", "task-03")
    for state in states:
        (folder / f"confusion_{state}.png").write_bytes(state.encode())
    save_page(FULL, tmp_path)
    shown = [base64.b64encode(state.encode()).decode() in read(tmp_path)[0] for state in states]
    assert shown == [state == newest for state in states]
