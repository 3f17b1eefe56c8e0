"""The files of recipes/accelerate: Accelerate reads each, and those that need no GPU start a run here."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, make_recipe, write_recipe

FOLDER = ROOT / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
PORT = ("--main_process_port",)
HERE = {
    "cpu.yaml": [()],
    "one.yaml": [()],
    "gpus.yaml": [("--num_processes", "2", *PORT, "29581")],
    "machines.yaml": [
        (*("--num_processes", "2", "--machine_rank", rank), *("--main_process_ip", "127.0.0.1"), *PORT, "29582")
        for rank in ("0", "1")
    ],
    "sharded_teacher.yaml": [("--num_processes", "2", *PORT, "29583")],
}
"""Options by which a machine of two cores stands for what a file is for, for each machine."""


def launched(file: Path, options: tuple[str, ...], *words: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "recipes/train.py", *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_accelerate_reads_a_file_that_says_what_it_is_for(file: Path) -> None:
    stored = yaml.safe_load(file.read_text())
    read = load_config_from_file(str(file)).to_dict()
    for name, value in stored.items():
        assert read[name] == value, f"{name} is nothing that Accelerate knows"
    assert read["mixed_precision"] == "no", "the recipe says it"
    said = [line for line in file.read_text().splitlines() if line.startswith("#")]
    comment = " ".join(line.lstrip("# ").rstrip("\\") for line in said)
    command = shlex.split(comment[comment.index("accelerate launch") :])
    assert command[:3] == ["accelerate", "launch", "--config_file"] and ROOT / command[3] == file
    assert {file.name for file in FILES} == HERE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_a_file_starts_a_run(name: str, tmp_path: Path) -> None:
    """GPUs are stood for by processes on the CPU (train.use_cpu), and machines by launchers on this one."""
    recipe = make_recipe(tmp_path, baselines=[])
    recipe["train"] |= {"num_train_epochs": 1, "shard_teacher": name == "sharded_teacher.yaml"}
    file, folder = write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "run"
    started = [launched(FOLDER / name, options, file, "--output_dir", folder) for options in HERE[name]]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), said
    assert sum(text.count("task 3/3: average") for text in said) == 1, "one process speaks"
    of = json.loads((folder / "results.json").read_text())
    assert of["roles"].keys() == {"teacher", "student"}
