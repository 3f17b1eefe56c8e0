"""Which model of a finished run to use, the student or a baseline, as far as its test images can tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

from hf_cdl.counted import counted
from hf_cdl.escape import visible
from hf_cdl.runs.metrics import average_accuracy

_Z = NormalDist().inv_cdf(0.975)
_MODELS = ("student", "teacher")
"""Roles that are no baselines."""


class Verdict(NamedTuple):
    """The role to use (the student, if nothing is shown to be better), and a sentence for people."""

    role: str
    said: str


def verdict(results: Mapping[str, Any]) -> Verdict | None:
    """Compare a run's student with its best baseline by their average accuracies after the last task.

    None for a run that is not finished, has no student or no baseline, or has tasks without test images. `results`: as
    in results.json; without `counts` of the student there is no interval.
    """
    roles = {role: entry for role, entry in results["roles"].items() if entry.get("accuracy_matrix")}
    others = {role: average_accuracy(roles[role]["accuracy_matrix"]) for role in baselines(roles)}
    if not results.get("finished", True) or "student" not in roles or not others:
        return None
    student, counts = average_accuracy(roles["student"]["accuracy_matrix"]), roles["student"].get("counts") or []
    best = max(others, key=lambda role: others[role])
    if any(map(math.isnan, (student, *others.values()))):
        return None
    first, second = ("student", best) if student >= others[best] else (best, "student")
    high, low = max(student, others[best]), min(student, others[best])
    ahead = f"{high:.1f} %, {high - low:.1f} points ahead of the {_name(second)}"
    if not counts or not all(counts):
        return Verdict(first, f"Use the {_name(first)}: {ahead}.")
    least, most = interval(high, low, counts)
    split = results.get("recipe", {}).get("data", {}).get("eval_split", "test")
    seen = counted(sum(counts), f"{split} image")
    if least > 0:
        measured = f"95 % interval {least:.1f} to {most:.1f}, by {seen}"
        return Verdict(first, f"Use the {_name(first)}: {ahead} ({measured}).")
    return Verdict(
        "student",
        f"Use the student or the {_name(best)}: {student:.1f} % and {others[best]:.1f} %, which {seen} "
        f"cannot tell apart ({high - low:.1f} points, 95 % interval {least:+.1f} to {most:+.1f}).",
    )


def baselines(roles: Iterable[str]) -> list[str]:
    """The roles that are baselines."""
    return [role for role in roles if role not in _MODELS]


def with_verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the sentence of their `verdict`, or without that field if there is none."""
    found = verdict(results)
    return {**{k: v for k, v in results.items() if k != "verdict"}, **({"verdict": found.said} if found else {})}


def interval(first: float, second: float, counts: Sequence[int]) -> tuple[float, float]:
    """95 % interval of the difference of two average accuracies, in percentage points.

    `counts`: test images of each task, all positive. Agresti and Caffo 2000: one right and one wrong answer are added
    to each model's, which keeps the interval honest for few images and for accuracies near 0 and 100. As the average
    weighs tasks equally, n is the number of images with which a plain share would vary as much, T^2 / sum_i 1 / n_i.
    The interval is cautious: it treats the models as if each had its own images, though they share them.
    """
    n = len(counts) ** 2 / sum(1 / count for count in counts)
    p, q = ((share / 100 * n + 1) / (n + 2) for share in (first, second))
    half = _Z * math.sqrt((p * (1 - p) + q * (1 - q)) / (n + 2))
    return 100 * (p - q - half), 100 * (p - q + half)


def _name(role: str) -> str:
    return visible(role).replace("_", " ")
