"""A recipe's sections as written, of which any field may be missing or of the wrong type."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_cdl.distill import Term
from hf_cdl.distill.objective import Asks
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe.fields import ModelRecipe
from hf_cdl.recipe.type_checks import default_of
from hf_cdl.registry import Registry


def registered(registry: Registry[Any], section: Any) -> Any:
    """The class that a `{type: ..., fields}` section names; None if there is no such class."""
    kind = section.get("type") if isinstance(section, dict) else None
    return registry.get(kind) if isinstance(kind, str) else None


def is_fitted(head: Any) -> bool:
    """Whether a head's section names one that is fitted."""
    known = registered(HEADS, head)
    return known is not None and known.fitted


def heads(fitted: bool) -> list[str]:
    """Names of the heads that are fitted, or of the others."""
    return [name for name, head in HEADS.items() if head.fitted == fitted]


DEFAULTS = {f.name: default_of(f) for f in dataclasses.fields(ModelRecipe)}
"""Of the fields of a model's section."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A model's section as written."""

    role: str
    section: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        """A `{type: ..., fields}` section."""
        value = self.section.get(name)
        return value if isinstance(value, dict) else DEFAULTS[name] or {}

    def has(self, name: str) -> bool:
        return self.section.get(name) is not None

    @property
    def prompted(self) -> bool:
        return self.part("prompt").get("type") != "none"

    @property
    def trains(self) -> bool:
        return self.section.get("train_backbone") is True

    @property
    def plain(self) -> bool:
        return self.section.get("model") == "classifier"

    @property
    def ready(self) -> bool:
        return "train" in self.section and self.section["train"] is None

    @property
    def asks(self) -> Asks:
        pool = registered(PROMPTS, self.section.get("prompt"))
        return Asks(pool is not None, self.section.get("query", "student") if pool and pool.needs_query else None)


@dataclasses.dataclass(frozen=True)
class WrittenTerm:
    """A registered distillation term, and its name in messages."""

    name: str
    kind: type[Term]
