"""hf-cdl demo and the files of a Space: real processes, a local Hub, and a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import app
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers import ROOT, class_means, make_table, picture, png, python, script, write_recipe
from hub_server import HubServer
from huggingface_hub import HfApi
from markup import answers_html, state_html
from PIL import Image
from states import Results, States, StatesError
from test_hub import STUDENT, TEACHER, TOKEN, Said, environment, hub, pushed, pusher, saved_run, tiny  # noqa: F401
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_cdl.commands.demo import examples
from hf_cdl.commands.train import main as train_main

SPACE = ROOT / "hf_cdl" / "commands" / "space"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_states_of_a_runs_folder(tmp_path: Path) -> None:
    results = saved_run(tmp_path, 3)
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert States(str(tmp_path)).folder == States(str(tmp_path / "student")).folder
    states = States(str(tmp_path))
    assert states.tasks == [1, 2, 3] and states.earlier("task-02") == 2
    names = [["class 0a", "class 0b"], ["class 1a", "class 1b"]]
    assert states.results(2) == Results("tiny", names, [[51.0], [52.0, 53.0]])
    with pytest.raises(StatesError, match=re.escape("has no folders task-01, task-02, ... Name a repository")):
        States(str(tmp_path / "student" / "task-01"))
    for name in ("task-03", "task-3", "TASK-01", "3", ""):  # the newest, and others
        with pytest.raises(StatesError, match=f"has no {name} to compare with its newest state, task-03; earlier"):
            states.earlier(name)
    (tmp_path / "results.json").unlink()
    with pytest.raises(StatesError, match=r"after task 1 cannot be read \(FileNotFoundError"):
        States(str(tmp_path / "student")).results(1)


_ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from states import States, StatesError
def ask(where):
    try:
        states = States(where)
        return {task: states.results(task) for task in states.tasks}
    except StatesError as error:
        return str(error)
print(json.dumps({where: ask(where) for where in sys.argv[2:]}))
"""


def ask(*repositories: str, env: dict[str, str]) -> dict[str, Any]:
    """What a separate process reads from repositories: their results by task, or the error."""
    return json.loads(python(_ASK, SPACE, *repositories, env=env).splitlines()[-1])


def test_the_states_of_a_repository_and_what_is_said_where_there_are_none(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    results = saved_run(tmp_path / "run", 2, 3)
    assert pusher(hub, tmp_path / "run", Said()).finish(results)
    HfApi(hub.url, token=TOKEN).create_repo("me/empty", private=False)
    said = ask(STUDENT, "me/empty", "me/nothing", "not/a/name", env=environment(hub, tmp_path / "home"))
    matrix = results["roles"]["student"]["accuracy_matrix"]
    assert said[STUDENT] == {
        str(task): ["tiny", results["class_names"][:task], matrix[:task], None] for task in (1, 2)
    }
    assert said["me/empty"].startswith("me/empty has no tags task-01, task-02, ... Name a repository that a run was")
    assert said["me/nothing"].startswith(
        "me/nothing is not a folder here, and on the Hub it does not exist or is priv"
    )
    assert said["not/a/name"] == "not/a/name is neither a folder here nor a repository's name, OWNER/NAME."
    without = {**environment(hub, tmp_path / "other"), "HF_TOKEN": ""}
    assert "log in with `hf auth login`, or set HF_TOKEN" in ask(STUDENT, env=without)[STUDENT]


def test_the_demo_ends_with_a_plain_error(tmp_path: Path) -> None:
    code, said = script("demo", tmp_path, env={})
    assert code == 2 and said.startswith(f"error: {tmp_path} has no folders task-01"), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "set the Space's variable HF_CDL_REPO"),
        ({"HF_CDL_REPO": "me/gone"}, "me/gone"),
        ({"HF_CDL_REPO": "me/gone", "HF_CDL_REJECT": "most"}, "HF_CDL_REJECT is most"),
    ],
)
def test_a_space_that_names_no_repository_says_so(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    """As in a Space: only its files, and environment variables instead of arguments."""
    shutil.copytree(SPACE, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    command, env = [sys.executable, "app.py"], {**os.environ, "HF_HUB_OFFLINE": "1"}
    options: dict[str, Any] = {"cwd": tmp_path / "space", "env": {**env, **variables}}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode in (1, 2) and done.stderr.startswith("error: ") and said in done.stderr, done.stderr


def test_names_are_text_not_markup_and_what_was_not_measured_is_a_dash() -> None:
    names = [["<b>", "b"], ["c"]]
    answers = [{"label": "c", "score": 0.9}, {"label": "<b>", "score": 0.0999}]
    cells = re.findall(r"<td[^>]*>([^<]*)", answers_html(answers, names))
    assert cells == ["c", "2", "90.0&nbsp;%", "&lt;b&gt;", "1", "10.0&nbsp;%"]
    page = state_html(Results("run", names, [[None], [40.0, 60.0]]))
    assert "After task 2: 3 classes, average accuracy 50.0&nbsp;%" in page
    assert "<b>" not in page and "&lt;b&gt;, b" in page
    assert re.findall(r"<td[^>]*>([\d.–]+)", page) == ["–", "40.0", "60.0", "–", "40.0", "60.0", "60.0"]
    assert "average" not in state_html(Results("run", names, [[50.0], [None, 60.0]]))


def test_the_files_of_the_space_fit_the_package() -> None:
    about = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert (SPACE / about["app_file"]).is_file() and about["sdk"] == "gradio"
    assert f"gradio=={about['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    needed = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    project = (ROOT / "pyproject.toml").read_text()
    assert needed and all(f'    "{line}",\n' in project for line in needed)


# ---- options, and the run's own images ----


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks whose student can tell unknown images, with validation images."""
    folder = tmp_path_factory.mktemp("telling")
    recipe = yaml.safe_load(class_means(folder).read_text())
    recipe["student"]["head"] = {"type": "ridge", "scale": "auto", "known": 0.9}
    labels = [label for label in range(6) for _ in range(2)]
    make_table(labels, 6, 500).to_parquet(str(folder / "data" / "validation.parquet"))
    assert train_main([str(write_recipe(folder / "tiny.yaml", recipe)), "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def foreign() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8))


def test_the_states_reject_as_the_pipeline_does(telling: Path) -> None:
    states = States(str(telling), reject=True)
    for task in states.tasks:
        model = str(telling / "student" / f"task-{task:02d}")
        for image in (foreign(), picture(0, 501)):
            assert states.classifier(task)(image) == pipeline("image-classification", model=model)(image, reject=True)
    assert states.classifier(3)(foreign())[0]["label"] == "unknown"
    assert States(str(telling)).classifier(3)(foreign())[0]["label"] != "unknown"
    with pytest.raises(StatesError, match="reject is 1.5"):
        States(str(telling), reject=1.5).classifier(3)


def test_a_model_of_others_is_told_that_it_cannot_reject(tmp_path: Path) -> None:
    """As `model: classifier` is stored: transformers' own model, and its own pipeline."""
    (tmp_path / "results.json").write_text(json.dumps(saved_run(tmp_path, 1)))
    shutil.rmtree(tmp_path / "student" / "task-01")
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))
    model.save_pretrained(tmp_path / "student" / "task-01")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "student" / "task-01")
    assert States(str(tmp_path)).classifier(1)(foreign())
    with pytest.raises(StatesError, match="cannot tell|Only a model of hf_cdl can tell"):
        States(str(tmp_path), reject=0.9).classifier(1)


def test_examples_are_the_run_s_own_validation_images(telling: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table: Any = Dataset.from_parquet(str(telling.parent / "data" / "validation.parquet"))
    stored = {np.asarray(row["image"]).tobytes(): row["label"] for row in table}
    found = [stored[np.asarray(image).tobytes()] for image in examples(telling, [f"class {c}" for c in "abcdef"])]
    assert len(found) == 6 and len({*found}) > 3
    known = [stored[np.asarray(image).tobytes()] for image in examples(telling, ["class b", "class e"])]
    assert known == [1, 1, 4, 4], "of classes that the model knows"
    assert examples(telling, ["another"]) == [] and capsys.readouterr().out == ""


def test_a_run_whose_data_are_gone_has_no_examples(
    telling: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(telling, tmp_path / "run")
    ledger = json.loads((run / "run.json").read_text())
    ledger["recipe"]["data"]["path"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(ledger))
    assert examples(run, ["class a"]) == []
    assert "note: the data of run are not there" in capsys.readouterr().out


def test_built_in_examples_are_shown_where_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [Path(file).name for file in app.fitting(["watch", "rose", "bus"], False)] == ["bus.png", "watch.png"]
    assert "hourglass.png, scissors.png, umbrella.png are left out" in capsys.readouterr().err
    assert app.fitting(["rose"], False) == []
    monkeypatch.setattr(app, "__file__", str(tmp_path / "app.py"))
    assert app.fitting(["rose"], False) == [], "without the folder"
    (tmp_path / "examples").mkdir()
    for name in ("rose.jpg", "rose-2.jpg", "rose 3.jpg", "mp3.png", "unknown.png", "roses.png"):
        (tmp_path / "examples" / name).touch()
    capsys.readouterr()
    fit = [Path(file).name for file in app.fitting(["rose", "mp3"], False)]
    assert fit == ["mp3.png", "rose 3.jpg", "rose-2.jpg", "rose.jpg"]
    assert "roses.png, unknown.png are left out" in capsys.readouterr().err
    assert "unknown.png" in [Path(file).name for file in app.fitting(["rose"], True)]


# ---- the page ----


_BUILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import app, gradio
from states import States
found = []
for where in sys.argv[2:]:
    page = app.build(States(where), gradio)
    page.queue()
    found.append(sorted(block.get_block_name() for block in page.blocks.values()))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_page_builds_with_one_state_and_with_several(tmp_path: Path) -> None:
    """A slider with a single position fails."""
    pytest.importorskip("gradio", reason="the demo needs the extra `demo`")
    for tasks in (1, 3):
        (run := tmp_path / str(tasks)).mkdir()
        (run / "results.json").write_text(json.dumps(saved_run(run, tasks)))
    said = python(_BUILD, SPACE, tmp_path / "1/student", tmp_path / "3/student")
    one, several = json.loads(said.splitlines()[-1])
    assert ("slider" in one, "number" in one) == (False, True)
    assert ("slider" in several, "number" in several) == (True, False)


@pytest.mark.slow
def test_a_browser_compares_two_states_and_shows_unknown_images(telling: Path, tmp_path: Path) -> None:
    """Examples keep their pixels on the way: the answers are those of the images themselves."""
    pytest.importorskip("gradio", reason="the demo needs the extra `demo`")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    own = examples(telling, [f"class {letter}" for letter in "abcdef"])
    foreign().save(tmp_path / "foreign.png")
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(demo(str(telling), "--compare", "task-01", "--reject", env=env))
        chromium = stack.enter_context(playwright.sync_playwright()).chromium
        browser = chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(url)
        page.wait_for_selector(".matrix")

        def answers() -> list[list[list[str]]]:
            tables = [table.locator("tbody tr").all_inner_texts() for table in page.locator(".answers").all()]
            return [[re.split(r"\s*\t", row.strip()) for row in rows] for rows in tables]

        assert [title[:12] for title in page.locator(".cdl h3").all_inner_texts()] == ["After task 1", "After task 3"]
        thumbnails = page.locator("button.gallery-item")
        assert thumbnails.count() == len(own)
        thumbnails.nth(3).click()
        assert_soon(lambda: answers()[1:], [prediction(telling, 3, own[3])])
        page.set_input_files("input[type=file]", tmp_path / "foreign.png")
        assert_soon(lambda: [rows[0][:2] for rows in answers() if rows], [["unknown", "–"]] * 2)
        page.screenshot(path=tmp_path / "beside.png", full_page=True)
        page.locator("input[type=number]").first.fill("2")
        page.locator("input[type=number]").first.press("Enter")
        titles = page.locator(".cdl h3").all_inner_texts
        assert_soon(lambda: [title[:12] for title in titles()], ["After task 2", "After task 3"])


@contextlib.contextmanager
def demo(*arguments: str, env: dict[str, str]) -> Iterator[str]:
    """Start the app in a separate process; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_cdl", "demo", *arguments],
        env={**os.environ, **env, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        said = ""
        while f"http://127.0.0.1:{port}" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def assert_soon(found: Callable[[], Any], expected: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while found() != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found() == expected


def prediction(folder: Path, task: int, image: Image.Image) -> list[list[str]]:
    """The student's five most likely classes after a task, from the model itself: class, task, score."""
    checkpoint = folder / "student" / f"task-{task:02d}"
    model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    processor: Any = AutoImageProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    learnt_in = {name: str(task) for task, names in enumerate(model.config.tasks, 1) for name in names}
    best = scores.topk(min(5, len(scores)))
    found = [(model.config.id2label[int(i)], 100 * float(score)) for score, i in zip(*best, strict=True)]
    return [[name, learnt_in[name], f"{score:.1f}\u00a0%"] for name, score in found]


@pytest.mark.slow
def test_a_browser_goes_through_the_states_of_a_pushed_run(
    pushed: tuple[Path, HubServer, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("gradio", reason="the demo needs the extra `demo`")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    folder, server, _ = pushed
    matrix = json.loads((folder / "results.json").read_text())["roles"]["student"]["accuracy_matrix"]
    image = picture(4, 1, 64)
    (tmp_path / "image.png").write_bytes(png(image))
    expected = {task: prediction(folder, task, image) for task in (1, 2, 3)}
    assert [len(rows) for rows in expected.values()] == [2, 4, 5]

    with contextlib.ExitStack() as stack:
        url = stack.enter_context(demo(STUDENT, env=environment(server, tmp_path / "home")))
        chromium = stack.enter_context(playwright.sync_playwright()).chromium
        browser = chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(120_000)
        problems, outside = [], []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else outside.append(1))
        page.goto(url)

        def texts(selector: str) -> list[str]:
            return page.locator(selector).all_inner_texts()

        def answers() -> list[list[str]]:
            return [re.split(r"\s*\t", row.strip()) for row in texts(".answers tbody tr")]

        def assert_state(task: int) -> None:
            assert_soon(answers, expected[task])
            mean = sum(matrix[task - 1]) / task
            title = f"After task {task}: {2 * task} classes, average accuracy {mean:.1f}\u00a0%"
            assert_soon(lambda: texts(".cdl h3"), [title])
            assert texts(".matrix td") == [f"{value:.1f}" for row in matrix[:task] for value in row]
            assert len(texts(".tasks tbody tr")) == task

        page.wait_for_selector(".matrix")
        page.set_input_files("input[type=file]", tmp_path / "image.png")
        assert_state(3)
        assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out on a phone
        page.screenshot(path=tmp_path / "space.png", full_page=True)
        page.locator("input[type=number]").fill("1")
        page.locator("input[type=number]").press("Enter")
        assert_state(1)
        server.faults = [("resolve", "403")] * 20
        page.locator("input[type=range]").press("ArrowRight")
        page.wait_for_selector("text=after task 2 cannot be")
        server.faults = []
        page.locator("input[type=range]").press("ArrowLeft")
        assert_state(1)
        page.locator("input[type=range]").press("ArrowRight")
        assert_state(2)
        assert (problems, outside) == ([], [])
