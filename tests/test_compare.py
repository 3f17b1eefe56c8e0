"""Several runs beside each other: the tables as text, the curves as a real image, a sweep of real processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, make_recipe, write_recipe
from PIL import Image

from hf_cdl.compare import CDL, ONE_TASK, compare_table, difference_table, save_curves


def metrics(accuracy: float, forgetting: float = 0.0, incremental: float = 0.0) -> dict[str, float]:
    return {"average_accuracy": accuracy, "forgetting": forgetting, "average_incremental_accuracy": incremental}


def test_compare_table():
    runs = {0: metrics(70.0, 10.0, 80.0), 1: metrics(74.0, 13.0, 80.0), 2: metrics(78.0, 10.0, 83.0)}
    assert compare_table({"kd|dist": runs, "one seed": {0: runs[0]}}) == (
        "| run | seeds | average accuracy | forgetting | average incremental accuracy |\n"
        "|---|---:|---:|---:|---:|\n"
        "| kd\\|dist | 3 | 74.00 ± 4.00 | 11.00 ± 1.73 | 81.00 ± 1.73 |\n"
        "| one seed | 1 | 70.00 ± – | 10.00 ± – | 80.00 ± – |\n"
    )


def test_compare_table_of_the_cdl_protocol_and_of_one_task():
    run = {"average_accuracy": 1.0, "official_forgetting": 2.0, "forgetting": 3.0, "average_incremental_accuracy": 4.0}
    assert compare_table({"kd": {0: run}}, CDL) == (
        "| run | seeds | average accuracy | official forgetting | forgetting | average incremental accuracy |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| kd | 1 | 1.00 ± – | 2.00 ± – | 3.00 ± – | 4.00 ± – |\n"
    )
    assert compare_table({"kd": {0: run}}, ONE_TASK).splitlines()[-1] == "| kd | 1 | 1.00 ± – |"


def test_a_label_without_runs_cannot_be_compared():
    with pytest.raises(ValueError, match="'kd' has no runs"):
        compare_table({"kd": {}})


def test_differences_are_paired_by_seed():
    """Seeds far apart, differences small: unpaired, nothing would be seen. A seed that one lacks is left out."""
    runs = {
        "kd": {2: metrics(92.0), 0: metrics(12.0), 1: metrics(50.0), 7: metrics(0.0)},
        "alone": {0: metrics(10.0), 1: metrics(51.0), 2: metrics(90.0)},
    }
    assert difference_table(runs, [["kd", "alone"]]).splitlines() == [
        "| paired difference | seeds | average accuracy | standard error | above 0 |",
        "|---|---:|---:|---:|---:|",
        "| kd − alone | 3 | +1.00 ± 1.73 | 1.00 | 2 of 3 |",
    ]
    with pytest.raises(ValueError, match=r"\[kd, kdp\] names no runs; there are: kd, alone"):
        difference_table(runs, [["kd", "kdp"]])
    with pytest.raises(ValueError, match="no seed in common"):
        difference_table({"a": {0: metrics(1.0)}, "b": {1: metrics(1.0)}}, [["a", "b"]])


def test_curves_are_a_whole_image_with_a_line_for_every_path(tmp_path):
    pytest.importorskip("matplotlib")

    def log(seed: int, *names: str) -> list[dict[str, float]]:
        return [{"loss": 1.0}, *({name: 40.0 * i + seed for i, name in enumerate(names)} for _ in range(5))]

    taught = [log(seed, "eval_accuracy", "eval_teacher_accuracy", "eval_prompt_path_accuracy") for seed in range(3)]
    for name, panels in {"both": {"KD": [log(0, "eval_accuracy")], "DFPT": taught}, "one": {"DFPT": taught}}.items():
        save_curves(panels, tmp_path / f"{name}.png", "curves")
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            colours = {
                tuple(int(code[i : i + 2], 16) for i in (1, 3, 5)) for code in ("#0072B2", "#D55E00", "#009E73")
            }
            assert colours <= {colour for _, colour in image.convert("RGB").getcolors(2**24) or ()}
    with pytest.raises(ValueError, match="'KD' hold no accuracies; .*eval_strategy"):
        save_curves({"KD": [[{"loss": 1.0}]]}, tmp_path / "none.png", "curves")


@pytest.mark.slow
def test_a_sweep_shares_teachers_pairs_seeds_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, baselines=[])
    recipe["student"]["train"] = {"eval_strategy": "epoch"}
    alone = {"teacher": None, "distill": [], "ce_weight": 1.0}
    spec = {
        "recipe": str(write_recipe(tmp_path / "tiny.yaml", recipe)),
        "seeds": [0, 1],
        "variants": {
            "alone": {"set": alone, "rows": {"student": "alone"}},
            "dfpt": {"teacher_from": "kdp", "set": {"distill": [{"type": "dual_path"}]}, "rows": {"student": "DFPT"}},
            "kdp": {"rows": {"teacher": "teacher", "student": "KDP"}},
        },
        "contrasts": [["KDP", "alone"], ["DFPT", "KDP"]],
        "curves": {"kdp": "KDP", "dfpt": "DFPT"},
    }
    command = [sys.executable, str(ROOT / "recipes/sweep.py"), str(write_recipe(tmp_path / "spec.yaml", spec))]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    root = tmp_path / "runs/sweeps/spec"
    table = (root / "table.md").read_text()
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line and "seeds" not in line and "--" not in line]
    assert rows == [
        ["| alone", "2"],
        ["| DFPT", "2"],
        ["| KDP", "2"],
        ["| teacher", "2"],
        ["| KDP − alone", "2"],
        ["| DFPT − KDP", "2"],
    ]
    for seed in (0, 1):
        theirs, ours = (root / name / f"seed-{seed}/teacher/model.safetensors" for name in ("kdp", "dfpt"))
        assert theirs.read_bytes() == ours.read_bytes()
    written = {file: file.stat().st_mtime_ns for file in root.glob("*/*/results.json")}
    assert len(written) == 6
    shutil.rmtree(root / "alone/seed-1")
    (root / "curves.png").unlink()
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    again = {file: file.stat().st_mtime_ns for file in root.glob("*/*/results.json")}
    assert (root / "table.md").read_text() == table and (root / "curves.png").exists()
    assert [file for file in again if again[file] != written[file]] == [root / "alone/seed-1/results.json"]
