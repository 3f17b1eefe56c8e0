"""hf-cdl evaluate: measure a student, or several of its revisions, on labelled images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_cdl.commands.console import exit_code_of, say
from hf_cdl.commands.images import check_images
from hf_cdl.commands.parsers import read
from hf_cdl.commands.run_images import named_at, own_images, run_of
from hf_cdl.counted import counted
from hf_cdl.data.names import nfc, some
from hf_cdl.escape import visible
from hf_cdl.inference import pictures as drawn
from hf_cdl.inference.labelled import Labelled, read_labelled
from hf_cdl.inference.measuring import Measured, Options, common, measure
from hf_cdl.inference.students import Student, find_student, load
from hf_cdl.places import by_name, short_name
from hf_cdl.recipe import described, load_plugins
from hf_cdl.runs.files import check_new, fill_folder
from hf_cdl.runs.ledger import CHANGED
from hf_cdl.runs.page import EVALUATION, PAGE, save_page
from hf_cdl.runs.pictures import plotting_available
from hf_cdl.runs.results import run_results
from hf_cdl.training.progress import progress_bar

_WORST, _LISTED = 10, 10


def main(arguments: list[str]) -> int:
    options, _ = read("evaluate", arguments)
    return exit_code_of(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> None:
    """Measure every revision, print what was found, and write it into the folder."""
    load_plugins(options.plugins)
    if twice := sorted({revision for revision in options.revision if options.revision.count(revision) > 1}):
        raise ValueError(f"--revision {twice[0]} is given more than once; leave one of them out.")
    students = [find_student(options.student, revision) for revision in options.revision or [None]]
    root = run_of(students[-1]) if options.images is None else None
    own = None if root is None else root / EVALUATION / _name_in_run(students[-1])
    folder = options.out or own or Path(f"evaluations/{short_name(options.student)}-{by_name(options.images or '')}")
    check_new(folder, "choose another folder with --out FOLDER, or move this one away")
    images = _images(options, students[-1], root)
    named = [images if root is None else named_at(root, images, found.role, found.state) for found in students]
    measured = [_measured(student, seen, options) for student, seen in zip(students, named, strict=True)]
    say(*_words(measured, named[-1]), sep="\n")
    pictures = _pictures(measured, students, images) if plotting_available() else {}
    content = {
        "student": visible(options.student),
        "images": visible(options.images or "of the run"),
        "split": images.split,
        "notes": images.notes,
        "unreadable": [problem for _, problem in sorted(measured[-1].unreadable.items())],
        "common": {
            "images": len(common(measured)),
            "accuracy": {found.revision: found.accuracy_on(common(measured)) for found in measured},
        }
        if len(common(measured))
        else None,
        "revisions": {found.revision: found.as_dict() for found in measured},
    }

    def write(place: Path) -> None:
        (place / "evaluation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        for picture, figure in pictures.items():
            figure.savefig(place / f"{picture}.png", bbox_inches="tight")

    fill_folder(folder, write)
    say(f"written: {folder}/ (evaluation.json{''.join(f', {picture}.png' for picture in pictures)})")
    if root is not None and folder == own and students[-1].role == CHANGED:
        save_page(run_results(root, described), root)
        say(f"also in the run's report: {root / PAGE}")
    if not pictures:
        say('No pictures: they need matplotlib; install it with: pip install "hf_cdl[report]"')


def _name_in_run(student: Student) -> str:
    """The folder of its evaluation in its run: the report reads those of the student, task-NN."""
    return student.short if student.role == CHANGED else f"{student.role}-{student.short}"


def _images(options: argparse.Namespace, student: Student, root: Path | None) -> Labelled:
    """The images that the user named, or those of the student's run."""
    if options.images is not None:
        check_images(options.images)
        return read_labelled(options.images, options.split, student, options.image_column, options.label_column)
    if root is None:
        raise ValueError(
            f"{student.name} is not in a run's folder, so it has no images of its own. Give IMAGES after it."
        )
    if given := [name for name in ("split", "image_column", "label_column") if getattr(options, name)]:
        raise ValueError(
            f"--{given[0].replace('_', '-')} is about IMAGES, but there are none. Give some, or leave it out."
        )
    return own_images(root)


def _measured(student: Student, images: Labelled, options: argparse.Namespace) -> Measured:
    model, processor = load(student)
    with progress_bar(student.short, hidden=False, total=len(images.labels), unit="image") as bar:
        how = Options(options.batch_size, options.workers, options.reject)
        return measure(student.short, model, processor, images, how, bar)


def _pictures(measured: Sequence[Measured], students: Sequence[Student], images: Labelled) -> dict[str, Any]:
    """Pictures by name."""
    pictures = {
        f"confusion_{found.revision}": drawn.confusion_figure(found, student.name)
        for found, student in zip(measured, students, strict=True)
    }
    most, newest = max(len(found.labels) for found in measured), measured[-1]
    more = {
        "mistakes": drawn.mistakes_figure(newest, lambda index: images.decode(index).image),
        "latent_map": drawn.latent_figure(measured, f"classes of {students[-1].name} by their features"),
        "prompt_usage": drawn.usage_figure(newest, f"use of prompts, {students[-1].name}"),
    }
    return {
        **pictures,
        **{name: figure for name, figure in more.items() if figure is not None},
        "calibration": drawn.calibration_figure(measured, f"{counted(most, 'image')} of the split {images.split}"),
    }


# ---- in words ----


def _words(measured: Sequence[Measured], images: Labelled) -> Iterator[str]:
    newest = measured[-1]
    yield from (f"note: {note}" for note in images.notes)
    for _, problem in sorted(newest.unreadable.items())[:_LISTED]:
        yield f"not read: {problem}"
    if (rest := len(newest.unreadable) - _LISTED) > 0:
        yield f"not read: {rest:,} more"
    yield from _table(measured)
    for found in measured:
        if found.unknown:
            total = sum(found.unknown.values())
            named = some(f"{name} ({count:,})" for name, count in sorted(found.unknown.items()))
            yield f"{found.revision} does not know, and was not measured on, {counted(total, 'image')} of {named}"
        if found.told:
            yield _ood_line(found)
    have = {*images.labels}
    if without := [name for name in newest.classes if nfc(name) not in have]:
        yield f"no images here of {len(without)} of its {counted(len(newest.classes), 'class')}: {some(without)}"
    yield from _classes(measured)
    if confused := newest.confused():
        taken = ", ".join(f"{visible(true)} for {visible(answer)} ({count:,})" for true, answer, count in confused[:5])
        yield f"most often taken, {newest.revision}: {taken}"


def _ood_line(found: Measured) -> str:
    """How well a revision tells images of known classes from others."""
    told = found.told
    said = f"{found.revision} keeps {told['kept']:.1f} % of the images of its classes"
    said += f", of which {told['accuracy_of_kept']:.1f} % are right" if "accuracy_of_kept" in told else ""
    if "auroc" not in told:
        return f"{said}; there are no images of others here"
    return f"{said}, and {told['passing']:.1f} % of those of others, the rest is unknown (AUROC {told['auroc']:.1f} %)"


def _table(measured: Sequence[Measured]) -> Iterator[str]:
    """A line per revision, and how many images they can be compared on."""
    width = max(len("revision"), *(len(found.revision) for found in measured))
    shared = common(measured)
    alike = len({len(found.labels) for found in measured}) == 1
    more = "" if alike or not len(shared) else f"  on the {len(shared):,} that all know"
    yield f"{'revision':{width}}  classes  images  accuracy  confidence  calibration error{more}"
    for found in measured:
        numbers = (found.metrics[name] for name in ("accuracy", "confidence", "calibration_error"))
        accuracy, confidence, error = (f"{value:.1f}" for value in numbers)
        end = f"{found.accuracy_on(shared):>{len(more)}.1f}" if more else ""
        yield (
            f"{found.revision:{width}}  {len(found.classes):>7}  {len(found.labels):>6,}  {accuracy:>6} %"
            f"  {confidence:>8} %  {error:>17}{end}"
        )


def _classes(measured: Sequence[Measured]) -> Iterator[str]:
    """The classes with the lowest accuracy in the last revision, with the accuracies of all revisions."""
    own, counts = measured[-1].class_accuracy(), measured[-1].counts()
    worst = sorted(own, key=lambda name: (own[name], name))[:_WORST]
    by_revision = [found.class_accuracy() for found in measured]
    width = max(len(visible(name)) for name in worst)
    named = f" ({', '.join(found.revision for found in measured)})" if len(measured) > 1 else ""
    yield f"accuracy per class{named}{f', the lowest {_WORST} of {len(own)}' if len(own) > _WORST else ''}:"
    for name in worst:
        values = "  ".join(f"{f'{found[name]:.1f} %' if name in found else '–':>7}" for found in by_revision)
        yield f"  {visible(name):{width}}  {values}  ({counted(counts[name], 'image')})"
