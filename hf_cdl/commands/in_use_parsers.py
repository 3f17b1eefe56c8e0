"""The arguments of the commands that use a trained student."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hf_cdl.commands.parser_parts import path, plugins, verb_parser

_STUDENT = "a run's folder (runs/quickstart), a checkpoint's (its student/task-03), or OWNER/NAME on the Hub"


def predict(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "STUDENT IMAGES [...] [--out FILE ...] [--top-k K] [--reject [SHARE]] [options]",
        """What a trained student says of images: as pipeline("image-classification") does, for many at a time.

IMAGES are files, and folders with all that lies in them and below. Without --out the first answers are shown, or all
of them as CSV where standard output is no terminal. With --out they are written, each file only once it is whole:
a table, row by row (columns image, label, score, label_2, score_2, ..., error), or a page that shows the images the
student is least sure of.

At the end it says how many images were answered with which class, and how sure the student was, beside how sure it was
on the images its run was measured on. Images that cannot be read are listed, and have a row with the reason.""",
        "hf-cdl predict runs/flowers photos --out answers.csv --out sheet.html",
    )
    parser.add_argument("student", metavar="STUDENT", help=_STUDENT)
    parser.add_argument("images", type=path, nargs="+", metavar="IMAGES", help="files, or folders of them")
    parser.add_argument(
        "--out",
        type=path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file that does not exist yet: .csv, .jsonl, .parquet, or .html for the page; may be given several "
        "times (default: none)",
    )
    parser.add_argument(
        "--top-k", type=_at_least(1), metavar="K", help="classes said of an image, the most likely ones (default: 3)"
    )
    reject(parser, "answer unknown for an image that is less known than this share of images of its classes")
    parser.add_argument(
        "--strict", action="store_true", help="stop at an image that cannot be read, and write nothing"
    )
    parser.add_argument("--revision", metavar="task-NN", help="an earlier state of STUDENT (default: the newest)")
    _loading(parser)
    return parser


def evaluate(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "STUDENT IMAGES [--revision task-NN ...] [--split NAME] [--out FOLDER] [options]",
        """How right a trained student is on images with labels: accuracy, per class too, confusions and calibration.

IMAGES are as in hf-cdl train: class folders, also inside of test/, parquet files, or a data set on the Hub. Labels are
compared by the names of the classes; images of classes that the student does not know are counted and left out. If
these are the data that the student learnt from, those that it learnt are left out, too.

With several --revision these are measured on the same images and compared, also on the classes that all of them know.
The folder of --out gets everything as evaluation.json, and as pictures the confusions of each revision and the
calibration of all.""",
        "hf-cdl evaluate runs/flowers photos --revision task-03 --revision task-05",
    )
    parser.add_argument("student", metavar="STUDENT", help=_STUDENT)
    parser.add_argument("images", metavar="IMAGES", help="a folder of images by class, or OWNER/NAME on the Hub")
    parser.add_argument(
        "--revision",
        action="append",
        default=[],
        metavar="task-NN",
        help="an earlier state of STUDENT; may be given several times (default: the newest)",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of the images (default: test, validation, or the only one that there is)"
    )
    for what in ("image", "label"):
        text = f"that holds the {what}s, where several columns of a table could (default: the only one)"
        parser.add_argument(f"--{what}-column", metavar="NAME", help=text)
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help="a new or empty folder (default: evaluations/STUDENT-IMAGES)"
    )
    reject(parser, "also measure how it tells images of classes that it does not know, at this share of those kept")
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
        "--batch-size", type=_at_least(1), default=32, metavar="N", help="images at a time (default: 32)"
    )
    parser.add_argument(
        "--workers",
        type=_at_least(0),
        metavar="N",
        help="processes that read images while the student answers; 0: none (default: one per core, at most 16)",
    )
    plugins(parser)


def _at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on; anything else raises an error that says so."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"it is {text!r}, but takes a whole number of at least {least}")
        return int(text)

    return parse
