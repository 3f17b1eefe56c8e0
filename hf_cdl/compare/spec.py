"""A comparison: variants of a recipe x seeds (x class orders), paired, in one YAML file; checked before anything runs.

A *unit* is one (seed, class order): every variant has one run per unit, and variants are compared within units. A
*row* is one role of a variant's runs under a label: tables have a line for each row, and contrasts name rows.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_cdl.compare.records import METRIC_COLUMNS
from hf_cdl.recipe import Recipe, completed, load_recipe
from hf_cdl.recipe.files import RecipeError, read_yaml
from hf_cdl.recipe.type_checks import WRONG, build_typed
from hf_cdl.runs.files import read_json
from hf_cdl.runs.ledger import edited_plugins, lasting, read_ledger
from hf_cdl.runs.results import checked_results

ROOT = Path("runs", "comparisons")
"""Folder of all comparisons, each in a subfolder of its name."""
ORDER = "data.class_order_seed"
_OWN = ("output_dir", "cache", "teacher_from", "data.eval_split")
_TAKEN = ("cache", "logs", "plots", "test", "table.parquet", "table.csv", "table.md", "report.html", "flops.json")
"""Names of the files and folders next to the variants' folders."""


def _help(text: str, **default: Any) -> Any:
    return field(**default, metadata={"help": text})


@dataclass(frozen=True)
class Variant:
    """One of the variants compared: the recipe fields that differ, and the rows it fills."""

    rows: dict[str, str] = _help("Role (student, teacher, a baseline) -> label of its row.")
    set: dict[str, Any] = _help("Dotted fields of the recipe and their values.", default_factory=dict)
    recipe: str | list[str] | None = _help("Recipe file or files instead of the comparison's.", default=None)
    teacher_from: str | None = _help("Variant whose trained teachers are used, unit by unit.", default=None)


@dataclass(frozen=True)
class Spec:
    """A comparison as described in its file."""

    recipe: str | list[str] = _help("Recipe file, or files that are merged, beside the spec, above it or in recipes/.")
    seeds: list[int] = _help("Seeds: each variant has a run with each.")
    variants: dict[str, Variant] = _help("Name -> rows, set, recipe, teacher_from.")
    class_orders: list[int] | None = _help(
        "Class orders, crossed with the seeds; by default the order changes together with the seed.", default=None
    )
    seed_fields: list[str] | None = _help(
        f"Fields that get the seed; default seed and {ORDER}, and seed alone beside class_orders.", default=None
    )
    split: Literal["validation", "test"] = _help("Images on which accuracy is measured.", default="validation")
    cache: Literal["cache"] | None = _help(
        "Folder beside the variants' in which runs find what frozen models said of the same images; null: none.",
        default="cache",
    )
    metric: str = _help("Metric that the contrasts are about.", default="average_accuracy")
    contrasts: list[tuple[str, str]] = _help("Pairs of labels: first - second, unit by unit.", default_factory=list)
    curves: dict[str, str] = _help(
        "Variant -> title of its panel with accuracies over training (train.eval_strategy).", default_factory=dict
    )


@dataclass(frozen=True)
class PlannedRun:
    """One run: its folder, the `arguments` of hf-cdl train, and the hash of what determines its numbers."""

    variant: str
    seed: int
    folder: Path
    arguments: list[str]
    recipe: Recipe
    recipe_hash: str
    teacher_from: Path | None

    @property
    def class_order(self) -> int | None:
        """Seed of the class order; None for the data's own order."""
        return self.recipe.data.class_order_seed

    def read(self, file: Path) -> dict[str, Any] | None:
        """Read a results file of this run; None if it is missing, unfinished or from another recipe.

        Raises RunError if it contains no results.
        """
        if not file.exists():
            return None
        results = checked_results(read_json(file), str(file))
        try:
            stored = completed(results["recipe"])
        except ValueError:
            return None
        same = _defining(stored) == _defining(self.recipe.as_dict())
        return results if results.get("finished") and same else None

    def results(self) -> dict[str, Any] | None:
        """Results of the run; None until it is finished, and if a plugin was edited since: hf-cdl train says so."""
        plugins = self.recipe.plugins
        if plugins and (self.folder / "run.json").exists() and edited_plugins(read_ledger(self.folder), plugins):
            return None
        return self.read(self.folder / "results.json")


@dataclass(frozen=True)
class Comparison:
    """A checked spec: its name (the file's), its folder and all its runs; runs that train teachers come first."""

    name: str
    root: Path
    spec: Spec
    runs: list[PlannedRun]

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(label, variant, role) of every row, in the spec's order."""
        return [(label, name, role) for name, v in self.spec.variants.items() for role, label in v.rows.items()]


def read_comparison(file: Path, root: Path = ROOT) -> Comparison:
    """Read the comparison in a spec file; its runs are in `root`/NAME.

    Raises RecipeError with everything that is wrong, including each run's recipe.
    """
    content, problems = read_yaml(file), []
    variants = content.get("variants")
    if isinstance(variants, dict):
        problems += [
            f"'variants' has the name {name!r}, which YAML does not read as a text; write it in quotes: '{name}'"
            for name in variants
            if not isinstance(name, str)
        ]
        built = {name: build_typed(Variant, v, f"variants.{name}", problems) for name, v in variants.items()}
        content = {**content, "variants": {}}
    else:
        built = {}
    spec = build_typed(Spec, content, "", problems)
    if not problems and not built:
        problems.append("'variants' names none; give each a name and its rows: {alone: {rows: {student: alone}}}")
    comparison = None
    if spec is not WRONG and WRONG not in built.values() and not problems:
        spec = dataclasses.replace(spec, variants=built)
        problems += _wrong_names(spec)
        if not problems:
            comparison = Comparison(file.stem, root / file.stem, spec, [])
            comparison.runs.extend(_runs(comparison, file, problems))
    if problems or comparison is None:
        raise RecipeError(
            f"The comparison {file} cannot be run:\n" + "\n".join(f"- {line}" for line in dict.fromkeys(problems))
        )
    return comparison


def _wrong_names(spec: Spec) -> Iterable[str]:
    """Yield problems with a spec's names: unknown, duplicate or not allowed."""
    labels = [label for variant in spec.variants.values() for label in variant.rows.values()]
    for name, values in {"seeds": spec.seeds, "class_orders": spec.class_orders or [0], "rows": labels}.items():
        twice = sorted({value for value in values if values.count(value) > 1}, key=str)
        if twice or not values:
            yield f"'{name}' " + (f"has {_some(twice)} twice" if twice else "is empty")
    for name, variant in spec.variants.items():
        if not re.fullmatch(r"\w[\w.+-]*", name) or name in _TAKEN:
            yield f"'variants.{name}' becomes a folder; use letters, digits and . _ + -, and none of {_some(_TAKEN)}"
        if not variant.rows:
            yield f"'variants.{name}.rows' is empty; give a role and its label, like {{student: {name}}}"
        for key in variant.set:
            if key in (*_OWN, *_seed_fields(spec), *([ORDER] if spec.class_orders else [])):
                yield f"'variants.{name}.set' has '{key}', which the comparison sets; leave it out"
        source = variant.teacher_from
        if source is not None and (source not in spec.variants or spec.variants[source].teacher_from is not None):
            able = [key for key, other in spec.variants.items() if other.teacher_from is None and key != name]
            yield f"'variants.{name}.teacher_from' is {source!r}; allowed are variants without one: {_some(able)}"
    for number, pair in enumerate(spec.contrasts):
        for label in pair:
            if label not in labels:
                yield f"'contrasts.{number}' names {label!r}, which is not a row{_near(label, labels)}"
        if pair[0] == pair[1]:
            yield f"'contrasts.{number}' compares {pair[0]!r} with itself"
    for name in spec.curves:
        if name not in spec.variants:
            yield f"'curves' names {name!r}, which is not a variant{_near(name, list(spec.variants))}"
    if spec.metric not in METRIC_COLUMNS:
        yield f"'metric' is {spec.metric!r}; allowed: {', '.join(METRIC_COLUMNS)}"
    if spec.class_orders and ORDER in _seed_fields(spec):
        yield f"'seed_fields' has {ORDER}, but 'class_orders' sets it; keep one of them"
    if "seed" not in _seed_fields(spec):
        yield "'seed_fields' must have 'seed', or all runs of a variant would be the same"


def _seed_fields(spec: Spec) -> list[str]:
    return ["seed"] + ([] if spec.class_orders else [ORDER]) if spec.seed_fields is None else spec.seed_fields


def _runs(comparison: Comparison, file: Path, problems: list[str]) -> Iterable[PlannedRun]:
    """All runs, with their recipes built and checked; the runs of a variant stop at a wrong recipe."""
    spec, made = comparison.spec, {}
    for name, variant in sorted(spec.variants.items(), key=lambda item: item[1].teacher_from is not None):
        for seed, order in itertools.product(spec.seeds, spec.class_orders or [None]):
            unit = f"seed-{seed}" + ("" if order is None else f"-order-{order}")
            folder = comparison.root / name / unit
            source = made.get((variant.teacher_from, unit))
            arguments = _arguments(spec, variant, seed, order, folder, source, file)
            try:
                recipe = load_recipe(arguments, "")
            except RecipeError as error:
                problems += [f"variant '{name}': {line.removeprefix('- ')}" for line in str(error).splitlines()]
                break
            problems += [f"variant '{name}': {line}" for line in _wrong_roles(spec, name, recipe)]
            defining = {**_defining(recipe.as_dict()), "teacher_from": source and source.recipe_hash}
            digest = hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()[:16]
            run = PlannedRun(name, seed, folder, arguments, recipe, digest, source and source.folder)
            made[name, unit] = run
            yield run


def _arguments(
    spec: Spec, variant: Variant, seed: int, order: int | None, folder: Path, source: PlannedRun | None, file: Path
) -> list[str]:
    files = spec.recipe if variant.recipe is None else variant.recipe
    fields = {**variant.set, **dict.fromkeys(_seed_fields(spec), seed), "data.eval_split": spec.split}
    if order is not None:
        fields[ORDER] = order
    if source is not None:
        fields["teacher_from"] = str(source.folder)
    fields["output_dir"] = str(folder)
    if spec.cache is not None and len(spec.variants) > 1:
        fields["cache"] = str(folder.parent.parent / spec.cache)
    return [
        *(_recipe(name, file) for name in ([files] if isinstance(files, str) else files)),
        *itertools.chain.from_iterable((f"--{name}", _as_yaml(value)) for name, value in fields.items()),
    ]


def _recipe(name: str, spec: Path) -> str:
    """Find a recipe that a spec names: next to it, in the folder above (as in a clone), or in recipes/ here."""
    places = (spec.absolute().parent, spec.absolute().parent.parent, Path("recipes").absolute())
    found = [place / name for place in places]
    return str(next((file for file in found if file.exists()), found[0]))


def _wrong_roles(spec: Spec, name: str, recipe: Recipe) -> Iterable[str]:
    """Yield what the spec asks of a variant that its recipe cannot provide."""
    variant = spec.variants[name]
    roles = [*(["teacher"] if recipe.teacher else []), "student", *recipe.baselines]
    for role in variant.rows:
        if role not in roles:
            yield f"'rows' names the role {role!r}, but its runs have {', '.join(roles)}"
    if recipe.teacher is None and (
        variant.teacher_from is not None or any(other.teacher_from == name for other in spec.variants.values())
    ):
        yield "'teacher_from' asks for its teacher, but its recipe has none"
    if name in spec.curves and recipe.training_args("student").get("eval_strategy", "no") == "no":
        yield "'curves' shows its accuracies over training; set student.train: {eval_strategy: epoch}"
    if recipe.push_to_hub:
        yield "'push_to_hub' is true, but its runs would overwrite each other; push one of them with hf-cdl push"


def _defining(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored recipe that its numbers depend on, after a round trip through JSON."""
    others = ("name", "save_backbone", "save_code")
    return json.loads(json.dumps({key: value for key, value in lasting(recipe).items() if key not in others}))


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {_some(names)}"


def _some(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))
