"""`data.views` needs roles that a loss trains for more epochs than there are views."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hf_cdl.counted import counted
from hf_cdl.recipe.checks import trains
from hf_cdl.recipe.fields import Recipe
from hf_cdl.training.arguments import CDLTrainingArguments


def views_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why `data.views` would have no effect."""
    views = recipe.data.views
    if views is None:
        return
    baselines = "linear_head" in recipe.baselines  # the one that a loss trains, by the student's arguments
    trained = [recipe.training_args("student")] if baselines or trains(recipe.student) else []
    if recipe.teacher is not None and trains(recipe.teacher):
        trained.append(recipe.training_args("teacher"))
    if not trained:
        yield "'data.views' has no effect: no loss trains, so no image is augmented; leave it out"
    epochs = [arguments.get("num_train_epochs", CDLTrainingArguments.num_train_epochs) for arguments in trained]
    if epochs and all(arguments.get("max_steps", -1) < 1 for arguments in trained) and max(epochs) <= views:
        yield (
            f"'data.views' is {views}, but of {counted(math.ceil(max(epochs)), 'epoch')} each has its own view "
            "anyway; give fewer views than epochs (train.num_train_epochs), or leave it out"
        )
