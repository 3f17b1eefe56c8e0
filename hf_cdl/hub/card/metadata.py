"""A card's metadata, as read by the Hub, including the model-index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_cdl.counted import counted
from hf_cdl.data.benchmarks import BENCHMARKS
from hf_cdl.escape import visible
from hf_cdl.places import HUB_ID, by_name, shareable
from hf_cdl.runs.metrics import continual_metrics

Results = Mapping[str, Any]

METRICS = {
    "average_accuracy": "average accuracy (%)",
    "forgetting": "forgetting",
    "average_incremental_accuracy": "incremental",
}


def shared(results: Results) -> dict[str, Any]:
    """The results as shared with others, without local paths."""
    return {**results, "recipe": shareable(results["recipe"], BENCHMARKS)}


def metadata(results: Results, role: str, repo_id: str | None) -> ModelCardData:
    """The YAML metadata of a card."""
    recipe, section = results["recipe"], results["recipe"][role]
    data, base = dataset(recipe["data"]), backbone_id(section)
    frozen = section["model"] == "cdl" and not section["train_backbone"]
    relation: dict[str, Any] = {"base_model_relation": "adapter" if frozen else "finetune"}
    return ModelCardData(
        base_model=base,
        datasets=data["id"],
        eval_results=eval_results(results, role),
        library_name="transformers",
        license=_plain(stated(recipe, "license")),
        metrics=["accuracy"],
        model_name=f"{visible(results['name'])}-{role}" if repo_id is None else repo_id.split("/")[-1],
        pipeline_tag="image-classification",
        tags=["hf_cdl", "continual-learning", "class-incremental-learning", "knowledge-distillation"],
        **(relation if base else {}),
    )


def backbone_id(section: Mapping[str, Any]) -> str | None:
    """The Hub id of the backbone whose weights are used; None for a local folder or random weights."""
    name = section["backbone"]
    return name if section["pretrained"] and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def dataset(data: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's id on the Hub (None for a folder), readable name, configuration, split and revision."""
    filled = {**data, **{k: v for k, v in BENCHMARKS.get(data["path"], {}).items() if k == "path" or not data[k]}}
    path, split = filled["path"], data["eval_split"]
    on_hub = HUB_ID.fullmatch(path) and "/" in path and not Path(path).exists()
    return {
        "id": path if on_hub else None,
        "name": visible(path.split("/")[-1] if on_hub else by_name(path)),
        "config": _plain(filled["name"]),
        "split": split if filled["test_fraction"] and split == "test" else _plain(filled[f"{split}_split"]) or split,
        "revision": _plain(filled["revision"]),
    }


def _plain(text: str | None) -> str | None:
    return None if text is None else visible(text)


def stated(recipe: Mapping[str, Any], field: str) -> str | None:
    """What the author states in the recipe's `card` section; None if nothing."""
    return recipe.get("card", {}).get(field)


def eval_results(results: Results, role: str) -> list[EvalResult]:
    """Entries of the model-index: accuracy on every task, and the averages, after the newest task."""
    matrix, data = results["roles"][role]["accuracy_matrix"], dataset(results["recipe"]["data"])
    classes = [len(names) for names in results["class_names"]]
    source: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Class-incremental image classification",
        "dataset_type": data["id"] or data["name"],
        "dataset_name": f"{data['name']}, {counted(sum(classes), 'class')} in {counted(len(classes), 'task')}",
        "dataset_config": data["config"],
        "dataset_split": data["split"],
        "dataset_revision": data["revision"],
    }
    after = f"after task {len(matrix)} of {len(classes)}"
    found = [("accuracy", value, f"accuracy on task {i + 1} {after} (%)") for i, value in enumerate(matrix[-1])]
    metrics = continual_metrics(matrix)
    found += [("accuracy", metrics["average_accuracy"], f"average accuracy {after} (%)")]
    found += [(name, metrics[name], f"{name.replace('_', ' ')} {after}") for name in [*METRICS][1:]]
    known = [(t, round(v, 4), n) for t, v, n in found if v is not None]
    return [EvalResult(**source, metric_type=t, metric_value=v, metric_name=n) for t, v, n in known]
