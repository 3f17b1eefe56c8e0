"""hf-cdl export: one ONNX file of a trained student for a device, compared with the student."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_cdl.commands import stopping
from hf_cdl.commands.console import exit_code_of, say
from hf_cdl.commands.parsers import read
from hf_cdl.commands.run_images import Images, images_of_run, run_of, spread
from hf_cdl.data.images import decode
from hf_cdl.data.views import output_size
from hf_cdl.escape import visible
from hf_cdl.export import classify
from hf_cdl.export.checking import Compared, Model, compare, latencies, machine, opened
from hf_cdl.export.graph import check_packages, onnx_graph, prepared
from hf_cdl.export.preprocessing import check_steps, steps_of
from hf_cdl.export.sizes import at_size
from hf_cdl.export.weights import WRITERS
from hf_cdl.inference.files import atomic_files, check_new_files, files_of
from hf_cdl.inference.labelled import numbers_of
from hf_cdl.inference.students import Student, find_student, load
from hf_cdl.models.classifier import labels_of
from hf_cdl.recipe import load_plugins
from hf_cdl.runs.exports import NAME, add_export, exports_in
from hf_cdl.runs.files import RunError, copy_whole

_MOST, _GENERATED = 1000, 32
"""Images that a file is compared on: the most, and how many are generated if there are none."""
_LOGITS, _KNOWN, _POINTS = 1e-4, 1e-2, 0.5
"""Allowed differences: of a float32 file's logits and `known` (a small difference of large squares, which rounding
moves more), as shares of the largest; of a smaller file's accuracy, in points."""


def main(arguments: list[str]) -> int:
    options, _ = read("export", arguments)
    return exit_code_of(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    """Write the file, its script and export.json. Raises an error, and writes nothing, if answers differ too much."""
    check_packages()
    load_plugins(options.plugins)
    student = find_student(options.student, options.revision)
    root = run_of(student)
    file = _file(options, student, root)
    check_new_files([file], [".onnx"])
    exports_in(file.parent)  # an unreadable one is reported now
    model, processor = load(student)
    before = Model(model.float(), processor)
    own = before if options.size is None else Model(*at_size(*before, options.size))
    steps = steps_of(own.processor)
    rounded = check_steps(own.processor, steps)
    images = _images(options.images, root, before, student)
    graph = onnx_graph(prepared(*own), own.processor, steps)
    with atomic_files([file]) as (partial,):
        WRITERS[options.precision](graph, partial)
        session = opened(partial)
        found = compare(session, own, before, steps, images.decode, images.labels)
        if options.precision == "fp32":
            _check_exact(found)
        size = output_size(own.processor)
        facts = _facts(options, student, file, images, found, partial.stat().st_size, size)
        facts["latency_ms"], facts["latency_before_ms"] = latencies(session, own, size)
    _put_beside(file, facts)
    say(*_words(file, facts, rounded, images.labels), sep="\n")
    if root is not None and file.parent.resolve() == (root / NAME).resolve():
        say(f"in the student's model card: {stopping.command('card', _shown(root))}")
    _warn(facts, None if options.size is None else min(output_size(processor)))


def _file(options: argparse.Namespace, student: Student, root: Path | None) -> Path:
    if options.out is not None and options.out.suffix.lower() == ".onnx":
        return options.out
    kind = "" if options.precision == "fp32" else f"-{options.precision}"
    kind += "" if options.size is None else f"-{options.size}px"
    folder = options.out or (Path("device", Path(student.place).name) if root is None else _shown(root) / NAME)
    return folder / f"{student.role}{kind}.onnx"


def _shown(folder: Path) -> Path:
    """A folder as a user would write it: from here, if it is below."""
    here = Path.cwd().resolve()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


# ---- the images ----


def _images(folder: Path | None, root: Path | None, model: Model, student: Student) -> Images:
    """The images to compare on: those in a folder, those of the student's run, or generated ones."""
    names = labels_of(model.model.config)
    if folder is not None:
        files = spread(files_of([folder]), _MOST)
        for file in files:
            decode(file)  # a bad one is reported before the work
        labels = numbers_of([Path(file).parent.name for file in files], names)
        return Images(f"images in {folder.name}", lambda index: decode(files[index]), labels)
    if root is not None and (found := images_of_run(root, names, _MOST, student.role, student.state)) is not None:
        return found
    height, width = output_size(model.processor)

    def generated(index: int) -> Image.Image:
        rng = np.random.default_rng(index)
        small = rng.integers(0, 256, (5 + index % 4, 7, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((width + 3 * index, height + index), Image.Resampling.BICUBIC)

    return Images("generated images", generated, np.full(_GENERATED, -1))


# ---- what was found ----


def _facts(
    options: argparse.Namespace,
    student: Student,
    file: Path,
    images: Images,
    found: Compared,
    size: int,
    sides: tuple[int, int],
) -> dict[str, Any]:
    return {
        "file": file.name,
        "revision": student.state or student.revision,
        "precision": options.precision,
        "height": sides[0],
        "width": sides[1],
        "bytes": size,
        "images": found.images,
        "images_of": images.of,
        "logit_difference": found.difference,
        "same_answers": found.same,
        **({} if found.same_unknown is None else {"same_unknown": found.same_unknown}),
        "accuracy": found.accuracy,
        "accuracy_before": found.accuracy_before,
        "machine": machine(),
    }


def _check_exact(found: Compared) -> None:
    """Raise RunError for a float32 file whose outputs differ from the student's."""
    if found.difference > _LOGITS or found.known_difference > _KNOWN:
        raise RunError(
            f"The file's logits differ from the student's by {found.difference:.1e} of the largest, and how known an "
            f"image is by {found.known_difference:.1e}; rounding explains {_LOGITS:.0e} and {_KNOWN:.0e}, so it was "
            "not written. Update torch, onnxscript and onnxruntime (pip install -U 'hf-cdl[export]'), and try again."
        )


def _put_beside(file: Path, facts: dict[str, Any]) -> None:
    """Write the script and export.json; a different script already there, such as a user's, stays."""
    script, own = file.with_name("classify.py"), Path(classify.__file__)
    if not script.exists():
        copy_whole(own, script)
    elif script.read_bytes() != own.read_bytes():
        say(f"note: {visible(script)} is another one and was left as it is; this version's: {own}")
    add_export(file.parent, facts)


def _words(file: Path, facts: dict[str, Any], rounded: float, labels: np.ndarray) -> list[str]:
    lines = [
        f"{visible(file)}: {facts['bytes'] / 1e6:.1f} MB, {facts['precision']}, images of "
        f"{facts['height']}x{facts['width']} pixels",
        f"compared on {facts['images']:,} {visible(facts['images_of'])}: {facts['same_answers']:.1f} % the same "
        f"answers; logits differ by at most {facts['logit_difference']:.1e} of the largest",
    ]
    if "same_unknown" in facts:
        lines.append(f"with --reject: both agree whether it is unknown for {facts['same_unknown']:.1f} % of them")
    told = int((labels >= 0).sum())
    part = "" if told == len(labels) else f", on the {told:,} of them in folders called like a class of the student"
    if facts["accuracy"] is not None:
        lines.append(f"accuracy: {facts['accuracy_before']:.1f} % before, {facts['accuracy']:.1f} % in the file{part}")
    else:
        lines.append(
            "accuracy: not measured, these images have no labels that the student knows; give some, in folders called "
            "like its classes, with --images FOLDER"
        )
    speed = facts["latency_before_ms"] / facts["latency_ms"]
    lines.append(
        f"one image takes {facts['latency_ms']:.1f} ms, torch {facts['latency_before_ms']:.1f} ms: {speed:.2f} times "
        f"as fast ({facts['machine']})"
    )
    if rounded:
        lines.append(
            f"note: the image processor resizes with torchvision, the script with Pillow: grey levels differ by up to "
            f"{rounded:.1f}, so a few answers may"
        )
    script = file.with_name("classify.py")
    return [*lines, f"on the device: python {visible(script)} {visible(file)} IMAGE ..."]


def _warn(facts: dict[str, Any], trained: int | None) -> None:
    """Warn of a file that loses too much accuracy, and say what keeps more; `trained`: the size, if it was changed."""
    lost = (facts["accuracy_before"] or 0) - (facts["accuracy"] or 0)
    if lost > _POINTS:
        ways = [f"a --size nearer to {trained}"] if trained not in (None, facts["height"]) else []
        ways += {"int8": ["--fp16 in place of --int8"], "fp16": ["no --fp16"]}.get(facts["precision"], [])
        said = f"warning: the file loses {lost:.1f} points of accuracy, more than {_POINTS}."
        print(f"{said} What keeps more: {' or '.join(ways)}.", file=sys.stderr)
