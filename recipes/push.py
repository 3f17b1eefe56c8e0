"""Push what a run has finished and the Hugging Face Hub does not hold yet.

python recipes/push.py RUN [--hub_model_id NAME] [--push_teacher true] [--hub_private_repo false]
RUN is a run's folder, such as runs/quickstart; without options it is pushed to where its recipe said.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_cdl.hub import HubError, Pusher
from hf_cdl.recipe import RecipeError, build_recipe, completed
from hf_cdl.run import Run
from hf_cdl.storing import RunError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--hub_model_id")
    for name in ("--push_teacher", "--hub_private_repo"):
        parser.add_argument(name, type=lambda text: {"true": True, "false": False}[text.lower()])
    given = vars(parser.parse_args(arguments))
    folder = given.pop("run")
    try:
        ledger = json.loads((folder / "run.json").read_text())
        asked = {**ledger.get("hub", {}), **{name: value for name, value in given.items() if value is not None}}
        if not asked:
            raise RunError(f"The recipe of {folder} did not say where to push it; give --hub_model_id NAME.")
        recipe = build_recipe({**ledger["recipe"], **asked, "push_to_hub": True})
        run = Run(folder, completed(ledger["recipe"]), writer=False, complete=completed)
        pusher = Pusher(folder, recipe.repositories, recipe.hub_private_repo, patience=None, origin=run.origin)
        pusher.check(run.results())
        return 0 if pusher.finish(run.results()) else 4
    except OSError as error:
        print(f"error: {folder} holds no run: {error}", file=sys.stderr)
    except (RunError, RecipeError, HubError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
