"""The recipes of offline distillation on CIFAR-100, and their networks."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from helpers import (
    ROOT,
    interrupt_when,
    make_data,
    picture,
    png,
    train,
    write_recipe,
)
from test_train import assert_same_run, losses, results, stored_epoch, train_recipe
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

from hf_cdl import CDLTrainingArguments
from hf_cdl.commands import verify
from hf_cdl.recipe import load_plugins, load_recipe
from hf_cdl.training.schedules import epoch_factor

FOLDER = ROOT / "recipes" / "offline_kd"
PAIRS = sorted(FOLDER.glob("cifar100_*.yaml"))
TERMS = sorted((FOLDER / "terms").glob("*.yaml"))
# Parameters for 100 classes, in millions, from the papers' tables and code; and the channels of the stages.
NETWORKS: dict[str, tuple[float, list[int]]] = {
    "resnet20": (0.28, [16, 32, 64]),
    "resnet56": (0.86, [16, 32, 64]),
    "resnet110": (1.74, [16, 32, 64]),
    "resnet8x4": (1.23, [64, 128, 256]),
    "resnet32x4": (7.43, [64, 128, 256]),
    "resnet50": (23.71, [256, 512, 1024, 2048]),
    "wrn_16_2": (0.70, [32, 64, 128]),
    "wrn_40_2": (2.26, [32, 64, 128]),
    "vgg8": (3.97, [64, 128, 256, 512, 512]),
    "vgg13": (9.46, [64, 128, 256, 512, 512]),
    "mobilenet_v2": (0.81, [8, 12, 16, 32, 48, 80, 160]),
    "shufflenet_v2": (1.36, [116, 232, 464]),
}


@pytest.fixture(autouse=True)
def plugins() -> None:
    load_plugins([str(FOLDER / "models.py")])


def network(name: str, **fields: Any) -> Any:
    config = AutoConfig.from_pretrained(FOLDER / name, **fields)
    set_seed(0)
    return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_sizes_of_the_papers(name: str) -> None:
    model = network(name, num_labels=100).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    millions, channels = NETWORKS[name]
    assert round(count / 1e6, 2) == millions
    seen: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        output = model(torch.rand(2, 3, 32, 32), labels=torch.tensor([0, 1]), output_hidden_states=True)
    assert output.logits.shape == (2, 100) and output.loss.ndim == 0
    assert [shape[1] for shape in seen] == channels
    assert [tuple(state.shape) for state in output.hidden_states[1:]] == seen
    assert [shape[2] for shape in seen] == sorted((shape[2] for shape in seen), reverse=True)
    processor = AutoImageProcessor.from_pretrained(FOLDER / name)
    assert dict(processor.size) == {"height": 32, "width": 32}


def test_every_network_of_the_cifar_pairs_is_tested() -> None:
    assert {file.parent.name for file in FOLDER.glob("[!i]*/config.json")} == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_learns(name: str) -> None:
    model = network(name, num_labels=5).train()
    model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and bool(gradient.isfinite().all()), key
        if not (name.startswith("vgg") and key.endswith("bias")):  # batch norm cancels a preceding bias
            assert gradient.abs().max() > 0, key


def test_shuffling_mixes_both_halves() -> None:
    unit = network("shufflenet_v2").stages[0][1].eval()
    pixels = torch.rand(1, 116, 4, 4)
    with torch.no_grad():
        before, changed = unit(pixels), unit(torch.cat([pixels[:, :58], -pixels[:, 58:]], dim=1))
    same = torch.tensor([torch.equal(before[:, i], changed[:, i]) for i in range(116)])
    assert same[0::2].all() and not same[1::2].all(), "the half that passes lies at every second place"


def test_a_network_of_nothing_known_is_refused() -> None:
    for fields in ({"family": "alexnet"}, {"depths": [1, 2]}, {"family": "vgg"}):
        with pytest.raises(ValueError, match="allowed: resnet of 3 stages, resnet_bottleneck of 4 stages, wide"):
            network("resnet20", **fields)


# ---- recipes ----


def test_the_pairs_are_all_there() -> None:
    assert [file.stem.removeprefix("cifar100_") for file in PAIRS] == [
        "resnet110_resnet20",
        "resnet32x4_resnet8x4",
        "resnet32x4_shufflenet_v2",
        "resnet50_mobilenet_v2",
        "resnet56_resnet20",
        "vgg13_vgg8",
        "wrn_40_2_wrn_16_2",
    ]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda file: file.stem)
def test_every_pair_is_a_recipe_with_every_term(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = set()
    for term in [None, *TERMS]:
        recipe = load_recipe([str(pair), *([] if term is None else [str(term)])], "unused.yaml")
        names.add(recipe.name)
        assert (recipe.data.path, recipe.data.classes_per_task, recipe.data.crop_padding) == ("cifar100", 100, 4)
        assert (recipe.teacher is None) == (recipe.distill == [])
        sections = [recipe.student, *([] if recipe.teacher is None else [recipe.teacher])]
        assert all(section.model == "classifier" and not section.pretrained for section in sections)
        names_of = [Path(section.backbone).name for section in sections]
        assert pair.stem == "_".join(["cifar100", *reversed(names_of)]) or recipe.teacher is None
        arguments = CDLTrainingArguments("work", **recipe.training_args("student"))
        slow = recipe.student.backbone.endswith(("mobilenet_v2", "shufflenet_v2"))
        assert (arguments.learning_rate, arguments.weight_decay) == (0.01 if slow else 0.05, 5e-4)
        assert (arguments.num_train_epochs, arguments.lr_steps, arguments.lr_decay) == (240, [150, 180, 210], 0.1)
        rate = epoch_factor(arguments, 240)
        assert rate is not None
        assert [round(rate(e), 6) for e in (0, 149, 150, 179, 180, 209, 210, 239)] == [
            *(1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001)
        ]
        assert (str(arguments.optim.value), arguments.optim_args) == ("sgd", "momentum=0.9")  # type: ignore[union-attr]
    assert len(names) == 1 + len(TERMS)


@pytest.mark.parametrize("file", [FOLDER / "base.yaml", *PAIRS, *TERMS], ids=lambda file: file.stem)
def test_a_file_says_where_it_is_from_and_how_to_run_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines(True)))
    for wanted in ("Source", "arXiv ", "Published", "What differs from the authors"):
        assert wanted in comment, wanted
    [command] = re.findall(
        r"^# Command: accelerate launch --config_file \S+ recipes/train.py (.*)$", comment, re.MULTILINE
    )
    words = shlex.split(command)
    assert load_recipe(words, "unused.yaml").student.model == "classifier"
    assert file.stem == "base" or str(file.relative_to(ROOT)) in words
    if file in PAIRS:
        [row] = re.findall(r"^#   (teacher .*)$", comment, re.MULTILINE)
        cells = re.split(r"  ", row)
        assert [re.sub(r" (\d\d\.\d\d|not known)$", "", cell) for cell in cells] == [
            *("teacher", "student alone", "kd", "dkd", "lskd", "dist")
        ]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in: data in CIFAR-100's layout with four classes, in a folder of its Hub id, and the recipes."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "uoft-cs" / "cifar100"
    folder.mkdir(parents=True)
    kinds = {"fine_label": ClassLabel(names=[f"thing {i}" for i in range(4)]), "coarse_label": ClassLabel(2)}
    features = Features({"img": ImageFeature(), **kinds})
    for split, count, first in (("train", 32, 0), ("test", 2, 1000)):
        labels = [label for label in range(4) for _ in range(count)]
        cells = [{"bytes": png(picture(label, first + i, 32)), "path": None} for i, label in enumerate(labels)]
        columns = {"img": cells, "fine_label": labels, "coarse_label": [label // 2 for label in labels]}
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}.parquet"))
    (root / "recipes").symlink_to(ROOT / "recipes")
    return root


SMALL = [
    "--train.lr_steps",
    "[]",
    "--train.per_device_train_batch_size",
    16,
    "--data.max_eval_per_class",
    2,
    "--data.max_train_per_class",
]
STREAM = ["recipes/quickstart.yaml", "--data.classes_per_task", 2, "--data.max_classes", 4, *SMALL, 16]
OFFLINE = ["recipes/offline_kd/cifar100_resnet56_resnet20.yaml", "--data.classes_per_task", 4, *SMALL, 8]
SWITCHED = {  # both paths' weights add up to the one of KD
    "kd": "[{type: kd, weight: 0.5}]",
    "dual_path": "[{type: dual_path, beta_o: 0.25, beta_p: 0.25}]",
}


@pytest.mark.parametrize(
    "words", [pytest.param(STREAM, id="stream"), pytest.param(OFFLINE, id="offline", marks=pytest.mark.slow)]
)
def test_kd_and_dual_path_are_switched_by_distill_alone(
    words: list[Any], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real steps per task of each, without effect on the teacher."""
    monkeypatch.chdir(cifar)
    common = [*words, "--train.num_train_epochs", 1, "--train.logging_steps", 1, "--train.use_cpu", "true"]
    same = []
    for kind, terms in SWITCHED.items():
        folder = tmp_path / kind
        said = [*map(str, common), "--baselines", "[]", "--distill", terms, "--output_dir", str(folder)]
        assert train_recipe.main(said) == 0
        found = results(folder)
        for task in range(1, len(found["class_names"]) + 1):
            steps = losses(folder, "student", task)
            assert len(steps) == 2 and all(step[f"loss/{kind}"] > 0 for step in steps)
        assert [term["type"] for term in found["recipe"].pop("distill")] == [kind]
        same.append((found["recipe"], found["roles"]["teacher"]["correct"]))
    assert same[0] == same[1]


_REMOTE = """
import json, sys
import numpy, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model(torch.from_numpy(numpy.load(sys.argv[2]))).logits.tolist()))
assert not any(name.split(".")[0] in ("hf_cdl", "hf_cdl_plugins") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda file: file.stem)
def test_every_pair_runs_two_steps(pair: Path, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real networks; and the student loads elsewhere with the copy of its source next to it."""
    words = [
        f"recipes/offline_kd/{pair.name}",
        "--data.classes_per_task",
        4,
        "--train.num_train_epochs",
        1,
        "--train.lr_steps",
        "[]",
    ]
    code, output = train(*words, "--train.use_cpu", "true", "--output_dir", tmp_path / "out", cwd=cifar)
    assert code == 0 and "Warning" not in output and "Traceback" not in output, output
    *_, use, page = output.rstrip().splitlines()
    assert use.endswith('trust_remote_code=True)("IMAGE.png"))\'') and page.endswith(f"{tmp_path}/out/report.html")
    monkeypatch.chdir(cifar)
    assert set(results(tmp_path / "out")["roles"]) == {"teacher", "student"}
    assert verify.main([str(tmp_path / "out")]) == 0
    student = tmp_path / "out" / "student"
    assert (student / "models.py").read_bytes() == (FOLDER / "models.py").read_bytes()
    pixels = torch.rand(2, 3, 32, 32)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    here = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", _REMOTE, str(student), str(tmp_path / "pixels.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=here)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        own = AutoModelForImageClassification.from_pretrained(student)(pixels).logits
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])), own, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS, ids=lambda file: file.stem)
def test_every_term_runs(term: Path, cifar: Path, tmp_path: Path) -> None:
    words = ["recipes/offline_kd/cifar100_resnet32x4_resnet8x4.yaml", f"recipes/offline_kd/terms/{term.name}"]
    words += ["--teacher.backbone", "recipes/offline_kd/resnet20"] if term.stem != "none" else []
    more = ["--data.classes_per_task", 4, "--train.num_train_epochs", 1, "--train.use_cpu", "true"]
    more += ["--train.lr_steps", "[]"]
    code, output = train(*words, *more, "--output_dir", tmp_path / "out", cwd=cifar)
    assert code == 0, output


def resnet(width: int, depth: int) -> ResNetConfig:
    sizes = [width, 2 * width, 3 * width]
    return ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[depth] * 3, layer_type="basic")


def vit(width: int, depth: int) -> ViTConfig:
    size: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 2 * width}
    return ViTConfig(**size, num_attention_heads=4, image_size=16, patch_size=4, hidden_dropout_prob=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [resnet, vit], ids=["resnet", "vit"])
def test_a_kill_does_not_change_an_offline_run_with_copied_stages(config: Any, tmp_path: Path) -> None:
    """Batch norms of the student, the blocks and the copies; dropout; two groups with momentum and a step schedule."""
    for role, sizes in (("teacher", (24, 2)), ("student", (12, 1))):
        size = {"height": 16, "width": 16}
        config(*sizes).save_pretrained(tmp_path / role)
        ViTImageProcessor(size=size).save_pretrained(tmp_path / role)
    models = {
        role: {"model": "classifier", "pretrained": False, "backbone": str(tmp_path / role)}
        for role in ("teacher", "student")
    }
    recipe = {
        "name": "offline",
        "data": {"path": str(make_data(tmp_path / "data", classes=4, train=16)), "classes_per_task": 4},
        **models,
        "distill": [{"type": "dual_path", "copy_from": "all", "warmup_steps": 24}],
        "ce_weight": 0.1,
        "train": {
            **{"num_train_epochs": 6, "per_device_train_batch_size": 8, "use_cpu": True, "learning_rate": 0.02},
            **{"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4, "lr_steps": [4]},
        },
    }
    command = (write_recipe(tmp_path / "recipe.yaml", recipe), "--output_dir")
    code, output = train(*command, tmp_path / "whole")
    assert code == 0, output
    cut = tmp_path / "cut"
    code, _ = interrupt_when(stored_epoch(cut, "student", 1), *command, cut)
    assert code == -signal.SIGKILL and list(cut.glob("work/student-task-01/checkpoint-*"))
    assert train(*command, cut)[0] == 0
    assert_same_run(cut, tmp_path / "whole")
    logged = losses(tmp_path / "whole", "student", 1)
    assert all(line["loss/dual_path/prompt_path"] > 0 for line in logged), "the second path learnt something"
    assert losses(cut, "student", 1)[-1] == logged[-1]
