"""Training arguments: every field of transformers' has an effect shown here, or is refused with a message."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import make_recipe, write_recipe
from test_contract import arguments, model_of, stream
from test_recipe import MINIMAL, changed
from test_train import train_recipe
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed
from transformers.utils import logging

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.recipe import RecipeError, build_recipe
from hf_cdl.training.arguments import checks
from hf_cdl.training.arguments.checks import OPTIMIZERS
from hf_cdl.training.arguments.table import ARGUMENTS, NOT_IN_ALL, Refused, Used

TASK = next(stream())
FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}


def trained(**fields: Any) -> tuple[CDLTrainer, dict[str, torch.Tensor]]:
    """A tiny model after one epoch, three steps, of one task: its trainer and its weights."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        once = {} if "max_steps" in fields else {"num_train_epochs": 1}
        trainer = CDLTrainer(model_of("coda"), arguments(Path(folder), **{**once, **fields}))
        trainer.learn(TASK)
    return trainer, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def made(**fields: Any) -> CDLTrainingArguments:
    return CDLTrainingArguments("work", **{"use_cpu": True, **fields})


KNOWN: dict[str, dict[str, torch.Tensor]] = {}


def base(**fields: Any) -> dict[str, torch.Tensor]:
    """Only the weights; equal arguments are trained only once."""
    key = repr(sorted(fields.items()))
    if key not in KNOWN:
        KNOWN[key] = trained(**fields)[1]
    return KNOWN[key]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Field -> a value that changes the weights, and other arguments, set both times.
MOVES: dict[str, tuple[Any, dict[str, Any]]] = {
    "per_device_train_batch_size": (4, {}),
    "num_train_epochs": (2, {}),
    "max_steps": (2, {}),
    "learning_rate": (0.02, {}),
    "lr_scheduler_type": ("linear", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 1.0}, {"lr_scheduler_type": "cosine"}),
    "warmup_steps": (2, {"lr_scheduler_type": "constant_with_warmup"}),
    "gradient_accumulation_steps": (2, {}),
    "max_grad_norm": (0.01, {"optim": "sgd"}),
    "optim": ("adafactor", {}),
    "optim_args": ("momentum=0.9", {"optim": "sgd"}),
    "weight_decay": (0.5, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.9, {}),
    "adam_epsilon": (0.1, {}),
    "bf16": (True, {}),
    "frozen_bf16": (True, {}),
    "seed": (1, {}),
    "data_seed": (1, {}),
    "dataloader_drop_last": (True, {"per_device_train_batch_size": 10}),
    "train_sampling_strategy": ("sequential", {}),
    "epoch_cosine": (True, {"num_train_epochs": 3}),
    "lr_steps": ([1], {"num_train_epochs": 2}),
    "lr_decay": (0.5, {"num_train_epochs": 2, "lr_steps": [1]}),
}

EVERY = {"eval_strategy": "epoch"}


def lines(trainer: CDLTrainer, name: str) -> int:
    return sum(name in line for line in trainer.state.log_history)


def loader(**fields: Any) -> Any:
    """The data loader that training would use."""
    trainer = CDLTrainer(model_of("coda"), arguments(Path("work"), **fields))
    trainer.seen, trainer.train_dataset = [TASK], TASK.train  # type: ignore[assignment]
    return trainer.get_train_dataloader()


def answers(trainer: CDLTrainer) -> int:
    """Number of images in the largest batch of an evaluation."""
    sizes: list[int] = []
    hook = trainer.model.register_forward_hook(lambda *_: sizes.append(len(_[2].logits)))
    trainer.evaluate_seen()
    hook.remove()
    return max(sizes)


class Processes(torch.utils.data.Dataset):
    """Images labelled with the id of the process that loaded them."""

    def __len__(self) -> int:
        return len(TASK.train)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return {**TASK.train[key], "labels": os.getpid()}  # type: ignore[index]


def loaded_by(trainer: CDLTrainer) -> set[int]:
    """Ids of the processes that load an epoch's images."""
    trainer.train_dataset = Processes()
    return {int(label) for batch in trainer.get_train_dataloader() for label in batch["labels"]}


# Field -> a value, other arguments, and what shows its effect; the weights stay the same.
KEEPS: dict[str, tuple[Any, dict[str, Any], Callable[[CDLTrainer], bool]]] = {
    "use_cpu": (True, {}, lambda t: next(t.model.parameters()).device.type == "cpu"),
    "full_determinism": (True, {}, lambda t: torch.are_deterministic_algorithms_enabled()),
    "logging_strategy": ("epoch", {"logging_steps": 10}, lambda t: lines(t, "loss/loss") == 1),
    "logging_steps": (2, {}, lambda t: lines(t, "loss/loss") == 1),
    "logging_first_step": (True, {"logging_steps": 3}, lambda t: lines(t, "loss/loss") == 2),
    "log_level": ("critical", {}, lambda t: logging.get_verbosity() == 50),
    "disable_tqdm": (True, {}, lambda t: t._bar("phase", total=1).disable),
    "eval_strategy": ("epoch", {}, lambda t: lines(t, "eval_accuracy") == 1),
    "eval_steps": (1, {"eval_strategy": "steps", "logging_steps": 3}, lambda t: lines(t, "eval_accuracy") == 3),
    "eval_delay": (2, {"eval_strategy": "steps", "eval_steps": 1}, lambda t: lines(t, "eval_accuracy") == 2),
    "per_device_eval_batch_size": (5, {}, lambda t: answers(t) == 5),
    "dataloader_num_workers": (1, {}, lambda t: os.getpid() not in loaded_by(t)),
}

# Field -> a value for data loader workers, and what shows it in the loader.
LOADERS: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "dataloader_persistent_workers": (True, lambda made: made.persistent_workers),
    "dataloader_prefetch_factor": (3, lambda made: made.prefetch_factor == 3),
    "dataloader_multiprocessing_context": (
        "forkserver",
        lambda made: type(made.multiprocessing_context).__name__ == "ForkServerContext",
    ),
}

# Field -> the test that shows its effect.
ELSEWHERE = {
    "output_dir": "test_arguments.py::test_output_dir_is_where_a_trainer_writes",
    "fp16": "test_arguments.py::test_fp16_is_refused_on_a_cpu",
    "tf32": "test_arguments.py::test_tf32_is_switched_on_where_there_is_such_a_gpu",
    "activation_checkpointing": "test_arguments.py::test_checkpointed_activations_are_computed_again",
    "gradient_checkpointing": "test_arguments.py::test_checkpointed_activations_are_computed_again",
    "torch_compile": "test_compiling.py::test_torch_compile_and_its_backend_compile_what_learns",
    "torch_compile_backend": "test_compiling.py::test_torch_compile_and_its_backend_compile_what_learns",
    "torch_compile_mode": "test_compiling.py::test_what_cannot_be_resumed_exactly_is_refused",
    "torch_empty_cache_steps": "test_arguments.py::test_the_cache_is_emptied_every_so_many_steps",
    "dataloader_pin_memory": "test_arguments.py::test_memory_is_pinned_where_there_is_a_gpu",
    "report_to": "test_trackers.py::test_a_whole_run_leaves_the_curves_of_every_role",
    "run_name": "test_trackers.py::test_wandb_has_one_run_per_role_offline",
    "project": "test_trackers.py::test_trackio_has_one_run_per_role",
    "load_best_model_at_end": "test_steering.py::test_a_phase_ends_with_its_best_state",
    "metric_for_best_model": "test_steering.py::test_the_accuracy_may_be_named",
    "greater_is_better": "test_steering.py::test_the_accuracy_may_be_named",
    "early_stopping_patience": "test_steering.py::test_a_phase_stops_when_it_gets_no_better",
    "early_stopping_threshold": "test_steering.py::test_a_phase_stops_when_it_gets_no_better",
    "save_strategy": "test_steering.py::test_save_steps_and_strategies_say_when_a_state_is_stored",
    "save_steps": "test_steering.py::test_save_steps_and_strategies_say_when_a_state_is_stored",
    "shard_teacher": "test_sharding.py::test_a_process_holds_a_share_of_a_teacher_that_is_stored_and_answers_whole",
    "save_total_limit": "test_steering.py::test_the_newest_states_and_the_best_one_are_kept",
}


def source_of(place: str) -> str:
    """The source of FILE::TEST including decorators; empty if it does not exist."""
    file, name = place.split("::")
    text = Path(__file__).with_name(file).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node, *node.decorator_list], key=lambda part: part.lineno)
            return "\n".join(text.splitlines()[first.lineno - 1 : node.end_lineno])
    return ""


def test_the_table_has_every_field_and_the_effect_of_all_that_are_used_is_shown() -> None:
    theirs = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    ours = {f.name for f in dataclasses.fields(CDLTrainingArguments) if f.init}
    assert theirs - ARGUMENTS.keys() == set(), "transformers has fields that table.py says nothing about"
    assert ARGUMENTS.keys() - ours <= NOT_IN_ALL, "table.py has fields that nobody has"
    used = {name for name, row in ARGUMENTS.items() if isinstance(row, Used)}
    assert used == MOVES.keys() | KEEPS.keys() | LOADERS.keys() | ELSEWHERE.keys()
    for field, place in ELSEWHERE.items():
        source = source_of(place)
        assert "assert" in source or "pytest.raises" in source, f"{place} is no test"
        assert re.search(rf"\b{field}\b", source), f"{place} says nothing of {field}"


@pytest.mark.parametrize("field", MOVES)
def test_a_field_that_changes_what_is_learnt(field: str) -> None:
    value, beside = MOVES[field]
    plain = {"num_train_epochs": 1, **beside}
    if field == "max_steps":
        plain.pop("num_train_epochs")
        plain["max_steps"] = 3
    assert not same(base(**plain), base(**{**plain, field: value}))


@pytest.mark.parametrize("field", KEEPS)
def test_a_field_that_changes_something_else(field: str) -> None:
    value, beside, shows = KEEPS[field]
    verbosity = logging.get_verbosity()
    try:
        if field in ("use_cpu", "disable_tqdm"):  # as `arguments` has them anyway
            trainer, got = trained(**beside)
        else:
            trainer, got = trained(**{**beside, field: value})
        assert same(got, base()), "it changed the weights too"
        assert shows(trainer)
        logging.set_verbosity(verbosity)
        if field not in ("use_cpu", "disable_tqdm", "full_determinism"):
            assert not shows(trained(**beside)[0]), "it is so without the field"
    finally:
        logging.set_verbosity(verbosity)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("field", LOADERS)
def test_a_field_of_the_workers_that_load_images(field: str) -> None:
    value, shows = LOADERS[field]
    assert shows(loader(dataloader_num_workers=1, **{field: value}))
    assert not shows(loader(dataloader_num_workers=1))


def test_output_dir_is_where_a_trainer_writes(tmp_path: Path) -> None:
    """Only when asked to, and nowhere else; without a run nothing is stored automatically."""
    for output_dir in (tmp_path / "one", tmp_path / "other"):
        set_seed(0)
        trainer = CDLTrainer(model_of("coda"), arguments(output_dir, num_train_epochs=1))
        trainer.learn(TASK)
        assert not [*output_dir.rglob("*")] and same(trainer.model.state_dict(), base())
        trainer.save_model()
        assert same(CDLForImageClassification.from_pretrained(str(output_dir)).state_dict(), base())
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}


def test_a_bar_is_shown_unless_asked_not_to() -> None:
    assert made().disable_tqdm is False


def test_fp16_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for use_cpu in (True, False):
        if use_cpu or not torch.cuda.is_available():
            with pytest.raises(ValueError, match="fp16 is true, but a CPU .*use bf16"):
                made(use_cpu=use_cpu, fp16=True)


def test_tf32_is_switched_on_where_there_is_such_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[bool] = []
    with pytest.raises(
        ValueError, match="tf32 is true, but this machine has no GPU that computes in it .*leave it out"
    ):
        made(tf32=True)
    for module in (transformers.training_args, checks):
        monkeypatch.setattr(module, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(transformers.training_args, "enable_tf32", switched.append)
    for value in (True, False, None):
        made(tf32=value)
    assert switched == [True, False]


def test_memory_is_pinned_where_there_is_a_gpu() -> None:
    assert not loader().pin_memory, "there is none to pin it for"
    if torch.cuda.is_available():
        assert CDLTrainingArguments("work").dataloader_pin_memory
    assert not CDLTrainingArguments("work", dataloader_pin_memory=False).dataloader_pin_memory


@pytest.mark.parametrize("field", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_checkpointed_activations_are_computed_again(field: str, tmp_path: Path) -> None:
    if field not in FIELDS:
        pytest.skip(f"transformers {transformers.__version__} has no {field}")
    passes = []
    for value in (False, True):
        set_seed(0)
        model, count = model_of("coda"), [0]
        layer = model.backbone.layers[0] if hasattr(model.backbone, "layers") else model.backbone.encoder.layer[0]
        layer.attention.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        trainer = CDLTrainer(model, arguments(tmp_path, num_train_epochs=1, **{field: value}))
        trainer.learn(TASK)
        passes.append(count[0])
        assert same(trainer.model.state_dict(), base())
    assert passes == [6, 9], "three steps of a query pass and a prompted pass, which backward repeats"


def test_checkpointing_is_refused_by_a_backbone_without_layers_for_it(tmp_path: Path) -> None:
    field = "gradient_checkpointing" if "activation_checkpointing" not in FIELDS else "activation_checkpointing"
    model = ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8))
    with pytest.raises(ValueError, match="activation_checkpointing is true, but the layers of this ImageC"):
        CDLTrainer(ImageClassifier(model), arguments(tmp_path, **{field: True}))


def test_the_cache_is_emptied_every_so_many_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emptied: list[int] = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda *_, **__: emptied.append(1))
    trainer = CDLTrainer(model_of("coda"), arguments(tmp_path, num_train_epochs=1))
    trainer.args.torch_empty_cache_steps = 2  # as on a GPU
    trainer.learn(TASK)
    assert len(emptied) == 2  # of steps 0, 1, 2
    with pytest.raises(ValueError, match="torch_empty_cache_steps is set, but a CPU has no cache"):
        made(torch_empty_cache_steps=2)


@pytest.mark.parametrize("optim", [name for name, kind in OPTIMIZERS.items() if kind.package is None])
def test_an_optimizer_learns_with_all_its_options(optim: str) -> None:
    kind = OPTIMIZERS[optim]
    values = {"nesterov": "true", "centered": "true", "dampening": "0"}
    args = ",".join(f"{name}={values.get(name, 0.1)}" for name in kind.options)
    plain, got = base(optim=optim), base(optim=optim, optim_args=args or None)
    assert same(plain, got) == (not kind.options)
    start = model_of("coda").state_dict()
    assert not same(start, plain)
    for name in kind.adam:
        assert not same(plain, base(optim=optim, **{name: 0.5})), name


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": 0.4},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 2},
    "cosine_with_min_lr": {"min_lr": 0.001},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_transformers_warms_up_and_takes_its_keywords(schedule: str) -> None:
    trainer, _ = trained(lr_scheduler_type=schedule, lr_scheduler_kwargs=SCHEDULES[schedule] or None, warmup_steps=1)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert len(rates) == 3 and len(set(rates)) > 1


# ---- refused arguments ----

NAN, INF = math.nan, math.inf
BEST = {"eval_strategy": "epoch", "load_best_model_at_end": True}
OUT_OF_RANGE: list[tuple[str, list[Any]]] = [
    ("num_train_epochs", [0, -1, NAN, INF, "3"]),
    ("learning_rate", [-1e-3, NAN, INF]),
    ("per_device_train_batch_size", [0, -8, 2.5]),
    ("per_device_eval_batch_size", [0, -1]),
    ("gradient_accumulation_steps", [0, -2]),
    ("max_steps", [0, -2, 1.5]),
    ("weight_decay", [-0.1, NAN]),
    ("max_grad_norm", [-1.0, NAN, INF]),
    ("warmup_steps", [-1, NAN, 2.5]),
    ("logging_steps", [0, -1, 2.5, NAN]),
    ("save_steps", [0, -1, 1.5]),
    ("eval_steps", [0, -1, 1.5]),
    ("adam_beta1", [1.0, -0.1]),
    ("adam_beta2", [1.0]),
    ("adam_epsilon", [-1e-8]),
    ("dataloader_num_workers", [-1]),
    ("dataloader_prefetch_factor", [0]),
    ("save_total_limit", [0, -1]),
    ("torch_empty_cache_steps", [0]),
    ("eval_delay", [-1]),
    ("seed", [-1, 2**32]),
    ("data_seed", [-1]),
    ("lr_decay", [0, -0.1, NAN]),
    ("early_stopping_patience", [0, -1]),
    ("early_stopping_threshold", [-0.1, INF]),
]


@pytest.mark.parametrize(("field", "values"), OUT_OF_RANGE, ids=[name for name, _ in OUT_OF_RANGE])
def test_numbers_out_of_range(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{field} is .*, but must be ") as error:
            made(**{field: value})
        assert "\n" not in str(error.value)


def test_every_number_has_a_range() -> None:
    kinds = {f.name: f.type for f in dataclasses.fields(CDLTrainingArguments)}
    free = [
        name
        for name, row in ARGUMENTS.items()
        if isinstance(row, Used) and kinds.get(name) in (int, float, "int", "float") and not row.is_number
    ]
    assert free == []


# A non-default value of every refused field.
REFUSED: dict[str, Any] = {
    "debug": "underflow_overflow",
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["loss"],
    "trackio_static_space_id": False,
    "hub_strategy": "end",
    "restore_callback_states_from_checkpoint": False,
    "remove_unused_columns": True,
    "fsdp": True,
    "accelerator_config": {"even_batches": False},
    "liger_kernel_config": {"x": True},
}


@pytest.mark.parametrize("field", [name for name, row in ARGUMENTS.items() if isinstance(row, Refused)])
def test_a_refused_field_says_what_to_do(field: str) -> None:
    known = {f.name: f for f in dataclasses.fields(CDLTrainingArguments)}
    if field not in known:
        pytest.skip(f"transformers {transformers.__version__} has no {field}")
    default = known[field].default
    usual = not default if isinstance(default, bool) else 0.5 if isinstance(default, (int, float)) else "x"
    value = REFUSED.get(field, usual)
    row: Any = ARGUMENTS[field]
    if field != "do_eval":  # transformers sets it itself if it evaluates
        with pytest.raises(ValueError) as error:
            made(**{field: value})
        assert str(error.value).startswith(f"{field} is ") and row.why in str(error.value)
    if default is not dataclasses.MISSING:
        made(**{field: default})  # passing the default is allowed


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"warmup_steps": 10},
            "is 10, but lr_scheduler_type constant has no warm-up; use .*_with_warmup",
        ),
        ({"warmup_steps": 0.1, "epoch_cosine": True}, "warmup_steps is 0.1, but epoch_cosine has no warm-up"),
        ({"warmup_steps": 3, "lr_steps": [2]}, "warmup_steps is 3, but lr_steps has no warm-up"),
        (
            {"warmup_steps": 3, "eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type reduce_lr_on_plateau has no warm-up",
        ),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "has num_cycles, but lr_scheduler_type constant takes nothing"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"min_lr": 2}},
            "lr_scheduler_type constant_with_warmup takes nothing",
        ),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 0}}, "linear takes nothing"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 0}}, "cosine takes num_cycles"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "x.json"}, "must be fields and values"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "goes by the accuracy during training; set eval_strategy"),
        ({"lr_scheduler_type": "greedy"}, "goes by the accuracy during training; set eval_strategy"),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "epoch",
                "lr_scheduler_kwargs": {"mode": "min"},
            },
            "accuracy is to rise; leave mode out",
        ),
        ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type is 'zigzag'; allowed: linear, cosine"),
        ({"lr_decay": 0.5}, "lr_decay is the factor at each of lr_steps"),
        ({"lr_steps": [5, 30]}, r"lr_steps is \[5, 30\], but must lie below num_train_epochs, which is 20"),
        ({"lr_steps": [1], "num_train_epochs": 2.5}, "lr_steps counts whole epochs, but num_train_epochs is 2.5"),
        ({"epoch_cosine": True, "num_train_epochs": 2.5}, "epoch_cosine counts whole epochs"),
        ({"max_steps": 5, "num_train_epochs": 2}, "max_steps is 5, and num_train_epochs 2; keep one of them"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1 is 0.8, but optim sgd does not read it"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon is 1e-06, but optim adafactor does not"),
        ({"optim": "rmsprop", "adam_beta2": 0.9}, "adam_beta2 is 0.9, but optim rmsprop does not"),
        ({"optim_args": "momentum=0.9"}, "has momentum, but optim adamw_torch_fused takes none"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "has momentun, but optim sgd takes momentum, dampening"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "the field weight_decay is its place"),
        ({"optim": "sgd", "optim_args": "momentum"}, "must be pairs"),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, "has momentum=fast, but must be a number"),
        ({"optim": "sgd", "optim_args": "nesterov=2"}, "has nesterov=2, but must be true or false"),
        ({"optim": "galore_adamw"}, "optim is 'galore_adamw'; allowed: adamw_torch, "),
        ({"optim": "schedule_free_sgd"}, "optim is 'schedule_free_sgd'; allowed: "),
        ({"optim": "adam"}, "optim is 'adam'; allowed: "),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"bf16": True, "frozen_bf16": True}, "frozen_bf16 is true beside bf16, .* already; keep one"),
        ({"fp16": True, "frozen_bf16": True}, "frozen_bf16 is true beside fp16, .* already; keep one"),
        ({"eval_steps": 5}, "eval_steps is 5, but eval_strategy is no"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_steps is 5, but eval_strategy is epoch"),
        ({"save_steps": 5}, "save_steps is 5, but save_strategy is epoch"),
        ({"logging_steps": 5, "logging_strategy": "epoch"}, "logging_steps is 5, but logging_strategy is epoch"),
        ({"eval_strategy": "often"}, "eval_strategy is 'often'; allowed: no, steps, epoch"),
        ({"save_strategy": "often"}, "save_strategy is 'often'; allowed: no, steps, epoch, best"),
        ({"log_level": "loud"}, "log_level is 'loud'; allowed: detail, debug"),
        ({"eval_delay": 2}, "eval_delay is set, but eval_strategy is no"),
        ({"save_strategy": "no", "save_total_limit": 2}, "save_total_limit is set, but save_strategy is no"),
        (
            {"save_strategy": "best"},
            "save_strategy is best, which goes by the accuracy during training; set eval_strategy",
        ),
        (
            {"load_best_model_at_end": True},
            "load_best_model_at_end is True, which goes by the accuracy during training",
        ),
        ({"early_stopping_patience": 2}, "early_stopping_patience is 2, which goes by the accuracy during training"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "needs save_strategy as eval_strategy, or best"),
        ({**BEST, "metric_for_best_model": "loss"}, "metric_for_best_model is 'loss', but only accuracy"),
        ({**BEST, "metric_for_best_model": "teacher_accuracy"}, "only accuracy is measured"),
        ({**BEST, "greater_is_better": False}, "the best accuracy is the greatest"),
        ({"eval_strategy": "epoch", "metric_for_best_model": "accuracy"}, "is set, but nothing asks for it"),
        ({"greater_is_better": True}, "greater_is_better is set, but nothing asks for it"),
        ({"early_stopping_threshold": 0.5}, "early_stopping_threshold is set, but nothing stops early"),
        ({"do_eval": True}, "do_eval is true, but a run trains and evaluates by its recipe"),
        ({"dataloader_prefetch_factor": 4}, "dataloader_prefetch_factor is set, but the process itself loads"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers is set, but"),
        ({"dataloader_multiprocessing_context": "fork"}, "dataloader_multiprocessing_context is set, but"),
        ({"dataloader_multiprocessing_context": "thread"}, "is 'thread'; allowed: fork, spawn, forkserver"),
        ({"train_sampling_strategy": "group_by_length"}, "is 'group_by_length'; allowed: random, sequential"),
        ({"run_name": "x"}, "run_name names the run for a tracker, but report_to is none"),
        ({"project": "x"}, "project is where trackio files a run, but report_to has no trackio"),
    ],
)
def test_what_would_be_ignored_beside_others(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        made(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "package"),
    [
        ({"report_to": "wandb"}, "wandb"),
        ({"report_to": ["tensorboard"]}, "tensorboard"),
        ({"report_to": "trackio"}, "trackio"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"optim": "paged_lion_8bit"}, "bitsandbytes"),
        ({"optim": "rmsprop_bnb"}, "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(
    fields: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even if there is a folder of its name, as left by wandb."""
    (tmp_path / package).mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ValueError, match=f"not installed: pip install {package}"):
        made(**fields)


@pytest.mark.parametrize("name", ["all", "mlflow", "wandb2", "comet_ml"])
def test_a_tracker_that_would_lose_tasks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"report_to is '{name}'; allowed: none, tensorboard, trackio, wandb"):
        made(report_to=name)


def test_all_numbers_in_one_message_and_by_the_place_where_they_stand() -> None:
    recipe = changed(
        train={"num_train_epochs": -1, "label_smoothing_factor": 0.1},
        student__train={"learning_rate": -1, "save_only_model": True},
        seed=-3,
    )
    with pytest.raises(RecipeError) as error:
        build_recipe(recipe)
    said = str(error.value).split("\n- ")[1:]
    starts = ("'train.num_train_epochs' is -1.0, but must be a finite number above 0",)
    starts += ("'train.label_smoothing_factor' is 0.1, but smoothing of the labels is a term: distill",)
    starts += ("'seed' is -3, but must be a whole number at least 0 and at most 4,294,967,295",)
    starts += ("'student.train.learning_rate' is -1.0, but", "'student.train.save_only_model' is True, but")
    assert all(sum(line.startswith(start) for line in said) == 1 for start in starts), said
    assert len(said) == len(starts)


def test_null_is_the_default_of_a_field() -> None:
    recipe = build_recipe(changed(train={"num_train_epochs": 3}, student__train={"num_train_epochs": None}))
    assert recipe.training_args("teacher")["num_train_epochs"] == 3
    assert recipe.training_args("student")["num_train_epochs"] == 20
    quick = build_recipe(changed(train={"max_steps": 2, "num_train_epochs": None}))
    assert build_recipe(quick.as_dict()) == quick


def test_arguments_can_be_copied(tmp_path: Path) -> None:
    args = arguments(tmp_path, **BEST, early_stopping_patience=2, lr_scheduler_type="reduce_lr_on_plateau")
    assert dataclasses.replace(args, learning_rate=0.5).to_dict() == {**args.to_dict(), "learning_rate": 0.5}
    assert args.metric_for_best_model == "accuracy" and args.lr_scheduler_kwargs == {"mode": "max"}


def test_the_order_of_the_images_follows_the_seed_if_it_has_none_of_its_own() -> None:
    assert made(seed=5, data_seed=None).data_seed == 5
    assert MINIMAL["student"]


def test_the_command_refuses_what_defeats_a_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", make_recipe(tmp_path))
    capfd.readouterr()
    for field, why in (("save_only_model", "without the optimizer's state"), ("ignore_data_skip", "the same images")):
        words = [str(file), f"--train.{field}", "true", "--output_dir", str(tmp_path / "run")]
        assert train_recipe.main(words) == 2
        said = capfd.readouterr().err
        assert f"'train.{field}' is True, but" in said and why in said and len(said.splitlines()) <= 6
        assert not (tmp_path / "run").exists()
