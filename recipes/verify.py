"""Load every checkpoint of a finished run again and compare its accuracies with the ones that the run recorded.

python recipes/verify.py RUN      (a run's folder, such as runs/quickstart)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoImageProcessor
from transformers.utils import logging as hf_logging

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.build import MODELS, load_plugins
from hf_cdl.recipe import build_recipe


def main(folder: Path) -> int:
    ledger = json.loads((folder / "run.json").read_text())
    recipe = build_recipe(ledger["recipe"])
    load_plugins(recipe.plugins)
    different = 0
    for role, entries in ledger["entries"].items():
        for entry in entries:
            checkpoint = folder / role / f"task-{entry['task'] + 1:02d}"
            processor = AutoImageProcessor.from_pretrained(checkpoint)
            stream = TaskStream(recipe.data, processor, seed=recipe.seed)
            with tempfile.TemporaryDirectory() as work:
                given = recipe.training_args("teacher" if role == "teacher" else "student")
                arguments = CDLTrainingArguments(work, **{**given, "disable_tqdm": True})
                section = getattr(recipe, role, None)  # a baseline has none
                model = MODELS[section.model if section else "cdl"].from_pretrained(checkpoint)
                trainer = CDLTrainer(model, arguments, eval_split=recipe.data.eval_split)
                correct, counts = trainer.count_correct([stream[i] for i in range(entry["task"] + 1)])
            same = (correct, counts) == (entry["correct"], entry["counts"])
            different += not same
            print(
                f"{checkpoint}: {sum(correct)} of {sum(counts)} right, {'as recorded' if same else 'NOT as recorded'}"
            )
    return 1 if different else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    sys.exit(main(Path(sys.argv[1])))
