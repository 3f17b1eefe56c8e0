"""hf-cdl predict: classify images in files and folders with a trained student, as the pipeline does."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_cdl.commands.console import exit_code_of, say
from hf_cdl.commands.parsers import read
from hf_cdl.counted import counted
from hf_cdl.data.images import Decoded, decode, decode_fully
from hf_cdl.escape import visible
from hf_cdl.inference import answering, files, summary
from hf_cdl.inference.answering import Answer, share_kept
from hf_cdl.inference.contact_sheet import ContactSheet
from hf_cdl.inference.files import TABLES, CsvTable, Row, Table
from hf_cdl.inference.students import Student, find_student, load
from hf_cdl.models.classifier import labels_of
from hf_cdl.recipe import load_plugins
from hf_cdl.training.progress import progress_bar
from hf_cdl.types import is_ours
from hf_cdl.unknown import thresholds

SHEET = ".html"
_TOP, _ROWS, _LISTED = 3, 20, 10
"""Defaults: answers per image, rows shown in a terminal, and unreadable images listed."""


class Outputs(NamedTuple):
    """Where answers are written. `head`: the first rows, shown in a terminal; None: not shown."""

    tables: list[Table]
    sheet: ContactSheet | None
    head: list[Row] | None


def main(arguments: list[str]) -> int:
    options, _ = read("predict", arguments)
    return exit_code_of(lambda: predict(options))


def predict(options: argparse.Namespace) -> None:
    """Classify all images. With --strict, an unreadable image raises an error, and no file is left behind."""
    files.check_new_files(options.out, [*TABLES, SHEET])
    images = files.files_of(options.images)
    load_plugins(options.plugins)
    student = find_student(options.student, options.revision)
    model, processor = load(student)
    names = labels_of(model.config)
    top = min(_TOP, len(names)) if options.top_k is None else options.top_k
    if top > len(names):
        raise ValueError(
            f"--top-k is {top}, but {student.name} has {counted(len(names), 'class')}; give at most that."
        )
    share = None if options.reject is None else share_kept(model, options.reject)
    limits = None if share is None else thresholds(model, share)
    plain = not is_ours(model.config)
    prepared = answering.Images(partial(_decoded, images), images.__getitem__, len(images), processor, plain)
    totals, unreadable, start = summary.Summary(), list[str](), time.perf_counter()
    with _outputs(options.out, columns_of(top)) as (outputs, finish):
        with progress_bar("images", hidden=False, total=len(images), unit="image") as bar:
            for batch in answering.outputs(model, prepared, options.batch_size, options.workers, bar):
                for index, answer in answering.answers(batch, model, names, top, limits):
                    _count(answer, totals, unreadable, options.strict)
                    _put(outputs, images[index], answer)
        if not totals.images:
            raise ValueError(
                f"None of {counted(len(images), 'file')} can be read as an image. The first: {unreadable[0]}"
            )
        lines = [*totals.lines(time.perf_counter() - start, summary.reference_of(student), share)]
        finish(f"{student.name}: {counted(totals.images, 'image')}", totals, [lines[0], *lines[2:]])
    _say(options.out, outputs, student, lines, unreadable, totals)


def _decoded(images: Sequence[str], index: int) -> Decoded:
    return decode_fully(images[index])


def _count(answer: Answer | str, totals: summary.Summary, unreadable: list[str], strict: bool) -> None:
    """Count an image's answer, or why it has none. Raises ValueError for the latter if `strict`."""
    if not isinstance(answer, str):
        totals.add(answer)
        return
    if strict:
        raise ValueError(f"{answer}. Nothing was written; without --strict such images are listed and left out.")
    totals.unreadable += 1
    if len(unreadable) < _LISTED:
        unreadable.append(answer)


def columns_of(top: int) -> list[str]:
    """image, label, score, label_2, score_2, ..., error."""
    pairs = [(f"label{end}", f"score{end}") for end in ("", *(f"_{place}" for place in range(2, top + 1)))]
    return ["image", *(name for pair in pairs for name in pair), "error"]


def _put(outputs: Outputs, image: str, answer: Answer | str) -> None:
    """Write an image's answer, or why it has none, to all outputs."""
    row: dict[str, str | float | None] = {"image": files.utf8(image)}
    if isinstance(answer, str):
        row["error"] = answer
        if outputs.sheet is not None:
            outputs.sheet.add_unreadable(image, answer)
    else:
        for place, (name, score) in enumerate(answer.answers, 1):
            end = "" if place == 1 else f"_{place}"
            row |= {f"label{end}": name, f"score{end}": score}
        if outputs.sheet is not None:
            outputs.sheet.add(image, answer)
    for table in outputs.tables:
        table.write(row)
    if outputs.head is not None and len(outputs.head) < _ROWS:
        outputs.head.append(row)


@contextlib.contextmanager
def _outputs(out: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[Outputs, Any]]:
    """Open all outputs, and close them; the files appear only at the end, and only if all went well.

    Yields the outputs and a function that writes the contact sheets.
    """
    with files.atomic_files(out) as paths, contextlib.ExitStack() as opened:
        tables, sheets = list[Table](), list[Path]()
        for file, path in zip(out, paths, strict=True):
            if (kind := file.suffix.lower()) == SHEET:
                sheets.append(path)
            else:
                tables.append(TABLES[kind](path, columns))
                opened.callback(tables[-1].close)
        on_terminal = sys.stdout.isatty()
        if not out and not on_terminal:
            tables.append(CsvTable(sys.stdout, columns))
        sheet = ContactSheet()

        def finish(title: str, totals: summary.Summary, lines: Sequence[str]) -> None:
            for path in sheets:
                sheet.write(path, title, totals, lines, decode)

        yield Outputs(tables, sheet if sheets else None, [] if not out and on_terminal else None), finish


def _say(
    out: Sequence[Path],
    outputs: Outputs,
    student: Student,
    lines: Sequence[str],
    unreadable: Sequence[str],
    totals: summary.Summary,
) -> None:
    """Print the summary, on standard error if the answers themselves are on standard output."""
    options = {} if out or outputs.head is not None else {"file": sys.stderr}
    if outputs.head is not None:
        say(*_table(outputs.head), sep="\n")
        if (rest := totals.images + totals.unreadable - len(outputs.head)) > 0:
            say(f"and {counted(rest, 'more image')}; all of them in a table: --out FILE.csv")
    say(f"{student.name}: {lines[0]}", *lines[1:], sep="\n", **options)
    for problem in unreadable:
        say(f"not read: {problem}", **options)
    if (rest := totals.unreadable - len(unreadable)) > 0:
        say(f"not read: {rest:,} more", **options)
    for file in out:
        say(f"written: {file}", **options)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Rows as lines of a table: image, label and confidence."""
    cells = [(visible(row["image"]), visible(row.get("label", "–")), _percent(row.get("score"))) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    for image, label, score in cells:
        yield f"{image:{widths[0]}}  {label:{widths[1]}}  {score:>7}"


def _percent(score: str | float | None) -> str:
    return "not read" if score is None else f"{100 * float(score):.1f} %"
