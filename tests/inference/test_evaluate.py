"""hf-cdl evaluate: a student's numbers on labelled images, also of several revisions, in words, JSON and pictures."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import class_means, make_backbone, make_recipe, picture, run_script, write_recipe
from PIL import Image

from hf_cdl import CDLForImageClassification, StreamConfig, TaskStream
from hf_cdl.commands import evaluate as evaluate_command
from hf_cdl.commands.add import main as add
from hf_cdl.commands.train import main as train
from hf_cdl.inference import answering
from hf_cdl.inference.answering import Batch
from hf_cdl.inference.measuring import Measured, Options, common, measure
from hf_cdl.inference.pictures import latent_figure, mistakes_figure, usage_figure
from hf_cdl.recipe.build import load_processor
from hf_cdl.training.evaluation import ood_metrics
from hf_cdl.unknown import thresholds

Command = Callable[..., int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a student with class means, of six classes in three tasks, beside its data."""
    folder = tmp_path_factory.mktemp("means")
    assert train([str(class_means(folder)), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return lambda verb, *words: run_script(verb, [*map(str, words), "--workers", "0"], monkeypatch)


def of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())["roles"]["student"]


def test_two_revisions_are_as_their_run_recorded(
    run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", run.parent / "data"
    assert command("evaluate", run, data, "--revision", "task-02", "--revision", "task-03", "--out", out) == 0
    found, recorded = json.loads((out / "evaluation.json").read_text()), of(run)
    for name, task in (("task-02", 1), ("task-03", 2)):
        own = found["revisions"][name]
        assert own["images"] == 6 * (task + 1) and len(own["classes"]) == 2 * (task + 1)
        assert own["accuracy"] == pytest.approx(np.mean(recorded["accuracy_matrix"][task]))
        for metric in ("confidence", "calibration_error"):
            assert own[metric] == pytest.approx(recorded[metric][task], abs=1e-3)
        assert own["class_accuracy"] == pytest.approx(recorded["class_accuracy"][task])
    assert found["revisions"]["task-02"]["unknown_classes"] == {"class e": 3, "class f": 3}
    assert found["common"]["images"] == 12
    assert found["common"]["accuracy"]["task-03"] == pytest.approx(np.mean(recorded["accuracy_matrix"][2][:2]))
    for picture_name in ("confusion_task-02", "confusion_task-03", "calibration"):
        with Image.open(out / f"{picture_name}.png") as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(10**6) or []) > 20
    said = capsys.readouterr().out
    assert "accuracy per class (task-02, task-03):\n" in said
    assert "measured on the split test; not read: train" in said and "on the 12 that all know" in said
    assert "task-02 does not know, and was not measured on, 6 images of class e (3), class f (3)" in said


def test_images_that_it_learnt_are_left_out(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder without splits the run held some images out; others are as good as the answers in the back."""
    monkeypatch.chdir(tmp_path)
    for label in range(3):
        (Path("photos") / f"kind {label}").mkdir(parents=True)
        for number in range(8):
            picture(label, number).save(Path("photos") / f"kind {label}" / f"{number}.png")
    make_backbone(Path("backbone"))
    recipe = {
        "data": {"path": "photos", "test_fraction": 0.25, "classes_per_task": None},
        "student": {"backbone": "backbone", "head": {"type": "ncm"}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    assert train([str(write_recipe(Path("held.yaml"), {"name": "held", **recipe}))]) == 0
    assert command("evaluate", "runs/held", "photos") == 0
    assert "left out: 18 images that it learnt from\n" in capsys.readouterr().out
    found = json.loads(Path("evaluations/held-photos/evaluation.json").read_text())["revisions"]["task-01"]
    assert found["images"] == 6 and found["accuracy"] == pytest.approx(of(Path("runs/held"))["accuracy_matrix"][0][0])
    assert command("evaluate", "runs/held", "photos", "--split", "train", "--out", "all") == 0
    assert json.loads(Path("all/evaluation.json").read_text())["revisions"]["task-01"]["images"] == 24
    assert "18 of these images it learnt from, so its accuracy on them says little\n" in capsys.readouterr().out


def test_images_that_it_learnt_are_known_in_a_part_of_its_data_and_after_a_change(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "photos", tmp_path / "run"
    for label, number in itertools.product(range(2), range(12)):
        folder = data / ("test" if number > 7 else "train") / f"class {'ab'[label]}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(label, number).save(folder / f"{number}.png")
    words = ["--backbone", str(make_backbone(tmp_path / "backbone")), "--baselines", "[]", "--train.use_cpu", "true"]
    head = "{type: ridge, scale: auto, strength: auto}"
    assert train([str(data), *words, "--student.head", head, "--output_dir", str(run)]) == 0
    capsys.readouterr()
    assert command("evaluate", run, data / "train", "--out", tmp_path / "a") == 2
    assert "were learnt by the student" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert command("evaluate", run, data / "test", "--out", tmp_path / "b") == 0
    assert "learnt from" not in capsys.readouterr().out
    changed, more = tmp_path / "changed", tmp_path / "more"
    shutil.copytree(run, changed)
    for number in range(4):
        (more / "class a").mkdir(parents=True, exist_ok=True)
        picture(0, 900 + number).save(more / "class a" / f"{number}.png")
    assert add([str(changed), str(more)]) == 0
    picture(0, 990).save(more / "class a" / "new.png")
    capsys.readouterr()
    assert command("evaluate", changed, more, "--out", tmp_path / "c") == 0
    assert "left out: 4 images that it learnt from\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "evaluation.json").read_text())["revisions"]["task-02"]["images"] == 1
    assert command("evaluate", changed, more, "--revision", "task-01", "--out", tmp_path / "d") == 0
    assert "learnt from" not in capsys.readouterr().out


def test_classes_and_images_that_do_not_count_are_said(
    run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for label, name in ((0, "class a"), (1, "class b"), (2, "newt")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            picture(label, number).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "class a" / "broken.png").write_bytes(b"")
    monkeypatch.setattr(evaluate_command, "plotting_available", lambda: False)
    assert command("evaluate", run, tmp_path / "photos", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "was not measured on, 2 images of newt (2)" in said
    assert "no images here of 4 of its 6 classes: class c, class d, class e, class f" in said
    assert "not read: " in said and "broken.png: the image is empty" in said
    assert "No pictures: they need matplotlib" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["evaluation.json"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["revisions"]["task-03"]["images"] == 4
    assert command("evaluate", run, tmp_path / "photos", "--out", tmp_path / "out") == 2
    assert "is not empty; choose another folder" in capsys.readouterr().err


def test_images_of_other_classes_are_told_from_its_own(tmp_path: Path, command: Command, capsys: Any) -> None:
    recipe = yaml.safe_load(class_means(tmp_path).read_text())
    recipe["student"]["head"] = {"type": "ridge", "strength": 1.0, "known": 0.9}
    recipe["data"]["max_classes"] = 4
    assert train([str(write_recipe(tmp_path / "tells.yaml", recipe)), "--output_dir", str(tmp_path / "run")]) == 0
    assert command("evaluate", tmp_path / "run", tmp_path / "data", "--out", tmp_path / "out", "--reject") == 0
    own = json.loads((tmp_path / "out" / "evaluation.json").read_text())["revisions"]["task-02"]
    assert own["images"] == 12 and own["unknown_classes"] == {"class e": 3, "class f": 3}
    assert own["accuracy"] == pytest.approx(np.mean(of(tmp_path / "run")["accuracy_matrix"][1]))
    model = CDLForImageClassification.from_pretrained(tmp_path / "run" / "student").eval()
    stream = TaskStream(
        StreamConfig(str(tmp_path / "data"), classes_per_task=6), load_processor(tmp_path / "run/student")
    )
    pixels = torch.stack([stream[0].test[index]["pixel_values"] for index in range(18)])
    with torch.no_grad():
        known, least = model(pixels).known, thresholds(model, True)[0]
    expected = ood_metrics(known[:12], known[12:], float(least))
    assert {key: own["told"][key] for key in expected} == pytest.approx(expected, abs=0.01)
    assert own["told"]["kept"] == pytest.approx(100 * float((known[:12] >= least).float().mean()))
    assert (
        f"task-02 keeps {own['told']['kept']:.1f} % of the images of its classes, of which" in capsys.readouterr().out
    )


def made(labels: list[int], answers: list[int], confidence: list[float], first: int = 0) -> Measured:
    indices = np.arange(first, first + len(labels))
    given = (indices, np.array(labels), np.array(answers), np.array(confidence))
    return Measured("task-01", ["ant", "bee", "cat"], *given, {"accuracy": 50.0}, {})


def test_figures_worked_by_hand() -> None:
    found = made([0, 0, 0, 1], [0, 1, 1, 1], [0.95, 0.5, 0.52, 0.94])
    assert found.counts() == {"ant": 3, "bee": 1}
    assert found.class_accuracy() == pytest.approx({"ant": 100 / 3, "bee": 100})
    assert found.confusion().tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert found.confused() == [("ant", "bee", 2)]
    low, high = found.calibration()
    assert low == pytest.approx({"confidence": 51, "accuracy": 0, "images": 2})
    assert high == pytest.approx({"confidence": 94.5, "accuracy": 100, "images": 2})
    other = made([0, 1, 1], [0, 0, 1], [0.9, 0.9, 0.9], first=2)
    assert common([found, other]).tolist() == [2, 3]
    assert (found.accuracy_on(common([found, other])), other.accuracy_on(common([found, other]))) == (50.0, 50.0)


# ---- the run's own images, and pictures ----


def test_without_images_those_of_the_run_are_measured_and_join_its_report(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = {"type": "l2p", "pool_size": 4, "length": 2, "top_k": 2}
    recipe = make_recipe(tmp_path, teacher=None, distill=[], ce_weight=1.0, baselines=["nearest_class_mean"])
    recipe["student"]["prompt"] = prompt
    recipe["train"]["num_train_epochs"] = 1
    run = tmp_path / "run"
    assert train([str(write_recipe(tmp_path / "l2p.yaml", recipe)), "--output_dir", str(run)]) == 0
    before = (run / "report.html").read_text()
    assert "data:image/png" in before and "Mistakes" not in before
    assert command("evaluate", run / "nearest_class_mean") == 0, "of another role, which the report is not about"
    assert (run / "evaluation" / "nearest_class_mean-task-03").is_dir() and (run / "report.html").read_text() == before
    capsys.readouterr()
    assert command("evaluate", run, "--revision", "task-01", "--revision", "task-03") == 0
    said, folder = capsys.readouterr().out, run / "evaluation" / "task-03"
    assert "note: measured on the test images of the run" in said and f"also in the run's report: {run}/" in said
    found, recorded = json.loads((folder / "evaluation.json").read_text()), of(run)
    assert found["revisions"]["task-03"]["accuracy"] == pytest.approx(np.mean(recorded["accuracy_matrix"][2]))
    assert found["revisions"]["task-01"]["images"] == 6
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == before.count("data:image/png") + len(
        {"mistakes", "latent_map", "prompt_usage", "confusion", "calibration"}
    )
    assert command("evaluate", run, "--revision", "task-01", "--revision", "task-03") == 2
    assert "is not empty; choose another folder" in capsys.readouterr().err
    assert command("evaluate", run, "--split", "train", "--out", tmp_path / "new") == 2
    assert "--split is about IMAGES, but there are none" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")
    assert command("evaluate", run, "--out", tmp_path / "new") == 2 and not (tmp_path / "new").exists()
    assert "error: " in capsys.readouterr().err


def test_a_student_of_no_run_has_no_images_of_its_own(
    run: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "student" / "task-03", tmp_path / "alone")
    assert command("evaluate", tmp_path / "alone") == 2
    assert "is not in a run's folder, so it has no images of its own" in capsys.readouterr().err


class Query(torch.nn.Module):
    """A model whose pixels are its features, logits and query."""

    def __init__(self, pool: Any = None) -> None:
        super().__init__()
        self.pool, self.dtype = pool, torch.float32
        self.config = SimpleNamespace(id2label={0: "ant", 1: "bee", 2: "cat"}, num_labels=3, model_type="cdl")
        self.config.tasks = [["ant", "bee"], ["cat"]]

    def forward(self, pixel_values: torch.Tensor) -> Any:
        values = pixel_values.mean(dim=(2, 3))
        return SimpleNamespace(logits=values, features=2 * values, query=values)


def test_features_and_prompts_are_averaged_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three images of two classes, in batches of two; the third class has none."""
    pixels = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 0.5]])
    batches = [
        Batch([0, 1], pixels[:2], None, {}, 2 * pixels[:2], (pixels[:2] > 0).float()),
        Batch([2], pixels[2:], None, {}),
    ]
    batches[1] = batches[1]._replace(features=2 * pixels[2:], usage=(pixels[2:] > 0).float())
    monkeypatch.setattr(answering, "outputs", lambda *given: iter(batches))
    images: Any = SimpleNamespace(labels=["cat", "ant", "cat"], classes=["ant", "cat"], decode=None, name=None)
    images.chosen = lambda rows: images
    found = measure("task-02", Query(), None, images, Options())
    assert found.means is not None and found.usage is not None
    np.testing.assert_allclose(found.means, [[0, 2, 0], [np.nan] * 3, [0, 0, 1.5]])
    np.testing.assert_allclose(found.usage, [[0, 1, 0], [np.nan] * 3, [0, 0, 1]])
    assert found.tasks == [["ant", "bee"], ["cat"]] and usage_figure(found, "use") is not None


def test_the_surest_mistakes_come_first_and_each_pair_once() -> None:
    found = made([0, 0, 0, 1, 2], [1, 1, 0, 2, 2], [0.6, 0.9, 0.99, 0.7, 0.5])
    asked: list[int] = []
    figure = mistakes_figure(found, lambda index: (asked.append(index), picture(0, index))[1])
    assert asked == [1, 3] and figure is not None
    assert [panel.get_title() for panel in figure.axes[:3]] == ["ant\n→ bee 90 %", "bee\n→ cat 70 %", ""]
    assert mistakes_figure(made([0], [0], [0.9]), lambda index: picture(0, 0)) is None


def test_the_map_keeps_its_directions_over_states_and_shows_classes_as_they_come() -> None:
    """Means that lie on a line are on one direction; names that no font may have become numbers."""
    new = made([0, 1, 2], [0, 1, 2], [0.9] * 3)
    new.means, new.tasks = np.array([[0.0, 0, 0], [3, 0, 0], [6, 0, 0.1]]), [["ant", "猫"], ["cat"]]
    new.classes = ["ant", "猫", "cat"]
    old = made([0], [0], [0.9])
    old.means, old.tasks, old.classes, old.revision = (
        new.means[:2] + [1, 0, 0],
        [["ant", "猫"]],
        ["ant", "猫"],
        "task-00",
    )
    figure: Any = latent_figure([old, new], "$x^$")
    first, second = figure.axes[:2]
    (before,), (after,) = ([p.get_offsets()[1, 0] for p in panel.collections[:1]] for panel in (first, second))
    assert abs(before - after) == pytest.approx(1, abs=1e-3), "the same class has moved by one on the first direction"
    assert [text.get_text() for text in second.texts] == ["ant", "class 2", "cat"]
    figure.savefig(io.BytesIO())
    back: Any = latent_figure([new, old], "from the state that knows more classes")
    assert back is None, "two classes span no plane"
    old.means, old.classes, old.tasks = new.means, new.classes, [["ant", "猫", "cat"]]
    back = latent_figure([new, old], "from the state of more tasks")
    assert [list(panel.collections[0].get_array()) for panel in back.axes[:2]] == [[1, 1, 2], [1, 1, 1]]
    assert latent_figure([made([0], [0], [0.9])], "no features") is None


def test_the_use_of_prompts_is_said_of_the_tasks_that_have_images() -> None:
    found = made([2], [2], [0.9])
    found.tasks, found.usage = [["ant", "bee"], ["cat"]], np.array([[np.nan] * 2, [np.nan] * 2, [0.25, 0.75]])
    figure: Any = usage_figure(found, "use")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["2"]
