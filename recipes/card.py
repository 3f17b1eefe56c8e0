"""Write the model cards of a run, with their picture: ROLE/README.md and ROLE/accuracy_matrix.png.

python recipes/card.py RUN [--output FOLDER] [--repo_id OWNER/NAME]
RUN is a run's folder, such as runs/quickstart, finished or not; --output is by default the same folder. --repo_id:
where the student will be (its teacher: the same with -teacher).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_cdl.card import card_files
from hf_cdl.recipe import completed
from hf_cdl.run import Run
from hf_cdl.storing import RunError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repo_id")
    options = parser.parse_args(arguments)
    output = options.output or options.run
    try:
        recipe = completed(json.loads((options.run / "run.json").read_text())["recipe"])
        results = Run(options.run, recipe, writer=False, complete=completed).results()
    except (OSError, RunError) as error:
        print(f"error: {options.run} holds no run: {error}", file=sys.stderr)
        return 2
    names = {"student": options.repo_id, "teacher": options.repo_id and f"{options.repo_id}-teacher"}
    for role in names.keys() & results["roles"].keys():
        other = names["teacher" if role == "student" else "student"]
        for name, content in card_files(results, role, names[role], other).items():
            file = output / role / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    if options.output is not None:
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"Wrote the cards to {output}/")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
