"""The arguments of each command, with their help. They are parsed before anything slow is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_cdl.commands import changing_parsers as changing
from hf_cdl.commands import export_parser
from hf_cdl.commands import in_use_parsers as in_use
from hf_cdl.commands.parser_parts import path, plugins, true_or_false, verb_parser


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
        description=f"Continual distillation learning: a large and a small model learn task after task.\n\n{verbs}",
        epilog="hf-cdl VERB --help: its options and an example.\nFrom nothing: hf-cdl train --example quickstart",
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
        return parser.parse_args(words), []
    if verb in ("train", "plan"):  # recipe/files.py parses their arguments
        parser.parse_args(["--help"] if {"-h", "--help"} & {*words} else [])
        return argparse.Namespace(), list(words)
    options, fields = parser.parse_known_args(words)
    if list(words[:2]) != [options.student, options.data]:
        parser.error("the student and the folder of images come first")
    return options, fields


def _train(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "IMAGES [--backbone NAME] [--teacher NAME] [--any.field value ...] [--plan]\n"
        "       hf-cdl train RECIPE.yaml ... [--any.field value ...] [--plan]\n"
        "       hf-cdl train --example quickstart",
        """Learn from images: teach, distil, evaluate, task after task. The same command goes on where the run stopped.

With IMAGES the recipe is the recommended one, and is said: a frozen backbone with a ridge head, whose strength the
images choose, beside class means and a linear head; with --teacher after a first session that the teacher learns and
then teaches. All classes are one task (--data.classes_per_task N: so many at a time).

With RECIPE.yaml everything is as written there; of several files a later one overrides an earlier one. In both forms
values on the command line override all. The fields of a recipe and their defaults: the page of options in the
documentation (make docs). On several GPUs: accelerate launch -m hf_cdl train ...""",
        "hf-cdl train photos --backbone facebook/dinov2-base --data.classes_per_task 5",
    )
    parser.add_argument(
        "images",
        nargs="?",
        metavar="IMAGES",
        help="a folder of class folders (FOLDER/CLASS/*.jpg, or in FOLDER/train and FOLDER/test), a folder of parquet "
        "files, or a data set on the Hub; anything whose name does not end in .yaml",
    )
    parser.add_argument("recipe", nargs="*", metavar="RECIPE.yaml", help="what is trained, and how")
    parser.add_argument(
        "--backbone", metavar="NAME", help="of the student, a Hub id or a folder (default: facebook/dinov2-small)"
    )
    parser.add_argument(
        "--teacher", metavar="NAME", help="backbone of a teacher, usually larger (default: no teacher)"
    )
    parser.add_argument("--any.field", metavar="value", help="a field of the recipe, as YAML (default: the recipe's)")
    parser.add_argument("--plan", action="store_true", help="only print what the run would need: hf-cdl plan")
    parser.add_argument("--example", metavar="NAME", help="write the recipe NAME.yaml into this folder: quickstart")
    return parser


def _plan(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "IMAGES | RECIPE.yaml ... [--any.field value ...]",
        "What a run would need: parameters, FLOPs, steps, memory and files. Nothing is trained.",
        "hf-cdl plan flowers.yaml --train.per_device_train_batch_size 64",
    )
    parser.add_argument("recipe", nargs="*", metavar="RECIPE.yaml", help="what would be trained; IMAGES: see train")
    parser.add_argument("--any.field", metavar="value", help="a field of the recipe, as YAML (default: the recipe's)")
    return parser


def _add(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "STUDENT DATA [options] [--any.field value ...]",
        """Learn more images with a student from the Hugging Face Hub or a folder; no more is needed.

A student with a fitted head (ridge, lda, ncm) takes images of new and known classes alike into its sums, in seconds;
the result is a further revision of it, which hf-cdl undo takes back. With --output_dir, and for a trained head, one
more task of new classes is learnt in a run of its own, with its teacher.

The same command goes on where it stopped. With --push_to_hub true (and --push_teacher true) the new task is pushed to
the repositories it came from, or to those of --hub_model_id.

Who made STUDENT may be a stranger: no code of theirs is run, and nothing pickled is loaded. If their recipe needs
plugins (Python files), read them, then name them yourself: --plugins '[FILE]'.""",
        "hf-cdl add runs/quickstart birds --train.num_train_epochs 5",
    )
    parser.add_argument(
        "student",
        metavar="STUDENT",
        help="OWNER/NAME on the Hub, a run's folder (runs/quickstart), or a checkpoint's (its student/task-03)",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="images by class, as data.path of a recipe: DATA/train/CLASS/*.png and DATA/test/CLASS/*.png; "
        "test images of known classes are used too: they tell what was forgotten",
    )
    parser.add_argument("--teacher", help="its teacher, if it had one (default: OWNER/NAME-teacher, or the run's)")
    parser.add_argument("--revision", metavar="task-NN", help="the state to go on from (default: the newest)")
    parser.add_argument("--output_dir", type=path, metavar="FOLDER", help="the new run's (default: runs/NAME-DATA)")
    return parser


def _push(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "RUN [--hub_model_id NAME] [--push_teacher true|false] [--hub_private_repo true|false] [options]",
        "Push what a run has finished and the Hugging Face Hub does not hold yet.",
        "hf-cdl push runs/quickstart --hub_model_id me/quickstart --push_teacher true",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    last = "(default: as it was last to be pushed)"
    parser.add_argument("--hub_model_id", metavar="NAME", help=f"the student's repository {last}")
    parser.add_argument(
        "--push_teacher", type=true_or_false, metavar="true|false", help=f"the teacher, too: NAME-teacher {last}"
    )
    parser.add_argument(
        "--hub_private_repo", type=true_or_false, metavar="true|false", help=f"whether others see it {last}"
    )
    plugins(parser)
    return parser


def _card(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "RUN [--output FOLDER] [--repo_id OWNER/NAME] [--plugins FILE ...]",
        "Write the model cards of a run, with their picture: ROLE/README.md and ROLE/accuracy_matrix.png.",
        "hf-cdl card runs/quickstart --repo_id me/quickstart",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--output", type=path, metavar="FOLDER", help="where they are written (default: RUN)")
    parser.add_argument(
        "--repo_id",
        metavar="OWNER/NAME",
        help="where the student will be; its teacher: NAME-teacher (default: none)",
    )
    plugins(parser)
    return parser


def _verify(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "RUN [--plugins FILE ...]",
        """Load every checkpoint of a run again and compare its accuracies with the ones that the run recorded.

Nothing that the run's files name is executed. If its recipe has plugins (Python files that register models), read
them, then name them here.""",
        "hf-cdl verify runs/quickstart",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    plugins(parser)
    return parser


def _shrink(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "BACKBONE FOLDER [options]",
        """A smaller backbone from a pre-trained one: its first layers and final norm, at another image size.

The first layers of a larger model are a student that needs no pre-training. A smaller size is fewer patches: position
embeddings are interpolated, a ViT's here and once, those of DINOv2 and most other families in each forward pass.""",
        "hf-cdl shrink facebook/dinov2-small backbones/dinov2-small-8 --layers 8 --size 56",
    )
    parser.add_argument("backbone", metavar="BACKBONE", help="a Hub id or folder")
    parser.add_argument("folder", type=path, metavar="FOLDER", help="where the smaller one is written")
    parser.add_argument("--layers", type=int, metavar="N", help="how many are kept (default: all)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="an image's side (default: as it was)")
    parser.add_argument("--revision", help="of BACKBONE on the Hub (default: main)")
    parser.add_argument("--processor", metavar="ID", help="where the image processor is from (default: BACKBONE)")
    return parser


def _compare(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "SPEC.yaml [SPEC.yaml ...] [--jobs N] [--test]",
        """Run variants of a recipe over seeds and class orders, and say what differs: tables, tests, a report.

SPEC (recipes/comparisons/, fields in docs/guides/comparisons.md) names a recipe, seeds, and variants: fields that
differ, and which roles of a run fill which rows. Every run is an `hf-cdl train` of its own below
runs/comparisons/NAME/, so the same command goes on where it stopped, also after a kill. There it writes
table.parquet and table.csv (every run with its recipe's hash), table.md, report.html and the report's pictures in
plots/.

Accuracy is measured on validation images. --test measures the stored checkpoints of the finished runs on the test
images, writes the same files to runs/comparisons/NAME/test/, and records in runs/comparisons/test_split.json that they
were read; it does so once, at the very end.""",
        "hf-cdl compare recipes/comparisons/quickstart_baselines.yaml --jobs 2",
    )
    parser.add_argument("specs", type=path, nargs="+", metavar="SPEC", help="a comparison's file")
    parser.add_argument("--jobs", type=_jobs, metavar="N", help="runs at a time (default: GPUs, or cores without one)")
    parser.add_argument("--test", action="store_true", help="measure the finished runs on the test images, once")
    return parser


def _jobs(text: str) -> int:
    """Parse a number of runs; anything else raises an error that says so."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}, but takes a number of runs, one at least")
    return int(text)


def _demo(verb: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        verb,
        "WHERE [--compare task-NN] [--reject [SHARE]] [--trust_remote_code] [--plugins FILE ...]",
        """A page that shows a model as it was after each of its tasks: what it says of an image, and how well it did.

The images to choose from are the run's own validation images, if its data are here. The variable GRADIO_SERVER_PORT
chooses the port (default: the first free one from 7860).""",
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
    "train": Verb("teach, distil, evaluate, task after task", _train, open=True, resumes=True),
    "plan": Verb("say what a run would need: parameters, FLOPs, steps, memory, files", _plan, open=True),
    "add": Verb("teach a student more images, or student and teacher one more task", _add, open=True, resumes=True),
    "predict": Verb("answer for images in files and folders", in_use.predict),
    "evaluate": Verb("measure a student on labelled images", in_use.evaluate),
    "export": Verb("export a student as one file for a device", export_parser.export),
    "correct": Verb("give images that were learnt with a wrong label the right one", changing.correct),
    "remove": Verb("remove a class from a student", changing.remove),
    "rename": Verb("rename a class of a student", changing.rename),
    "merge": Verb("make one class of several", changing.merge),
    "undo": Verb("take back the last change of a student", changing.undo),
    "push": Verb("push whatever the Hub lacks of a run", _push, resumes=True),
    "card": Verb("write a run's model cards", _card),
    "verify": Verb("load a run's checkpoints again and check their accuracies", _verify),
    "shrink": Verb("make a smaller backbone: its first layers, at another image size", _shrink),
    "compare": Verb("compare variants of a recipe over seeds and class orders", _compare, resumes=True),
    "demo": Verb("show a student on a web page, with a slider over its tasks", _demo, quiet=False),
}
