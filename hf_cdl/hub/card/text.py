"""The text of a card, section by section, for the template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_cdl.counted import counted
from hf_cdl.escape import code, longest_run, markdown, needs_escaping
from hf_cdl.hub.card.metadata import METRICS, Results, backbone_id, dataset, stated
from hf_cdl.places import HUB_ID, by_name
from hf_cdl.runs import report
from hf_cdl.runs.ledger import CHANGED, revision_name
from hf_cdl.runs.metrics import average_accuracy, continual_metrics
from hf_cdl.runs.verdict import verdict

_ADDRESS = re.compile(r"https?://[^\s<>()\[\]`\"'\\]+")
_SHOWN = 20
"""Number of changes that a card lists."""
UNKNOWN_OVERLAP = (
    "Not stated. If the backbones' pre-training showed these classes or images, with or without labels, the numbers "
    "above say less about learning new classes than they seem to."
)


def summary(results: Results, role: str) -> str:
    """What the model is and how it learnt, in a few sentences."""
    recipe, section = results["recipe"], results["recipe"][role]
    learnt = results["class_names"][: len(results["roles"][role]["accuracy_matrix"])]
    many = f"{counted(len(learnt), 'task')}, one after another and without images of earlier ones"
    classes, tasks = counted(sum(map(len, learnt)), "class"), many if learnt[1:] else "one task"
    text = f"An image classifier that learnt {classes} in {tasks}."
    if section["model"] == "classifier":
        text += " All its weights were trained." if section["train"] is not None else " It is used as it was found."
    else:
        text += f" {_learnt_parts(section)}"
    if changed := _changes(results, role):
        count = sum(map(len, changed[-1]["class_names"]))
        text += f" It was changed since, and knows {counted(count, 'class')} now."
    terms = ", ".join(f"`{term['type']}`" for term in recipe["distill"])
    if recipe["teacher"] is None:
        return text
    if role == "teacher":
        return f"{text} It is the teacher of a student, which is the model that is meant for use."
    when = " on the first" if section.get("first_session") is not None and not _has_later_sessions(section) else ""
    return f"{text} A teacher learnt every task first and helped it{when}{f' ({terms})' if terms else ''}."


def _learnt_parts(section: Mapping[str, Any]) -> str:
    """A sentence on which parts of the model learnt, and on which tasks."""
    prompt, head = section["prompt"]["type"], section["head"]["type"]
    head = "a head" if head == "linear" else f"a `{head}` head"
    parts = [] if prompt == "none" else [f"prompts (`{prompt}`)"]
    parts += ["low-rank adapters (LoRA)"] if section.get("lora") is not None else []  # missing in older results
    if section["train_backbone"]:
        parts.insert(0, "its pre-trained backbone")
    if section.get("first_session") is not None:
        on = "in sessions on the tasks" if _has_later_sessions(section) else "on the first task alone"
        text = f"{' and '.join(parts)} learnt {on}, {head} on all tasks."
    else:
        text = f"{' and '.join([*parts, head])} learnt."
    return text[0].upper() + text[1:] if section["train_backbone"] else f"Its pre-trained backbone is frozen; {text}"


def _has_later_sessions(section: Mapping[str, Any]) -> bool:
    """Whether a model learnt in sessions after the first; the field is missing in older results."""
    return section.get("later_sessions") is not None


def usage(recipe: Mapping[str, Any], role: str, repo_id: str | None) -> str:
    """Example code that uses the model."""
    options = ", trust_remote_code=True" if recipe["plugins"] or _code(recipe, role) else ""
    lines = [
        "from transformers import pipeline",
        "",
        f'print(pipeline("image-classification", model="{repo_id or "FOLDER"}"{options})("IMAGE.png"))',
    ]
    own = recipe[role]["model"] == "cdl" and not options
    return "\n".join(["import hf_cdl  # tells transformers about the model type", *lines] if own else lines)


def usage_notes(results: Results, role: str, repo_id: str | None) -> str:
    """What a user must know in addition to the example code."""
    recipe, learnt = results["recipe"], len(results["roles"][role]["accuracy_matrix"])
    changed = _changes(results, role)
    classes = sum(map(len, changed[-1]["class_names"] if changed else results["class_names"][:learnt]))
    learnt += len(changed)
    known = counted(classes, "class")
    notes = [f"Every image is answered with one of the {known} below, also one that shows none of them."]
    if told := unknown_images(results, role):
        notes[0] = f"{notes[0][:-1]}, unless `pipeline(..., reject=True)` asks for `unknown`.\n{told}"
    if repo_id is not None:
        after = "task and each change" if changed else "task"
        notes.append(f'The state after each {after} is a revision, `revision="task-01"` to `"task-{learnt:02d}"`.')
    if recipe[role]["model"] == "cdl":
        if not recipe.get("save_backbone", True):
            need = "needs" if _is_local(recipe[role]["backbone"]) else "fetches"
            notes.append(f"The files hold what was learnt alone; loading {need} the frozen backbone named below.")
        if _code(recipe, role):
            notes.append("Its code lies beside its weights: read it before you trust it, or install hf_cdl instead.")
        notes.append("`CDLForImageClassification.from_pretrained(...).begin_task(class_names)` adds a task to learn.")
        notes += [note for entry in _papers(recipe, role) for note in re.findall(r"annote = {(.*)}", entry)]
    return "\n".join(notes)


def unknown_images(results: Results, role: str) -> str | None:
    """How well the model recognises images of none of its classes; None if it does not try."""
    listed = [(number, known) for number, known in enumerate(results["roles"][role].get("known", []), 1) if known]
    if not listed:
        return None
    number, known = next((pair for pair in reversed(listed) if "unlearnt_passing" in pair[1]), listed[-1])
    said = report.unknown_images(known)
    figures = [f"AUROC {known['unlearnt_auroc']:.0f} %"] if "unlearnt_auroc" in known else []
    return f"After task {number}: {said}{f' ({figures[0]})' if figures else ''}."


def confidence(results: Results, role: str, learnt: int) -> str | None:
    """How far the model's confidence can be trusted; None if that was not measured."""
    entry = results["roles"][role]
    values = [(entry.get(name) or [None] * learnt)[learnt - 1] for name in ("confidence", "calibration_error")]
    if None in values:
        return None
    return (
        f"Its confidence (the largest softmax probability) is {values[0]:.1f} % on average, with an expected\n"
        f"calibration error of {values[1]:.1f} points (15 bins)."
    )


def _code(recipe: Mapping[str, Any], role: str) -> bool:
    return recipe[role]["model"] == "cdl" and recipe.get("save_code", False)


def task_table(results: Results, role: str) -> str:
    """A table with a row per task: classes, test images, accuracy when just learnt and now."""
    entry = results["roles"][role]
    matrix, counts = entry["accuracy_matrix"], entry["counts"]
    rows = [["task", "classes", "images", "just learnt", f"after task {len(matrix)}"]]
    for i, now in enumerate(matrix[-1]):
        names = ", ".join(map(markdown, results["class_names"][i]))
        rows.append([str(i + 1), names, str(counts[i]), report.number(matrix[i][i]), report.number(now)])
    return _table(rows, "rlrrr")


def _changes(results: Results, role: str) -> list[Any]:
    return results.get("changes", []) if role == CHANGED else []


def changes(results: Results, role: str) -> str | None:
    """A table of what was changed after the tasks, newest last, and the classes that are left; None if nothing was."""
    if not (made := _changes(results, role)):
        return None
    rows = [["revision", "when", "what"]]
    for change in made[-_SHOWN:]:
        when = markdown(change["time"][:16].replace("T", " "))
        rows.append([f"`{revision_name(change['revision'])}`", when, markdown(change["said"])])
    names = [markdown(name) for task in made[-1]["class_names"] for name in task]
    earlier = f"The last {_SHOWN} of {len(made)}; all are in `results.json`.\n\n" if len(made) > _SHOWN else ""
    listed = ", ".join(names)
    return f"{earlier}{_table(rows, 'lll')}\n\nIts {counted(len(names), 'class')} now: {listed}."


def better(results: Results, role: str) -> list[str]:
    """The baselines that are at least as accurate as the model."""
    learnt = len(results["roles"][role]["accuracy_matrix"])
    averages = {r: average_accuracy(e["accuracy_matrix"][:learnt]) for r, e in results["roles"].items()}
    return [
        markdown(results["roles"][other].get("label", other))
        for other, average in averages.items()
        if other not in ("student", "teacher") and average >= averages[role]
    ]


def verdict_of(results: Results) -> str | None:
    """Which model of a finished run to use, by its numbers."""
    found = verdict(results)
    return found and markdown(found.said)


def role_table(results: Results, learnt: int) -> str:
    """A table with a row per model of the run, after `learnt` tasks."""
    rows = [["model", *METRICS.values()]]
    for role, entry in results["roles"].items():
        metrics = continual_metrics(entry["accuracy_matrix"][:learnt])
        rows.append([markdown(entry.get("label", role)), *(report.number(metrics[name]) for name in METRICS)])
    return _table(rows, "l" + "r" * len(METRICS))


def _table(rows: Sequence[Sequence[str]], align: str) -> str:
    rule = ["---:" if side == "r" else "---" for side in align]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def model_facts(recipe: Mapping[str, Any], role: str, other_id: str | None) -> list[str]:
    """Backbone, the other model, distillation."""
    section, other = recipe[role], "teacher" if role == "student" else "student"
    facts = [f"Backbone: {_backbone(section)}"]
    if recipe[other] is not None:
        link = f"[{other_id}](https://huggingface.co/{other_id}), " if other_id else ""
        facts.append(f"Its {other}: {link}on the backbone {_backbone(recipe[other])}")
    if role == "student" and recipe["distill"]:
        terms = []
        for term in recipe["distill"]:
            settings = ", ".join(f"{name} {value}" for name, value in term.items() if name != "type")
            terms.append(f"`{term['type']}`" + (f" ({settings})" if settings else ""))
        facts.append(f"Distillation: {' + '.join(terms)}, cross-entropy with weight {recipe['ce_weight']}")
    return facts


def _backbone(section: Mapping[str, Any]) -> str:
    found, name = backbone_id(section), section["backbone"]
    local = _is_local(name)
    name = f"[{found}](https://huggingface.co/{found})" if found else code(by_name(name) if local else name)
    name += " (a folder of the author's)" if local else ""
    return name + (f" at {code(section['revision'])}" if section["revision"] else "")


def _is_local(backbone: str) -> bool:
    return not HUB_ID.fullmatch(backbone) or Path(backbone).exists()


def data_facts(results: Results) -> list[str]:
    """The data, with page, and the stream."""
    recipe, data = results["recipe"], dataset(results["recipe"]["data"])
    page = stated(recipe, "data_card") or data["id"]
    if page is None:
        facts = [f"Data: {code(data['name'])}, a folder of the author's; no data card was named"]
    elif _ADDRESS.fullmatch(page):
        facts = [f"Data: {markdown(data['name'])}, [data card]({page})"]
    elif HUB_ID.fullmatch(page) and page.count("/") == 1:
        facts = [f"Data: [{page}](https://huggingface.co/datasets/{page})"]
    else:
        facts = [f"Data: {markdown(data['name'])}; data card: {code(page)}"]
    counts = [len(names) for names in results["class_names"]]
    order = recipe["data"]["class_order_seed"]
    facts.append(
        f"Stream: {counted(sum(counts), 'class')} in {counted(len(counts), 'task')}, "
        + ("classes in their natural order" if order is None else f"class order of seed {order}")
    )
    if (beside := results.get("unlabelled")) is not None:
        name, terms = recipe["data"]["unlabelled"], ", ".join(f"`{markdown(term)}`" for term in beside["terms"])
        alone = recipe["student"]["first_session"] and not _has_later_sessions(recipe["student"])
        where = "in the first session" if alone else "in every session"
        learnt = [f"from which the student learnt {where} by its teacher's answers ({terms})"] if terms else []
        facts.append(
            f"Unlabelled images: {beside['images']} of {code(by_name(name))}, "
            f"{'; '.join([*learnt, *read_in_sessions(recipe)])}; labels of theirs, if there are any, were not read"
        )
    return facts


def read_in_sessions(recipe: Mapping[str, Any]) -> list[str]:
    """Role -> how its later sessions use unlabelled images, in words; roles that do not use them are left out."""
    said = []
    for role in ("teacher", "student"):
        later = (recipe.get(role) or {}).get("later_sessions") or {}
        if later.get("keep_on", "task") != "task":
            said.append(f"the {role}'s features of them are held in later sessions")
        if later.get("anchors", "task") != "task":
            said.append(f"by them the {role} sees how its features moved")
    return said


def origin(results: Results, role: str) -> str | None:
    """Where the first tasks were learnt, if elsewhere."""
    if "origin" not in results:
        return None
    count, source = results["origin"]["tasks"], results["origin"]["roles"][role]
    if (name := source.get("repository")) is None:
        link = f"{code(source['folder'])}, a folder of the author's"
    else:
        link = f"[{markdown(name)}](https://huggingface.co/{name}/tree/{source['commit']})"
    return (
        f"Tasks 1 to {count} were learnt in an earlier run: {link}, whose card tells of their data. What is shown "
        "here of them as just learnt was measured there; what was not measured again later is shown as -."
    )


def cost_facts(entry: Mapping[str, Any]) -> list[str]:
    """Size and inference latency, training time and memory."""
    facts, cost = [], entry.get("cost")
    if cost is None:
        facts.append("In use: measured at the end of the run")
    else:
        facts.append(f"Parameters: {cost['parameters']:,}, with backbones; weights stored: {_bytes(cost['bytes'])}")
        facts.append(f"Latency: {cost['latency_ms']:.1f} ms for one image (median, {cost['device']})")
    seconds, memory = sum(entry["train_seconds"]), max(entry["peak_memory_bytes"])
    return [*facts, f"Training: {seconds:,.0f} s in all; peak memory of the process {_bytes(memory)}"]


def exports(results: Results, role: str) -> str | None:
    """A table of the files for devices that were made of the model as it is now; None if there are none."""
    newest = revision_name(len(results["roles"][role]["accuracy_matrix"]) + len(_changes(results, role)))
    made = [export for export in results.get("exports", []) if role == CHANGED and export["revision"] == newest]
    if not made:
        return None
    rows = [["file", "size", "pixels", "accuracy", "before", "same answers", "one image", "torch"]]
    for export in made:
        name = f"{code(export['file'])}, {markdown(export['precision'])}"
        accuracies = [report.number(export[key]) for key in ("accuracy", "accuracy_before", "same_answers")]
        times = [f"{export[key]:.1f} ms" for key in ("latency_ms", "latency_before_ms")]
        sides = f"{export['height']} x {export['width']}"
        rows.append([name, _bytes(export["bytes"]), sides, *accuracies, *times])
    on = {f"{export['images']:,} {markdown(export['images_of'])}" for export in made}
    machines = {markdown(export["machine"]) for export in made}
    text = f"Compared on {', '.join(sorted(on))}; times on {', '.join(sorted(machines))}."
    return f"{_table(rows, 'lrrrrrrr')}\n\n{text}"


def _bytes(count: int) -> str:
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or n == "kB")
    return f"{count / unit:.1f} {name}"


def lines(facts: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {fact}" for fact in facts)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe as a fenced block of YAML, without its `card` section."""
    content = {key: value for key, value in recipe.items() if key != "card"}
    options: dict[str, Any] = {"sort_keys": False, "default_flow_style": None, "width": 110}
    text = yaml.safe_dump(content, allow_unicode=True, **options)
    if needs_escaping(text):
        text = yaml.safe_dump(content, allow_unicode=False, **options)
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}yaml\n{text.strip()}\n{fence}"


def citations(recipe: Mapping[str, Any], role: str) -> str:
    """BibTeX entries of the methods that this model uses."""
    return "\n".join(re.sub(r"\n *(keywords|annote) = .*", "", entry) for entry in _papers(recipe, role))


def _papers(recipe: Mapping[str, Any], role: str) -> list[str]:
    """Entries of papers.bib whose keywords name a method this model uses; `annote` is what its users must know."""
    section = recipe[role]
    parts = {section[part]["type"] for part in ("prompt", "head")}
    used = {"cdl", section["query"], *parts} if section["model"] == "cdl" else set[str]()
    used |= {"lora"} if section.get("lora") is not None else set()
    if role == "student":
        used |= {term["type"] for term in recipe["distill"]}
        used |= {"lskd" for term in recipe["distill"] if term.get("standardise")}
    entries = re.split(r"\n(?=@)", Path(__file__).with_name("papers.bib").read_text(encoding="utf-8").strip())
    keyed = [(set(re.findall(r"\w+", re.findall(r"keywords = {(.*?)}", e)[0])), e) for e in entries]
    return [entry for keywords, entry in keyed if keywords & used]
