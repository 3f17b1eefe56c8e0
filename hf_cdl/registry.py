"""Open registries of the methods that a recipe can name: built-in ones and those of plugins."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType
from typing import Any, TypeVar, overload

from torch import nn

from hf_cdl.checked import short, storable

T = TypeVar("T")
C = TypeVar("C", bound=type)


def usable(name: Any) -> bool:
    """Whether a module can have a part of this name: an identifier that is no attribute of a ModuleDict."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(nn.ModuleDict(), name)


def _misfit(name: str, own: inspect.Signature, promised: inspect.Signature) -> Iterator[str]:
    """What is wrong if a method of the signature `own` cannot be called as one that is `promised`."""
    try:
        own.bind(*promised.parameters)
    except TypeError as error:
        yield f"has {name}{own}, but it is called as {name}{promised} ({error}); give it those arguments"


class Registry(dict[str, type[T]]):
    """Classes of one kind of method, keyed by the name used as `type` in a recipe.

    Messages call the registry `name` and an entry `what`. Entries derive from `base`, whose `check_class` says what
    they lack; their `config_class`, a dataclass with `fields`, derives from that of `base`. `bare` are types without a
    class or fields; `reserved` are names that cannot be types.
    """

    def __init__(
        self,
        name: str,
        what: str,
        base: type[T],
        own: Mapping[str, type[T]],
        fields: Collection[str] = (),
        bare: Collection[str] = (),
        reserved: Collection[str] = (),
    ):
        super().__init__(own)
        self.name, self.what, self.base, self.fields, self.bare = name, what, base, fields, bare
        self.reserved = reserved
        self._own = dict(own)

    @property
    def added(self) -> set[str]:
        """Names of classes that are not the package's own, so that their code is not saved with checkpoints."""
        return {name for name, kind in self.items() if self._own.get(name) is not kind}

    @property
    def types(self) -> list[str]:
        """Allowed values of a section's `type`."""
        return [*self.bare, *self]

    def pick(self, section: Any, what: str) -> tuple[str, dict[str, Any]]:
        """Split a section `{type: ..., fields}` of a model's config into type and fields.

        Raises ValueError unless the type is known.
        """
        fields = dict(section) if isinstance(section, Mapping) else {}
        kind = fields.pop("type", None)
        if not isinstance(kind, str) or kind not in self.types:
            said = f"'{kind}'" if isinstance(kind, str) else f"in {short(section)}"
            raise ValueError(
                f"Unknown {what} type {said}; allowed: {', '.join(self.types)}. Write it as {{'type': ...}}. A method "
                f"of your own is known once the file that calls {self.name}.register has run: import it first."
            )
        return kind, fields

    @overload
    def register(self, name: str) -> Callable[[C], C]: ...
    @overload
    def register(self, name: str, kind: C) -> C: ...
    def register(self, name: str, kind: Any = None) -> Any:
        """Register a class under a name for use as `type`: as a decorator, `@TERMS.register("mine")`, or directly.

        A class redefined in a notebook replaces the old one. Raises ValueError for a name that is not an identifier or
        is taken, and for a class that lacks what every method of its kind has.
        """
        if not usable(name) or name in (*self.bare, *self.reserved):
            raise ValueError(
                f"{self.name}.register: {short(name)} cannot be the name of a {self.what}; allowed are words of "
                "letters, digits and _ without another meaning. Choose one, as 'my_method'."
            )
        if kind is None:
            return lambda decorated: self.register(name, decorated)
        self._check(name, kind)
        self[name] = kind
        return kind

    def _check(self, name: str, kind: Any) -> None:
        """Raise ValueError unless a class can be registered under a name."""
        base: Any = self.base
        call = f"{self.name}.register('{name}')"
        if not isinstance(kind, type) or not issubclass(kind, base):
            raise ValueError(
                f"{call} got {short(kind)}, which is not a {self.what}: allowed are classes derived from "
                f"{base.__module__}.{base.__name__}. Derive yours from it."
            )
        taken = self.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(
                f"{call} got {kind.__qualname__}, but the name is taken by {taken.__module__}.{taken.__qualname__}; "
                "choose a name that is free."
            )
        if lacking := sorted(vars(kind).get("__abstractmethods__", ())):
            raise ValueError(
                f"{call}: {kind.__qualname__} lacks {', '.join(lacking)}, which every {self.what} has; define what is "
                "missing."
            )
        if problem := self._config_problem(getattr(kind, "config_class", None)):
            raise ValueError(
                f"{call}: {kind.__qualname__}.config_class {problem}; allowed is a dataclass, whose fields are those "
                "of the recipe's section."
            )
        for problem in (*self._promises(kind), kind.check_class()):
            if problem is not None:
                raise ValueError(f"{call}: {kind.__qualname__} {problem}.")

    def _promises(self, kind: Any) -> Iterator[str]:
        """Problems of what a class redefines: methods that cannot be called as its base's, attributes of instances."""
        bases = [parent for parent in kind.__mro__[1:] if parent.__module__ == self.base.__module__]
        for base, name, promised in ((parent, *item) for parent in bases for item in vars(parent).items()):
            own = inspect.getattr_static(kind, name)
            if isinstance(promised, bool) and str(base.__annotations__.get(name, "")).startswith("ClassVar"):
                if not isinstance(own, bool):
                    yield f"has {name} {short(own)}; allowed: True or False, as a class is asked before one is made"
            elif isinstance(promised, classmethod) and not isinstance(own, classmethod | staticmethod):
                yield f"has {name} as a method of instances; make it a classmethod, as {base.__name__}.{name} is"
            elif isinstance(promised, FunctionType) and isinstance(own, FunctionType):
                yield from _misfit(name, inspect.signature(own), inspect.signature(promised))

    def _config_problem(self, config: Any) -> str | None:
        if not isinstance(config, type) or not dataclasses.is_dataclass(config):
            return f"is {short(config)}"
        if (root := getattr(self.base, "config_class", object)) not in config.__mro__:
            return f"({config.__qualname__}) is not derived from {root.__module__}.{root.__qualname__}"
        names = [f.name for f in dataclasses.fields(config)]
        if lacking := [field for field in self.fields if field not in names and not hasattr(config, field)]:
            return f"({config.__qualname__}) has no {' and no '.join(lacking)}"
        if "type" in names:
            return f"({config.__qualname__}) has a field 'type', which says of what type the section is"
        needed = [f for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]
        if needed:
            return f"({config.__qualname__}) has no default for {', '.join(f.name for f in needed)}; give it one"
        try:
            hints = typing.get_type_hints(config)
        except NameError as error:
            return f"({config.__qualname__}) has an annotation that is unknown where the class is defined: {error}"
        if odd := [f"{name}: {short(hints[name])}" for name in names if not storable(hints[name])]:
            return (
                f"({config.__qualname__}) has {', '.join(odd)}, which cannot be stored as JSON and read again; allowed"
                " are bool, int, float, str, None, Literal words, and tuple, list or dict of these"
            )
        return None
