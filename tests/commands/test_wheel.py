"""The package as a wheel, outside of any clone: it contains everything that a command needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, class_means

pytestmark = pytest.mark.slow

LEFT_OUT = shutil.ignore_patterns("__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the repository without files of earlier builds."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "repository"
    for name in ("hf_cdl", "recipes"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=LEFT_OUT)
    for name in ("hf_cdl_command.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    pip("wheel", copy, "--no-build-isolation", "--wheel-dir", folder)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder that the wheel is installed into, without its dependencies, which are installed already."""
    pip("install", wheel, "--target", wheel.parent / "site")
    return wheel.parent / "site"


def pip(verb: str, what: Path, *options: object) -> None:
    words = [verb, str(what), "--no-deps", "--no-index", "--disable-pip-version-check", *map(str, options)]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    ours = {file for file in (ROOT / "hf_cdl").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == {file.relative_to(ROOT).as_posix() for file in ours} | {"hf_cdl_command.py"}
        for file in ours:
            assert archive.read(file.relative_to(ROOT).as_posix()) == file.read_bytes(), file
        example = archive.read("hf_cdl/commands/examples/quickstart.yaml")
    assert example == (ROOT / "recipes" / "quickstart.yaml").read_bytes()


def test_the_commands_work_where_there_is_no_clone(installed: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PYTHONPATH": str(installed), "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code and "Traceback" not in done.stderr, (words, done.stdout + done.stderr)
        return done.stdout + done.stderr

    assert run(sys.executable, "-c", "import hf_cdl; print(hf_cdl.__file__)").startswith(str(installed))
    assert run("hf-cdl", "--version") == run(sys.executable, "-m", "hf_cdl", "--version")
    assert "hf-cdl train --example quickstart" in run("hf-cdl", "train", code=2)
    said = run("hf-cdl", "train", "--example", "quickstart")
    assert "student.backbone" in said and "Start it: hf-cdl train quickstart.yaml" in said
    assert "is here already" in run("hf-cdl", "train", "--example", "quickstart", code=2)

    recipe = class_means(tmp_path).rename(tmp_path / "my.yaml").name
    assert "3 tasks, 6 classes" in run("hf-cdl", "plan", recipe)
    assert "Try the student on an image" in run("hf-cdl", "train", recipe)
    assert "This run is finished" in run("accelerate", "launch", "--cpu", "-m", "hf_cdl", "train", recipe)
    run("hf-cdl", "verify", "runs/tiny")
    run("hf-cdl", "card", "runs/tiny")
    assert (tmp_path / "runs" / "tiny" / "student" / "README.md").is_file()
    assert "has no folders task-01" in run("hf-cdl", "demo", "data", code=2)
    spec = {"recipe": recipe, "seeds": [0, 1], "split": "test", "variants": {"means": {"rows": {"student": "means"}}}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    said = run("hf-cdl", "compare", "spec.yaml", "--jobs", "1")
    assert "0 of 2 runs are done; 1 at a time" in said and "run 2 of 2: means/seed-1 done after" in said
    assert (tmp_path / "runs" / "comparisons" / "spec" / "report.html").is_file()
