"""Model cards: what a run's results say about its student or its teacher, by Hugging Face's own card machinery.

Everything comes from `results`, the content of a run's results.json, also of one that is still going on. What only
the author knows (licences, the data's page, what the backbones saw in pre-training) is the recipe's `card` section;
what is not stated there is called not stated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_cdl import report
from hf_cdl.metrics import average_accuracy, continual_metrics
from hf_cdl.tasks.benchmarks import BENCHMARKS

Results = Mapping[str, Any]

_HERE = Path(__file__).parent
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_METRICS = {
    "average_accuracy": "average accuracy (%)",
    "forgetting": "forgetting",
    "average_incremental_accuracy": "incremental",
}
_UNKNOWN_OVERLAP = (
    "Not stated. If the backbones' pre-training showed these classes or images, with or without labels, the numbers "
    "above say less about learning new classes than they seem to."
)


def model_card(
    results: Results, role: str, repo_id: str | None = None, other_id: str | None = None, picture: bool = True
) -> str:
    """The card of the `student` or `teacher` of a run, Markdown with metadata.

    `repo_id`: its repository; `other_id`: that of the run's other model; `picture`: accuracy_matrix.png lies beside
    the card. Raises ValueError for a role without results.
    """
    if role not in ("student", "teacher") or not results["roles"].get(role, {}).get("accuracy_matrix"):
        raise ValueError(f"There is no card for '{role}': cards are for a student or teacher that has learnt a task.")
    recipe, matrix = results["recipe"], results["roles"][role]["accuracy_matrix"]
    card = ModelCard.from_template(
        _metadata(results, role, repo_id),
        template_path=str(_HERE / "card_template.md.jinja"),
        title=f"{results['name']}: {role}" if repo_id is None else repo_id,
        summary=_summary(results, role),
        finished=len(matrix) == len(results["class_names"]),
        learnt=len(matrix),
        planned=len(results["class_names"]),
        usage=_usage(recipe, role, repo_id),
        usage_notes=_usage_notes(results, role, repo_id),
        split=recipe["data"]["eval_split"],
        seed=results["seed"],
        task_table=_task_table(results, role),
        role_table=_role_table(results, len(matrix)),
        better=_better(results, role),
        picture=picture,
        model_facts=_lines(_model_facts(recipe, role, other_id)),
        data_facts=_lines(_data_facts(results)),
        origin=_origin(results, role),
        overlap=_stated(recipe, "pretraining") or _UNKNOWN_OVERLAP,
        cost_facts=_lines(_cost_facts(results["roles"][role])),
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        stream=results["stream"],
        recipe=_recipe(recipe),
        citations=_citations(recipe, role),
    )
    return f"{str(card).strip()}\n"


def card_files(
    results: Results, role: str, repo_id: str | None = None, other_id: str | None = None
) -> dict[str, bytes]:
    """The files of a card, by name: README.md and, where matplotlib is installed, accuracy_matrix.png."""
    picture = report.plotting_available()
    files = {"README.md": model_card(results, role, repo_id, other_id, picture).encode()}
    if picture:
        with TemporaryDirectory() as folder:
            report.save_plots(results, folder)
            files["accuracy_matrix.png"] = Path(folder, "accuracy_matrix.png").read_bytes()
    return files


def eval_results(results: Results, role: str) -> list[EvalResult]:
    """What the model-index holds: the accuracy on every task, and the averages, after the newest task."""
    matrix, data = results["roles"][role]["accuracy_matrix"], _dataset(results["recipe"]["data"])
    classes = [len(names) for names in results["class_names"]]
    source: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Class-incremental image classification",
        "dataset_type": data["id"] or data["name"],
        "dataset_name": f"{data['name']}, {sum(classes)} classes in {len(classes)} tasks",
        "dataset_config": data["config"],
        "dataset_split": data["split"],
        "dataset_revision": data["revision"],
    }
    after = f"after task {len(matrix)} of {len(classes)}"
    found = [("accuracy", value, f"accuracy on task {i + 1} {after} (%)") for i, value in enumerate(matrix[-1])]
    metrics = continual_metrics(matrix)
    found += [("accuracy", metrics["average_accuracy"], f"average accuracy {after} (%)")]
    found += [(name, metrics[name], f"{name.replace('_', ' ')} {after}") for name in [*_METRICS][1:]]
    known = [(t, round(v, 4), n) for t, v, n in found if v is not None]
    return [EvalResult(**source, metric_type=t, metric_value=v, metric_name=n) for t, v, n in known]


# ---- metadata ----


def _metadata(results: Results, role: str, repo_id: str | None) -> ModelCardData:
    recipe, section = results["recipe"], results["recipe"][role]
    data, base = _dataset(recipe["data"]), _backbone_id(section)
    frozen = section["model"] == "cdl" and not section["train_backbone"]
    relation: dict[str, Any] = {"base_model_relation": "adapter" if frozen else "finetune"}
    return ModelCardData(
        base_model=base,
        datasets=data["id"],
        eval_results=eval_results(results, role),
        library_name="transformers",
        license=_stated(recipe, "license"),
        metrics=["accuracy"],
        model_name=f"{results['name']}-{role}" if repo_id is None else repo_id.split("/")[-1],
        pipeline_tag="image-classification",
        tags=["hf_cdl", "continual-learning", "class-incremental-learning", "knowledge-distillation"],
        **(relation if base else {}),
    )


def _backbone_id(section: Mapping[str, Any]) -> str | None:
    """The Hub id of the backbone whose weights are used; None for a folder, or for random weights."""
    name = section["backbone"]
    return name if section["pretrained"] and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _dataset(data: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's id on the Hub (None for a folder), readable name, configuration, split and revision."""
    filled = {**data, **{k: v for k, v in BENCHMARKS.get(data["path"], {}).items() if k == "path" or not data[k]}}
    path, split = filled["path"], data["eval_split"]
    on_hub = _HUB_ID.fullmatch(path) and "/" in path and not Path(path).exists()
    return {
        "id": path if on_hub else None,
        "name": Path(path).name,
        "config": filled["name"],
        "split": split if filled["test_fraction"] and split == "test" else filled[f"{split}_split"] or split,
        "revision": filled["revision"],
    }


def _stated(recipe: Mapping[str, Any], field: str) -> str | None:
    return recipe.get("card", {}).get(field)


# ---- text ----


def _summary(results: Results, role: str) -> str:
    recipe, section = results["recipe"], results["recipe"][role]
    learnt = results["class_names"][: len(results["roles"][role]["accuracy_matrix"])]
    tasks = f"{len(learnt)} tasks, one after another and without images of earlier ones" if learnt[1:] else "one task"
    text = f"An image classifier that learnt {sum(map(len, learnt))} classes in {tasks}."
    if section["model"] == "classifier":
        text += " All its weights were trained." if section["train"] is not None else " It is used as it was found."
    elif section["train_backbone"]:
        text += " Its pre-trained backbone was trained too."
    else:
        kind = section["prompt"]["type"]
        learns = "a head" if kind == "none" else f"prompts (`{kind}`) and a head"
        text += f" Its pre-trained backbone is frozen; {learns} learnt."
    terms = ", ".join(f"`{term['type']}`" for term in recipe["distill"])
    if recipe["teacher"] is None:
        return text
    if role == "teacher":
        return f"{text} It is the teacher of a student, which is the model that is meant for use."
    return f"{text} A teacher learnt every task first and helped it{f' ({terms})' if terms else ''}."


def _usage(recipe: Mapping[str, Any], role: str, repo_id: str | None) -> str:
    options = ", trust_remote_code=True" if recipe["plugins"] or _code(recipe, role) else ""
    lines = [
        "from transformers import pipeline",
        "",
        f'print(pipeline("image-classification", model="{repo_id or "FOLDER"}"{options})("IMAGE.png"))',
    ]
    own = recipe[role]["model"] == "cdl" and not options
    return "\n".join(["import hf_cdl  # tells transformers about the model type", *lines] if own else lines)


def _usage_notes(results: Results, role: str, repo_id: str | None) -> str:
    recipe, learnt = results["recipe"], len(results["roles"][role]["accuracy_matrix"])
    classes = sum(map(len, results["class_names"][:learnt]))
    notes = [f"Every image is answered with one of the {classes} classes below, also one that shows none of them."]
    if repo_id is not None:
        notes.append(f'The state after each task is a revision, `revision="task-01"` to `"task-{learnt:02d}"`.')
    if recipe[role]["model"] == "cdl":
        if not recipe.get("save_backbone", True):
            notes.append("The files hold prompts and heads alone; loading fetches the frozen backbone named below.")
        if _code(recipe, role):
            notes.append("Its code lies beside its weights: read it before you trust it, or install hf_cdl instead.")
        notes.append("`CDLForImageClassification.from_pretrained(...).begin_task(class_names)` adds a task to learn.")
    return "\n".join(notes)


def _code(recipe: Mapping[str, Any], role: str) -> bool:
    return recipe[role]["model"] == "cdl" and recipe.get("save_code", False)


def _task_table(results: Results, role: str) -> str:
    entry = results["roles"][role]
    matrix, counts = entry["accuracy_matrix"], entry["counts"]
    rows = [["task", "classes", "images", "just learnt", f"after task {len(matrix)}"]]
    for i, now in enumerate(matrix[-1]):
        names = ", ".join(name.replace("|", "\\|") for name in results["class_names"][i])
        rows.append([str(i + 1), names, str(counts[i]), report.number(matrix[i][i]), report.number(now)])
    return _table(rows, "rlrrr")


def _better(results: Results, role: str) -> list[str]:
    """The baselines that are at least as accurate as the model."""
    learnt = len(results["roles"][role]["accuracy_matrix"])
    averages = {r: average_accuracy(e["accuracy_matrix"][:learnt]) for r, e in results["roles"].items()}
    return [
        results["roles"][other].get("label", other)
        for other, average in averages.items()
        if other not in ("student", "teacher") and average >= averages[role]
    ]


def _role_table(results: Results, learnt: int) -> str:
    rows = [["model", *_METRICS.values()]]
    for role, entry in results["roles"].items():
        metrics = continual_metrics(entry["accuracy_matrix"][:learnt])
        label = entry.get("label", role).replace("|", "\\|")
        rows.append([label, *(report.number(metrics[name]) for name in _METRICS)])
    return _table(rows, "l" + "r" * len(_METRICS))


def _table(rows: Sequence[Sequence[str]], align: str) -> str:
    rule = ["---:" if side == "r" else "---" for side in align]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def _model_facts(recipe: Mapping[str, Any], role: str, other_id: str | None) -> list[str]:
    section, other = recipe[role], "teacher" if role == "student" else "student"
    facts = [f"Backbone: {_backbone(section)}"]
    if recipe[other] is not None:
        link = f"[{other_id}](https://huggingface.co/{other_id}), " if other_id else ""
        facts.append(f"Its {other}: {link}on the backbone {_backbone(recipe[other])}")
    if role == "student" and recipe["distill"]:
        terms = [
            f"`{t['type']}` ({', '.join(f'{k} {v}' for k, v in t.items() if k != 'type')})" for t in recipe["distill"]
        ]
        facts.append(f"Distillation: {' + '.join(terms)}, cross-entropy with weight {recipe['ce_weight']}")
    licence = _stated(recipe, "license")
    return [*facts, f"Licence: {licence or 'not stated by the author'}"]


def _backbone(section: Mapping[str, Any]) -> str:
    found = _backbone_id(section)
    name = f"`{section['backbone']}`" if found is None else f"[{found}](https://huggingface.co/{found})"
    return name + (f" at `{section['revision']}`" if section["revision"] else "")


def _data_facts(results: Results) -> list[str]:
    recipe, data = results["recipe"], _dataset(results["recipe"]["data"])
    page = _stated(recipe, "data_card") or data["id"]
    if page is None:
        facts = [f"Data: `{data['name']}`, a folder of the author's; no data card was named"]
    elif "://" in page:
        facts = [f"Data: {data['name']}, [data card]({page})"]
    elif _HUB_ID.fullmatch(page) and page.count("/") == 1:
        facts = [f"Data: [{page}](https://huggingface.co/datasets/{page})"]
    else:
        facts = [f"Data: {data['name']}; data card: `{page}`"]
    counts = [len(names) for names in results["class_names"]]
    order = recipe["data"]["class_order_seed"]
    facts.append(
        f"Stream: {sum(counts)} classes in {len(counts)} tasks, "
        + ("classes in their natural order" if order is None else f"class order of seed {order}")
    )
    return [*facts, f"Licence of the data: {_stated(recipe, 'data_license') or 'not stated by the author'}"]


def _origin(results: Results, role: str) -> str | None:
    """Where the first tasks are from, if they were learnt elsewhere."""
    if "origin" not in results:
        return None
    count, source = results["origin"]["tasks"], results["origin"]["roles"][role]
    link = f"[{source['repository']}](https://huggingface.co/{source['repository']}/tree/{source['commit']})"
    return (
        f"Tasks 1 to {count} were learnt in an earlier run: {link}, whose card tells of their data. What is shown "
        "here of them as just learnt was measured there; what was not measured again later is shown as -."
    )


def _cost_facts(entry: Mapping[str, Any]) -> list[str]:
    facts, cost = [], entry.get("cost")
    if cost is None:
        facts.append("In use: measured at the end of the run")
    else:
        facts.append(f"Parameters: {cost['parameters']:,}, with backbones; weights stored: {_bytes(cost['bytes'])}")
        facts.append(f"Latency: {cost['latency_ms']:.1f} ms for one image (median, {cost['device']})")
    seconds, memory = sum(entry["train_seconds"]), max(entry["peak_memory_bytes"])
    return [*facts, f"Training: {seconds:,.0f} s in all; peak memory of the process {_bytes(memory)}"]


def _bytes(count: int) -> str:
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or n == "kB")
    return f"{count / unit:.1f} {name}"


def _lines(facts: Sequence[str]) -> str:
    return "\n".join(f"- {fact}" for fact in facts)


def _recipe(recipe: Mapping[str, Any]) -> str:
    content = {key: value for key, value in recipe.items() if key != "card"}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110).strip()


def _citations(recipe: Mapping[str, Any], role: str) -> str:
    """The BibTeX entries of papers.bib whose keywords name a method that this model uses."""
    section = recipe[role]
    parts = {section[part]["type"] for part in ("prompt", "head")}
    used = {"cdl", section["query"], *parts} if section["model"] == "cdl" else set[str]()
    if role == "student":
        used |= {term["type"] for term in recipe["distill"]}
        used |= {"lskd" for term in recipe["distill"] if term.get("standardise")}
    entries = re.split(r"\n(?=@)", (_HERE / "papers.bib").read_text(encoding="utf-8").strip())
    keyed = [(set(re.findall(r"\w+", re.findall(r"keywords = {(.*?)}", e)[0])), e) for e in entries]
    chosen = [re.sub(r"\n *keywords = .*", "", entry) for keywords, entry in keyed if keywords & used]
    return "\n".join(chosen)
