"""The arguments of the commands that use a trained student."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hf_cdl.commands.parser_parts import path, plugins, student, verb_parser


def predict(verb: str) -> argparse.ArgumentParser:
    """Classify many images with a trained student, as pipeline("image-classification") does.

    IMAGES are files, or folders with everything in and below them. Without --out the first answers are printed, or all
    of them as CSV if standard output is no terminal. With --out they are written to a table (columns image, label,
    score, label_2, score_2, ..., error) or to a page that shows the images the student is least sure of. A file
    appears once it is complete.

    At the end the command prints how often each class was answered, and how sure the student was, compared with the
    images its run was measured on. Images that cannot be read are listed, and get a row with the reason.
    """
    parser = verb_parser(
        verb,
        "STUDENT IMAGES [...] [--out FILE ...] [--top-k K] [--reject [SHARE]] [options]",
        predict.__doc__,
        "hf-cdl predict runs/flowers photos --out answers.csv --out sheet.html",
    )
    student(parser)
    parser.add_argument("images", type=path, nargs="+", metavar="IMAGES", help="files, or folders of them")
    parser.add_argument(
        "--out",
        type=path,
        action="append",
        default=[],
        metavar="FILE",
        help="a new file: .csv, .jsonl, .parquet, or .html for the page; may be given several times (default: none)",
    )
    parser.add_argument(
        "--top-k", type=_at_least(1), metavar="K", help="number of likeliest classes to give (default: 3)"
    )
    reject(parser, "answer unknown where an image is less known than this share of images of the classes")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first image that cannot be read, and write nothing"
    )
    parser.add_argument("--revision", metavar="task-NN", help="an earlier state of STUDENT (default: the newest)")
    _loading(parser)
    return parser


def evaluate(verb: str) -> argparse.ArgumentParser:
    """Measure a student on labelled images: accuracy (also per class), confusions and calibration.

    IMAGES are as in hf-cdl train: class folders, also inside test/, parquet files, or a data set on the Hub. Labels
    are compared by class name. Images of classes that the student does not know are counted and left out. Images that
    the student learnt are left out too. Without IMAGES, the student is measured on the validation images of its run
    (or those that the run measures on), and the pictures are added to the run's report.html.

    Several --revision are measured on the same images and compared, also on the classes that all of them know. The
    folder of --out gets everything as evaluation.json, and pictures: the confusions of each revision, the calibration
    of all, the surest mistakes, a map of the classes in the student's features, and how often each prompt is used.
    """
    parser = verb_parser(
        verb,
        "STUDENT [IMAGES] [--revision task-NN ...] [--split NAME] [--out FOLDER] [options]",
        evaluate.__doc__,
        "hf-cdl evaluate runs/flowers photos --revision task-03 --revision task-05",
    )
    student(parser)
    text = "a folder of images by class, or OWNER/NAME on the Hub (default: those of the student's run)"
    parser.add_argument("images", nargs="?", metavar="IMAGES", help=text)
    parser.add_argument(
        "--revision",
        action="append",
        default=[],
        metavar="task-NN",
        help="an earlier state of STUDENT; may be given several times (default: the newest)",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="split of the images (default: test, else validation, else the only one)"
    )
    for what in ("image", "label"):
        text = f"column of the {what}s, if a table has several candidates (default: the only one)"
        parser.add_argument(f"--{what}-column", metavar="NAME", help=text)
    text = "a new or empty folder (default: evaluations/STUDENT-IMAGES, or RUN/evaluation/task-NN without IMAGES)"
    parser.add_argument("--out", type=path, metavar="FOLDER", help=text)
    reject(parser, "also measure rejection of images of unknown classes, keeping this share of the known ones")
    _loading(parser)
    return parser


def reject(parser: argparse.ArgumentParser, what: str) -> None:
    text = f"{what}, such as 0.95 (default: off; without SHARE: that of its head)"
    parser.add_argument("--reject", nargs="?", const=True, type=_share, metavar="SHARE", help=text)


def _share(text: str) -> float:
    """Parse a share between 0 and 1; anything else raises an error that says so."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}, but takes a share between 0 and 1, such as 0.95")
    return value


def _loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=_at_least(1), default=32, metavar="N", help="images per batch (default: 32)"
    )
    parser.add_argument(
        "--workers",
        type=_at_least(0),
        metavar="N",
        help="processes that decode images meanwhile; 0: none (default: one per core, at most 16)",
    )
    plugins(parser)


def _at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on; anything else raises an error that says so."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"it is {text!r}, but takes a whole number of at least {least}")
        return int(text)

    return parse
