"""Compiled training: the same numbers, graphs that serve every step and task, and no trace in files and copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from test_contract import MAPPING, METHODS, arguments, images, model_of, newcomer, pair_of, stream  # noqa: F401
from test_interrupted import CtrlC, bound, trainer_of
from test_kept_queries import pair, passes
from torch._dynamo.utils import counters
from transformers import TrainerCallback, set_seed

from hf_cdl import CDLForImageClassification, CDLTrainer
from hf_cdl.distill import TERMS, Objective
from hf_cdl.training.compiling import is_compiled

TASKS = list(stream())
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # inductor's own imports
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch hides it itself
]


class Graphs(TrainerCallback):
    """How many graphs there are after every step, task by task."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.found.append([])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.found[-1].append(counters["stats"]["unique_graphs"])


def learnt(
    folder: Path, method: str, term: str, query: str, tasks: int = 2, **fields: Any
) -> tuple[CDLTrainer, list[list[int]]]:
    """A student's trainer after two epochs of every task, and its graphs."""
    torch.compiler.reset()
    counters.clear()
    teacher, student = pair_of(method, term, query)
    made = TERMS[term](TERMS[term].config_class(), student.shape, teacher.shape)
    seen = Graphs()
    options = arguments(folder, num_train_epochs=2, **fields)
    trainer = CDLTrainer(student, options, Objective(0.5, [(term, made)]), teacher)
    trainer.add_callback(seen)
    for task in TASKS[:tasks]:
        set_seed(task.index)
        teacher.begin_task(task.class_names)
        trainer.learn(task)
    return trainer, seen.found


def check_alike(compiled: CDLTrainer, plain: CDLTrainer) -> None:
    got, want = compiled.model.state_dict(), plain.model.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "term", "query"),
    [
        *((method, "kdp", query) for method in METHODS for query in ("self", "one_pass")),
        ("coda", "prompt_mapping", "student"),
        ("l2p", "fitnets", "self"),
        ("coda", "dual_path", "self"),
    ],
)
def test_every_method_learns_the_same_in_graphs_that_serve_all_tasks(
    method: str, term: str, query: str, tmp_path: Path
) -> None:
    plain, _ = learnt(tmp_path, method, term, query)
    compiled, graphs = learnt(tmp_path, method, term, query, torch_compile_backend="aot_eager")
    check_alike(compiled, plain)
    per_epoch = len(graphs[0]) // 2
    assert graphs[0][0] > 0 and {*graphs[0][per_epoch:]} == {graphs[0][per_epoch - 1]}, "graphs of later steps"
    assert {*graphs[1][per_epoch:]} == {graphs[1][per_epoch - 1]}, "graphs of later steps of the second task"
    if query != "one_pass":  # where the pass itself asks the pool, which has grown
        assert graphs[1][-1] == graphs[0][-1], "the second task's steps have the shapes of the first one's"


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("vpt", {"torch_compile_backend": "eager"}),
        pytest.param("coda", {"torch_compile": True}, marks=pytest.mark.slow),
        pytest.param("coda", {"torch_compile": True, "bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_torch_compile_and_its_backend_compile_what_learns(
    method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    precision = {name: value for name, value in fields.items() if name == "bf16"}
    plain, none = learnt(tmp_path, method, "kd", "self", tasks=1, **precision)
    compiled, graphs = learnt(tmp_path, method, "kd", "self", tasks=1, **fields)
    assert not any(none[0]) and graphs[0][0] > 0
    assert compiled.args.torch_compile is True
    assert compiled.args.torch_compile_backend == fields.get("torch_compile_backend", "inductor")
    if not precision:
        check_alike(compiled, plain)
    plugin: Any = compiled.accelerator.state.dynamo_plugin
    assert plugin.backend.value == "NO", "accelerate would compile the whole model"
    model = compiled.model
    assert not any("_orig_mod" in name for name in model.state_dict())
    assert not any(map(is_compiled, (*model.encoders, *compiled.teacher.model.encoders))), "the phase is over"


def test_nothing_of_it_is_in_copies_and_files(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Copies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            model.save_pretrained(tmp_path / "saved")
            saved = CDLForImageClassification.from_pretrained(tmp_path / "saved")
            own = model.state_dict()
            for other in (copied, loaded, saved):
                assert {*other.state_dict()} == {*own} and not is_compiled(other.backbone)
                assert all(torch.equal(value, own[name]) for name, value in other.state_dict().items())
            seen.append(is_compiled(model.backbone))
            control.should_training_stop = True

    model = model_of("vpt")
    trainer = CDLTrainer(model, arguments(tmp_path, torch_compile_backend="eager"), callbacks=[Copies()])
    trainer.learn(TASKS[0])
    assert seen == [True]


@pytest.mark.slow
def test_an_interrupted_compiled_phase_resumes_to_the_bit(tmp_path: Path) -> None:
    """In its second step, whose batch has another shape than the last one of an epoch."""
    compiled = {"torch_compile_backend": "aot_eager", "num_train_epochs": 2, "per_device_train_batch_size": 5}

    def trainer(folder: Path, run: Any = None, model: Any = None, **more: Any) -> CDLTrainer:
        torch.compiler.reset()  # as in a new process
        made = trainer_of(folder, model, run, **more)
        steps = {"save_strategy": "steps", "save_steps": 1} if run else {}
        args = arguments(folder / "work", **steps, **compiled)
        return CDLTrainer(made.model, args, run=run, train_dataset=TASKS[:1], **more)

    whole = trainer(tmp_path / "whole")
    whole.train()
    run = bound(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, run, callbacks=[CtrlC(0, 3)]).train()
    run.close()
    run = bound(tmp_path)
    resumed = trainer(tmp_path, run)
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert value.equal(resumed.model.state_dict()[name]), name
    run.close()


@pytest.mark.slow
def test_queries_are_kept_in_compiled_phases_too(tmp_path: Path) -> None:
    teacher, student, tasks = pair(tmp_path, torch_compile_backend="eager", num_train_epochs=1)
    task, asked = tasks[0], (passes(teacher), passes(student))
    teacher.learn(task)
    student.learn(task)
    assert asked[0] and not asked[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"torch_compile_mode": "reduce-overhead"},
            "mode is 'reduce-overhead', but its CUDA graphs.* use default",
        ),
        (
            {"torch_compile_mode": "max-autotune"},
            "mode is 'max-autotune', but .* resumed .*; use default",
        ),
        ({"torch_compile_mode": "fast"}, "mode is 'fast'; allowed: default"),
        ({"torch_compile_backend": "cudagraphs"}, "backend is 'cudagraphs'; allowed: inductor, aot_eager, eager"),
    ],
)
def test_what_cannot_be_resumed_exactly_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path, **fields)
    assert arguments(tmp_path, torch_compile_mode="default").torch_compile is True


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="torch_compile is true, but .*C\\+\\+ compiler.*leave torch_compile out"):
        arguments(tmp_path, torch_compile=True)
    arguments(tmp_path, torch_compile_backend="aot_eager")  # which generates no code
