"""The code saved with a checkpoint: a process without hf_cdl loads it with trust_remote_code, bit-identically."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_backbone, picture
from PIL import Image
from test_small import as_cached, logits, student, teacher
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline
from transformers.dynamic_module_utils import get_relative_import_files

from hf_cdl.models.remote_code import ENTRY

# -I -S: no PYTHONPATH, no .pth files (editable installs); the None keeps an ordinary install from being found too.
WITHOUT_HF_CDL = """
import json, sys
sys.path += json.loads(sys.argv[1])
sys.modules["hf_cdl"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
try:
    import hf_cdl
except ImportError:
    pass
else:
    raise SystemExit("hf_cdl is there")
"""
LOAD = """
images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
answers = []
for name in sys.argv[3:]:
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
    answers.append(model(images).logits)
classify = pipeline("image-classification", model=sys.argv[3], trust_remote_code=True, device="cpu")
scores = [classify(sys.argv[2] + f"/{name}.png") for name in ("picture", "deep")]
torch.manual_seed(9)
model.begin_task(["bee"])  # it goes on learning, and is saved with its code
model.save_pretrained(sys.argv[2] + "/grown")
grown = AutoModelForImageClassification.from_pretrained(sys.argv[2] + "/grown", trust_remote_code=True)
torch.save({"answers": answers, "scores": scores, "grown": grown(images).logits}, sys.argv[2] + "/answers.pt")
"""


@pytest.mark.slow
def test_a_process_without_hf_cdl_loads_the_same_model(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    teacher(tmp_path, save_code=True, save_backbone=False).save_pretrained(tmp_path / "teacher")
    student(make_backbone(tmp_path / "backbone"), save_code=True).save_pretrained(tmp_path / "student")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "student")
    as_cached(tmp_path / "student", cache, name="org/student")
    picture(0, 0).save(tmp_path / "picture.png")
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")  # which transformers' own pipeline clips
    names = [str(tmp_path / "student"), str(tmp_path / "teacher"), "org/student"]
    site = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-S", "-c", WITHOUT_HF_CDL + LOAD, json.dumps(site), str(tmp_path), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "answers.pt")
    models = [AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("student", "teacher")]
    for answer, model in zip(found["answers"], [*models, models[0]], strict=True):
        assert torch.equal(answer, logits(model))
    classify = pipeline("image-classification", model=str(tmp_path / "student"), device="cpu")
    assert found["scores"] == [classify(str(tmp_path / f"{name}.png")) for name in ("picture", "deep")]
    assert found["scores"][1] == classify(Image.fromarray((deep >> 8).astype(np.uint8)))
    torch.manual_seed(9)
    models[0].begin_task(["bee"])
    assert torch.equal(found["grown"], logits(models[0]))
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "grown")), logits(models[0]))


def test_the_code_is_a_copy_that_transformers_finds_and_goes_when_it_is_not_wanted(tmp_path: Path) -> None:
    model = student(make_backbone(tmp_path / "backbone"), save_code=True)
    model.save_pretrained(tmp_path / "s")
    files = set((tmp_path / "s").glob("*.py"))
    entry = tmp_path / "s" / f"hf_cdl_{ENTRY.replace('.', '_')}.py"
    assert files == {entry, *map(Path, get_relative_import_files(entry))}, "what is there is what is needed"
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "s")
    assert type(loaded) is type(model), "with hf_cdl installed its own classes are used"
    loaded.save_pretrained(tmp_path / "again")
    assert {file.name for file in files} == {file.name for file in (tmp_path / "again").glob("*.py")}
    loaded.config.save_code = False
    loaded.save_pretrained(tmp_path / "without")
    assert not [*(tmp_path / "without").glob("*.py")]
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
