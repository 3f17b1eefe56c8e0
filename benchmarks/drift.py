"""What a student loses on earlier classes as its features move, compared with a head refitted on all images.

python benchmarks/drift.py RUN ... [--unlabelled FOLDER] [--head HEAD] [--patch_mean]     (from the root)

Each RUN is one of `hf-cdl train` whose student has `later_sessions`, such as
  hf-cdl train recipes/dinov2_session.yaml --student.later_sessions '{keep: 0.1}' --data.eval_split validation
If its terms don't read the head (`similarity`, `keep`), its backbones are the same however sums are moved, so all ways
of moving them are tried on these. HEAD, as YAML, is by default the run's. After each task the accuracy on the run's
evaluation images of all classes so far is compared with that of the head refitted on the training images of all tasks
with the current features, which no stream allows. `--unlabelled`: a labelled data set; its images of the stream's
classes are left out. Nothing is downloaded or trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from hf_cdl import TaskStream
from hf_cdl.backbones.families import patch_mean
from hf_cdl.heads import build_head
from hf_cdl.heads.drift import fit_drift
from hf_cdl.recipe import build_recipe
from hf_cdl.recipe.build import build_processors, load_model
from hf_cdl.runs.ledger import revision_name

REFITTED = "refitted on all images"
WAYS = {
    "nothing, they stay": "",
    "the task's images": "task",
    "the task's images and views": "task views",
    "unlabelled images": "unlabelled",
    "all of these": "task views unlabelled",
}
"""Ways of moving the sums: the images to which the map is fitted."""
VIEWS = 3


class Images(NamedTuple):
    """Pixels (N, 3, H, W) of the images of each task, or labels (N,)."""

    train: list[torch.Tensor]
    measured: list[torch.Tensor]
    views: list[torch.Tensor]
    unlabelled: list[torch.Tensor]


def read(split: Any, name: str, keys: Any = None) -> torch.Tensor:
    items = [split[key] for key in (range(len(split)) if keys is None else keys)]
    return torch.stack([torch.as_tensor(item[name]) for item in items])


def images(stream: TaskStream, other: TaskStream | None, epochs: int) -> tuple[Images, Images]:
    """Pixels and labels of a stream's images, and of those of other classes of another data set.

    The views are those of the package, which were not trained on.
    """
    known, found = {*stream.class_names}, []
    for name in ("pixel_values", "labels"):
        views, unlabelled = [], []
        for task in stream:
            keys = [(index, epochs + view) for view in range(VIEWS) for index in range(len(task.train))]
            views.append(read(task.train, name, keys))
        for task in () if other is None else other:
            data: Any = task.train
            keys = [
                n
                for n, label in enumerate(data.labels.tolist())
                if task.class_names[label - task.first_class] not in known
            ]
            unlabelled.append(read(data, name, keys))
        own = [read(task.train, name) for task in stream], [read(measured(task, stream), name) for task in stream]
        found.append(Images(*own, views, unlabelled))
    return found[0], found[1]._replace(unlabelled=[-torch.ones_like(label) for label in found[1].unlabelled])


def measured(task: Any, stream: TaskStream) -> Any:
    return getattr(task, stream.config.eval_split)


@torch.no_grad()
def features(model: Any, pixels: torch.Tensor, patches: bool) -> torch.Tensor:
    """Features (N, D) of images: CLS, or CLS and the mean of the patches."""
    found = []
    for batch in pixels.split(64):
        hidden = model.backbone(pixel_values=batch).last_hidden_state
        found.append(torch.cat([hidden[:, 0], patch_mean(model.backbone, hidden)], dim=1) if patches else hidden[:, 0])
    return torch.cat(found)


def walk(run: Path, unlabelled: str | None, patches: bool) -> tuple[list[Images], Images, dict[str, Any]]:
    """Features of all images under the backbone of each task, their labels, and the run's head."""
    recipe = build_recipe(json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"])
    processors = build_processors(recipe)
    stream, other = TaskStream(recipe.data, processors), None
    if unlabelled is not None:
        other = TaskStream(dataclasses.replace(recipe.data, path=unlabelled, max_train_per_class=None), processors)
    pixels, labels = images(stream, other, math.ceil(recipe.train["num_train_epochs"]))
    stages = []
    for number in range(len(stream)):
        model = load_model(recipe, recipe.student, run / "student" / revision_name(number + 1)).eval()
        first_and_last = {"train": (0, number + 1), "measured": (0, number), "views": (number, number + 1)}
        of_model = {
            name: [
                features(model, each, patches) if first <= task <= last else each[:0]
                for task, each in enumerate(getattr(pixels, name))
            ]
            for name, (first, last) in first_and_last.items()  # all that is read
        }
        stages.append(Images(**of_model, unlabelled=[features(model, each, patches) for each in pixels.unlabelled]))
    return stages, labels, recipe.student.head


def accuracy(head: Any, tasks: list[torch.Tensor], labels: list[torch.Tensor]) -> float:
    with torch.no_grad():
        hits = [(head(x).argmax(dim=1) == y).float() for x, y in zip(tasks, labels, strict=True)]
    return 100 * float(torch.cat(hits).mean())


def new_head(config: dict[str, Any], width: int, first: torch.Tensor) -> Any:
    torch.manual_seed(0)
    head: Any = build_head(config, width)
    head.init_shared()
    if head.standard is not None:
        head.standard.measure(first)
    return head


def learn(head: Any, x: torch.Tensor, labels: torch.Tensor) -> None:
    head.add_task(int(labels.max()) + 1 - sum(len(block.count) for block in head.blocks))
    head.init_task(len(head.blocks) - 1)
    head.accumulate(x, labels)


def seen(of: Images, anchors: str, number: int) -> torch.Tensor:
    """What the map of task `number` is fitted to, of features or labels."""
    parts = {"task": [of.train[number]], "views": [of.views[number]], "unlabelled": of.unlabelled}
    return torch.cat([each for name in anchors.split() for each in parts[name]])


def losses(stages: list[Images], labels: Images, config: dict[str, Any], anchors: str) -> tuple[list[float], int]:
    """Accuracy after each task with sums moved by the map of `anchors`, and the bytes of the head."""
    first = stages[0].train[0]
    head, found = new_head(config, first.shape[1], first), []
    for number, now in enumerate(stages):
        if number and anchors:
            before, after, whose = (seen(part, anchors, number) for part in (stages[number - 1], now, labels))
            head.move(fit_drift(head.prepare(before), head.prepare(after), whose))
        learn(head, now.train[number], labels.train[number])
        head.end_task()
        found.append(accuracy(head, now.measured[: number + 1], labels.measured[: number + 1]))
    return found, sum(value.nbytes for value in head.state_dict().values())


def refitted(stages: list[Images], labels: Images, config: dict[str, Any]) -> list[float]:
    found = []
    for number, now in enumerate(stages):
        head = new_head(config, now.train[0].shape[1], stages[0].train[0])
        for task in range(number + 1):
            learn(head, now.train[task], labels.train[task])
        head.end_task()
        found.append(accuracy(head, now.measured[: number + 1], labels.measured[: number + 1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--unlabelled", metavar="FOLDER")
    parser.add_argument("--head", type=yaml.safe_load, action="append", help="as YAML; may be given several times")
    parser.add_argument("--patch_mean", action="store_true", help="heads read the mean of the patches beside CLS")
    asked = parser.parse_args()
    lost: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    size: dict[tuple[str, str], int] = {}
    for run in asked.runs:
        stages, labels, own = walk(run, asked.unlabelled, asked.patch_mean)
        for config in asked.head or [own]:
            best, name = refitted(stages, labels, config), yaml.safe_dump(config, default_flow_style=True).strip()
            lost[name, REFITTED].append(best)
            for way, anchors in WAYS.items():
                if "unlabelled" in anchors and not stages[0].unlabelled:
                    continue
                found, size[name, way] = losses(stages, labels, config, anchors)
                lost[name, way].append([whole - each for whole, each in zip(best, found, strict=True)])
    print("| head | sums moved by | points lost after each task, from the second | after the last | MB of the head |")
    print("|---|---|---|---:|---:|")
    for (name, way), of_runs in lost.items():
        tasks = [statistics.mean(of_task) for of_task in zip(*of_runs, strict=True)][1:]
        last = [of_run[-1] for of_run in of_runs]
        spread = f" ± {statistics.stdev(last):.1f}" if len(last) > 1 else ""
        each = " ".join(f"{value:.1f}" for value in tasks)
        held = f"{size[name, way] / 1e6:.1f}" if way != REFITTED else "–"
        what = f"{REFITTED} (accuracy)" if way == REFITTED else way
        print(f"| {name} | {what} | {each} | {statistics.mean(last):.1f}{spread} | {held} |")


if __name__ == "__main__":
    main()
