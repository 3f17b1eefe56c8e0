"""hf-cdl predict: answers are the pipeline's, rows are written as they come, and what cannot be read is said."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import class_means, picture, run_script, write_recipe
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from hf_cdl.commands.train import main as train
from hf_cdl.data.images import decode
from hf_cdl.inference import answering
from hf_cdl.inference.answering import Answer
from hf_cdl.inference.contact_sheet import ContactSheet
from hf_cdl.inference.files import TABLES, atomic_files, files_of
from hf_cdl.inference.students import find_student
from hf_cdl.inference.summary import Reference, Summary, reference_of
from hf_cdl.runs.files import RunError
from hf_cdl.unknown import UNKNOWN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
Command = Callable[..., int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a student with class means, of six classes in three tasks."""
    folder = tmp_path_factory.mktemp("means")
    assert train([str(class_means(folder)), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of every kind, and among them one that is none."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for label in range(6):
        picture(label, 50, 24 + 9 * label).save(folder / f"{label}.png")
    deep = np.random.default_rng(0).integers(0, 2**16, (20, 31)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "inner" / "deep.png")
    picture(1, 60, 40).convert("RGBA").save(folder / "inner" / "clear.png")
    picture(2, 60, 40).quantize(16).save(folder / "inner" / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(3, 60, 40).save(folder / "inner" / "turned.jpg", exif=turned)
    (folder / "inner" / "broken.jpg").write_bytes(b"no image")
    (folder / "inner" / "notes.txt").write_text("not an image either, and named so")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return lambda verb, *words: run_script(verb, [*map(str, words)], monkeypatch)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def plain(folder: Path) -> Path:
    """A plain classifier's checkpoint."""
    torch.manual_seed(3)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {0: "ant", 1: "bee", 2: "cat"}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, id2label=names, initializer_range=0.5)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_answers_are_those_of_the_pipeline(run: Path, photos: Path, command: Command, workers: int) -> None:
    out = photos.parent / "answers.jsonl"
    words = ("--top-k", 4, "--batch-size", 3, "--workers", workers, "--out", out)
    assert command("predict", run, photos, *words) == 0
    classify: Any = pipeline("image-classification", model=str(run / "student"), device="cpu")
    rows = rows_of(out)
    assert [Path(row["image"]).name for row in rows] == [
        *(f"{label}.png" for label in range(6)),
        *("broken.jpg", "clear.png", "deep.png", "palette.png", "turned.jpg"),
    ]
    for row in rows:
        if "error" in row:
            assert row.keys() == {"image", "error"} and "broken.jpg: cannot be read as an image" in row["error"]
            continue
        for end, expected in zip(("", "_2", "_3", "_4"), classify(row["image"], top_k=4), strict=True):
            assert row[f"label{end}"] == expected["label"]
            assert row[f"score{end}"] == pytest.approx(expected["score"], abs=1e-5)


def test_answers_of_a_plain_classifier_are_those_of_the_pipeline(photos: Path, command: Command) -> None:
    picture(0, 0, 1).resize((1, 4000)).save(photos / "thin.png")  # squeezed by its processor, as any other
    place, out = plain(photos.parent / "plain"), photos.parent / "answers.jsonl"
    assert command("predict", place, photos, "--workers", 0, "--out", out) == 0
    classify: Any = pipeline("image-classification", model=str(place), device="cpu")
    rows = rows_of(out)
    assert [Path(row["image"]).name for row in rows if "error" in row] == ["broken.jpg", "deep.png"]
    assert any("deep.png: has 16 bits a channel, which the pipeline" in row.get("error", "") for row in rows)
    for row in rows:
        if "error" not in row:
            expected = classify(row["image"], top_k=3)
            assert [row["label"], row["label_2"], row["label_3"]] == [answer["label"] for answer in expected]
            assert row["score"] == pytest.approx(expected[0]["score"], abs=1e-5)


def test_a_model_that_tells_numbers_and_no_classes_is_refused(photos: Path, command: Command, capsys: Any) -> None:
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**{**sizes, "num_labels": 3}, image_size=32, patch_size=16, problem_type="regression")
    ViTForImageClassification(config).save_pretrained(photos.parent / "plain")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(photos.parent / "plain")
    out = photos.parent / "a.csv"
    assert command("predict", photos.parent / "plain", photos, "--out", out, "--workers", 0) == 2
    assert "problem_type: regression" in capsys.readouterr().err and not out.exists()


def test_all_tables_have_the_same_rows_and_the_summary_is_said(
    run: Path, photos: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [photos.parent / "new" / f"answers.{kind}" for kind in ("csv", "jsonl", "parquet")]
    words = [word for out in outs for word in ("--out", out)]
    assert command("predict", run, photos, "--top-k", 2, "--workers", 0, *words) == 0
    with outs[0].open(newline="") as file:
        as_csv = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    as_json, as_parquet = rows_of(outs[1]), pq.read_table(outs[2]).to_pylist()
    assert [{key: str(value) for key, value in row.items()} for row in as_json] == as_csv
    assert [{key: value for key, value in row.items() if value is not None} for row in as_parquet] == as_json
    assert sorted(path.name for path in outs[0].parent.iterdir()) == [path.name for path in outs]
    said = capsys.readouterr().out
    assert re.search(r"run/student/task-03: 10 images in [\d.]+ s \([\d,.]+ images/s\); 1 could not be read\n", said)
    assert "mean confidence: " in said and "on the run's own test images (18): " in said
    assert "not read: " in said and f"written: {outs[0]}" in said


def test_without_a_terminal_the_answers_are_csv_and_the_rest_is_said_beside_it(
    run: Path, photos: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("predict", run / "student" / "task-01", photos / "2.png", "--workers", 0) == 0
    said = capsys.readouterr()
    first, second = csv.reader(said.out.splitlines())
    assert first == ["image", "label", "score", "label_2", "score_2", "error"]  # it knows two classes
    assert second[0] == str(photos / "2.png") and second[1] in ("class a", "class b")
    assert said.err.startswith(f"{run}/student/task-01: 1 image in ")


def test_with_strict_nothing_is_written(run: Path, photos: Path, command: Command, capsys: Any) -> None:
    before = sorted(photos.parent.rglob("*"))
    words = ("--strict", "--workers", 0, "--out", photos.parent / "a.csv", "--out", photos.parent / "a.html")
    assert command("predict", run, photos, *words) == 2
    assert "broken.jpg: cannot be read as an image" in capsys.readouterr().err
    assert command("predict", run, photos, *words, "--out", photos.parent / "new" / "a.csv") == 2
    assert sorted(photos.parent.rglob("*")) == before


def test_a_name_with_any_end_of_line_is_one_cell_in_csv(tmp_path: Path) -> None:
    names = ["car\rriage.png", "line\nbreak.png", "both\r\n.png", "plain.png"]
    table = TABLES[".csv"](tmp_path / "a.csv", ["image", "label"])
    for name in names:
        table.write({"image": name, "label": "a, b"})
    table.close()
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as lines:
        assert [[*row.values()] for row in csv.DictReader(lines)] == [[name, "a, b"] for name in names]
    assert (tmp_path / "a.csv").read_bytes().startswith(b"image,label\n")


@pytest.mark.slow
def test_a_file_that_another_process_wrote_meanwhile_stays(tmp_path: Path) -> None:
    """Two processes that write the same file: the first to end has it, and the other one says so."""
    out = [tmp_path / "new" / "a.csv", tmp_path / "new" / "b.csv"]
    with pytest.raises(RunError, match="b.csv has appeared while this command ran"), atomic_files(out) as mine:
        for path in mine:
            path.write_text("mine")
        other = subprocess.run([sys.executable, "-c", OTHER, str(out[1])], capture_output=True, text=True)
        assert other.returncode == 0, other.stderr
        assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert out[1].read_text() == "theirs" and [*out[1].parent.iterdir()] == [out[1]]


OTHER = """
import sys
from pathlib import Path
from hf_cdl.inference.files import atomic_files
with atomic_files([Path(sys.argv[1])]) as (path,):
    path.write_text("theirs")
"""


def test_names_that_are_no_utf8_and_folders_named_twice(run: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [os.fsdecode(b"a\xff.png"), "b,\n.png"]
    for name in names:
        picture(1, 2).save(folder / name, "PNG")
    (folder / ".hidden.png").write_bytes(b"")
    assert files_of([folder / names[1], folder]) == [str(folder / names[1]), str(folder / names[0])]
    outs = [tmp_path / f"answers.{kind}" for kind in ("csv", "jsonl", "parquet", "html")]
    assert command("predict", run, folder, "--workers", 0, *(word for out in outs for word in ("--out", out))) == 0
    with outs[0].open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [f"{folder}/a\\udcff.png", f"{folder}/b,\n.png"]
    assert "a\\xff.png" in outs[3].read_text()


def test_the_student_that_is_meant(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    newest = find_student("run")
    assert (newest.place, newest.state, newest.measured) == ("run/student/task-03", "task-03", 2)
    assert find_student("run/student") == newest and find_student("run/student/task-03") == newest
    earlier = find_student("run", "task-02")
    assert (earlier.place, earlier.measured) == ("run/student/task-02", 1)
    results = json.loads((run / "results.json").read_text())["roles"]["student"]
    assert reference_of(earlier) == Reference(results["confidence"][1], 12, "test", 0)
    with pytest.raises(RunError, match="has no student task-07; it has task-01, task-02, task-03"):
        find_student("run", "task-07")
    alone = Path(shutil.copytree(run / "student" / "task-01", tmp_path / "alone"))
    assert reference_of(find_student(str(alone))).startswith("no results of a run lie beside")  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_reading_process_that_dies_is_said(tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(plain(tmp_path / "plain"))
    images = answering.Images(lambda index: os._exit(9), str, 4, None, False)
    with pytest.raises(RunError, match=r"was ended \(DataLoader worker .* --workers 0"):
        list(answering.outputs(model, images, 2, 1))


# ---- rejection


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a student that tells which images are of none of its classes."""
    folder = tmp_path_factory.mktemp("telling")
    recipe = yaml.safe_load(class_means(folder).read_text())
    recipe["student"]["head"] = {"type": "ridge", "strength": 1.0, "known": 0.9}
    assert train([str(write_recipe(folder / "tells.yaml", recipe)), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("share", [None, 0.6])
def test_what_is_rejected_is_what_the_pipeline_rejects(
    telling: Path, photos: Path, command: Command, capsys: pytest.CaptureFixture[str], share: float | None
) -> None:
    outs = [photos.parent / "answers.jsonl", photos.parent / "sheet.html"]
    words = ("--reject", *([] if share is None else [share]), "--out", outs[0], "--out", outs[1])
    assert command("predict", telling, photos, "--workers", 0, *words) == 0
    classify: Any = pipeline("image-classification", model=str(telling / "student"), device="cpu")
    rows = [row for row in rows_of(outs[0]) if "error" not in row]
    for row in rows:
        expected = classify(row["image"], top_k=3, reject=True if share is None else share)
        assert [row["label"], row["label_2"], row["label_3"]] == [answer["label"] for answer in expected]
        assert row["score"] == pytest.approx(expected[0]["score"], abs=0.006)  # of unknown, in steps of half a percent
    count = sum(row["label"] == UNKNOWN for row in rows)
    assert 0 < count and outs[1].read_text().count('<figure class="unknown">') == count
    share = 0.9 if share is None else share
    said = f"rejected as unknown: {10 * count:.1f} %; of images of its own classes {100 * (1 - share):.3g} % would be"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rejected", "says"), [(40, "none of its classes"), (6, "may be chance"), (5, "no more than expected")]
)
def test_the_share_of_rejected_images_in_words(rejected: int, says: str) -> None:
    found = Summary()
    for number in range(100):
        found.add(Answer([("class a", 0.5)], 0.5, number < rejected))
    assert says in found.rejected_text(0.05)


# ---- words and figures


def summary(confidence: float, count: int, spread: float = 0.1) -> Summary:
    found = Summary()
    for number in range(count):
        sure = confidence + (spread if number % 2 else -spread)
        found.add(Answer([("class a", sure)], sure))
    return found


@pytest.mark.parametrize(
    ("confidence", "count", "says"),
    [
        (0.60, 400, "These images look different from those"),
        (0.71, 4000, "much like those, if a little harder"),
        (0.60, 2, "may be chance"),
        (0.74, 400, "may be chance"),
        (0.85, 400, "no harder than those"),
    ],
)
def test_confidence_is_compared_with_that_of_the_run(confidence: float, count: int, says: str) -> None:
    said = summary(confidence, count).compared(Reference(74.0, 1000, "test", 0))
    assert f"mean confidence: {100 * confidence:.1f} %; on the run's own test images (1,000): 74.0 %" in said
    assert says in said


@pytest.mark.parametrize(("count", "says"), [(1, "may be chance"), (5, "may be chance"), (400, "look different")])
def test_a_few_images_that_are_alike_prove_nothing(count: int, says: str) -> None:
    """Their own deviation is none."""
    assert says in summary(0.5519, count, spread=0.0).compared(Reference(66.9, 120, "test", 0))


def test_a_student_changed_since_is_said_to_be() -> None:
    said = summary(0.6, 50).compared(Reference(74.0, 1000, "validation", 2))
    assert "validation images (1,000, before its 2 changes): 74.0 %" in said


def test_as_many_workers_as_there_is_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(4)}, raising=False)
    assert [answering.useful_workers(batches) for batches in (0, 1, 2, 3, 100)] == [0, 0, 1, 2, 4]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(64)})
    assert answering.useful_workers(1000) == 16


# ---- the contact sheet


def sheet(folder: Path, most: int, count: int = 7) -> str:
    """A page of `count` images whose confidence is 0.9, 0.8, ...; the fourth file is gone when it is written."""
    found, totals = ContactSheet(most), Summary(unreadable=1)
    for number in range(count):
        picture(number, 0, 300).save(folder / f"{number}.png")
        answers = [(f"<b>class {number}</b>", 0.9 - number / 10), ("other", 0.05)]
        answer = Answer([(UNKNOWN, 1.0), *answers] if number == 1 else answers, answers[0][1], number == 1)
        found.add(str(folder / f"{number}.png"), answer)
        totals.add(answer)
    found.add_unreadable("<i>bad.png", "<u>empty")
    (folder / "3.png").unlink()
    found.write(folder / "sheet.html", "a & b", totals, ["all <fine>"], decode)
    return (folder / "sheet.html").read_text()


def test_the_least_sure_come_first_and_others_are_left_out(tmp_path: Path) -> None:
    page = sheet(tmp_path, most=5)
    shown = page.split("The least sure first")[-1]
    assert re.findall(r'<span title="&lt;b&gt;class (\d)&lt;/b&gt;">', shown) == [*"16543"]  # 1 is rejected
    assert shown.count('<figure class="unknown">') == 1 and "First come those that are answered" in shown
    assert "The 5 images with the lowest confidence; the other 2 are left out." in page
    assert page.count("data:image/jpeg;base64,") == 4 and page.count("cannot be read any more") == 1
    assert len(page) < 120_000


def test_what_others_chose_is_escaped(tmp_path: Path) -> None:
    page = sheet(tmp_path, most=9)
    assert "All 7 images by their confidence." in page
    assert not re.search(r"<(b>class|i>|u>|fine>)", page) and "a &amp; b" in page and "&lt;i&gt;bad.png" in page


@pytest.mark.slow
def test_the_sheet_in_a_browser(tmp_path: Path) -> None:
    """It asks for nothing from elsewhere, shows every thumbnail, and nothing sticks out on a phone."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    sheet(tmp_path, most=9)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        for width, scheme in ((390, "dark"), (1280, "light")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            asked = list[str]()
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((tmp_path / "sheet.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            loaded = "[...document.images].filter(image => image.scrollIntoView() || image.naturalWidth).length"
            page.wait_for_function(f"{loaded} == 6")
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (back == "rgb(255, 255, 255)") == (scheme == "light")
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        browser.close()
