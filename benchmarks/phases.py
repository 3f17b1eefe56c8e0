"""Seconds of a finished run by phase: python benchmarks/phases.py RUN [SECONDS]     (SECONDS: of its whole command)

A Markdown table of results.json: training and evaluation of every role over all tasks, and what remains of the whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(run: str, whole: str | None = None) -> None:
    roles = json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))["roles"]
    print("| role | average accuracy | training s | evaluation s | images/s | MiB |\n|---|---:|---:|---:|---:|---:|")
    measured = 0.0
    for role in roles.values():
        seconds = [
            sum(each) if isinstance(each, list) else each for each in (role["train_seconds"], role["eval_seconds"])
        ]
        measured += sum(seconds)
        rates, memory = role["images_per_second"], role["peak_memory_bytes"]
        rate = sum(rates) / len(rates) if isinstance(rates, list) else rates
        most = max(memory) if isinstance(memory, list) else memory
        accuracy = role["metrics"]["average_accuracy"]
        times = " | ".join(f"{each:.1f}" for each in seconds)
        print(f"| {role['label']} | {accuracy:.1f} | {times} | {rate:,.0f} | {most / 2**20:,.0f} |")
    if whole is not None:
        print(f"| start, loading, files and tables | | {float(whole) - measured:.1f} | | | |")
        print(f"| the command | | {float(whole):.1f} | | | |")


if __name__ == "__main__":
    main(*sys.argv[1:])
