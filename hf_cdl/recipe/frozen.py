"""`train.frozen_bf16` needs passes that no loss trains: of queries, of a teacher, or of a fitted head's features."""

from __future__ import annotations

from collections.abc import Iterator

from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe.fields import BASELINES, ModelRecipe, Recipe


def frozen_problems(recipe: Recipe) -> Iterator[str]:
    """Yield where `frozen_bf16` would have no effect: in all roles that share it, or in the one whose own it is."""
    sections = {"teacher": recipe.teacher, "student": recipe.student}
    able = {role: section is not None and _has_frozen_passes(recipe, section) for role, section in sections.items()}
    for role, section in sections.items():
        own = section is not None and section.train and section.train.get("frozen_bf16")
        shared = recipe.train.get("frozen_bf16") and not any(able.values())
        if (own or shared) and section is not None and not able[role]:
            yield (
                f"'{f'{role}.' if own else ''}train.frozen_bf16' has no effect: no pass runs that no loss trains (no "
                "query, no teacher, no head that is fitted); leave it out"
            )


def _has_frozen_passes(recipe: Recipe, section: ModelRecipe) -> bool:
    """Whether passes that no loss trains are taken while a model learns; baselines go by the student's arguments."""
    if section is recipe.student:
        taught = any(TERMS[term["type"]].needs_teacher for term in recipe.distill) or section.head.get("soft_targets")
        if taught or any(HEADS[BASELINES[name]["type"]].fitted for name in recipe.baselines):
            return True
    if section.model == "classifier":
        return False
    pool = PROMPTS.get(section.prompt["type"])
    asks = pool is not None and pool.needs_query and section.query != "one_pass"
    return asks or HEADS[section.head["type"]].fitted
