"""Commands that the program prints, executed as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stopping
import train
import yaml
from helpers import ROOT, make_recipe, picture, write_recipe
from test_classifier import write as write_classifiers

PRINTING = [*(ROOT / "hf_cdl").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]


def test_what_is_to_be_installed_can_be() -> None:
    """Every requirement has its right name, and every extra is one of ours: here they are all installed."""
    found = re.findall(r"""pip install ["']?([\w\[\]-]+)""", "".join(file.read_text() for file in PRINTING))
    assert {"hf-cdl[report]", "scikit-learn", "peft"} <= {*found}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *{*found}]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "does not provide the extra" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("path", "here", "shown"),
    [
        ("{bin}:/usr/bin", "{bin}/../../other", "python"),
        ("/usr/bin:{bin}", "{bin}/../../other", "{python}"),  # another environment's comes first
        ("/nowhere", "{bin}/../../other", "{python}"),
        ("/nowhere", "{bin}/../..", ".venv/bin/python"),
    ],
)
def test_python_is_the_one_that_the_shell_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, here: str, shown: str
) -> None:
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "python").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", path.format(bin=folder).replace("/usr/bin", str(other)))
    monkeypatch.chdir(os.path.normpath(here.format(bin=folder)))
    assert stopping.python() == shown.format(python=folder / "python")


def ordinary(folder: Path) -> dict[str, Any]:
    return make_recipe(folder, baselines=[])


def small(folder: Path) -> dict[str, Any]:
    """A small checkpoint names its backbone as the recipe does: from the folder that it was trained in."""
    recipe = make_recipe(folder, save_backbone=False, baselines=[])
    for role in ("teacher", "student"):
        recipe[role]["backbone"] = role
    return recipe


def classifier(folder: Path) -> dict[str, Any]:
    return yaml.safe_load(write_classifiers(folder).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("make", [ordinary, small, classifier])
def test_the_student_is_used_as_it_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make: Callable[[Path], dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path / "recipe.yaml", make(tmp_path))
    picture(0, 0).save("IMAGE.png")
    folder = """it's a "run" of $HOME \\ n"""
    assert (
        train.main([str(file), "--output_dir", folder, "--train.num_train_epochs", "1", "--train.lr_steps", "[]"]) == 0
    )
    line = capfd.readouterr().out.split("Use the student:\n")[1].strip()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "'label': 'class " in done.stdout, (line, done.stdout + done.stderr)
