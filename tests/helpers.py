"""Tiny backbones and image data sets as real files, and recipes/train.py as a real process."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from forking import Forked
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from transformers.utils import logging as hf_logging

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "recipes" / "train.py"
COMMANDS = ROOT / "hf_cdl" / "__main__.py"
MAIN = ROOT / "hf_cdl" / "__main__.py"
MODULE = ("-m", "hf_cdl", "train")
SIZE = 16


def make_backbone(
    folder: Path, hidden: int = 32, depth: int = 2, seed: int = 0, size: int = SIZE, patch: int = 8, **processor: Any
) -> Path:
    """Save a random ViT and its image processor (with the fields `processor`) as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        image_size=size,
        patch_size=patch,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}, **processor).save_pretrained(folder)
    return folder


def picture(label: int, number: int, size: int = SIZE) -> Image.Image:
    """A noisy image in the colour of its class: easy to learn, and no two alike."""
    colour = np.random.default_rng((label, 0)).integers(40, 216, 3)
    noise = np.random.default_rng((label, number, 1)).integers(-40, 40, (size, size, 3))
    return Image.fromarray((colour + noise).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def make_table(labels: Sequence[int], classes: int, first: int = 0, label_column: str = "label") -> Dataset:
    """An image table; `first` numbers the images, so that two splits do not share them."""
    names = ClassLabel(names=[f"class {chr(97 + i)}" for i in range(classes)])
    cells = [{"bytes": png(picture(label, first + i)), "path": None} for i, label in enumerate(labels)]
    features = Features({"image": ImageFeature(), label_column: names})
    return Dataset.from_dict({"image": cells, label_column: list(labels)}, features=features)


def make_data(folder: Path, classes: int = 6, train: int = 8, test: int = 3, label_column: str = "label") -> Path:
    """Make a folder with train.parquet and test.parquet, with `train` and `test` images per class."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train", train, 0), ("test", test, 10_000)):
        labels = [label for label in range(classes) for _ in range(count)]
        make_table(labels, classes, first, label_column).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def make_recipe(folder: Path, **fields: Any) -> dict[str, Any]:
    """A recipe of a CODA teacher and a D-CDL student on tiny files made in `folder`: 3 tasks of 2 classes, seconds."""
    prompt = {"type": "coda", "components": 3, "length": 4, "layers": [0, 1]}
    recipe = {
        "name": "tiny",
        "data": {"path": str(make_data(folder / "data")), "classes_per_task": 2},
        "teacher": {"backbone": str(make_backbone(folder / "teacher", 48, 3, 1)), "prompt": prompt},
        "student": {"backbone": str(make_backbone(folder / "student", 32, 2, 2)), "prompt": prompt},
        "distill": [{"type": "kdp", "weight": 0.5}],
        "ce_weight": 0.5,
        "train": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "use_cpu": True},
    }
    return {**recipe, **fields}


def write_recipe(file: Path, recipe: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(recipe))
    return file


def start(*arguments: Any, launcher: Sequence[str] = (), **options: Any) -> subprocess.Popen[str] | Forked:
    """Start recipes/train.py in a separate process, without a network; `env` adds to its environment.

    It is forked from one that has imported everything, unless options besides `cwd` and `env` for the Hub are given.
    """
    for_hub = all(name.startswith("HF_") for name in options.get("env", ()))
    if not launcher and options.keys() <= {"cwd", "env"} and for_hub:
        return Forked(TRAIN, [str(word) for word in arguments], **{"cwd": ROOT, **options})
    return start_anew(*arguments, launcher=launcher, **options)


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """Cases for `parametrize`, of one value or several: every `every`th is in the fast tier, the rest in the slow."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=pytest.mark.slow if number % every else ()) for number, row in enumerate(rows)]


def start_anew(*arguments: Any, launcher: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    """Start recipes/train.py in a new interpreter, as a user does."""
    prepare = options.pop("preexec_fn", lambda: None)

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # in a shell's background job, Ctrl-C is ignored
        prepare()

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.update(options.pop("env", {}))
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, options.pop("program", (TRAIN,))), *map(str, arguments)],
        cwd=options.pop("cwd", ROOT),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=begin,
        **options,
    )


def train(*arguments: Any, **options: Any) -> tuple[int, str]:
    """Run recipes/train.py to its end; returns its exit code and output."""
    process = start(*arguments, **options)
    output, _ = process.communicate(timeout=300)
    return process.wait(), output


def script(verb: str, *arguments: Any, env: dict[str, str], cwd: Path | str = ".") -> tuple[int, str]:
    """Run python -m hf_cdl to its end; returns its exit code and output. A UserWarning is an error."""
    process = Forked(COMMANDS, [verb, *(str(word) for word in arguments)], cwd, env, warn=True)
    output, _ = process.communicate(timeout=300)
    return process.wait(), output


def python(code: str, *words: Any, env: dict[str, str] | None = None, cwd: Path | str = ".") -> str:
    """The output of Python code in a separate process that already has hf_cdl and its dependencies imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code.py"
        file.write_text(code)
        process = Forked(file, [str(word) for word in words], cwd, env)
        output, _ = process.communicate(timeout=300)
    assert process.wait() == 0, output
    return output


@contextlib.contextmanager
def little_room(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupt_when(
    arrived: Callable[[], bool], *arguments: Any, kill: int = signal.SIGKILL, timeout: float = 120, **options: Any
) -> tuple[int, str]:
    """Start recipes/train.py and send it a signal as soon as `arrived()`; returns its exit code and output."""
    process = start(*arguments, **options)
    deadline = time.monotonic() + timeout
    while not arrived():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the run never came to that point:\n{process.communicate()[0]}")
        time.sleep(0.0005)
    process.send_signal(kill)
    output, _ = process.communicate(timeout=timeout)
    return process.wait(), output


def killed_and_taken(file: Path, whole: Path, work: str, said: str) -> Iterator[Path]:
    """Train a recipe into `whole`, whose output must contain `said`, then two more runs; yields the latter's folders.

    One of the two is killed in the phase `work` and resumed; the other one reuses the teacher of `whole`.
    """
    code, output = train(file, "--output_dir", whole)
    assert code == 0 and said in output, output
    killed, taken = (whole.with_name(name) for name in ("killed", "taken"))
    state = killed / "work" / work
    interrupt_when(lambda: any(state.glob("checkpoint-*")), file, "--output_dir", killed)
    role, _, task = work.partition("-")
    assert not (killed / role / task).exists(), "it came too late"
    for folder, more in ((killed, ()), (taken, ("--teacher_from", whole))):
        code, output = train(file, "--output_dir", folder, *more)
        assert code == 0, output
        yield folder


def class_means(folder: Path) -> Path:
    """A recipe file of a student with class means, with data of six classes next to it."""
    recipe = {
        "name": "tiny",
        "data": {"path": str(make_data(folder / "data")), "classes_per_task": 2},
        "student": {"backbone": str(make_backbone(folder / "backbone")), "head": {"type": "ncm"}},
        "baselines": [],
        "train": {"use_cpu": True},
    }
    return write_recipe(folder / "tiny.yaml", recipe)


def run_script(command: Path | str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a script, or a verb of hf-cdl, in this process as from the command line; returns its exit code."""
    file = command if isinstance(command, Path) else MAIN
    monkeypatch.setattr(sys, "argv", [str(file), *([] if isinstance(command, Path) else [command]), *words])
    verbosity = hf_logging.get_verbosity()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(file), run_name="__main__")
    finally:
        hf_logging.set_verbosity(verbosity)
    return ended.value.code
