"""Offline distillation of ordinary classifiers: the wrapper, whole runs of recipes/train.py, plain checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import interrupt_when, make_data, make_table, train, write_recipe
from PIL import Image
from safetensors.torch import load_file
from test_contract import arguments
from test_train import assert_same_run, losses, results, stored_epoch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    MobileNetV2Config,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SwinConfig,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    set_seed,
)

from hf_cdl import CDLTrainer
from hf_cdl.commands import train as script
from hf_cdl.commands import verify
from hf_cdl.data import ImageError, StreamConfig, TaskStream
from hf_cdl.distill import TERMS, Objective
from hf_cdl.models.classifier import ImageClassifier, class_dimensions
from hf_cdl.runs.run import Run

RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
MOBILENET: dict[str, Any] = {"depth_multiplier": 0.1, "min_depth": 4, "classifier_dropout_prob": 0.2}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
NAMES = [f"class {letter}" for letter in "abcdef"]


def processor(folder: Path) -> Path:
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def config_folder(folder: Path, config: Any) -> Path:
    """Make a folder with a config and an image processor, but no weights."""
    config.save_pretrained(folder)
    return processor(folder)


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return processor(folder)


def write(folder: Path, **fields: Any) -> Path:
    """Write a recipe of a ResNet that teaches a MobileNetV2 six classes, with its files next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {
        "teacher": config_folder(folder / "resnet", ResNetConfig(**RESNET)),
        "student": config_folder(folder / "mobilenet", MobileNetV2Config(**MOBILENET)),
    }
    sgd = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4, "learning_rate": 0.05}
    recipe: dict[str, Any] = {
        "name": "offline",
        "data": {"path": str(make_data(folder / "data", train=16)), "classes_per_task": 6, "crop_padding": 2},
        **{role: {"model": "classifier", "backbone": str(path), "pretrained": False} for role, path in models.items()},
        "distill": [{"type": "kd", "weight": 0.5}],
        "ce_weight": 0.5,
        "train": {"num_train_epochs": 8, "lr_steps": [6], "per_device_train_batch_size": 16, "use_cpu": True, **sgd},
    }
    recipe["student"]["train"] = {"learning_rate": 0.01}
    return write_recipe(folder / "recipe.yaml", {**recipe, **fields})


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("offline"))


@pytest.fixture(scope="module")
def finished(offline: Path) -> Path:
    """The folder of an uninterrupted run."""
    folder = offline.parent / "finished"
    code, output = train(offline, "--output_dir", folder)
    assert code == 0, output
    assert "Warning" not in output and "Traceback" not in output, output
    assert "teacher (resnet)" in output and "student (mobilenet + kd)" in output
    assert "import hf_cdl" not in output.splitlines()[-1], "the student needs transformers alone"
    return folder


def run(capfd: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """Run recipes/train.py in this process; returns its exit code and output."""
    code = script.main([str(word) for word in words])
    captured = capfd.readouterr()
    return code, captured.out + captured.err


# ---- complete runs ----


def test_a_run_trains_both_and_logs_the_term(finished: Path) -> None:
    found = results(finished)["roles"]
    assert set(found) == {"teacher", "student"}
    for entry in found.values():
        assert [len(row) for row in entry["accuracy_matrix"]] == [1] and entry["counts"] == [18]
    assert found["teacher"]["accuracy_matrix"][0][0] > 60, "six colours are learnt"
    assert set(losses(finished, "student", 1)[0]) == {"loss", "loss/loss", "loss/ce", "loss/kd"}
    assert set(losses(finished, "teacher", 1)[0]) == {"loss", "loss/loss", "loss/ce"}


_PLAIN = """
import json, sys
import datasets
from transformers import AutoModelForImageClassification, pipeline
folder, data, more = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
table = datasets.load_dataset("parquet", data_files=data, split="train")
names = table.features["label"].names
found = {}
for role in ("teacher", "student"):
    model = AutoModelForImageClassification.from_pretrained(f"{folder}/{role}", **more)
    classify = pipeline("image-classification", model=f"{folder}/{role}", device="cpu", **more)
    answers = [answer[0]["label"] for answer in classify(list(table["image"]), top_k=1)]
    found[role] = [type(model).__name__, sum(a == names[b] for a, b in zip(answers, table["label"]))]
assert not any(name.split(".")[0] == "hf_cdl" for name in sys.modules)
print(json.dumps(found))
"""


def plainly(folder: Path, data: Path, **more: Any) -> dict[str, Any]:
    """Class and number of right answers of each role's checkpoint, in a process without hf_cdl."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "HF_MODULES_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", _PLAIN, str(folder), str(data / "test.parquet"), json.dumps(more)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_checkpoints_repeat_their_accuracy_without_hf_cdl(offline: Path, finished: Path) -> None:
    found = plainly(finished, offline.parent / "data")
    roles = results(finished)["roles"]
    assert found == {
        "teacher": ["ResNetForImageClassification", roles["teacher"]["correct"][0][0]],
        "student": ["MobileNetV2ForImageClassification", roles["student"]["correct"][0][0]],
    }


def test_checkpoints_are_plain_ones_and_repeat_their_accuracy(finished: Path) -> None:
    assert verify.main([str(finished)]) == 0
    config = json.loads((finished / "student" / "config.json").read_text())
    assert list(config["id2label"].values()) == NAMES and "tasks" not in config
    files = {file.name for file in (finished / "student").iterdir() if file.is_file()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.slow
def test_a_run_can_take_over_its_teacher(offline: Path, finished: Path, tmp_path: Path, capfd: Any) -> None:
    """What the teacher learnt is reused, but no file of the other folder."""
    source = shutil.copytree(finished, tmp_path / "source")
    for name in ("notes.txt", "evil.py", "more.json"):
        (source / "teacher" / "task-01" / name).write_text("1")
    code, output = run(capfd, offline, "--teacher_from", source, "--output_dir", tmp_path / "out")
    assert code == 0, output
    assert_same_run(tmp_path / "out", finished)
    files = {file.name for file in (tmp_path / "out" / "teacher" / "task-01").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.slow
def test_a_ready_teacher_is_used_as_it_is(offline: Path, finished: Path, tmp_path: Path, capfd: Any) -> None:
    """It is not trained; its classes are matched by name in a stream of another order; it is evaluated and stored."""
    ready = tmp_path / "ready"
    shutil.copytree(finished / "teacher", ready)
    section = f"{{model: classifier, backbone: {ready}, train: null}}"
    folder = tmp_path / "out"
    words = (offline, "--teacher", "null", "--teacher", section, "--data.class_order_seed", 1, "--output_dir", folder)
    code, output = run(capfd, *words)
    assert code == 0 and "teacher (ready, as it is)" in output, output
    found, before = results(folder), results(finished)
    [order] = found["class_names"]
    assert order != NAMES and sorted(order) == NAMES
    assert found["roles"]["teacher"]["correct"] == before["roles"]["teacher"]["correct"]
    assert found["roles"]["teacher"]["train_seconds"] == [0.0] and losses(folder, "teacher", 1) == []
    assert losses(folder, "student", 1)[0]["loss/kd"] > 0
    one, two = (AutoModelForImageClassification.from_pretrained(path).eval() for path in (ready, folder / "teacher"))
    assert [two.config.id2label[i] for i in range(6)] == order
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(one(pixels).logits[:, [NAMES.index(name) for name in order]], two(pixels).logits)
    assert verify.main([str(folder)]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("--data.classes_per_task", 2),
            "learns one task, but the data are cut into 3. Set data.classes_per_task to 6",
        ),
        (("--data.max_classes", 5, "--data.classes_per_task", 5), "the data lack ['class f']. Rename the classes"),
        (("--student.pretrained", "true"), "cannot be loaded"),
        (("--plugins", "[nowhere.py]"), "'plugins' names 'nowhere.py', which is not a Python file"),
    ],
)
def test_what_cannot_be_learnt_is_said_before_training(
    change: tuple[Any, ...], said: str, offline: Path, finished: Path, tmp_path: Path, capfd: Any
) -> None:
    section = f"{{model: classifier, backbone: {finished / 'teacher'}, train: null}}"
    words = (offline, "--teacher", section, "--output_dir", tmp_path / "out", *change)
    code, output = run(capfd, *words)
    assert code == 2 and said in output and "Traceback" not in output, output
    assert not list((tmp_path / "out").glob("*/task-01"))


@pytest.mark.slow
def test_prompts_can_learn_from_a_classifier(offline: Path, finished: Path, tmp_path: Path, capfd: Any) -> None:
    vit = saved(tmp_path / "vit", ViTModel(ViTConfig(**VIT), add_pooling_layer=False))
    student = f"{{backbone: {vit}, prompt: {{type: coda, layers: [0, 1], length: 4}}, train: {{lr_steps: []}}}}"
    teacher = f"{{model: classifier, backbone: {finished / 'teacher'}, train: null}}"
    code, output = run(capfd, offline, "--teacher", teacher, "--student", student, "--output_dir", tmp_path / "out")
    assert code == 0 and "student (coda + kd)" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_kill_does_not_change_a_run_with_batch_norm(
    role: str, offline: Path, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    code, _ = interrupt_when(stored_epoch(folder, role, 1), offline, "--output_dir", folder)
    assert code == -signal.SIGKILL and list(folder.glob(f"work/{role}-task-01/checkpoint-*"))
    assert train(offline, "--output_dir", folder)[0] == 0
    assert_same_run(folder, finished)


@pytest.mark.slow
def test_a_kill_does_not_change_a_run_of_trainable_transformers(tmp_path: Path) -> None:
    """Their checkpoints name the weights differently than the models in memory."""
    vit = saved(tmp_path / "vit", ViTForImageClassification(ViTConfig(**VIT)))
    recipe = write(tmp_path / "files", student={"model": "classifier", "backbone": str(vit)})
    assert train(recipe, "--output_dir", tmp_path / "whole")[0] == 0
    code, _ = interrupt_when(stored_epoch(tmp_path / "cut", "student", 1), recipe, "--output_dir", tmp_path / "cut")
    assert code == -signal.SIGKILL and list((tmp_path / "cut").glob("work/student-task-01/checkpoint-*"))
    assert train(recipe, "--output_dir", tmp_path / "cut")[0] == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


# ---- the trainer ----


def task(folder: Path) -> Any:
    data = StreamConfig(path=str(make_data(folder)), classes_per_task=6, crop_padding=2)
    return TaskStream(data, ViTImageProcessor(size={"height": 16, "width": 16}))[0]


def resnet() -> ImageClassifier:
    set_seed(0)
    return ImageClassifier(ResNetForImageClassification(ResNetConfig(**RESNET)), pretrained=False)


def test_a_teacher_stays_as_it_is_while_its_student_learns(tmp_path: Path) -> None:
    """Even its batch norm statistics, though its own phase left it in training mode; the student's do change."""
    teacher, student = resnet(), resnet()
    learnt = task(tmp_path / "data")
    teach = CDLTrainer(teacher, arguments(tmp_path / "t"), role="teacher")
    teach.learn(learnt)
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    kd = TERMS["kd"](TERMS["kd"].config_class(), student.shape, teacher.shape)
    distil = CDLTrainer(student, arguments(tmp_path / "s"), Objective(0.5, [("kd", kd)]), teacher=teacher)
    distil.learn(learnt)
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    moved = [name for name, value in student.named_buffers() if "running" in name and value.abs().sum() > 0]
    assert moved


def test_images_that_its_pipeline_would_see_otherwise_are_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    Image.fromarray(np.full((16, 16), 4096, np.uint16)).save(file)
    table = make_table([0, 1, 0, 1], 2).select_columns(["label"])
    table = table.add_column("image", [str(file)] * 4).cast_column("image", datasets.Image())  # type: ignore[call-arg]
    stream = TaskStream(
        StreamConfig(classes_per_task=2),
        ViTImageProcessor(size={"height": 16, "width": 16}),
        dataset={"train": table, "test": table},
    )
    trainer = CDLTrainer(resnet(), arguments(tmp_path / "out"))
    with pytest.raises(ImageError, match=rf"{file.name}: has 16 bits a channel.*save it with 8 bits"):
        trainer.learn(stream[0])
    assert not trainer.seen and not trainer.model.tasks


class StopAfterSaving(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_phase_that_was_cut_off_goes_on_with_its_batch_norm_statistics(tmp_path: Path) -> None:
    learnt = task(tmp_path / "data")

    def trainer(folder: str) -> CDLTrainer:
        schedule: dict[str, Any] = {
            "num_train_epochs": 4,
            "lr_steps": [1, 3],
            "optim": "sgd",
            "optim_args": "momentum=0.9",
        }
        ledger = Run(tmp_path / folder, {"name": "x", "seed": 0})
        ledger.bind("stream", [NAMES])
        return CDLTrainer(resnet(), arguments(tmp_path / f"{folder} work", **schedule), run=ledger)

    whole = trainer("whole")
    whole.learn(learnt)
    cut = trainer("cut")
    cut.add_callback(StopAfterSaving())
    with pytest.raises(KeyboardInterrupt):
        cut.learn(learnt)
    cut.run._lock.release(force=True)  # type: ignore[union-attr]  # as if the process had ended
    [state] = (tmp_path / "cut" / "work").glob("*/checkpoint-*")
    assert any(name.endswith("running_var") for name in load_file(state / "trained.safetensors"))
    again = trainer("cut")
    again.learn(learnt)
    assert again.state.global_step == whole.state.global_step
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


# ---- the wrapper ----


def test_it_learns_one_task() -> None:
    model = resnet()
    model.begin_task(["cat", "dog"])
    assert model.tasks == [["cat", "dog"]] and model.config.num_labels == 2
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="learns one task, and this one knows 2 classes already"):
        model.begin_task(["owl"])
    output = model(torch.zeros(3, 3, 16, 16), labels=torch.tensor([0, 1, 0]))
    assert output.logits.shape == (3, 2)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 0])))
    with pytest.raises(ValueError, match="shows its logits alone"):
        model(torch.zeros(1, 3, 16, 16), output_hidden_states=[-1])


def test_random_weights_are_drawn_when_the_task_begins(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "resnet", ResNetConfig(**RESNET))
    draws = []
    for seed in (1, 1, 2):
        model = ImageClassifier.from_backbone(str(folder), pretrained=False)
        set_seed(seed)
        model.begin_task(NAMES)
        draws.append(model.state_dict())
    name = "model.resnet.embedder.embedder.convolution.weight"
    assert torch.equal(draws[0][name], draws[1][name]) and not torch.equal(draws[0][name], draws[2][name])


@pytest.mark.parametrize("head", [True, False])
def test_pretrained_weights_are_kept_but_for_the_head(head: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = {**RESNET, "num_labels": 6}
    config = ResNetConfig(**fields)
    source: Any = ResNetForImageClassification(config) if head else ResNetModel(config)
    for name, buffer in source.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.uniform_(buffer)
    folder = saved(tmp_path / "resnet", source)
    model = ImageClassifier.from_backbone(str(folder))
    model.begin_task(NAMES)
    old, new = source.state_dict(), model.model.state_dict()
    shared = [name for name in new if not name.startswith("classifier")]
    assert all(torch.equal(new[name], old[name if head else name.removeprefix("resnet.")]) for name in shared)
    if head:
        assert not torch.equal(new["classifier.1.weight"], old["classifier.1.weight"])
    model.save_pretrained(tmp_path / "out")
    again = ImageClassifier.from_pretrained(tmp_path / "out")
    assert again.tasks == [NAMES]
    assert all(torch.equal(value, new[name]) for name, value in again.model.state_dict().items())


def test_checkpoints_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    deep = saved(tmp_path / "resnet", ResNetForImageClassification(ResNetConfig(**RESNET)))
    config = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps({**config, "depths": [2, 1]}))
    with pytest.raises(ValueError, match="lacks .* weights .* or set pretrained: false"):
        ImageClassifier.from_backbone(str(deep))


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "resnet": (ResNetConfig, RESNET),
    "mobilenet_v2": (MobileNetV2Config, MOBILENET),
    "convnext": (ConvNextConfig, {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "vit": (ViTConfig, VIT),
    "swin": (
        SwinConfig,
        {"image_size": 16, "embed_dim": 8, "depths": [1], "num_heads": [2], "patch_size": 4, "window_size": 2},
    ),
    "deit, two heads": (DeiTConfig, VIT),
}


def _classifier(config: Any) -> Any:
    return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("classes", [5, 16])
def test_the_logits_of_a_ready_classifier_follow_the_names(family: str, classes: int) -> None:
    """16 is the width of some of them; the head is found nevertheless."""
    set_seed(0)
    kind, fields = FAMILIES[family]
    config = kind(**fields, num_labels=classes)
    two = family == "deit, two heads"
    plain: Any = DeiTForImageClassificationWithTeacher(config) if two else _classifier(config)
    names = [f"thing {i}" for i in range(classes)]
    plain.config.id2label = dict(enumerate(names))
    plain.config.label2id = {name: i for i, name in enumerate(names)}
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pixels = torch.rand(2, 3, 16, 16)
    model = ImageClassifier(plain).eval()
    order = torch.randperm(classes).tolist()
    with torch.no_grad():
        before = plain.eval()(pixels).logits
        model.use_as_is([names[i] for i in order])
        after = model(pixels).logits
    assert torch.allclose(after, before[:, order], atol=1e-6) and before.std() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(class_dimensions(plain)) == (4 if two else 2)
    with pytest.raises(ValueError, match=r"it lacks \['owl'\], the data lack \['thing"):
        ImageClassifier(plain).use_as_is([*names[1:], "owl"])
