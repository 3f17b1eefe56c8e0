"""hf-cdl verify: reload every checkpoint of a run and compare its accuracies with the recorded ones.

Nothing that the run's files name is executed, except plugins named on the command line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.commands.console import exit_code_of
from hf_cdl.commands.parsers import read
from hf_cdl.commands.plugin_files import load_named
from hf_cdl.counted import counted
from hf_cdl.escape import visible
from hf_cdl.recipe import Recipe, build_recipe, untrained
from hf_cdl.recipe.build import MODELS, load_processor
from hf_cdl.runs.files import RunError, damage
from hf_cdl.runs.ledger import CHANGED, data_changes, labelled_part, revision_name, stored_tasks
from hf_cdl.runs.results import stored_ledger
from hf_cdl.types import TaskResult

_MEASURING = ("per_device_eval_batch_size", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu")
"""The training arguments that matter for evaluation: no others are taken from a recipe, which may be a stranger's."""


def main(arguments: list[str]) -> int:
    """Measure a run again; 1 if anything differs, 2 if it cannot be measured."""
    options, _ = read("verify", arguments)
    return exit_code_of(lambda: verify(options.run, options.plugins))


def verify(folder: Path, plugins: Sequence[str]) -> int:
    """Measure a run again, after running `plugins`."""
    load_named(folder, plugins)
    recipe, ledger = stored_recipe(folder), stored_ledger(folder)
    check_data(folder, ledger, recipe)
    elsewhere = ledger.get("origin", {}).get("tasks", 0)
    if elsewhere:
        print(f"Learnt elsewhere: the first {counted(elsewhere, 'task')}. Only the last one's checkpoint is here.")
    different = 0
    for checkpoint, entry, result in measure_again(folder, recipe, recipe.data.eval_split):
        found = compared(entry, result, elsewhere)
        different += found == DIFFERENT
        print(f"{visible(checkpoint)}: {sum(result.correct)} of {sum(result.counts)} right, {found}", flush=True)
    lost = check_changes(folder, ledger)
    if different:
        print(
            "The data may have changed: images of as many bytes as before are not told apart from them. Another "
            "machine or other packages may answer a few images differently, too."
        )
    return 1 if different or lost else 0


def check_changes(folder: Path, ledger: dict[str, Any]) -> int:
    """Compare the files of the student's changed states with what was stored; returns how many states differ.

    Their accuracies are not recorded.
    """
    lost, made = 0, {revision_name(change["revision"]) for change in ledger.get("changes", [])}
    for name in (name for name in stored_tasks(ledger, CHANGED) if name in made):
        known = {path: stored for path, stored in ledger["files"].items() if path.startswith(f"{CHANGED}/{name}/")}
        bad = [f"{path} {problem}" for path in known if (problem := damage(folder / path, known[path]))]
        lost += bool(bad)
        found = f"NOT as stored: {visible(bad[0])}" if bad else "as stored"
        print(f"{visible(folder / CHANGED / name)}: a change, of which no accuracy is recorded; {found}", flush=True)
    return lost


DIFFERENT = "NOT as recorded"


def compared(entry: dict[str, Any], result: TaskResult, elsewhere: int) -> str:
    """Compare a new measurement with the recorded one, in words; `elsewhere`: number of tasks learnt in other runs."""
    if not result.counts:
        return "no images of its tasks are in these data"
    if not entry.get("row"):
        return "not measured yet by the run"
    if result.task < elsewhere:
        return "learnt and recorded elsewhere, maybe with other images"
    recorded = {name: entry[name] for name in ("row", "correct", "counts") if name in entry}
    if "correct" in recorded:
        del recorded["row"]  # it follows from the counts
    return "as recorded" if all(getattr(result, name) == recorded[name] for name in recorded) else DIFFERENT


def check_data(folder: Path, ledger: dict[str, Any], recipe: Recipe) -> None:
    """Check that the data give the stream the run was trained on. Raises RunError if not."""
    if ledger["stream"] is None:
        return
    stream = TaskStream(recipe.data.labelled, {}, seed=recipe.seed)  # without processors: no image is decoded
    if labelled_part(stream.fingerprint) != labelled_part(ledger["stream"]):
        changes = data_changes(ledger, [list(task.class_names) for task in stream], stream.images)
        raise RunError(
            f"The data changed since {visible(folder)} was trained (stream {visible(ledger['stream'])}, now "
            f"{stream.fingerprint}): {visible(changes)}. Restore the data; its checkpoints can be compared on them "
            "alone."
        )


def stored_recipe(folder: Path) -> Recipe:
    """The recipe in a run's ledger, with only the training arguments that matter here."""
    stored = stored_ledger(folder)["recipe"]
    bare = untrained(stored)
    bare["train"] = _measuring(stored.get("train"))
    for role in ("student", "teacher"):
        if isinstance(bare.get(role), dict) and bare[role].get("train") is not None:
            bare[role] = {**bare[role], "train": _measuring(stored[role]["train"])}
    return build_recipe({**bare, "teacher_from": None})


def _measuring(train: Any) -> dict[str, Any]:
    return {key: train[key] for key in _MEASURING if key in train} if isinstance(train, dict) else {}


def measure_again(
    folder: Path, recipe: Recipe, split: str, *only: str, others: bool = False
) -> Iterator[tuple[Path, dict[str, Any], TaskResult]]:
    """Measure each checkpoint of a run (of the roles `only`, or all) on a split; yields path, ledger entry, result.

    `recipe`: the run's recipe. Its plugins are not run here. `others`: also on images that the checkpoint should not
    answer, of later tasks and foreign ones, as far as it tells.
    """
    ledger = stored_ledger(folder)
    with tempfile.TemporaryDirectory() as cache:  # the same frozen weights lie in many checkpoints
        for role, entries in ledger["entries"].items():
            there = stored_tasks(ledger, role)  # others were learnt in another run
            for entry in entries if not only or role in only else ():
                checkpoint = folder / role / f"task-{entry['task'] + 1:02d}"
                if checkpoint.name in there:
                    answers = _answers(checkpoint, role, recipe, split, others, cache)
                    yield checkpoint, entry, TaskResult(role, entry["task"], **answers)


def _answers(checkpoint: Path, role: str, recipe: Recipe, split: str, others: bool, cache: str) -> dict[str, Any]:
    """What a checkpoint answers to the tasks it has learnt, as fields of TaskResult; {} without images of them."""
    processor = load_processor(checkpoint)
    data = replace(recipe.data.labelled, foreign=recipe.data.foreign if others else None)
    stream = TaskStream(data, processor, seed=recipe.seed)
    learnt = int(checkpoint.name[5:])
    tasks = [stream[number] for number in range(learnt)]
    with tempfile.TemporaryDirectory() as work:
        given = recipe.training_args("teacher" if role == "teacher" else "student")
        given = {name: given[name] for name in given.keys() - {"report_to", "run_name", "project", "shard_teacher"}}
        arguments = CDLTrainingArguments(work, **{**given, "disable_tqdm": True})
        section = getattr(recipe, role, None)  # a baseline has none
        try:
            model = MODELS[section.model if section else "cdl"].from_pretrained(checkpoint)
        except ValueError as error:  # for a truncated file, it names only the line in the file
            raise RunError(f"{checkpoint} cannot be loaded; restore it: {error}") from error
        trainer = CDLTrainer(model, arguments, eval_split=split, cache=cache)
        later, foreign = ([*stream][learnt:], stream.foreign) if others else ([], None)
        return trainer.answer(tasks, later, foreign) if any(len(getattr(task, split)) for task in tasks) else {}
