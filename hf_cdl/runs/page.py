"""report.html of a run: everything that it found on one page, which needs no network. Comparisons share its style."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_cdl.counted import counted
from hf_cdl.escape import visible_lines
from hf_cdl.runs.files import write_whole
from hf_cdl.runs.report import Results, cells, conclusion, label_of, measured, number, title_of
from hf_cdl.runs.verdict import baselines

PAGE, RESULTS = "report.html", "results.json"
EVALUATION = "evaluation"
"""Folder, in a run, of what `hf-cdl evaluate` found on the run's own images, by revision."""
_COST = ["seconds to train", "peak MiB", "million parameters", "MB of weights", "ms a use"]


def rendered(template: Path, **values: Any) -> str:
    """Render a page that extends base.html.jinja; all text is escaped, control characters too."""
    places = FileSystemLoader([template.parent, Path(__file__).parent])
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    options["finalize"] = lambda value: visible_lines(value) if type(value) is str else value  # escaped after that
    environment = Environment(loader=places, trim_blocks=True, lstrip_blocks=True, **options)
    return environment.get_template(template.name).render(**values, counted=counted)


def embedded(pictures: Mapping[str, Path]) -> dict[str, str]:
    """The content of PNG files, by name, for a page."""
    return {name: base64.b64encode(file.read_bytes()).decode() for name, file in pictures.items()}


def save_page(results: Results, folder: Path) -> None:
    """Write report.html into a run's folder, with the pictures that are there."""
    roles = measured(results)
    beside = baselines(roles)
    headings, rows = cells(results)
    recipe = yaml.safe_dump(results["recipe"], sort_keys=False, allow_unicode=True, width=100)
    page = rendered(
        Path(__file__).with_name("page.html.jinja"),
        title=title_of(results),
        results={"finished": True, "changes": [], "versions": {}, **results},
        names=[label_of(role, roles[role], 60) for role in roles if role not in beside],
        beside=len(beside),
        counts=next((entry["counts"] for entry in roles.values() if entry.get("counts")), []),
        said=conclusion(results),
        table={"headings": [heading.replace("\n", " ") for heading in headings], "rows": rows},
        cost={"headings": ["role", *_COST], "rows": [_cost(role, entry) for role, entry in roles.items()]},
        images=embedded(_pictures(folder)),
        state=getattr(_evaluated(folder), "name", None),
        recipe=recipe,
        files=[RESULTS, *(path.name for path in sorted(folder.iterdir()))],
    )
    write_whole(folder / PAGE, lambda file: file.write_text(page, encoding="utf-8"))


def is_whole(file: Path) -> bool:
    """Whether a page is there to its end."""
    return file.is_file() and file.read_bytes().endswith(b"</html>")


def _evaluated(folder: Path) -> Path | None:
    """The evaluation on the run's own images of the newest state of the student that has one."""
    states = [path for path in folder.glob(f"{EVALUATION}/task-*") if path.is_dir()]
    return max(states, key=lambda path: (len(path.name), path.name), default=None)


def _pictures(folder: Path) -> dict[str, Path]:
    """The run's pictures, and those of the evaluation of that state; of others evaluated beside it, none alone."""
    pictures, state = {path.stem: path for path in folder.glob("*.png")}, _evaluated(folder)
    if state is not None:
        shown = {path.stem.removesuffix(f"_{state.name}"): path for path in state.glob("*.png")}
        pictures |= {name: path for name, path in shown.items() if "_task-" not in name}
    return pictures


def _cost(role: str, entry: Mapping[str, Any]) -> list[str]:
    """A role's line in the table of costs: of training, and of use if that was measured."""
    use = entry.get("cost") or {}
    shown = [(sum(entry.get("train_seconds") or []), 1), (max(entry.get("peak_memory_bytes") or [0]) / 2**20, 0)]
    shown += [(use.get("parameters", 0) / 1e6, 2), (use.get("bytes", 0) / 1e6, 1), (use.get("latency_ms", 0), 1)]
    return [label_of(role, entry, 60), *(number(value, digits) if value else "-" for value, digits in shown)]
