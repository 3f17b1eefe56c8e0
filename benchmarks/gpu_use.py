"""Rows of gpu_check.py about use: sums, kill and resume, changes, the pipeline and commands, on a device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import torch
import yaml
from small import Images, model_of, pair_of, picture, task_of, trainer_of, vit
from transformers import TrainerCallback, ViTImageProcessor, ViTModel, pipeline

from hf_cdl import CDLForImageClassification
from hf_cdl.runs.run import Run
from hf_cdl.types import CDLOutput

SUMS = 1e-6
"""Largest allowed difference between the tensors of a head fitted to the same features on both devices."""
ROOT = Path(__file__).parent.parent


def rows() -> dict[str, Callable[[str, Path], str]]:
    found = {f"sums of head {name}": sums(head) for name, head in gpu_check.heads().items() if _fitted(head)}
    found |= {f"killed and resumed{name}": resumed(train) for name, train in RESUMED.items()}
    found |= {"add, correct, remove, merge, undo": changes, "pipeline": answered, "commands": commands}
    return found


def _fitted(head: dict[str, Any]) -> bool:
    return model_of(vit(), head=head).fitted


def placed(backbone: Any, place: Any, **fields: Any) -> Any:
    return model_of(backbone, **fields).eval().to(place)


def sums(head: dict[str, Any]) -> Callable[[str, Path], str]:
    """Fit a head to the same features on the device and on the CPU, two tasks."""

    def check(device: str, folder: Path) -> str:
        found = []
        for place in (device, "cpu"):
            model, draw = placed(vit(), place, head=head), torch.Generator().manual_seed(0)
            for index in range(2):
                model.begin_task(task_of(index).class_names)
                labels = torch.arange(40) % 3 + 3 * index
                features = torch.randn(40, 32, generator=draw) + labels[:, None] * torch.randn(32, generator=draw)
                layers = torch.randn(40, 3, 32, generator=draw)
                output = CDLOutput(features=features.to(place), layers=layers.to(place))
                if model.unmeasured:
                    model.measure(output)
                model.accumulate(output, labels.to(place))
                model.end_task()
            found.append(model.head.state_dict())
        apart, name = gpu_check.largest_difference(*found)
        assert apart <= SUMS, f"{name} differs by {apart:.1e} of its largest value"
        return f"{apart:.0e}"

    return check


class Kill(TrainerCallback):
    """Ends a phase in the middle, after a state has been stored."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


RESUMED: dict[str, dict[str, Any]] = {
    "": {},
    ", bf16": {"bf16": True},
    ", full_determinism": {"full_determinism": True},
}


def resumed(train: dict[str, Any]) -> Callable[[str, Path], str]:
    """A run that was ended in the middle of its second task and resumed, and two that were not: equal to the bit."""

    def check(device: str, folder: Path) -> str:
        options = {"use_cpu": device == "cpu", "save_strategy": "steps", "save_steps": 2, **train}
        found = []
        for name, kill in (("whole", False), ("again", False), ("cut", True), ("cut", False)):
            student, teacher, objective = pair_of(vit(32), vit(48), "coda", [{"type": "kdp"}])
            for index in range(2):
                teacher.begin_task(task_of(index).class_names)
            run = Run(folder / name, {"name": "small"}, say=lambda line: None)
            run.bind("small", [[*task_of(index).class_names] for index in range(2)])
            stored = run.checkpoint("student")
            if stored is not None:
                student = CDLForImageClassification.from_pretrained(str(stored))
            trainer = trainer_of(student, folder, objective, teacher, run=run, **options)
            trainer.learn(task_of(0))
            trainer.evaluate_seen()
            if kill:
                trainer.callback_handler.add_callback(_hidden(Kill))
            try:
                trainer.learn(task_of(1))
                found.append(student.state_dict())
            except KeyboardInterrupt:
                assert any((folder / name / "work").rglob("checkpoint-*")), "nothing was stored before the end"
            run.close()
        own = gpu_check.largest_difference(found[0], found[1])
        cut = gpu_check.largest_difference(found[0], found[2])
        same = all(torch.equal(found[0][name], value) for name, value in found[2].items())
        said = f"two whole runs differ by {own[0]:.0e}, the resumed one by {cut[0]:.0e}"
        assert same, f"{said} ({cut[1]})"
        return said

    return check


def _hidden(callback: type[TrainerCallback]) -> TrainerCallback:
    """A callback that counts as the package's own: a user's may steer the training, which needs more images."""
    return type(callback.__name__, (callback,), {"__module__": "hf_cdl.check"})()


def changes(device: str, folder: Path) -> str:
    """Change a model on the device and on the CPU: the same classes, weights to 1e-3 of the largest."""
    found = []
    for place in (device, "cpu"):
        head = {"type": "ridge", "known": 0.9, "strength": "auto", "scale": "auto"}
        model = placed(vit(), place, head=head)
        pixels, labels = Images(24).images, [f"class {number % 3}" for number in range(24)]
        model.add(pixels, labels)
        model.add(pixels + 1, [f"class {3 + number % 2}" for number in range(24)])
        model.correct(pixels[:2], ["class 4", "class 4"], labels[:2])
        model.remove("class 2", pixels[2::3])
        model.merge(["class 3", "class 4"], "both")
        model.rename("both", "one")
        model.remove("class 1")
        model.undo()
        assert {value.device.type for value in model.state_dict().values()} == {place}
        found.append(model)
    assert found[0].tasks == found[1].tasks
    apart = gpu_check.largest_difference(*(model.state_dict() for model in found))
    assert apart[0] <= gpu_check.WEIGHTS, f"{apart[1]} differs by {apart[0]:.1e} of its largest value"
    return f"{apart[0]:.0e}, logits {gpu_check.reloaded(found[0], device, folder):.0e}"


def answered(device: str, folder: Path) -> str:
    """The pipeline's answers on the device and on the CPU."""
    model = gpu_check.learnt(device, folder, "coda", [{"type": "kdp"}])
    model.save_pretrained(folder / "student")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "student")
    place = 0 if device == "cuda" else "cpu"
    ask = [pipeline("image-classification", model=str(folder / "student"), device=at) for at in (place, "cpu")]
    ours, theirs = (
        [{a["label"]: a["score"] for a in answer} for answer in one([picture(n) for n in range(4)])] for one in ask
    )
    apart = max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True) for name in a)
    assert apart <= 1e-4, f"scores differ by {apart:.1e}"
    return f"scores {apart:.0e}"


def commands(device: str, folder: Path) -> str:
    """train, evaluate, predict, export, verify, add and correct of a small run, as commands."""
    for split, numbers in (("train", range(24)), ("test", range(100, 112))):
        for number in numbers:
            file = folder / "data" / split / f"class {number % 4}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(file)
    for name, width in (("teacher", 48), ("student", 32)):
        torch.manual_seed(0)
        ViTModel(vit(width), add_pooling_layer=False).save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / name)
    prompt = {"type": "coda", "components": 3, "length": 4, "layers": [0, 1]}
    recipe = {
        "name": "small", "data": {"path": str(folder / "data"), "classes_per_task": 2},
        "teacher": {"backbone": str(folder / "teacher"), "prompt": prompt},
        "student": {"backbone": str(folder / "student"), "prompt": prompt}, "distill": [{"type": "kdp"}],
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": device == "cpu"},
        "baselines": ["nearest_class_mean", "ridge_head"],
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    run, said = folder / "run", []
    test = str(folder / "data" / "test")
    for words in (
        ["train", str(folder / "small.yaml"), "--output_dir", str(run)],
        ["verify", str(run)],
        ["evaluate", str(run), test, "--out", str(folder / "evaluated")],
        ["predict", str(run), test, "--out", str(folder / "answers.csv")],
        ["export", str(run), "--out", str(folder / "student.onnx")],
    ):
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        done = subprocess.run(
            [sys.executable, "-m", "hf_cdl", *words], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1", **hidden},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines() or ["nothing was said"]
        assert done.returncode == 0, f"hf-cdl {words[0]} ended with {done.returncode}: {' / '.join(lines[-3:])}"
        said.append(words[0])
    return ", ".join(said)
