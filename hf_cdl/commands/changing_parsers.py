"""The arguments of the commands that change a trained student."""

from __future__ import annotations

import argparse

from hf_cdl.commands.parser_parts import path, plugins, student, true_or_false, verb_parser


def _changing(verb: str, usage: str, about: str | None, example: str) -> argparse.ArgumentParser:
    """Every change makes a new revision of the student (task-06 after task-05). Nothing is overwritten, and hf-cdl
    undo goes back. A student from the Hub, or from a checkpoint alone, is first copied into a new run. With a fitted
    head (ridge, lda, ncm) the result equals learning the final images at once.
    """
    parser = verb_parser(verb, f"STUDENT {usage} [options]", f"{about}\n    {_changing.__doc__}", example)
    student(parser)
    return parser


def _changing_options(parser: argparse.ArgumentParser) -> None:
    text = "folder of the new run, for a student that is not in a run (default: runs/NAME)"
    parser.add_argument("--output_dir", type=path, metavar="FOLDER", help=text)
    parser.add_argument(
        "--push_to_hub", type=true_or_false, metavar="true|false", help="push it (default: if the run was pushed)"
    )
    parser.add_argument(
        "--backbone", metavar="FOLDER", help="frozen backbone of a small checkpoint (default: as it says)"
    )
    plugins(parser)


def correct(verb: str) -> argparse.ArgumentParser:
    """Correct the labels of images that the student learnt with a wrong one."""
    parser = _changing(verb, "FILE.csv", correct.__doc__, "hf-cdl correct runs/flowers wrong.csv")
    parser.add_argument(
        "file",
        type=path,
        metavar="FILE.csv",
        help="columns: image (path relative to the file), label (the right one) and was (the wrong one; without this "
        "column, the name of the image's folder)",
    )
    _changing_options(parser)
    return parser


def remove(verb: str) -> argparse.ArgumentParser:
    """Remove a class: the student never answers with it again.

    If you give the images that the class was learnt from, or if the head keeps sums per class (head.sums: per_class),
    the student becomes one that never saw them. Otherwise they still count, as images of no class.
    """
    parser = _changing(
        verb,
        "CLASS [--images FOLDER ...]",
        remove.__doc__,
        "hf-cdl remove runs/flowers 'ox-eye daisy' --images flowers/train",
    )
    parser.add_argument("name", metavar="CLASS", help="the name of the class")
    parser.add_argument(
        "--images",
        type=path,
        nargs="+",
        metavar="FOLDER",
        help="all its training images: folders with a subfolder CLASS/, or of this class alone (default: none)",
    )
    _changing_options(parser)
    return parser


def rename(verb: str) -> argparse.ArgumentParser:
    """Give a class another name."""
    parser = _changing(verb, "OLD NEW", rename.__doc__, "hf-cdl rename runs/flowers daisy 'common daisy'")
    parser.add_argument("old", metavar="OLD", help="the present name of the class")
    parser.add_argument("new", metavar="NEW", help="its new name")
    _changing_options(parser)
    return parser


def merge(verb: str) -> argparse.ArgumentParser:
    """Merge several classes into one."""
    parser = _changing(
        verb, "CLASS CLASS [...] --as NAME", merge.__doc__, "hf-cdl merge runs/flowers daisy 'ox-eye daisy' --as daisy"
    )
    parser.add_argument("names", nargs="+", metavar="CLASS", help="the classes to merge")
    text = "the name of the merged class (default: none; required)"
    parser.add_argument("--as", dest="name", required=True, metavar="NAME", help=text)
    _changing_options(parser)
    return parser


def undo(verb: str) -> argparse.ArgumentParser:
    """Go back to the student before its last change."""
    parser = _changing(verb, "", undo.__doc__, "hf-cdl undo runs/flowers")
    _changing_options(parser)
    return parser
