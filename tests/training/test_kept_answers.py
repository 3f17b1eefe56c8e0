"""What a teacher says of a batch is computed once, where the batch comes again, and no bit moves by it."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_backbone, make_data, make_table
from pairwise import pairwise
from safetensors.torch import load_file, save_file
from test_contract import CLASSES, arguments, pair_of, stream
from test_kept_queries import PROMPT, equal
from transformers import AutoImageProcessor, TrainerCallback

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.data import StreamConfig
from hf_cdl.distill import TERMS, Objective
from hf_cdl.runs.run import Run
from hf_cdl.training import kept
from hf_cdl.training.kept import files as parts

pytestmark = pytest.mark.filterwarnings("ignore:frozen_bf16 is true, but this machine:UserWarning")
ANSWERED = ["kd", "kdp", "fitnets", "review_kd", "similarity", "dkd", "dist", "prompt_mapping", "dual_path"]
WAYS: list[Any] = [{}, {"bf16": True}, {"frozen_bf16": True}, {"gradient_accumulation_steps": 2}]
ROWS = [
    (method, term, query, way)
    for method in ("coda", "dualprompt", "l2p", "apt", "vpt")
    for term in ANSWERED
    for query in ("student", "self", "one_pass")
    for way in range(len(WAYS))
]


CHOSEN = pairwise(ROWS)
FAST = {next(row for row in CHOSEN[number:] + CHOSEN if row[1] == term) for number, term in enumerate(ANSWERED)}
MARKED = [pytest.param(*row, marks=() if row in FAST else pytest.mark.slow) for row in CHOSEN]
"""In the fast tier a row of every term; the slow tier has every pair of a method, a term, a query and a way."""


def passes(model: Any) -> list[int]:
    """Sizes of the batches that a model answers from now on."""
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.append(len(output.logits)))
    return seen


def counted(compute: Any, sizes: list[int]) -> Any:
    return lambda pixels: sizes.append(len(pixels)) or compute(pixels)


def objective_of(term: str, student: Any, teacher: Any) -> Objective:
    torch.manual_seed(2)
    kind = TERMS[term]
    return Objective(0.5, [(term, kind(kind.config_class(), student.shape, teacher.shape))])


def weights(*models: Any) -> list[torch.Tensor]:
    return [value.clone() for model in models for value in model.state_dict().values()]


@pytest.mark.parametrize(
    ("method", "term", "query", "way"),
    [pytest.param(*row, marks=() if row in FAST else pytest.mark.slow) for row in CHOSEN],
)
def test_a_second_student_of_a_teacher_asks_it_nothing(
    method: str, term: str, query: str, way: int, tmp_path: Path
) -> None:
    teacher, student = pair_of(method, term, query)
    args = arguments(tmp_path, num_train_epochs=2, **WAYS[way])
    tasks = list(stream())
    CDLTrainer(teacher, args, role="teacher").learn(tasks[0])
    found, asked = [], []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        one, other = copy.deepcopy((student, teacher))
        trainer = CDLTrainer(one, args, objective_of(term, one, other), other, cache=cache)
        answered, queries = passes(other), []
        for model in (one, other):
            compute = model.compute_query
            model.compute_query = counted(compute, queries)
        trainer.learn(tasks[0])
        asked.append((sum(answered), sum(queries)))
        found.append([*weights(one), trainer.answer([tasks[0]])])
    for other in found[1:]:
        assert all(map(equal, found[0], other)), "to the bit"
    if term == "dual_path":
        assert asked[2][0] == asked[0][0], "its path runs through the teacher's own pass"
    else:
        assert [answers for answers, _ in asked] == [2 * len(tasks[0].train)] * 2 + [0]
    assert asked[2][1] == 0 or term == "dual_path", "queries too"


def learner(place: Path, views: int | None, term: str = "kd", cache: Any = None, **fields: Any) -> Any:
    """A trained teacher, its student's trainer, and a task whose images have so many views, in six batches."""
    if not (place / "student").exists():
        make_backbone(place / "student")
        make_backbone(place / "teacher", 48, 3, 1, image_mean=[0.4, 0.5, 0.6])
        make_data(place / "data")
    config = StreamConfig(path=str(place / "data"), classes_per_task=3, views=views)
    roles = {role: AutoImageProcessor.from_pretrained(place / role) for role in ("student", "teacher")}
    task = TaskStream(config, roles)[0]
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, **fields}
    args = CDLTrainingArguments(str(place), report_to="none", disable_tqdm=True, use_cpu=True, **settings)
    torch.manual_seed(0)
    large = CDLForImageClassification.from_backbone(place / "teacher", prompt=PROMPT)
    small = CDLForImageClassification.from_backbone(place / "student", prompt=PROMPT)
    large.begin_task(task.class_names)
    return CDLTrainer(small, args, objective_of(term, small, large), large, cache=cache), task


def test_a_teacher_answers_every_view_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase of 4 epochs, or of 24 steps of 6 an epoch."""
    steps = {"max_steps": 24, "num_train_epochs": CDLTrainingArguments.num_train_epochs}
    for views, count, length in ((None, 4, {}), (3, 3, {}), (3, 3, steps)):
        trainer, task = learner(tmp_path, views, **length)
        answered = passes(trainer.teacher.model)
        trainer.learn(task)
        assert sum(answered) == count * len(task.train), "of both roles' own pixels"
        kept_weights = weights(trainer.model)
        with monkeypatch.context() as patch:
            patch.setattr(kept.Kept, "outputs", lambda *_, **__: None)
            patch.setattr(kept.Kept, "reader", lambda *_: None)
            again, task = learner(tmp_path, views, **length)
            again.learn(task)
        assert all(map(torch.equal, kept_weights, weights(again.model))), "to the bit"


@pytest.mark.slow
def test_with_accumulation_and_hidden_states_too(tmp_path: Path) -> None:
    found = []
    for views, cache in ((2, None), (2, tmp_path / "cache"), (2, tmp_path / "cache")):
        trainer, task = learner(tmp_path, views, "review_kd", cache, gradient_accumulation_steps=2)
        answered = passes(trainer.teacher.model)
        trainer.learn(task)
        found.append((sum(answered), weights(trainer.model)))
    assert [count for count, _ in found] == [2 * len(task.train), 2 * len(task.train), 0]
    assert all(map(torch.equal, found[0][1], found[2][1]))


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 1000)
    trainer, task = learner(tmp_path, 1)
    answered = passes(trainer.teacher.model)
    trainer.learn(task)
    assert len(task.train) < sum(answered) <= 4 * len(task.train)
    assert trainer._kept.held <= 1000


def test_a_teacher_that_a_callback_changes_is_asked_again(tmp_path: Path) -> None:
    class Moves(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            with torch.no_grad():
                next(trainer.teacher.model.head.parameters()).mul_(1.1)

    trainer, task = learner(tmp_path, 1)
    trainer.add_callback(Moves)
    answered = passes(trainer.teacher.model)
    trainer.learn(task)
    assert sum(answered) == 4 * len(task.train)


def test_an_answer_that_a_term_writes_into_is_not_given_again(tmp_path: Path) -> None:
    trainer, task = learner(tmp_path, 1)
    term = trainer.objective.terms["kd"]
    forward = term.forward

    def written(student: Any, teacher: Any, labels: torch.Tensor) -> torch.Tensor:
        return forward(student, teacher, labels) + 0 * teacher.logits.mul_(2).sum()

    term.forward = written
    answered = passes(trainer.teacher.model)
    trainer.learn(task)
    assert sum(answered) == 4 * len(task.train)


@pytest.mark.slow
def test_unlabelled_images_beside_are_told_by_their_content(tmp_path: Path) -> None:
    found = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        trainer, _ = learner(tmp_path, None, cache=cache)
        roles = {role: AutoImageProcessor.from_pretrained(tmp_path / role) for role in ("student", "teacher")}
        beside = make_table([0] * 7, 2, 5000).select_columns(["image"])
        config = StreamConfig(path=str(tmp_path / "data"), classes_per_task=3, unlabelled_ratio=2)
        task = TaskStream(config, roles, unlabelled=beside)[0]
        answered = passes(trainer.teacher.model)
        trainer.learn(task)
        found.append((sum(answered), weights(trainer.model)))
    assert [count for count, _ in found] == [12 * len(task.train), 12 * len(task.train), 0]
    for _, other in found[1:]:
        assert all(map(torch.equal, found[0][1], other))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: next(model.backbone.parameters()).data.mul_(1.01), id="backbone"),
        pytest.param(lambda model: next(model.head.parameters()).data.mul_(1.01), marks=pytest.mark.slow, id="head"),
        pytest.param(lambda model: model.set_attn_implementation("eager"), marks=pytest.mark.slow, id="attention"),
    ],
)
def test_another_teacher_finds_nothing(change: Callable[[Any], Any], tmp_path: Path) -> None:
    trainer, task = learner(tmp_path, None, cache=tmp_path / "cache")
    trainer.learn(task)
    trainer, task = learner(tmp_path, None, cache=tmp_path / "cache")
    change(trainer.teacher.model)
    answered = passes(trainer.teacher.model)
    trainer.learn(task)
    assert sum(answered) == 4 * len(task.train)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def turned(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(bytes(content))


def of_another_format(file: Path) -> None:
    save_file(load_file(file), file, {"format": "hf_cdl kept outputs 99"})


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        pytest.param(cut, "is damaged .* put aside", marks=pytest.mark.slow),
        pytest.param(emptied, "is damaged .* put aside", marks=pytest.mark.slow),
        (turned, "is damaged \\(a checksum is wrong\\): it is put aside"),
        pytest.param(of_another_format, "is not of the format of this version and", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_part_is_put_aside_and_computed_again(
    harm: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    trainer, task = learner(tmp_path, None, cache=tmp_path / "cache")
    trainer.learn(task)
    whole = weights(trainer.model)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        harm(file)
    trainer, task = learner(tmp_path, None, cache=tmp_path / "cache")
    said: list[str] = []
    trainer._kept.files.say = said.append
    answered = passes(trainer.teacher.model)
    trainer.learn(task)
    assert answered
    assert all(map(torch.equal, whole, weights(trainer.model)))
    assert said and all(re.search(says, line) for line in said)
    assert len(said) == len({*said}), "once each"
    trainer, task = learner(tmp_path, None, cache=tmp_path / "cache")
    answered = passes(trainer.teacher.model)
    trainer.learn(task)
    assert not answered or harm is of_another_format


def test_a_full_disk_is_said_once_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, task = learner(tmp_path, None)
    trainer.learn(task)
    whole = weights(trainer.model)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "save_file", full)
    trainer, task = learner(tmp_path, None, cache=tmp_path / "cache")
    with pytest.warns(UserWarning, match="Nothing more is stored in the cache .*No space left.*continues") as caught:
        trainer.learn(task)
        trainer.evaluate_seen()
    assert len(caught) == 1
    assert all(map(torch.equal, whole, weights(trainer.model)))
    assert not [*(tmp_path / "cache").rglob("*.partial")]


@pytest.mark.slow
def test_processes_share_a_folder_at_once_and_survive_kills(tmp_path: Path) -> None:
    trainer, task = learner(tmp_path, None)
    trainer.learn(task)
    whole = weights(trainer.model)
    code = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
        import torch
        from hf_cdl.training.kept import files
        files._TOGETHER = 1
        from test_kept_answers import learner, weights
        place = Path({str(tmp_path)!r})
        trainer, task = learner(place, None, cache=place / "cache")
        trainer.learn(task)
        torch.save(weights(trainer.model), sys.argv[1])
        """
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def begun(name: str) -> Any:
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], env=environment)

    for number in range(3):
        process = begun("killed")
        while process.poll() is None and not len([*(tmp_path / "cache").rglob("*.safetensors")]) > number:
            pass
        process.kill()
        process.wait()
    both = [begun(f"whole {number}") for number in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    for number in range(2):
        assert all(map(torch.equal, whole, torch.load(tmp_path / f"whole {number}")))
    trainer, task = learner(tmp_path, None, cache=tmp_path / "cache")
    answered = passes(trainer.teacher.model)
    trainer.learn(task)
    assert not answered
    assert all(map(torch.equal, whole, weights(trainer.model)))


@pytest.mark.parametrize("kind", ["file", "model"])
def test_a_folder_that_cannot_be_a_cache_is_refused(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "student" / "cache" if kind == "model" else tmp_path / "cache"
    trainer, _ = learner(tmp_path, None)
    if kind == "file":
        place.write_text("")
    says = {"file": "is a file; name a folder", "model": "would lie in the model's folder .*name another folder"}[kind]
    with pytest.raises(ValueError, match=says):
        CDLTrainer(trainer.model, trainer.args, cache=place)


class Stops(TrainerCallback):
    """Ctrl-C behind a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_phase_that_resumes_among_recurring_views_ends_the_same(cached: bool, tmp_path: Path) -> None:
    task = replace(next(stream()), views=2)
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    args = arguments(tmp_path, num_train_epochs=5, **{**fields, "per_device_train_batch_size": 4})
    found = []
    for stops in ((), (3, 9)):
        teacher, student = pair_of("coda", "kd", "student")
        teacher.begin_task(CLASSES[0])
        run = Run(tmp_path / f"run {len(stops)}", {"name": "views"}, say=lambda _: None)
        run.bind("stream", [[*task.class_names]])
        cache = tmp_path / "cache" if cached else None
        for stop in (*stops, None):
            one, other = copy.deepcopy((student, teacher))
            trainer = CDLTrainer(one, args, objective_of("kd", one, other), other, run=run, cache=cache)
            if stop is None:
                trainer.learn(task)
                assert trainer.state.global_step == 15
                found.append(weights(one))
            else:
                trainer.add_callback(Stops(stop))
                with pytest.raises(KeyboardInterrupt):
                    trainer.learn(task)
        run.close()
    assert all(map(torch.equal, *found)), "to the bit"
