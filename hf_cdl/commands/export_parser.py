"""The arguments of hf-cdl export."""

from __future__ import annotations

import argparse
from typing import Any

from hf_cdl.commands.parser_parts import path, plugins, student, verb_parser


def export(verb: str) -> argparse.ArgumentParser:
    """Export a student as one file for a device: an ONNX model with normalisation and class names inside.

    Its input is RGB pixels, uint8 of shape (images, height, width, 3); its outputs are logits and scores. The script
    classify.py beside it resizes, crops and answers as pipeline("image-classification") does, and needs only
    onnxruntime and Pillow. The file's answers are compared with the student's, on the validation images of its run or
    on --images. The result is printed, written to export.json beside the file, and shown by the run's model card
    (hf-cdl card).
    """
    parser = verb_parser(
        verb,
        "STUDENT [--int8 | --fp16] [--size N] [--out FOLDER | FILE.onnx] [options]",
        export.__doc__,
        "hf-cdl export runs/flowers --int8",
    )
    student(parser)
    parser.add_argument("--to", choices=["onnx"], default="onnx", help="the format (default: onnx)")
    _precision(parser.add_mutually_exclusive_group())
    parser.add_argument("--size", type=int, metavar="N", help="side of the images in pixels (default: as trained)")
    text = "where to write it (default: RUN/device, or device/NAME)"
    parser.add_argument("--out", type=path, metavar="FOLDER | FILE.onnx", help=text)
    text = "images to compare on, in folders named like the classes if labelled (default: the run's)"
    parser.add_argument("--images", type=path, metavar="FOLDER", help=text)
    parser.add_argument("--revision", metavar="task-NN", help="an earlier state of STUDENT (default: the newest)")
    plugins(parser)
    return parser


def _precision(group: argparse._MutuallyExclusiveGroup) -> None:
    set_it: Any = {"dest": "precision", "action": "store_const", "default": "fp32"}
    text = "matrix products in 8-bit integers: about a quarter of the size, and faster (default: float32)"
    group.add_argument("--int8", const="int8", help=text, **set_it)
    text = "store weights in half precision, compute in float32: half the size (default: float32)"
    group.add_argument("--fp16", const="fp16", help=text, **set_it)
