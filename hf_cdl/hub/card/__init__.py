"""Model cards for a run's student or teacher, written from its results with huggingface_hub's ModelCard.

Everything comes from `results`, the content of a run's results.json, also of an unfinished run. What only the author
knows (licences, the data's page, what the backbones saw in pre-training) comes from the recipe's `card` section;
anything missing there is shown as not stated.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard

from hf_cdl.escape import code, markdown, visible_lines
from hf_cdl.hub.card import text
from hf_cdl.hub.card.metadata import Results, eval_results, metadata, shared, stated
from hf_cdl.runs import pictures

__all__ = ["card_files", "eval_results", "model_card", "shared"]


def model_card(
    results: Results, role: str, repo_id: str | None = None, other_id: str | None = None, picture: bool = True
) -> str:
    """Write the card of a run's `student` or `teacher`, as Markdown with metadata.

    `repo_id`: its repository; `other_id`: the repository of the run's other model; `picture`: whether the card shows
    accuracy_matrix.png from the same folder. Raises ValueError for a role without results.
    """
    if role not in ("student", "teacher") or not results["roles"].get(role, {}).get("accuracy_matrix"):
        raise ValueError(f"There is no card for '{role}': cards are for a student or teacher that has learnt a task.")
    results = shared(results)
    recipe, matrix = results["recipe"], results["roles"][role]["accuracy_matrix"]
    card = ModelCard.from_template(
        metadata(results, role, repo_id),
        template_path=str(Path(__file__).with_name("template.md.jinja")),
        title=markdown(f"{results['name']}: {role}" if repo_id is None else repo_id),
        summary=text.summary(results, role),
        finished=len(matrix) == len(results["class_names"]),
        learnt=len(matrix),
        planned=len(results["class_names"]),
        usage=text.usage(recipe, role, repo_id),
        usage_notes=text.usage_notes(results, role, repo_id),
        changes=text.changes(results, role),
        split=recipe["data"]["eval_split"],
        seed=results["seed"],
        task_table=text.task_table(results, role),
        role_table=text.role_table(results, len(matrix)),
        confidence=text.confidence(results, role, len(matrix)),
        better=text.better(results, role),
        verdict=text.verdict_of(results),
        picture=picture,
        model_facts=text.lines(text.model_facts(recipe, role, other_id)),
        data_facts=text.lines(text.data_facts(results)),
        licence=markdown(stated(recipe, "license") or ""),
        data_licence=markdown(stated(recipe, "data_license") or ""),
        origin=text.origin(results, role),
        overlap=visible_lines(stated(recipe, "pretraining") or text.UNKNOWN_OVERLAP),
        exports=text.exports(results, role),
        cost_facts=text.lines(text.cost_facts(results["roles"][role])),
        versions=", ".join(markdown(f"{name} {version}") for name, version in results.get("versions", {}).items()),
        stream=code(results.get("stream")),
        recipe=text.recipe_text(recipe),
        citations=text.citations(recipe, role),
    )
    return f"{str(card).strip()}\n"


def card_files(
    results: Results, role: str, repo_id: str | None = None, other_id: str | None = None
) -> dict[str, bytes]:
    """Make a card's files, by name: README.md and, if matplotlib is installed, accuracy_matrix.png."""
    picture = pictures.plotting_available()
    files = {"README.md": model_card(results, role, repo_id, other_id, picture).encode()}
    if picture:
        with TemporaryDirectory() as folder:
            pictures.save_plots(results, folder)
            files["accuracy_matrix.png"] = Path(folder, "accuracy_matrix.png").read_bytes()
    return files
