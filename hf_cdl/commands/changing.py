"""What the commands that change a trained student share: finding it, changing it, and storing it as a revision."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from huggingface_hub import HfApi

from hf_cdl import CDLForImageClassification
from hf_cdl.commands import stopping
from hf_cdl.commands.console import say
from hf_cdl.commands.plugin_files import say_differences
from hf_cdl.escape import visible_lines
from hf_cdl.hub import HubError, Origin, Pusher, read_folder, read_origin
from hf_cdl.models.changes import Change
from hf_cdl.places import short_name
from hf_cdl.recipe import build_recipe, described, load_plugins, untrained
from hf_cdl.recipe.build import load_processor
from hf_cdl.runs.changes import ChangingRun
from hf_cdl.runs.continuation import continue_elsewhere
from hf_cdl.runs.files import RunError
from hf_cdl.runs.ledger import CHANGED
from hf_cdl.runs.results import run_results


def change(options: Any, make: Callable[[CDLForImageClassification, Any], Change]) -> int:
    """Change the student that the options name by `make(model, processor)`, and store it as a new revision."""
    return _told(lambda: _change(options, make))


def undo(options: Any) -> int:
    """Go back to the student before its last change, as a new revision."""

    def undone() -> int:
        run = ChangingRun(_folder(options)[0], say)
        with run.changing():
            stored = run.undo()
        return _after(run, stored, options)

    return _told(undone)


def _told(act: Callable[[], int]) -> int:
    try:
        return act()
    except (OSError, ValueError, RunError, HubError, FloatingPointError) as error:
        say(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2


def _change(options: Any, make: Callable[[CDLForImageClassification, Any], Change]) -> int:
    load_plugins(options.plugins)
    folder, take_away = _folder(options)
    try:
        run = ChangingRun(folder, say)
        _store(run, options, make)
    except BaseException:  # Ctrl-C too: a failed first change leaves nothing behind
        take_away()
        raise
    return _after(run, run.changes[-1], options)


def _store(run: ChangingRun, options: Any, make: Callable[[CDLForImageClassification, Any], Change]) -> None:
    say_differences(run.folder, options.plugins)
    with run.changing():
        checkpoint = run.checkpoint(CHANGED)
        if checkpoint is None:
            raise RunError(f"The run in {run.folder} has no student that could be changed.")
        model: Any = CDLForImageClassification.from_pretrained(checkpoint).to(PartialState().device)
        processor = load_processor(checkpoint)
        made = make(model, processor)

        def write(place: Path) -> None:
            model.save_pretrained(place)
            processor.save_pretrained(place)

        said = {"kind": made.kind, "said": str(made), "images": made.images, "choices": made.choices}
        run.save_change({**said, "class_names": model.tasks}, write)


def _after(run: ChangingRun, stored: dict[str, Any], options: Any) -> int:
    """Say what was done and, if the run is pushed, push it."""
    name = f"task-{stored['revision']:02d}"
    say(stored["said"])
    say(f"Stored as {name} in {run.folder / CHANGED}/. To go back: {stopping.command('undo', run.folder)}")
    hub = _hub(run, options)
    if hub is None:
        return 0
    recipe = build_recipe({**untrained(run.ledger["recipe"]), **hub, "push_to_hub": True})
    later = stopping.command("push", run.folder)
    pusher = Pusher(run.folder, recipe.repositories, recipe.hub_private_repo, say=say, origin=run.origin, later=later)
    results = run_results(run.folder, described)
    pusher.check(results)
    return 0 if pusher.finish(results) else 4


def _hub(run: ChangingRun, options: Any) -> dict[str, Any] | None:
    """Where the run is pushed to: as before, or if asked for, to the repository that it came from; None: nowhere."""
    hub = run.ledger.get("hub")
    if options.push_to_hub is False or (hub is None and not options.push_to_hub):
        return None
    if hub is None:
        repository = run.origin.get("roles", {}).get(CHANGED, {}).get("repository")
        if repository is None:
            raise RunError(
                "The change is stored, but not pushed: this run was never pushed. Say where to, once: "
                f"{stopping.command('push', run.folder, '--hub_model_id', 'NAME')}"
            )
        hub = {"hub_model_id": repository, "push_teacher": False, "hub_private_repo": True}
        run.set_hub(hub)
    return hub


def _folder(options: Any) -> tuple[Path, Callable[[], None]]:
    """The run whose student is changed: the one that is named, or a new one for a student from elsewhere.

    Returns a function, too, that takes a new one away again.
    """
    place = Path(options.student)
    if place.is_dir():
        root = next((p for p in (place, *place.resolve().parents[:2]) if (p / "run.json").exists()), None)
        inside = place.resolve().relative_to(root.resolve()).parts if root else ()
        if root is not None and inside in ((), (CHANGED,)):
            if options.output_dir is not None:
                raise RunError(
                    f"{root} is a run, whose student is changed there: every change is a revision, and none is lost. "
                    "Leave --output_dir out."
                )
            return root, _nothing
        origin: Origin = read_folder(place, CHANGED)
    else:
        origin = read_origin(HfApi(), options.student, CHANGED)
    folder = options.output_dir or Path("runs", short_name(options.student))
    return folder, _nothing if (folder / "run.json").exists() else _take_over(folder, origin)


def _nothing() -> None:
    """What takes away a run that is not new."""


def _take_over(folder: Path, origin: Origin) -> Callable[[], None]:
    """Create a finished run of a student from elsewhere; returns a function that takes it away again."""
    recipe = origin.results["recipe"]
    say(f"{origin.place} is taken over into {folder}/")
    return continue_elsewhere(
        folder,
        {"tasks": origin.tasks, "revision": origin.revision, "roles": {CHANGED: origin.as_dict()}},
        {CHANGED: origin.results},
        lambda role, target: origin.copy(target),
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110),
        finished=True,
    )
