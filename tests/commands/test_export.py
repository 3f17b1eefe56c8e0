"""hf-cdl export: the file answers as the pipeline does, in an environment without torch, for every method."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, make_backbone, make_data, picture
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
    pipeline,
)

from hf_cdl import CDLForImageClassification
from hf_cdl.commands.card import main as card
from hf_cdl.commands.export import _warn as warn
from hf_cdl.commands.export import _words as words_of
from hf_cdl.commands.export import main as export
from hf_cdl.commands.train import main as train
from hf_cdl.export import classify
from hf_cdl.export import graph as graphs
from hf_cdl.export.checking import Model, compare, opened
from hf_cdl.export.graph import onnx_graph, prepared
from hf_cdl.export.preprocessing import check_steps, resized, steps_of
from hf_cdl.export.weights import int8
from hf_cdl.heads import HEADS
from hf_cdl.heads.linear import LinearHead
from hf_cdl.hub.card.text import exports
from hf_cdl.hub.content import results_after
from hf_cdl.inference.labelled import numbers_of
from hf_cdl.runs.results import run_results

onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
pytest.importorskip("onnxscript", reason="needs the extra 'export'")

spec: Any = importlib.util.spec_from_file_location("export_parity", ROOT / "benchmarks" / "export_parity.py")
parity: Any = importlib.util.module_from_spec(spec)
sys.modules["export_parity"] = parity
spec.loader.exec_module(parity)
TWO_PASS = {"prompt": {"type": "coda", "components": 2, "length": 4, "layers": [0]}, "kd_prompt": {"alpha": 0.3}}
WIDE = 96
"""A width whose weights are larger than what torch's exporter folds by itself, 8,192 numbers."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a student that computes its query in a pass of its own."""
    folder = tmp_path_factory.mktemp("export")
    backbone = make_backbone(folder / "backbone", WIDE, 1, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    model = CDLForImageClassification.from_backbone(backbone, **TWO_PASS)
    for names in (["ant", "bee"], ["cat, big", "pélican"]):
        model.begin_task(names)
        parity._stirred(model)
    model.save_pretrained(folder / "student")
    ViTImageProcessorPil.from_pretrained(backbone).save_pretrained(folder / "student")
    return folder / "student"


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an interpreter that has onnxruntime, Pillow and numpy alone."""
    site = tmp_path_factory.mktemp("site")
    for module in (onnxruntime, np, Image):
        package = Path(str(module.__file__)).parent
        for part in (package, package.with_name("numpy.libs"), package.with_name("pillow.libs")):
            if part.exists() and not (site / part.name).exists():
                (site / part.name).symlink_to(part)
    return {"PYTHONPATH": str(site), "PATH": os.environ["PATH"]}


def classified(file: Path, images: list[Path], environment: dict[str, str], *more: str) -> list[Any]:
    """What the script beside a file answers, in an interpreter without site-packages."""
    words = [str(file.with_name("classify.py")), str(file), *map(str, images), *more]
    refused = subprocess.run([sys.executable, "-S", "-c", "import torch"], env=environment, capture_output=True)
    assert refused.returncode == 1 and b"No module named 'torch'" in refused.stderr
    done = subprocess.run([sys.executable, "-S", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(image) for image in images]
    return [line["answers"] for line in lines]


def photos(folder: Path) -> list[Path]:
    """Images of the kinds that cameras and tools write."""
    folder.mkdir()
    plain, turned = picture(1, 1, 40).resize((50, 30)), Image.Exif()
    turned[0x0112] = 6  # its right side is the top
    plain.save(folder / "plain.png")
    plain.save(folder / "turned.jpg", exif=turned, quality=95)
    plain.convert("L").save(folder / "grey.png")
    plain.convert("P").save(folder / "palette.png", transparency=3)
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    deep = np.asarray(plain.convert("L")).astype(np.uint16) * 256
    Image.fromarray(deep).save(folder / "deep.png")
    return sorted(folder.iterdir())


def test_the_file_answers_as_the_pipeline_does_without_torch(
    place: Path, tmp_path: Path, without_torch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Cropped, rotated, grey, of 16 bits: the same answers, from one file, with the class names inside."""
    images = photos(tmp_path / "photos")
    assert export([str(place), "--out", str(tmp_path / "device"), "--images", str(tmp_path / "photos")]) == 0
    file = tmp_path / "device" / "student.onnx"
    said = capsys.readouterr().out
    assert f"{file}: {file.stat().st_size / 1e6:.1f} MB, fp32, images of 16x16 pixels" in said
    assert "compared on 6 images in photos: 100.0 % the same answers" in said and "no labels" in said
    assert {path.name for path in file.parent.iterdir()} == {"student.onnx", "classify.py", "export.json"}
    assert str(ROOT).encode() not in file.read_bytes()
    classify: Any = pipeline("image-classification", model=str(place))
    for answers, image in zip(classified(file, images, without_torch), images, strict=True):
        expected = classify(str(image))
        assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected], image
        found, scores = ([answer["score"] for answer in part] for part in (answers, expected))
        np.testing.assert_allclose(found, scores, atol=1e-5)
    assert export([str(place), "--out", str(file)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_every_product_by_weights_is_quantised_also_if_two_passes_read_them(place: Path, tmp_path: Path) -> None:
    """What is left in float32 are the two products of attention, in each of two passes over one layer."""
    model = CDLForImageClassification.from_pretrained(place).eval()
    own = Model(model, ViTImageProcessorPil.from_pretrained(place))
    graph = onnx_graph(prepared(*own), own.processor, steps_of(own.processor))
    products = [node for node in graph.graph if node.op_type in ("MatMul", "Gemm")]
    assert len(products) - sum(node.inputs[1].is_initializer() for node in products) == 4
    int8(graph, tmp_path / "int8.onnx")
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "int8.onnx")).graph.node]
    assert kinds.count("MatMulInteger") == len(products) - 4 and kinds.count("MatMul") == 4
    batch = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    session = opened(tmp_path / "int8.onnx")
    logits, scores = session.run(None, {"pixels": batch})
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    expected = own.outputs([Image.fromarray(pixels) for pixels in batch])[0]
    assert 1e-4 < abs(logits - expected).max() / abs(expected).max() < 0.1


@pytest.mark.slow
def test_a_part_that_decides_by_values_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LinearHead, "prepare", lambda self, features: features if features.sum() > 0 else -features)
    assert export([str(place), "--out", str(tmp_path / "device")]) == 2
    said = capsys.readouterr().err
    assert "cannot be exported" in said and "torch.where" in said and not (tmp_path / "device").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxruntime" else name)
    assert export(["runs/none"]) == 2
    assert "needs onnxruntime, which is not installed. Install them with: pip install 'hf-cdl[export]'" in (
        capsys.readouterr().err
    )


def test_the_card_shows_the_files_of_the_newest_state_alone() -> None:
    facts = {"file": "student-int8.onnx", "revision": "task-01", "precision": "int8", "height": 16, "width": 16}
    facts |= {"bytes": 2_500_000, "images": 300, "images_of": "validation images of the run", "same_answers": 99.0}
    facts |= {
        "accuracy": 71.25,
        "accuracy_before": 71.5,
        "latency_ms": 2.0,
        "latency_before_ms": 8.0,
        "machine": "cpu",
    }
    results: dict[str, Any] = {"roles": {"student": {"accuracy_matrix": [[71.5]]}}, "exports": [facts]}
    shown = exports(results, "student") or ""
    assert "| `student-int8.onnx`, int8 | 2.5 MB | 16 x 16 | 71.2 | 71.5 | 99.0 | 2.0 ms | 8.0 ms |" in shown
    assert "Compared on 300 validation images of the run; times on cpu." in shown
    results["roles"]["student"]["accuracy_matrix"].append([70.0, 71.0])
    assert exports(results, "student") is None and exports({**results, "exports": []}, "student") is None


PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 24, "width": 18}, resample=3),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=3),
    "too small to crop": BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 29, "width": 27}),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875),
    "raw": ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False, do_rescale=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_script_resizes_and_crops_as_the_image_processor(name: str) -> None:
    assert check_steps(PROCESSORS[name], steps_of(PROCESSORS[name])) == 0


def test_a_processor_that_does_more_is_refused() -> None:
    swaps = MobileViTImageProcessorPil(
        size={"height": 16, "width": 16}, do_center_crop=False, do_flip_channel_order=True, do_normalize=False
    )
    with pytest.raises(ValueError, match="does more than resize"):
        check_steps(swaps, steps_of(swaps))


def test_another_size_keeps_the_share_that_is_cropped_away() -> None:
    made = resized(PROCESSORS["dinov2"], 42)
    assert dict(made.size)["shortest_edge"] == 48 and dict(made.crop_size) == {"height": 42, "width": 42}
    with pytest.raises(ValueError, match="--size 24"):
        resized(PROCESSORS["vit"], 24)


def test_the_comparison_is_of_what_the_script_does(tmp_path: Path) -> None:
    """Images one at a time, which 8 bits depend on; what is unknown is asked of the student as it was trained."""
    seen: list[int] = []

    class Session:
        def run(self, _: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.append(len(inputs["pixels"]))
            value = inputs["pixels"].mean(axis=(1, 2, 3))
            return [np.stack([value, 100 - value], axis=1), value[:, None], value]

    class Student:
        config, head = SimpleNamespace(num_labels=2), SimpleNamespace(config=SimpleNamespace(known=0.95))

        def __init__(self, shift: float):
            self.shift = shift
            self.head.known = SimpleNamespace(fitted=True, threshold=lambda _: 50.0, quantiles=torch.zeros(1))

        def __call__(self, pixel_values: torch.Tensor) -> Any:
            value = pixel_values.mean(dim=(1, 2, 3)) * 255
            return SimpleNamespace(logits=torch.stack([value, 100 - value], dim=1), known=value + self.shift)

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False)
    own, before = Model(Student(0.0), processor), Model(Student(30.0), processor)
    levels = [10, 30, 40, 60, 90]
    images = [Image.new("RGB", (8, 8), (level,) * 3) for level in levels]
    steps = steps_of(processor)
    found = compare(Session(), own, before, steps, images.__getitem__, np.full(len(levels), -1))
    assert seen == [1] * len(levels) and found.same_unknown == 60  # 30 and 40 were known to the student
    assert compare(Session(), own, own, steps, images.__getitem__, np.zeros(5, int)).same_unknown == 100


@pytest.mark.parametrize("kind", [None, "single_label_classification"])
@pytest.mark.parametrize("names", [["ant"], ["ant", "bee"]])
def test_scores_are_the_pipeline_s_of_any_number_of_classes(kind: Any, names: list[str], tmp_path: Path) -> None:
    model = CDLForImageClassification.from_backbone(make_backbone(tmp_path / "backbone"))
    model.begin_task(names)
    model.config.problem_type = kind
    processor, image = ViTImageProcessorPil(size={"height": 16, "width": 16}), picture(1, 1, 16)
    with torch.no_grad():
        _, scores = prepared(model, processor)(torch.from_numpy(np.asarray(image).copy())[None])
    answers = pipeline("image-classification", model=model.eval(), image_processor=processor)(image)
    expected = {answer["label"]: pytest.approx(answer["score"], abs=1e-5) for answer in answers}
    assert dict(zip(names, scores[0].tolist(), strict=True)) == expected


def test_labels_are_compared_by_their_letters_not_their_bytes() -> None:
    assert numbers_of(["cafe\u0301", "caf\u00e9", "tea"], ["tea", "caf\u00e9"]).tolist() == [1, 1, 0]


@pytest.mark.parametrize(("labels", "says"), [([0, -1, 1], "on the 2 of them in folders"), ([0, 1, 1], "in the file")])
def test_the_accuracy_says_of_how_many_images_it_is(labels: list[int], says: str) -> None:
    facts = {"bytes": 1e6, "precision": "fp32", "height": 8, "width": 8, "images": 3, "images_of": "images in x"}
    facts |= {"same_answers": 100.0, "logit_difference": 0.0, "accuracy": 50.0, "accuracy_before": 50.0}
    facts |= {"latency_ms": 1.0, "latency_before_ms": 1.0, "machine": "cpu"}
    line = next(line for line in words_of(Path("a.onnx"), facts, 0.0, np.array(labels)) if line.startswith("accuracy"))
    assert says in line and ("folders" in line) == (-1 in labels)


@pytest.mark.parametrize(("side", "says"), [(96, "a --size nearer to 48"), (24, "a --size nearer to 48")])
def test_a_size_above_the_trained_one_is_not_told_to_grow(
    side: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn({"accuracy_before": 55.0, "accuracy": 49.0, "precision": "fp32", "height": side}, 48)
    assert f"What keeps more: {says}." in capsys.readouterr().err


def test_the_script_goes_on_after_an_image_that_cannot_be_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(place), "--out", str(tmp_path / "a.onnx")]) == 0
    picture(1, 1, 40).save(tmp_path / "good.png")
    picture(1, 1, 40).save(tmp_path / "program.eps")
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "float.tif")
    names = ["bad.png", "float.tif", "program.eps", "gone.png", "good.png"]
    capsys.readouterr()
    assert classify.main(str(tmp_path / "a.onnx"), *(str(tmp_path / name) for name in names)) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == names
    assert ["error" in line for line in lines] == [True, True, True, True, False]
    assert "a program that would be run" in lines[2]["error"]
    for words in ((), ("a.onnx",), ("-h",), ("a.onnx", "good.png", "--rejct")):
        with pytest.raises(SystemExit, match="python classify.py FILE.onnx IMAGE"):
            classify.main(*words)


# ---- a run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of a ridge head, with its data."""
    folder = tmp_path_factory.mktemp("run")
    backbone, data = make_backbone(folder / "backbone"), make_data(folder / "data", classes=4, train=8, test=60)
    words = ["--backbone", str(backbone), "--output_dir", str(folder / "runs"), "--baselines", "[]"]
    words += ["--student.head", "{type: ridge, known: 0.95, scale: auto, strength: auto}"]
    assert train([str(data), *words, "--data.classes_per_task", "2", "--train.use_cpu", "true"]) == 0
    yield folder / "runs"


@pytest.mark.slow
def test_a_run_s_files_are_compared_on_its_images_and_stand_on_its_card(
    run: Path, tmp_path: Path, without_torch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """int8 in an environment without torch, on 200 images, beside the pipeline."""
    capsys.readouterr()
    for words in ([], ["--int8"], ["--fp16"], ["--size", "24", "--int8"]):
        assert export([str(run), *words]) == 0
        assert re.search(r"compared on 240 test images of the run: [\d.]+ % the same", capsys.readouterr().out)
    sizes = {file.name: file.stat().st_size for file in (run / "device").glob("*.onnx")}
    assert sizes.keys() == {"student.onnx", "student-int8.onnx", "student-fp16.onnx", "student-int8-24px.onnx"}
    assert sizes["student-fp16.onnx"] < 0.7 * sizes["student.onnx"]
    images = [tmp_path / f"{index}.png" for index in range(200)]
    for index, image in enumerate(images):  # a class in five was never learnt
        picture(index % 5, 10_000 + index, 30).save(image)
    expected = pipeline("image-classification", model=str(run / "student"))([*map(str, images)])
    exact = classified(run / "device" / "student.onnx", images, without_torch)
    small = classified(run / "device" / "student-int8.onnx", images, without_torch)
    tops = [[answer[0]["label"] for answer in answers] for answers in (exact, small, expected)]
    told = classified(run / "device" / "student.onnx", images, without_torch, "--reject")
    asked = pipeline("image-classification", model=str(run / "student"), reject=True)([*map(str, images)])
    assert any(answers[0]["label"] == "unknown" for answers in told)
    for mine, theirs in zip(told, asked, strict=True):
        assert [answer["label"] for answer in mine] == [answer["label"] for answer in theirs]
        assert mine[0]["score"] == pytest.approx(theirs[0]["score"], abs=1e-4)
    assert tops[0] == tops[2] and np.mean([a == b for a, b in zip(tops[1], tops[2], strict=True)]) >= 0.97
    assert card([str(run), "--output", str(tmp_path / "card")]) == 0
    text = (tmp_path / "card" / "student" / "README.md").read_text()
    assert "## On a device" in text and all(f"`{name}`" in text for name in sizes)
    results = run_results(run)
    assert len(results_after(results, 2)["exports"]) == 4 and "exports" not in results_after(results, 1)
    (run / "device" / "student.onnx").unlink()
    assert card([str(run), "--output", str(tmp_path / "card")]) == 0
    assert "`student.onnx`" not in (tmp_path / "card" / "student" / "README.md").read_text()


@pytest.mark.slow
def test_an_ordinary_classifier_is_exported_too(
    tmp_path: Path, without_torch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = parity.rows()["classifier: resnet"]()
    model.save_pretrained(tmp_path / "plain")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "plain")
    assert export([str(tmp_path / "plain"), "--int8", "--out", str(tmp_path)]) == 0
    assert "compared on 32 generated images" in capsys.readouterr().out
    assert export([str(tmp_path / "plain"), "--size", "64", "--out", str(tmp_path)]) == 2
    picture(1, 1, 40).save(tmp_path / "a.png")
    ((best, *_),) = classified(tmp_path / "student-int8.onnx", [tmp_path / "a.png"], without_torch)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert best["label"] in plain.config.id2label.values()


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.rows())
def test_every_method_is_exported(name: str, tmp_path: Path) -> None:
    found = parity.parity(parity.rows()[name], tmp_path)
    assert found.fp32 <= 1e-5 and found.fp16 <= 2e-2
    assert 1e-6 < found.int8 <= 0.3 and found.same >= 85


def test_every_head_and_prompt_has_a_row() -> None:
    names = " ".join(parity.rows())
    assert all(f"{head} head" in names for head in HEADS)
    with torch.no_grad():
        assert parity.rows()["ridge head"]().num_labels == 5
