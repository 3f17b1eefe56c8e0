"""The recipes of the papers' tables: all combinations parse, and run with tiny backbones and data of the same layout.

Backbones and data are in folders named like their Hub ids, so the recipes run unchanged, only smaller.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from helpers import ROOT, make_backbone, picture, png, train

from hf_cdl.commands import train as script
from hf_cdl.data.benchmarks import BENCHMARKS
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe import load_recipe

RECIPES = ROOT / "recipes"
FOLDERS = {"cifar100_10t": "cifar100", "imagenet_r_10t": "imagenet_r"}
METHODS = ("l2p", "dualprompt", "coda", "apt")
PAIRS = ("base_small", "large_base", "base_tiny")
PUBLISHED = ("none", "kd", "dkd", "fitnets", "review_kd", "kd_token", "kdp", "prompt_mapping")
TERMS = (*PUBLISHED, "dual_path")
SINGLE = "imagenet_r_10t/coda_dual_path.yaml"  # a single file: this combination is not in the papers' tables
COMBINATIONS = list(itertools.product(FOLDERS, METHODS, PAIRS, TERMS))
BACKBONES = {  # width and depth; the prompts reach five layers
    "google/vit-large-patch16-224": (48, 7),
    "google/vit-base-patch16-224": (32, 6),
    "WinKawaks/vit-small-patch16-224": (24, 6),
    "WinKawaks/vit-tiny-patch16-224": (16, 6),
}


def files(folder: str, method: str, pair: str, term: str) -> list[str]:
    return [str(RECIPES / part) for part in (f"{folder}/{method}.yaml", f"pairs/{pair}.yaml", f"terms/{term}.yaml")]


# ---- every combination parses ----


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_combination_is_a_recipe(folder: str) -> None:
    names = set()
    for combination in COMBINATIONS:
        if combination[0] != folder:
            continue
        _, method, pair, term = combination
        recipe = load_recipe(files(*combination), "unused.yaml")
        names.add(recipe.name)
        assert recipe.name == f"{folder}-{method}-{pair}-{term}"
        assert (recipe.protocol, recipe.normalise, recipe.data.path) == ("cdl", False, FOLDERS[folder])
        assert (recipe.teacher is None) == (term == "none") == (recipe.distill == [])
        assert recipe.ce_weight == (1.0 if term == "none" else 0.5)
        for role in ("student",) if recipe.teacher is None else ("teacher", "student"):
            section, arguments = getattr(recipe, role), recipe.training_args(role)
            assert section.prompt["type"] == method
            assert section.head["type"] == ("weight_normalised" if method == "apt" else "linear")
            assert section.backbone in BACKBONES
            assert arguments["num_train_epochs"] == {"cifar100_10t": 20, "imagenet_r_10t": 35}[folder]
            assert arguments["per_device_train_batch_size"] == (32 if pair == "large_base" else 64)
            assert (arguments["learning_rate"], arguments["epoch_cosine"]) == (1e-3, True)
            assert arguments["dataloader_drop_last"] is True
    assert len(names) == len(COMBINATIONS) / len(FOLDERS)


def test_the_recipe_files_are_those_that_are_tested() -> None:
    found = {file.relative_to(RECIPES).as_posix() for file in RECIPES.glob("*/*.yaml")}
    parts = {Path(file).relative_to(RECIPES).as_posix() for c in COMBINATIONS for file in files(*c)}
    parts |= {SINGLE, *(f"{folder}/base.yaml" for folder in FOLDERS)}
    assert {file for file in found if not file.startswith(("comparisons/", "offline_kd/", "accelerate/"))} == parts
    assert set(METHODS) == set(PROMPTS) - {"vpt"}, "the authors' tables have all of them but VPT"


PARTS = sorted(file for folder in (*FOLDERS, "pairs", "terms") for file in (RECIPES / folder).glob("*.yaml"))


@pytest.mark.parametrize("file", PARTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipe_file_says_where_it_is_from_and_how_to_run_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines(True)))
    for wanted in ("Source", "arXiv ", "Published", "What differs from the authors"):
        assert wanted in comment, wanted
    [command] = re.findall(
        r"^# Command: accelerate launch --config_file \S+ recipes/train.py (.*)$", comment, re.MULTILINE
    )
    words = shlex.split(command)
    assert load_recipe(words, "unused.yaml").protocol == "cdl"
    assert file.stem == "base" or str(file.relative_to(ROOT)) in words
    if file.parent.name in FOLDERS and file.stem in METHODS:
        assert re.findall(r"^# {3,}(none .*)$", comment, re.MULTILINE)[0].split() == list(PUBLISHED)
        rows = re.findall(r"^#   (\w+) +(\d.*|- .*)$", comment, re.MULTILINE)
        assert [name for name, _ in rows] == list(PAIRS)
        cells = [cell for _, row in rows for cell in row.split()]
        assert len(cells) == len(PAIRS) * len(PUBLISHED)
        assert all(re.fullmatch(r"-|\d\d\.\d\d/(\d\.\d\d|-)", cell) for cell in cells)


def test_the_dual_path_recipe_is_the_combination_that_it_names() -> None:
    recipe = load_recipe([str(RECIPES / SINGLE)], "unused.yaml")
    combined = load_recipe(files("imagenet_r_10t", "coda", "base_small", "dual_path"), "unused.yaml")
    assert {**recipe.as_dict(), "name": combined.name} == combined.as_dict()


# ---- every combination runs ----


def images(labels: list[int], first: int) -> list[dict[str, Any]]:
    return [{"bytes": png(picture(label, first + i, 32)), "path": None} for i, label in enumerate(labels)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders named like Hub ids: random backbones, and data in the data sets' layout with four classes."""
    hub = tmp_path_factory.mktemp("hub")
    for number, (name, (width, depth)) in enumerate(BACKBONES.items()):
        make_backbone(hub / name, width, depth, seed=number, size=32)
    cifar = hub / "uoft-cs" / "cifar100"
    cifar.mkdir(parents=True)
    fine, coarse = ClassLabel(names=["apple", "bear", "cloud", "dolphin"]), ClassLabel(names=["a", "b"])
    features = Features({"img": ImageFeature(), "fine_label": fine, "coarse_label": coarse})
    for split, count in (("train", 5), ("test", 2)):
        labels = [label for label in range(4) for _ in range(count)]
        columns = {"img": images(labels, 100 * count), "fine_label": labels, "coarse_label": [n // 2 for n in labels]}
        table = Dataset.from_dict(columns, features=features)
        table.to_parquet(str(cifar / f"{split}-00000-of-00001.parquet"))
    renditions = hub / "axiong" / "imagenet-r"
    renditions.mkdir(parents=True)
    wnids = ["n01443537", "n01484850", "n01494475", "n01498041"]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 6)).tolist()
    features = Features({"image": ImageFeature(), "wnid": Value("string"), "class_name": Value("string")})
    columns = {"image": images(labels, 0), "wnid": [wnids[n] for n in labels], "class_name": [f"c{n}" for n in labels]}
    Dataset.from_dict(columns, features=features).to_parquet(str(renditions / "test-00000-of-00001.parquet"))
    assert {BENCHMARKS[name]["path"] for name in FOLDERS.values()} == {"uoft-cs/cifar100", "axiong/imagenet-r"}
    return hub


SMALL = (
    "--data.classes_per_task 2 --train.num_train_epochs 1 --train.per_device_train_batch_size 4 --train.use_cpu true"
)


def check_results(folder: Path, term: str) -> None:
    results = json.loads((folder / "results.json").read_text())
    roles = {"student", "nearest_class_mean"} | ({"teacher"} if term != "none" else set())
    assert results["finished"] and set(results["roles"]) >= roles - {"nearest_class_mean"}
    assert results["recipe"]["protocol"] == "cdl"
    assert len(results["class_names"]) == 2
    for role, entry in results["roles"].items():
        assert [len(row) for row in entry["accuracy_matrix"]] == [1, 2], role
        assert list(entry["metrics"])[:2] == ["average_accuracy", "official_forgetting"]
        assert all(math.isfinite(value) for value in entry["metrics"].values())
        if role in ("teacher", "student"):
            for number in (1, 2):
                log = json.loads((folder / "logs" / f"{role}-task-{number:02d}.json").read_text())
                assert log[-1]["step"] == 2 and math.isfinite(log[-1]["train_loss"])  # 8 or 9 images: two full batches
    processor = json.loads((folder / "student" / "preprocessor_config.json").read_text())
    assert processor["do_normalize"] is False


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_a_combination_runs(
    combination: tuple[str, str, str, str], hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub)
    # plotting takes half of the time
    monkeypatch.setattr("hf_cdl.runs.pictures.save_plots", lambda results, folder: [])
    quick = ["--output_dir", str(tmp_path / "run"), "--baselines", "[]", "--train.save_strategy", "'no'"]
    assert script.main([*files(*combination), *SMALL.split(), "--train.disable_tqdm", "true", *quick]) == 0
    check_results(tmp_path / "run", combination[3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "combination",
    [
        ("cifar100_10t", "coda", "base_small", "kdp"),
        ("imagenet_r_10t", "apt", "large_base", "fitnets"),
        ("imagenet_r_10t", "l2p", "base_tiny", "prompt_mapping"),
    ],
    ids="-".join,
)
def test_the_command_runs(combination: tuple[str, str, str, str], hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = train(*files(*combination), *SMALL.split(), "--output_dir", folder, cwd=hub)
    assert code == 0, output
    stream = json.loads((folder / "results.json").read_text())["stream"]
    assert output.startswith(f"{'-'.join(combination)}: ") and " 4 classes in 2 tasks; this may take " in output
    assert f"\nstream {stream} -> {folder}/\n" in output
    assert re.search(r"since +since\b.*\n.* learnt +best ", output), (
        "forgetting is defined as its authors do, then as others"
    )
    check_results(folder, combination[3])
