"""Copy a student from elsewhere, and its recipe, which may be a stranger's, into a new run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from hf_cdl.commands.console import say
from hf_cdl.escape import visible
from hf_cdl.hub import HubError, Origin, read_folder, read_origin
from hf_cdl.places import by_name, is_private, short_name
from hf_cdl.recipe import Recipe, RecipeError, build_recipe, inherited_recipe
from hf_cdl.runs.continuation import continue_elsewhere
from hf_cdl.runs.files import RunError
from hf_cdl.runs.ledger import CHANGED, read_ledger, revision_name, revisions
from hf_cdl.runs.run import Run


def run_to_change(student: str, output_dir: Path | None, plugins: bool) -> tuple[Path, Callable[[], None]]:
    """The run whose student is to be changed: the one named, or a new one for a student from elsewhere.

    `plugins`: whether any were named on the command line. Also returns a function that removes a new run. Raises
    RunError if another student's run is in its place, and HubError for a model that cannot be copied.
    """
    place = Path(student)
    if place.is_dir():
        root = next((p for p in (place, *place.resolve().parents[:2]) if (p / "run.json").exists()), None)
        inside = place.resolve().relative_to(root.resolve()).parts if root else ()
        newest = root is not None and inside in ((), (CHANGED,), (CHANGED, _newest(root)))
        if root is not None and newest:
            if output_dir is not None:
                raise RunError(
                    f"{root} is a run, whose student is changed there: every change is a revision, and none is lost. "
                    "Leave --output_dir out."
                )
            return root, _remove_nothing
        if root is not None and (output_dir is None or output_dir.resolve() == root.resolve()):
            raise RunError(
                f"{place} is an earlier state of the run {root}, whose newest student is {_newest(root)}. Name the "
                "run to change that, or give --output_dir FOLDER for a new run that continues from here."
            )
        origin: Origin = read_folder(place, CHANGED)
    else:
        origin = read_origin(HfApi(), student, CHANGED)
    folder = output_dir or Path("runs", short_name(student))
    if (folder / "run.json").exists():
        _check_same(folder, origin)
        return folder, _remove_nothing
    return folder, _import(folder, origin, student, plugins)


def earlier_state(run: Run, number: int, folder: Path) -> None:
    """Download an earlier revision of a run's student that is not in the run, from where it was pushed.

    Raises RunError if it is no longer there, or differs.
    """
    source = run.origin.get("roles", {}).get(CHANGED, {})
    tag, repository = revision_name(number), source.get("repository")
    commit = source.get("tags", {}).get(tag)
    if repository is None or commit is None:
        raise RunError(
            f"The student cannot go back to {tag}: {run.folder} does not hold it, for it was changed elsewhere before "
            "it was copied from there. Undo it in the run where it was changed."
        )
    origin = read_origin(HfApi(), repository, CHANGED, tag)
    if origin.commit != commit:
        raise HubError(f"The tag {tag} of {repository} was moved since the student was copied. Nothing was undone.")
    origin.copy(folder)


def inherited(student: str, stored: Any, plugins: bool) -> tuple[Recipe, list[str]]:
    """What a new run inherits of a stored recipe, and the fields that were left out. Raises HubError if it is invalid.

    A stored recipe that runs Python files is refused, unless the user named `plugins`.
    """
    if not plugins and (listed := stored.get("plugins") if isinstance(stored, dict) else None):
        raise HubError(
            f"The recipe of {visible(student)} runs Python files, which were not run and not downloaded: "
            f"{visible(listed)[:300]}. Whoever made it chose what they do. Get and read them, then name them "
            "yourself: --plugins '[FILE.py]'."
        )
    try:
        return inherited_recipe(stored, build_recipe)
    except RecipeError as error:
        raise HubError(f"The recipe of {visible(student)} cannot be continued: {error}.") from error


def _newest(root: Path) -> str:
    """The name of the newest revision of a run's student."""
    return revision_name(revisions(read_ledger(root), CHANGED))


def _remove_nothing() -> None:
    """Remove nothing: the run is not new."""


def _check_same(folder: Path, origin: Origin) -> None:
    """Say that changes continue in the run that already holds the student. Raises RunError if it holds another."""
    name, newest = revision_name(origin.revision), _newest(folder)
    if not origin.same(folder / CHANGED / name):
        raise RunError(
            f"{folder} is in use: its student has not been what {origin.place} is. Nothing was changed. If that run's "
            f"student is meant, name it in place of {origin.place}; otherwise choose another folder with --output_dir "
            "FOLDER."
        )
    more = "" if newest == name else f", whose student has been changed since ({newest})"
    say(f"{origin.place} was copied before; continuing in {folder}/{more}.")


def _import(folder: Path, origin: Origin, student: str, plugins: bool) -> Callable[[], None]:
    """Create a finished run of a student from elsewhere; returns a function that removes it."""
    recipe = _recipe_of(origin, student, plugins, folder.resolve().name)
    say(f"{origin.place} is copied into {folder}/")
    return continue_elsewhere(
        folder,
        {"tasks": origin.tasks, "revision": origin.revision, "roles": {CHANGED: origin.as_dict()}},
        {CHANGED: {**origin.results, "recipe": recipe}},
        lambda role, target: origin.copy(target),
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110),
        finished=True,
    )


def _recipe_of(origin: Origin, student: str, plugins: bool, name: str) -> dict[str, Any]:
    """The recipe of a run that trains nothing: it rebuilds the student and names the data it was trained on."""
    stored = origin.results["recipe"]
    content = {**inherited(student, stored, plugins)[0].as_dict(), "name": name}
    data = stored.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    path = visible(path) if isinstance(path, str) and path.strip() else "./unknown"
    path = f"./{by_name(path)}" if is_private(path) else path
    return build_recipe({**content, "data": {**content["data"], "path": path}}).as_dict()
