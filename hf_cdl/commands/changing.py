"""Shared by the commands that change a student: find it, change it, and store it as a new revision."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_cdl.commands import stopping
from hf_cdl.commands.console import say
from hf_cdl.commands.import_student import earlier_state, run_to_change
from hf_cdl.commands.plugin_files import say_differences
from hf_cdl.escape import visible_lines
from hf_cdl.hub import HubError, Pusher
from hf_cdl.models.changes import Change
from hf_cdl.recipe import build_recipe, described, load_plugins, untrained
from hf_cdl.recipe.build import load_model, load_processor
from hf_cdl.runs.changes import ChangingRun
from hf_cdl.runs.files import RunError
from hf_cdl.runs.learnt import Moves
from hf_cdl.runs.ledger import CHANGED, revision_name
from hf_cdl.runs.results import run_results
from hf_cdl.runs.shards import save_checkpoint

Made = tuple[Change, Moves]
"""What a command did to the model, and the images that it moved."""
Make = Callable[[ChangingRun, Any, Any], Made | None]


def change(options: Any, make: Make) -> int:
    """Change the student that the options name, and store it as a new revision.

    `make(run, model, processor)` makes the change; it returns None if there is nothing to change.
    """
    return _exit_code(lambda: _change(options, lambda run: _store(run, options, make)))


def undo(options: Any) -> int:
    """Go back to the student before its last change, as a new revision."""

    def undone(run: ChangingRun) -> None:
        run.undo(lambda number, folder: earlier_state(run, number, folder))

    return _exit_code(lambda: _change(options, undone))


def _exit_code(act: Callable[[], int]) -> int:
    try:
        return act()
    except (OSError, ValueError, RunError, HubError, FloatingPointError) as error:
        say(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2


def _change(options: Any, store: Callable[[ChangingRun], Any]) -> int:
    load_plugins(options.plugins)
    folder, remove_new_run = run_to_change(options.student, options.output_dir, bool(options.plugins))
    try:
        run = ChangingRun(folder, say)
        hub = _hub(run, options)
        with _stored_or_not(run), run.changing():
            store(run)
    except BaseException:  # Ctrl-C too: a failed first change leaves nothing behind
        remove_new_run()
        raise
    with _stored_or_not(run):
        if run.stored() is None:
            say(f"Nothing was changed: the student in {run.folder / CHANGED}/ is what was asked for.")
            return 0
        return _after(run, hub)


def _store(run: ChangingRun, options: Any, make: Make) -> None:
    say_differences(run.folder, options.plugins)
    checkpoint = run.checkpoint(CHANGED)
    if checkpoint is None:
        raise RunError(f"The run in {run.folder} has no student that could be changed; name one that has.")
    model, processor = _load(run, checkpoint, options.backbone), load_processor(checkpoint)
    if (found := make(run, model, processor)) is None:
        return
    made, moves = found

    def write(place: Path) -> None:
        save_checkpoint(model, processor, place, checkpoint)

    said = {"kind": made.kind, "said": str(made), "images": made.images, "choices": made.choices}
    said |= {"classes": made.classes} if made.classes else {}
    run.save_change({**said, "class_names": model.tasks}, write, moves)


def _load(run: ChangingRun, checkpoint: Path, backbone: str | None) -> Any:
    """The student; a small checkpoint's backbone comes from where the run's recipe names it, or from `backbone`."""
    recipe = build_recipe(untrained(run.ledger["recipe"]))
    section = recipe.student if backbone is None else replace(recipe.student, backbone=backbone, revision=None)
    if section.model == "classifier":
        raise RunError(
            f"The student of {run.folder} is of model: classifier, which learns one task alone and whose classes do "
            "not change. Train one with model: cdl, such as with a ridge head on it as the backbone."
        )
    if backbone is not None and recipe.save_backbone:
        raise RunError(
            f"--backbone {backbone} would have no effect: the student's checkpoint holds its own. Leave it out."
        )
    model: Any = load_model(recipe, section, checkpoint)
    return model.to(PartialState().device)


@contextlib.contextmanager
def _stored_or_not(run: ChangingRun) -> Iterator[None]:
    """After Ctrl-C, say whether the change was stored: the same command would make it again."""
    try:
        yield
    except KeyboardInterrupt:
        if (change := run.stored()) is not None:
            stopping.stored(
                f"The change is stored as {revision_name(change['revision'])} in {run.folder}, so the same command "
                f"would make it once more. To go back:\n  {stopping.command('undo', run.folder)}"
            )
        raise


def _after(run: ChangingRun, hub: dict[str, Any] | None) -> int:
    """Say what was done and, if the run is pushed, push it."""
    stored = run.changes[-1]
    say(stored["said"])
    say(
        f"Stored as {revision_name(stored['revision'])} in {run.folder / CHANGED}/. To go back: "
        f"{stopping.command('undo', run.folder)}"
    )
    if hub is None:
        return 0
    run.set_hub(hub)
    recipe = build_recipe({**untrained(run.ledger["recipe"]), **hub, "push_to_hub": True})
    later = stopping.command("push", run.folder)
    pusher = Pusher(run.folder, recipe.repositories, recipe.hub_private_repo, say=say, origin=run.origin, later=later)
    results = run_results(run.folder, described)
    try:
        pusher.check(results)
    except HubError as error:
        say(f"NOT PUSHED: the student. {visible_lines(error)}\nThe change is stored. Push it later with:\n  {later}")
        return 4
    return 0 if pusher.finish(results) else 4


def _hub(run: ChangingRun, options: Any) -> dict[str, Any] | None:
    """Where to push the run: as before or, if asked for, to the repository it came from; None: nowhere."""
    hub = run.ledger.get("hub")
    if options.push_to_hub is False or (hub is None and not options.push_to_hub):
        return None
    if hub is None:
        repository = run.origin.get("roles", {}).get(CHANGED, {}).get("repository")
        if repository is None:
            raise RunError(
                f"{run.folder} was never pushed, so it is not known where to push it, and nothing was changed. Make "
                "the change without --push_to_hub, then say where to, once: "
                f"{stopping.command('push', run.folder, '--hub_model_id', 'NAME')}"
            )
        hub = {"hub_model_id": repository, "push_teacher": False, "hub_private_repo": True}
    return hub
