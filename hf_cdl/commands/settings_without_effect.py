"""What a recipe asks for that the tasks of a run give no occasion for; known once its data are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_cdl.counted import counted
from hf_cdl.training.arguments import CDLTrainingArguments
from hf_cdl.training.schedules import epochs_begun


def check_views(views: int | None, tasks: Sequence[Any], arguments: Sequence[CDLTrainingArguments]) -> None:
    """Raise ValueError for `data.views` of which no image comes again; `arguments`: of the roles that a loss trains.

    What is said in epochs is checked with the recipe.
    """
    if views is None or not tasks or all(args.max_steps <= 0 for args in arguments):
        return
    most = max(epochs_begun(args, len(task.train)) for args in arguments for task in tasks)
    if most <= views:
        raise ValueError(
            f"'data.views' is {views}, but in {counted(most, 'epoch')} (train.max_steps) each has its own view "
            "anyway; give fewer views than epochs, or leave it out."
        )


def without_sessions(tasks: Sequence[Any], models: Mapping[str, Any]) -> Iterator[str]:
    """Name the models whose `later_sessions` do not come in these tasks; further ones may be added to a run later."""
    for role, model in models.items():
        later = getattr(model, "later", None)
        if later is not None and not any(task.index and model.has_session(task.index) for task in tasks):
            yield (
                f"{role}.later_sessions has no effect on {counted(len(tasks), 'task')}: no session comes after the "
                "first (hf-cdl add --output_dir FOLDER learns further tasks)"
            )
