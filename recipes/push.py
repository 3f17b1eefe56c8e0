"""Push what a run has finished and the Hugging Face Hub does not hold yet.

python recipes/push.py RUN [--hub_model_id NAME] [--push_teacher true] [--hub_private_repo false]
RUN is a run's folder, such as runs/quickstart; without options it is pushed to where its recipe said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_cdl.escape import visible_lines
from hf_cdl.hub import HubError, Pusher
from hf_cdl.recipe import build_recipe, described, untrained
from hf_cdl.results import run_results, stored_ledger
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
        ledger = stored_ledger(folder)
        asked = {**(ledger.get("hub") or {}), **{name: value for name, value in given.items() if value is not None}}
        if not asked:
            raise RunError(f"The recipe of {folder} did not say where to push it; give --hub_model_id NAME.")
        recipe = build_recipe({**untrained(ledger["recipe"]), **asked, "push_to_hub": True})
        results = run_results(folder, described)
        origin = results.get("origin")
        pusher = Pusher(folder, recipe.repositories, recipe.hub_private_repo, patience=None, origin=origin)
        pusher.check(results)
        return 0 if pusher.finish(results) else 4
    except (OSError, ValueError, RunError, HubError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
