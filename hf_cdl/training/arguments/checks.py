"""Checks for training arguments without effect, or with an unwanted one; problems are returned, not raised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import trainer_log_levels
from transformers.utils.import_utils import is_torch_tf32_available

from hf_cdl.training.arguments.table import ARGUMENTS, Refused
from hf_cdl.training.compiling import BACKENDS, MODES
from hf_cdl.training.trackers import TRACKERS, wandb_problem

STEERED = ("reduce_lr_on_plateau", "greedy")
"""Schedules that depend on the accuracy during training."""

_NO_WARMUP = ("constant", *STEERED)
_NO_KEYWORDS = ("constant", "constant_with_warmup")
"""Schedules for which transformers' get_scheduler ignores all further keywords."""


@dataclass(frozen=True)
class _Optimizer:
    """What an optimizer reads: `adam`, which of the adam_* fields, and `options`, the names in optim_args."""

    adam: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    package: str | None = None


_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_BNB_ADAM, _BNB_LION = _Optimizer(_ADAM, package="bitsandbytes"), _Optimizer(_ADAM[:2], package="bitsandbytes")
_BNB_RMSPROP = _Optimizer(package="bitsandbytes")
OPTIMIZERS = {
    "adamw_torch": _Optimizer(_ADAM),
    "adamw_torch_fused": _Optimizer(_ADAM),
    "adafactor": _Optimizer(),
    "sgd": _Optimizer(options=("momentum", "dampening", "nesterov")),
    "adagrad": _Optimizer(options=("lr_decay", "eps")),
    "rmsprop": _Optimizer(options=("momentum", "alpha", "eps", "centered")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), _BNB_ADAM),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), _BNB_LION),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), _BNB_RMSPROP),
}
"""transformers' other optimizers keep extra state, change the model, or come from unmaintained packages."""

_CHOICES: dict[str, list[str]] = {
    "lr_scheduler_type": [known.value for known in SchedulerType],
    "eval_strategy": [known.value for known in IntervalStrategy],
    "logging_strategy": [known.value for known in IntervalStrategy],
    "save_strategy": [known.value for known in SaveStrategy],
    "log_level": [*trainer_log_levels],
    "optim": [*OPTIMIZERS],
    "train_sampling_strategy": ["random", "sequential"],
    "torch_compile_backend": [*BACKENDS],
    "torch_compile_mode": [*MODES],
    "dataloader_multiprocessing_context": ["fork", "spawn", "forkserver"],
}


_SHARDED = (
    ("ACCELERATE_USE_FSDP", "use_fsdp", "fsdp"),
    ("ACCELERATE_USE_DEEPSPEED", "use_deepspeed", "deepspeed"),
    ("ACCELERATE_USE_MEGATRON_LM", "use_megatron_lm", "parallelism_config"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "use_parallelism_config", "parallelism_config"),
)
"""Environment variables by which `accelerate launch` requests sharded models, its options, and our arguments."""


class Problem(NamedTuple):
    """A problem with a field; `what` is worded to follow the field's name."""

    field: str
    what: str


def find_problems(values: dict[str, Any], defaults: dict[str, Any]) -> list[Problem]:
    """All problems of the arguments `values` (every field, as given), whose defaults are `defaults`."""
    values = {name: _plain(value) for name, value in values.items()}
    given = {name for name, value in values.items() if value != _plain(defaults[name])}
    found = [problem for name in values if name in given for problem in _alone(name, values[name])]
    if found:  # the rules between fields rely on valid values
        return found
    rules = (_duration, _schedule, _optimizer, _precision, _launch, _compiling, _steps, _steering, _loading, _tracking)
    return [problem for rule in rules for problem in rule(values, given)]


def _plain(value: Any) -> Any:
    """A value as in a recipe: enums become their values, and empty values None."""
    value = getattr(value, "value", value)
    if hasattr(value, "to_dict"):  # accelerate's configuration; equals the default if none was given
        value = None if value == type(value)() else value.to_dict()
    return None if value in ("", [], {}, "none", ["none"]) else value


def _alone(name: str, value: Any) -> Iterator[Problem]:
    row = ARGUMENTS.get(name)
    if isinstance(row, Refused):
        if name != "do_eval":  # set by transformers itself; see _steering
            said = "is set" if name.endswith("_token") else f"is {value!r}"
            yield Problem(name, f"{said}, but {row.why}")
    elif row is not None and row.is_number and value is not None and not row.allows(value):
        yield Problem(name, f"is {value!r}, but must be {row}")
    elif name in _CHOICES and value not in _CHOICES[name]:
        yield Problem(name, f"is {value!r}; allowed: {', '.join(_CHOICES[name])}")


def _duration(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    if v["max_steps"] == -1:
        return
    if "num_train_epochs" in given:
        yield Problem(
            "max_steps",
            f"is {v['max_steps']}, and num_train_epochs {v['num_train_epochs']:g}; keep one of them: leave the other "
            "out, or set it null in a recipe",
        )
    for own in ("epoch_cosine", "lr_steps"):
        if v[own]:
            yield Problem(own, "counts epochs; set num_train_epochs instead of max_steps")


def _schedule(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    kind, epochs, steps = v["lr_scheduler_type"], v["num_train_epochs"], v["lr_steps"] or []
    own = [name for name in ("epoch_cosine", "lr_steps") if v[name]]
    if len(own) + (kind != "constant") > 1:
        yield Problem(
            own[0],
            f"is a schedule beside {' and '.join([*own[1:], f'lr_scheduler_type {kind}'])}; keep one (and "
            "lr_scheduler_type constant beside another)",
        )
        return
    if own and epochs != int(epochs):
        yield Problem(own[0], f"counts whole epochs, but num_train_epochs is {epochs:g}")
    if steps and (steps != sorted(set(steps)) or steps[0] < 1):
        yield Problem("lr_steps", f"is {steps}, but must be ascending numbers of epochs, from 1 on")
    elif steps and steps[-1] >= epochs and v["max_steps"] == -1:
        yield Problem("lr_steps", f"is {steps}, but must lie below num_train_epochs, which is {epochs:g}")
    if "lr_decay" in given and not steps:
        yield Problem("lr_decay", "is the factor at each of lr_steps; set lr_steps, or leave it out")
    if v["warmup_steps"] and (own or kind in _NO_WARMUP):
        instead = "constant_with_warmup" if kind == "constant" and not own else "a schedule with one, as cosine"
        yield Problem(
            "warmup_steps",
            f"is {v['warmup_steps']:g}, but {own[0] if own else f'lr_scheduler_type {kind}'} has no warm-up; use "
            f"lr_scheduler_type {instead}, or leave it out",
        )
    keywords = v["lr_scheduler_kwargs"] or {}
    if isinstance(keywords, dict):
        yield from _keywords(kind, keywords, v)
    else:
        yield Problem(
            "lr_scheduler_kwargs", f"is {keywords!r}, but must be fields and values, like {{min_lr: 0.0001}}"
        )


def _keywords(kind: str, keywords: dict[str, Any], v: dict[str, Any]) -> Iterator[Problem]:
    """Unknown or missing keywords of a schedule, found by building it for a dummy optimizer."""
    classes: dict[str, Any] = {STEERED[0]: torch.optim.lr_scheduler.ReduceLROnPlateau, STEERED[1]: GreedyLR}
    taken = signature(classes.get(kind, TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)])).parameters
    names = {*taken} - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
    names = set() if kind in _NO_KEYWORDS else names
    if unknown := sorted({*keywords} - names):
        allowed = ", ".join(sorted(names)) or "nothing"
        yield Problem("lr_scheduler_kwargs", f"has {', '.join(unknown)}, but lr_scheduler_type {kind} takes {allowed}")
        return
    if kind in STEERED and keywords.get("mode", "max") != "max":
        yield Problem("lr_scheduler_kwargs", f"has mode {keywords['mode']!r}, but accuracy is to rise; leave mode out")
        return
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=v["learning_rate"])
    try:
        get_scheduler(kind, optimizer, 0, 100, keywords)
    except (ValueError, TypeError, AssertionError) as error:
        yield Problem(
            "lr_scheduler_type", f"is {kind}, which cannot be made with lr_scheduler_kwargs {keywords}: {error}"
        )


def _optimizer(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    kind = OPTIMIZERS[v["optim"]]
    if kind.package is not None and not _installed(kind.package):
        yield Problem(
            "optim", f"is {v['optim']}, which needs a package that is not installed: pip install {kind.package}"
        )
    for name in _ADAM:
        if name in given and name not in kind.adam:
            yield Problem(name, f"is {v[name]:g}, but optim {v['optim']} does not read it; leave it out")
    options: dict[str, str] = {}
    for pair in (v["optim_args"] or "").replace(" ", "").split(","):
        name, equals, value = pair.partition("=")
        if pair and not (name and equals and value):
            yield Problem("optim_args", f"is {v['optim_args']!r}, but must be pairs: 'momentum=0.9,nesterov=true'")
            return
        options |= {name: value} if pair else {}
    if unknown := [name for name in options if name not in kind.options]:
        more = " (the field weight_decay is its place)" if "weight_decay" in unknown else ""
        yield Problem(
            "optim_args",
            f"has {', '.join(unknown)}{more}, but optim {v['optim']} takes {', '.join(kind.options) or 'none'}",
        )
        return
    for name, value in options.items():
        switch = name in ("nesterov", "centered")
        if (switch and value.lower() not in ("true", "false")) or (not switch and not _is_number(value)):
            yield Problem("optim_args", f"has {name}={value}, but must be {'true or false' if switch else 'a number'}")


def _installed(package: str) -> bool:
    """Whether a package is installed; wandb leaves `wandb` folders behind, which Python takes for packages."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0 and float(text) != float("inf")
    except ValueError:
        return False


def _precision(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    if v["bf16"] and v["fp16"]:
        yield Problem("bf16", "and fp16 are both true; keep one of them")
    if v["frozen_bf16"] and (beside := next((name for name in ("bf16", "fp16") if v[name]), None)):
        yield Problem(
            "frozen_bf16", f"is true beside {beside}, which computes all passes in half precision already; keep one"
        )
    if v["fp16"] and v["use_cpu"]:
        yield Problem("fp16", "is true, but a CPU (use_cpu) does not train in it; use bf16")
    if v["tf32"] and not is_torch_tf32_available():
        yield Problem(
            "tf32", "is true, but this machine has no GPU that computes in it (Ampere or newer); leave it out"
        )


def _launch(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    """What `accelerate launch` requests by the environment instead of arguments: it would be recorded nowhere."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    own = next((name for name in ("bf16", "fp16") if v[name]), "no")
    if precision not in ("no", "none", "", own) and own == "no":
        way = f"set {precision} true (train.{precision} in a recipe)" if precision in ("bf16", "fp16") else "set bf16"
        yield Problem(
            precision if precision in ("bf16", "fp16") else "bf16",
            f"is not set, but ACCELERATE_MIXED_PRECISION is {precision} (accelerate launch --mixed_precision, or "
            f"accelerate config); the precision is said here alone: {way}, or launch with --mixed_precision no",
        )
    for variable, option, name in _SHARDED:
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "on"):
            yield Problem(
                name,
                f"is asked for by {variable} (accelerate launch --{option}, or accelerate config), but that would "
                "shard the student too; leave it out of the launch, and for a teacher too large for one device set "
                "shard_teacher true (train.shard_teacher in a recipe)",
            )
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() not in ("no", ""):
        yield Problem(
            "torch_compile",
            f"is asked for by ACCELERATE_DYNAMO_BACKEND {backend} (accelerate launch --dynamo_backend, or accelerate "
            "config), which would compile a model that grows; leave it out of the launch, and set torch_compile true "
            "here (train.torch_compile in a recipe)",
        )


def _compiling(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    mode = v["torch_compile_mode"]
    if mode is not None and (why := MODES[mode]) is not None:
        yield Problem("torch_compile_mode", f"is {mode!r}, but {why}; use default, or leave it out")


def _steps(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    for what in ("eval", "save", "logging"):
        steps, strategy = f"{what}_steps", v[f"{what}_strategy"]
        if steps in given and strategy != "steps":
            yield Problem(
                steps,
                f"is {v[steps]:g}, but {what}_strategy is {strategy}; set {what}_strategy steps, or leave {steps} out",
            )
    if v["eval_delay"] and v["eval_strategy"] == "no":
        yield Problem("eval_delay", "is set, but eval_strategy is no; set it to epoch or steps")
    if "save_total_limit" in given and v["save_strategy"] == "no":
        yield Problem("save_total_limit", "is set, but save_strategy is no: nothing is stored; leave one of them out")


def _steering(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    """Options that depend on the accuracy during training need one to be measured."""
    evaluated, stored = v["eval_strategy"], v["save_strategy"]
    users = {
        "lr_scheduler_type": v["lr_scheduler_type"] in STEERED,
        "load_best_model_at_end": v["load_best_model_at_end"],
        "save_strategy": stored == "best",
        "early_stopping_patience": v["early_stopping_patience"] is not None,
    }
    using = [name for name, used in users.items() if used]
    if using and evaluated == "no":
        what = f"is {v[using[0]]}, which goes by the accuracy during training; set eval_strategy epoch"
        yield Problem(using[0], what)
    if v["do_eval"] and evaluated == "no":
        yield Problem("do_eval", "is true, but a run trains and evaluates by its recipe; leave it out")
    if v["load_best_model_at_end"] and evaluated not in ("no", stored) and stored != "best":
        yield Problem(
            "load_best_model_at_end",
            f"needs save_strategy as eval_strategy, or best; they are {stored} and {evaluated}",
        )
    if (metric := v["metric_for_best_model"]) not in (None, "accuracy", "eval_accuracy"):
        yield Problem("metric_for_best_model", f"is {metric!r}, but only accuracy is measured during training")
    if v["greater_is_better"] is False:
        yield Problem("greater_is_better", "is false, but the best accuracy is the greatest; leave it out")
    if not using:
        for name in ("metric_for_best_model", "greater_is_better"):
            if v[name] is not None:
                yield Problem(
                    name,
                    "is set, but nothing asks for it; set load_best_model_at_end, save_strategy best, "
                    "early_stopping_patience or lr_scheduler_type reduce_lr_on_plateau, or leave it out",
                )
    if v["early_stopping_threshold"] and v["early_stopping_patience"] is None:
        yield Problem("early_stopping_threshold", "is set, but nothing stops early; set early_stopping_patience")


def _loading(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    for name in (
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "dataloader_multiprocessing_context",
    ):
        if name in given and not v["dataloader_num_workers"]:
            yield Problem(name, "is set, but the process itself loads the images; set dataloader_num_workers")


def _tracking(v: dict[str, Any], given: set[str]) -> Iterator[Problem]:
    names = v["report_to"] or []
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in TRACKERS:
            yield Problem("report_to", f"is {name!r}; allowed: none, {', '.join(TRACKERS)}")
        elif not _installed(name):
            yield Problem("report_to", f"is {name}, which is not installed: pip install {name}")
        elif name == "wandb" and os.environ.get("RANK", "0") == "0" and (problem := wandb_problem()):
            yield Problem("report_to", problem)  # only the first process reports
    if "run_name" in given and not names:
        yield Problem("run_name", "names the run for a tracker, but report_to is none; set it, or leave run_name out")
    if "project" in given and "trackio" not in names:
        yield Problem("project", "is where trackio files a run, but report_to has no trackio; leave it out")
    if "wandb" in names and os.environ.get("WANDB_LOG_MODEL", "false").lower() != "false":
        yield Problem(
            "report_to",
            "is wandb, with WANDB_LOG_MODEL in the environment: models lie in the run's folder, not there; unset it",
        )
