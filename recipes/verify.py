"""Load every checkpoint of a finished run again and compare its accuracies with the ones that the run recorded.

python recipes/verify.py RUN      (a run's folder, such as runs/quickstart)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor
from transformers.utils import logging as hf_logging

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.build import MODELS, load_plugins
from hf_cdl.recipe import build_recipe
from hf_cdl.types import TaskResult


def main(folder: Path) -> int:
    ledger = json.loads((folder / "run.json").read_text())
    different = 0
    for checkpoint, entry, result in measure_again(folder, build_recipe(ledger["recipe"]).data.eval_split):
        same = (result.correct, result.counts) == (entry["correct"], entry["counts"])
        different += not same
        print(
            f"{checkpoint}: {sum(result.correct)} of {sum(result.counts)} right, "
            f"{'as recorded' if same else 'NOT as recorded'}"
        )
    return 1 if different else 0


def measure_again(folder: Path, split: str, *only: str) -> Iterator[tuple[Path, dict[str, Any], TaskResult]]:
    """Each checkpoint of a run (of the roles `only`, or all), its ledger entry, and what it answers on a split now."""
    ledger = json.loads((folder / "run.json").read_text())
    recipe = build_recipe(ledger["recipe"])
    load_plugins(recipe.plugins)
    for role, entries in ledger["entries"].items():
        for entry in entries if not only or role in only else ():
            checkpoint = folder / role / f"task-{entry['task'] + 1:02d}"
            processor = AutoImageProcessor.from_pretrained(checkpoint)
            stream = TaskStream(recipe.data, processor, seed=recipe.seed)
            with tempfile.TemporaryDirectory() as work:
                given = recipe.training_args("teacher" if role == "teacher" else "student")
                arguments = CDLTrainingArguments(work, **{**given, "disable_tqdm": True})
                section = getattr(recipe, role, None)  # a baseline has none
                model = MODELS[section.model if section else "cdl"].from_pretrained(checkpoint)
                trainer = CDLTrainer(model, arguments, eval_split=split)
                answers = trainer.answer([stream[i] for i in range(entry["task"] + 1)])
            yield checkpoint, entry, TaskResult(role, entry["task"], **answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    sys.exit(main(options.run))
