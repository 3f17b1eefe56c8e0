"""A student in use, as docs/guides/ (in_use, measure, device) walk it: each command in a process of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_backbone, make_data, picture, script
from PIL import Image
from test_export import classified, without_torch  # noqa: F401  # a fixture
from transformers import pipeline


def command(*words: Any) -> str:
    code, said = script(*words, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"})
    assert code == 0 and "Traceback" not in said, said
    return said


@pytest.mark.slow
def test_the_day_after_training(tmp_path: Path, without_torch: dict[str, str]) -> None:  # noqa: F811
    """Predict with rejection, evaluate two revisions, export, and run the small file where there is no torch."""
    backbone, data = make_backbone(tmp_path / "backbone"), make_data(tmp_path / "data", classes=4, train=20, test=15)
    head = "{type: ridge, strength: auto, scale: auto, known: 0.9}"
    words = ("--backbone", backbone, "--student.head", head, "--data.classes_per_task", 2, "--baselines", "[]")
    command("train", data, *words, "--train.use_cpu", "true", "--output_dir", tmp_path / "run")

    photos = [tmp_path / "photos" / f"{index:03}.png" for index in range(200)]
    photos[0].parent.mkdir()
    for index, photo in enumerate(photos):
        picture(index % 4, 10_000 + index, 30).save(photo)
    for index in range(0, 200, 20):
        noise = np.random.default_rng(index).integers(0, 256, (30, 30, 3), np.uint8)
        Image.fromarray(noise).save(photos[index])
    table, sheet = tmp_path / "answers.csv", tmp_path / "sheet.html"
    said = command("predict", tmp_path / "run", photos[0].parent, "--reject", "--out", table, "--out", sheet)
    assert "rejected as unknown: " in said
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    asked = pipeline("image-classification", model=str(tmp_path / "run" / "student"), reject=True)
    assert [row["label"] for row in rows] == [answers[0]["label"] for answers in asked([*map(str, photos)])]
    assert {rows[index]["label"] for index in range(0, 200, 20)} == {"unknown"}
    assert sheet.read_text().count("<img") == 200 and "unknown" in sheet.read_text()

    revisions = ("--revision", "task-01", "--revision", "task-02")
    command("evaluate", tmp_path / "run", data, *revisions, "--reject", "--out", tmp_path / "evaluation")
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert "task-01" in json.dumps(found) and (tmp_path / "evaluation" / "confusion_task-02.png").exists()
    newest = json.loads((tmp_path / "run" / "results.json").read_text())["roles"]["student"]["accuracy_matrix"][-1]
    assert f"{sum(newest) / 2:.1f} %" in command("evaluate", tmp_path / "run", data, "--out", tmp_path / "again"), (
        "what the run measured"
    )

    for options in ((), ("--int8",)):
        assert "60 test images of the run" in command("export", tmp_path / "run", *options)
    small = classified(tmp_path / "run" / "device" / "student-int8.onnx", photos, without_torch, "--reject")
    exact = classified(tmp_path / "run" / "device" / "student.onnx", photos, without_torch, "--reject")
    labels = [[answers[0]["label"] for answers in part] for part in (exact, small)]
    assert labels[0] == [row["label"] for row in rows]
    assert np.mean([a == b for a, b in zip(*labels, strict=True)]) > 0.95
