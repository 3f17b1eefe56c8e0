"""The notebook: what is stored in it is whole, small and of no machine; the slow tier runs a copy of it anew."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers import ROOT

NOTEBOOK = ROOT / "recipes" / "notebooks" / "student_for_life.ipynb"
PRIVATE = r"/(?:tm[p]|hom[e]|roo[t]|wor[k]|Users|mnt|opt|srv|usr|var)/|\b\d\d:\d\d:\d\d\b|\b20\d\d-\d\d-\d\d\b"
PRIVATE += r"|[Ww]arning:|[Tt]raceback"
"""A machine's folders, times of day, dates and warnings."""


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def said(notebook: Any) -> str:
    """All that the cells printed, or gave as their value."""
    return "\n".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs(notebook))


def assert_run(notebook: Any) -> None:
    """Every code cell was run, in order and without an error, and pictures were drawn."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs(notebook) if output.output_type == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 3


def number(pattern: str, text: str) -> float:
    found = re.findall(pattern, text)
    assert len(found) == 1, (pattern, found)
    return float(found[0])


def assert_claims(text: str) -> None:
    """What the text between the cells says of what they print."""
    before, after = (number(rf"(?m)^task-0{state} +\d+ .* ([\d.]+)$", text) for state in (1, 2))
    assert before > 50 and after > before - 1.5, "earlier classes keep their accuracy"
    for words in ("those of task-01", "the same; the file has"):  # a class is removed, the student exported
        [(same, of)] = re.findall(rf"(\d+) of (\d+) answers are {words}", text)
        assert same == of and int(of) > 500, words
    assert number(r"the file has ([\d.]+) MB", text) < 4
    assert "7 labels corrected: 5 from 'radio' to 'radio-waves', 2 from 'radio' to 'radio-button'" in text
    assert "unknown unknown unknown" in text, "noise, a screenshot, a chart"
    own, emoji = (number(rf"{group}: (\d+) of", text) for group in ("its own classes", "emoji"))
    assert own < 0.1 * int(of) and emoji > 100


def test_what_is_stored_is_whole_small_and_of_no_machine() -> None:
    stored = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(stored, as_version=4)
    nbformat.validate(notebook)
    assert len(stored) <= 400_000
    assert_run(notebook)
    assert re.findall(PRIVATE, f"{said(notebook)}{notebook.metadata}") == []
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == [], "as a kernel's times would be"
    assert_claims(said(notebook))


def test_its_links_lead_somewhere() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    links = [link for cell in cells for link in re.findall(r"\]\(([^)\s#]+)", cell.source)]
    assert len(links) > 5 and [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["", "recipes/notebooks"])
def test_it_runs_from_the_root_and_from_its_own_folder(inside: str, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "notebooks").mkdir(parents=True)
    for name in ("recipes/quickstart", "recipes/emoji", "docs", "hf_cdl"):
        (tmp_path / name).symlink_to(ROOT / name)
    copy = Path(shutil.copy(NOTEBOOK, tmp_path / inside))
    env = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(NOTEBOOK.with_name("execute.py")), str(copy)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = nbformat.read(copy, as_version=4)
    assert_run(ran)
    assert_claims(said(ran))
    written = {path.name for path in tmp_path.iterdir()} - {"ipython", copy.name}
    assert written == {"recipes", "docs", "hf_cdl", "runs"} and os.listdir(tmp_path / "runs") == ["student_for_life"]
