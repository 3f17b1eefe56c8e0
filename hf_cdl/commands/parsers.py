"""The arguments of each command and their help. They are parsed before anything slow is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_cdl.commands import changing_parsers as changing
from hf_cdl.commands import export_parser
from hf_cdl.commands import in_use_parsers as in_use
from hf_cdl.commands.parser_parts import path, plugins, student, true_or_false, verb_parser


@dataclass(frozen=True)
class Verb:
    """A command. `parser` creates its argument parser; `open`: its arguments may include any --field of a recipe.

    `resumes`: whether the same command resumes where it was stopped; `quiet`: whether transformers' own messages and
    progress bars are suppressed.
    """

    about: str
    parser: Callable[[str], argparse.ArgumentParser]
    open: bool = False
    resumes: bool = False
    quiet: bool = True


def main_parser(version: str) -> argparse.ArgumentParser:
    """The parser for a command line without a verb."""
    verbs = "\n".join(f"  {name:8} {verb.about}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="hf-cdl",
        usage="hf-cdl VERB ...",
        description=f"Continual distillation learning: a large model teaches a small one, task after task.\n\n{verbs}",
        epilog="hf-cdl VERB --help: its options and an example.\nTo start: hf-cdl train --example quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"hf-cdl {version}")
    return parser


def read(verb: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command's arguments; returns the options, and the arguments that are a recipe's fields.

    Exits with code 0 on --help, and with 2 on wrong arguments.
    """
    parser = VERBS[verb].parser(verb)
    if not VERBS[verb].open:
        return parser.parse_intermixed_args(words), []  # options may stand before IMAGES that may be left out
    if verb in ("train", "plan"):  # recipe/files.py parses their arguments
        parser.parse_args(["--help"] if {"-h", "--help"} & {*words} else [])
        return argparse.Namespace(), list(words)
    options, fields = parser.parse_known_args(words)
    if list(words[:2]) != [options.student, options.data]:
        parser.error("the student and the folder of images come first")
    return options, fields


def _train(verb: str) -> argparse.ArgumentParser:
    """Train and evaluate on images, task after task. If the run was stopped, the same command resumes it.

    With IMAGES, the command uses the recommended recipe and prints it: a ridge head on a frozen backbone, compared
    with class means and a linear head. With --teacher, a first session comes before that: the teacher learns the first
    task and then teaches it. All classes are one task, unless --data.classes_per_task N gives N at a time.

    With RECIPE.yaml, the recipe says everything. Of several files, a later one overrides an earlier one. In both
    forms, values on the command line override the recipe. The page of options in the documentation (make docs) lists
    all fields and their defaults. On several GPUs: accelerate launch -m hf_cdl train ...
    """
    parser = verb_parser(
        verb,
        "IMAGES [--backbone NAME] [--teacher NAME] [--any.field value ...] [--plan]\n"
        "       hf-cdl train RECIPE.yaml ... [--any.field value ...] [--plan]\n"
        "       hf-cdl train --example quickstart",
        _train.__doc__,
        "hf-cdl train photos --backbone facebook/dinov2-base --data.classes_per_task 5",
    )
    parser.add_argument(
        "images",
        nargs="?",
        metavar="IMAGES",
        help="a folder of class folders (FOLDER/CLASS/*.jpg, or FOLDER/train/CLASS and FOLDER/test/CLASS), a folder "
        "of parquet files, or a data set on the Hub; its name must not end in .yaml",
    )
    parser.add_argument("recipe", nargs="*", metavar="RECIPE.yaml", help="recipe files: what to train, and how")
    parser.add_argument(
        "--backbone", metavar="NAME", help="the student's, by Hub id or folder (default: facebook/dinov2-small)"
    )
    parser.add_argument(
        "--teacher", metavar="NAME", help="the teacher's backbone, usually a larger one (default: no teacher)"
    )
    parser.add_argument("--any.field", metavar="value", help="a field of the recipe, as YAML (default: the recipe's)")
    parser.add_argument("--plan", action="store_true", help="only print what the run would need, as hf-cdl plan does")
    parser.add_argument("--example", metavar="NAME", help="write an example recipe into this folder; NAME: quickstart")
    return parser


def _plan(verb: str) -> argparse.ArgumentParser:
    """Print what a run would need: parameters, FLOPs, steps, memory and files. Nothing is trained."""
    parser = verb_parser(
        verb,
        "IMAGES | RECIPE.yaml ... [--any.field value ...]",
        _plan.__doc__,
        "hf-cdl plan flowers.yaml --train.per_device_train_batch_size 64",
    )
    parser.add_argument("recipe", nargs="*", metavar="RECIPE.yaml", help="recipe files, or IMAGES as in hf-cdl train")
    parser.add_argument("--any.field", metavar="value", help="a field of the recipe, as YAML (default: the recipe's)")
    return parser


def _add(verb: str) -> argparse.ArgumentParser:
    """Teach a student more images. All you need is the student, from the Hugging Face Hub or a folder.

    A student with a fitted head (ridge, lda, ncm) adds images of new and known classes to its sums, in seconds. This
    makes a new revision of it, which hf-cdl undo takes back. A student with a trained head learns the new classes as
    one more task, with its teacher, in a new run. With --output_dir, a student with a fitted head does so too.

    If it was stopped, the same command resumes. With --push_to_hub true (and --push_teacher true) the new task is
    pushed to the repositories that the models came from, or to those of --hub_model_id.

    STUDENT may be a stranger's: no code of theirs is run, and nothing pickled is loaded. If their recipe needs plugins
    (Python files), read them, then name them yourself: --plugins '[FILE]'.
    """
    parser = verb_parser(
        verb,
        "STUDENT DATA [options] [--any.field value ...]",
        _add.__doc__,
        "hf-cdl add runs/quickstart birds --train.num_train_epochs 5",
    )
    student(parser)
    parser.add_argument(
        "data",
        metavar="DATA",
        help="images by class, as in a recipe's data.path: DATA/train/CLASS/*.png and DATA/test/CLASS/*.png; "
        "test images of known classes measure what was forgotten",
    )
    parser.add_argument("--teacher", help="its teacher, if it had one (default: OWNER/NAME-teacher, or the run's)")
    parser.add_argument("--revision", metavar="task-NN", help="the state to continue from (default: the newest)")
    parser.add_argument("--output_dir", type=path, metavar="FOLDER", help="of a new run (default: runs/NAME-DATA)")
    return parser


def _push(verb: str) -> argparse.ArgumentParser:
    """Push what a run has finished and the Hugging Face Hub does not have yet."""
    parser = verb_parser(
        verb,
        "RUN [--hub_model_id NAME] [--push_teacher true|false] [--hub_private_repo true|false] [options]",
        _push.__doc__,
        "hf-cdl push runs/quickstart --hub_model_id me/quickstart --push_teacher true",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    last = "(default: as in the last push)"
    parser.add_argument("--hub_model_id", metavar="NAME", help=f"the student's repository {last}")
    parser.add_argument(
        "--push_teacher", type=true_or_false, metavar="true|false", help=f"push the teacher too: NAME-teacher {last}"
    )
    parser.add_argument(
        "--hub_private_repo", type=true_or_false, metavar="true|false", help=f"make new repositories private {last}"
    )
    plugins(parser)
    return parser


def _card(verb: str) -> argparse.ArgumentParser:
    """Write a run's model cards and their pictures: ROLE/README.md and ROLE/accuracy_matrix.png."""
    parser = verb_parser(
        verb,
        "RUN [--output FOLDER] [--repo_id OWNER/NAME] [--plugins FILE ...]",
        _card.__doc__,
        "hf-cdl card runs/quickstart --repo_id me/quickstart",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--output", type=path, metavar="FOLDER", help="where to write them (default: RUN)")
    parser.add_argument(
        "--repo_id", metavar="OWNER/NAME", help="where the student will be; its teacher: NAME-teacher (default: none)"
    )
    plugins(parser)
    return parser


def _verify(verb: str) -> argparse.ArgumentParser:
    """Load every checkpoint of a run and compare its accuracies with the ones that the run recorded.

    Nothing that the run's files name is executed. If the recipe has plugins (Python files that register models), read
    them, then name them here.
    """
    parser = verb_parser(verb, "RUN [--plugins FILE ...]", _verify.__doc__, "hf-cdl verify runs/quickstart")
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    plugins(parser)
    return parser


def _shrink(verb: str) -> argparse.ArgumentParser:
    """Make a smaller backbone from a pre-trained one: its first layers and final norm, at another image size.

    The first layers of a larger model make a student that needs no pre-training of its own. Smaller images mean fewer
    patches, so position embeddings are interpolated: for a ViT once, by this command; for DINOv2 and most other
    families in each forward pass.
    """
    parser = verb_parser(
        verb,
        "BACKBONE FOLDER [options]",
        _shrink.__doc__,
        "hf-cdl shrink facebook/dinov2-small backbones/dinov2-small-8 --layers 8 --size 56",
    )
    parser.add_argument("backbone", metavar="BACKBONE", help="a Hub id or folder")
    parser.add_argument("folder", type=path, metavar="FOLDER", help="where to write the smaller one")
    parser.add_argument("--layers", type=int, metavar="N", help="number of layers to keep (default: all)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of an image (default: unchanged)")
    parser.add_argument("--revision", help="of BACKBONE on the Hub (default: main)")
    parser.add_argument("--processor", metavar="ID", help="where to take the image processor from (default: BACKBONE)")
    return parser


def _compare(verb: str) -> argparse.ArgumentParser:
    """Run variants of a recipe over seeds and class orders, and compare them in tables, tests and a report.

    SPEC (recipes/comparisons/, fields in docs/guides/comparisons.md) names a recipe, seeds, and variants: the fields
    that differ, and which roles of a run fill which rows. Every run is an `hf-cdl train` in a folder below
    runs/comparisons/NAME/. If the command was stopped or killed, the same command resumes. It writes table.parquet and
    table.csv (every run with its recipe's hash), table.md, report.html and the report's pictures in plots/.

    Accuracy is measured on validation images. --test measures the stored checkpoints of the finished runs on the test
    images, once, at the very end. It writes the same files to runs/comparisons/NAME/test/, and records in
    runs/comparisons/test_split.json that the test images were read.
    """
    parser = verb_parser(
        verb,
        "SPEC.yaml [SPEC.yaml ...] [--jobs N] [--test]",
        _compare.__doc__,
        "hf-cdl compare recipes/comparisons/quickstart_baselines.yaml --jobs 2",
    )
    parser.add_argument("specs", type=path, nargs="+", metavar="SPEC", help="a comparison's file")
    parser.add_argument("--jobs", type=_jobs, metavar="N", help="runs at a time (default: one per GPU, else per core)")
    parser.add_argument("--test", action="store_true", help="measure the finished runs on the test images, once")
    return parser


def _jobs(text: str) -> int:
    """Parse a number of runs; anything else raises an error that says so."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}, but takes a number of runs, one at least")
    return int(text)


def _demo(verb: str) -> argparse.ArgumentParser:
    """A page that shows a model as it was after each of its tasks: what it says of an image, and how well it did.

    The images to choose from are the run's own validation images, if its data are here. The variable
    GRADIO_SERVER_PORT chooses the port (default: the first free one from 7860).
    """
    parser = verb_parser(
        verb,
        "WHERE [--compare task-NN] [--reject [SHARE]] [--trust_remote_code] [--plugins FILE ...]",
        _demo.__doc__,
        "hf-cdl demo runs/quickstart --compare task-01",
    )
    parser.add_argument(
        "where",
        metavar="WHERE",
        help="a repository on the Hub that a run was pushed to, OWNER/NAME, a run's folder, or a model's in it",
    )
    parser.add_argument(
        "--compare", metavar="task-NN", help="an earlier state, shown beside the newest (default: one at a time)"
    )
    in_use.reject(parser, "answer unknown for an image that is less known than this share of images of its classes")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that lies in it (default: it is not run)"
    )
    plugins(parser)
    return parser


VERBS = {
    "train": Verb("train and evaluate on images, task after task", _train, open=True, resumes=True),
    "plan": Verb("print what a run would need: parameters, FLOPs, steps, memory, files", _plan, open=True),
    "add": Verb("teach a student more images, or student and teacher one more task", _add, open=True, resumes=True),
    "predict": Verb("classify images in files and folders", in_use.predict),
    "evaluate": Verb("measure a student on labelled images", in_use.evaluate),
    "export": Verb("export a student as one file for a device", export_parser.export),
    "correct": Verb("correct labels that a student learnt wrongly", changing.correct),
    "remove": Verb("remove a class from a student", changing.remove),
    "rename": Verb("rename a class of a student", changing.rename),
    "merge": Verb("merge several classes into one", changing.merge),
    "undo": Verb("take back the last change of a student", changing.undo),
    "push": Verb("push whatever part of a run the Hub lacks", _push, resumes=True),
    "card": Verb("write a run's model cards", _card),
    "verify": Verb("load a run's checkpoints and check their accuracies", _verify),
    "shrink": Verb("make a smaller backbone: its first layers, at another image size", _shrink),
    "compare": Verb("compare variants of a recipe over seeds and class orders", _compare, resumes=True),
    "demo": Verb("show a student on a web page, with a slider over its tasks", _demo, quiet=False),
}
