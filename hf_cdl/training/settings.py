"""What a trainer's learning depends on, as JSON values for its run's ledger: runs/settings.py compares them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hf_cdl.distill import Objective
from hf_cdl.training.arguments import CDLTrainingArguments
from hf_cdl.training.arguments.table import ARGUMENTS, BESIDE, STEERING, Used

_PARTS = (
    *("prompt", "head", "first_session", "later_sessions", "lora", "kd_prompt", "mapping", "query", "patch_mean"),
    "train_backbone",
)
"""Fields of a CDLConfig that say what a model is and how it learns, whatever tasks it knows."""


def settings_of(args: CDLTrainingArguments, objective: Objective, model: Any, teacher: Any) -> dict[str, Any]:
    """Training arguments that affect the numbers, the objective, and what model and teacher (or None) are."""
    beside = BESIDE if args.metric_for_best_model is not None else (*BESIDE, *STEERING)
    names = [name for name, row in ARGUMENTS.items() if isinstance(row, Used) and name not in beside]
    found = {
        "arguments": {name: getattr(args, name, None) for name in names},
        "objective": {"ce_weight": objective.ce_weight, "terms": {k: _term(t) for k, t in objective.terms.items()}},
        "model": _model(model),
        "teacher": None if teacher is None else _model(teacher),
    }
    return json.loads(json.dumps(found, default=str))


def _term(term: Any) -> dict[str, Any]:
    return {"class": type(term).__qualname__, **dataclasses.asdict(term.config)}


def _model(model: Any) -> dict[str, Any]:
    """A model's class and its parts; of a user's own module the class alone is known."""
    config = getattr(model, "config", None)
    parts = {name: getattr(config, name) for name in (*_PARTS, "backbone_digest") if hasattr(config, name)}
    return {"class": type(model).__qualname__, **parts}
