"""benchmarks/dual_path_cost.py runs, and its costs are ordered as expected."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_the_second_path_costs_memory_and_copies_of_the_stages_more() -> None:
    command = [sys.executable, "benchmarks/dual_path_cost.py", "--pairs", "vit-offline", "--repeats", "1"]
    here = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, cwd=ROOT, env=here)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^\| vit-offline \| (\S+) \| [\d,]+ \| ([\d.]+) \(.*?\) \| ([\d,]+) \|", done.stdout, re.MULTILINE
    )
    assert [(name, ratio) for name, ratio, _ in rows][0] == ("KD", "1.00")
    assert [name for name, *_ in rows] == ["KD", "DFPT-KD", "DFPT-KD+"]
    memory = [int(cell.replace(",", "")) for *_, cell in rows]
    assert memory[0] < memory[1] < memory[2]
