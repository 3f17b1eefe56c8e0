"""Model cards: the complete committed example, its metadata read back, and the cards of other runs."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, interrupt_when, make_backbone, make_recipe, train, write_recipe
from hub_server import HubServer, environment
from huggingface_hub import ModelCard
from transformers import ViTForImageClassification

from hf_cdl import CDLForImageClassification
from hf_cdl.distill import TERMS
from hf_cdl.hub.card import card_files, eval_results, model_card
from hf_cdl.hub.content import results_after
from hf_cdl.prompts import PROMPTS
from hf_cdl.recipe import build_recipe
from hf_cdl.runs.cost import cost_in_use
from hf_cdl.runs.verdict import verdict

EXAMPLES = ROOT / "model_cards"
CARDS = [(name, role) for name in ("quickstart", "dinov2_taught") for role in ("student", "teacher")]
CARDS += [("quickstart_ridge", "student")]


def example(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / name / "results.json").read_text())


@pytest.fixture
def results() -> dict[str, Any]:
    return example("quickstart")


def on_the_hub(results: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The results as if their recipe named data and backbones on the Hub, with other fields changed."""
    recipe: dict[str, Any] = {
        **results["recipe"],
        "data": {"path": "cifar100"},
        "teacher": {"backbone": "org/large", "prompt": {"type": "l2p"}},
        "student": {"backbone": "org/small", "revision": "abc", "prompt": {"type": "l2p"}},
        "card": {},
        **fields,
    }
    return {**results, "recipe": build_recipe(recipe).as_dict()}


def cut(results: dict[str, Any], count: int) -> dict[str, Any]:
    """The results of the same run after `count` tasks."""
    early = copy.deepcopy({**results, "finished": False})
    for entry in early["roles"].values():
        entry.pop("cost", None)
        entry.update({key: value[:count] for key, value in entry.items() if isinstance(value, list)})
    return early


_VALIDATE = """import sys
from huggingface_hub import ModelCard
card = ModelCard.load(sys.argv[1])
card.validate()
for change in ({"datasets": 7}, {"license": 3}, {"base_model_relation": "child"}):
    broken = ModelCard(str(card))
    for name, value in change.items():
        setattr(broken.data, name, value)
    broken.content = f"---\\n{broken.data.to_yaml()}\\n---\\n{broken.text}"
    try:
        broken.validate()
    except ValueError as error:
        print(*change, "must be" in str(error))
"""


def test_the_hub_takes_the_examples(tmp_path: Path) -> None:
    """By Hugging Face's own validation, which calls the Hub; broken metadata are refused."""
    with HubServer(tmp_path) as hub:
        env = {**os.environ, **environment(hub, tmp_path / "home")}
        for name, role in CARDS:
            command = [sys.executable, "-c", _VALIDATE, str(EXAMPLES / name / role / "README.md")]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said = ["datasets True", "license True", "base_model_relation True"]
            assert done.stdout.splitlines() == said, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "role"), CARDS)
def test_the_examples_are_what_is_rendered_and_their_metadata_read_back(name: str, role: str) -> None:
    results, file = example(name), EXAMPLES / name / role / "README.md"
    ids = {"student": f"your-name/{name.replace('_', '-')}", "teacher": f"your-name/{name.replace('_', '-')}-teacher"}
    other = ids["teacher" if role == "student" else "student"]
    text = file.read_text()
    assert model_card(results, role, ids[role], other) == text, "see model_cards/README.md"
    data: Any = ModelCard.load(file).data
    assert data.eval_results == eval_results(results, role)
    assert data.model_name == ids[role].split("/")[1]
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    row = results["roles"][role]["accuracy_matrix"][-1]
    assert [*values.values()][:5] == row
    assert values["average accuracy after task 5 of 5 (%)"] == pytest.approx(sum(row) / 5)
    found = data.to_dict()
    assert (found["license"], found["pipeline_tag"]) == ("apache-2.0", "image-classification")
    assert "base_model" not in found and "datasets" not in found, "folders are nothing on the Hub"
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]) == {
        key: value for key, value in results["recipe"].items() if key != "card"
    }


def test_the_truth_about_baselines_is_in_words(results: dict[str, Any]) -> None:
    text, said = model_card(results, "student"), verdict(results)
    assert "at least as accurate as this model: class means, no training; linear head" in text
    assert said is not None and f"\n\n{said.said}\n\n" in text and said.said.startswith("Use the ridge head: ")
    assert said.said not in model_card(cut(results, 3), "student")
    assert results_after(results, 5)["verdict"] == said.said and "verdict" not in results_after(results, 3)
    for role in ("nearest_class_mean", "linear_head", "ridge_head"):
        del results["roles"][role]
    text = model_card(results, "student")
    assert "at least as accurate" not in text and "points ahead" not in text


def test_models_and_data_of_the_hub_are_linked(results: dict[str, Any]) -> None:
    results = on_the_hub(results, card={"pretraining": "It saw everything.", "data_license": "cc-by-4.0"})
    card = ModelCard(model_card(results, "student", "me/s", "me/t"))
    found = card.data.to_dict()
    assert (found["base_model"], found["base_model_relation"]) == ("org/small", "adapter")
    assert found["datasets"] == "uoft-cs/cifar100"
    dataset = found["model-index"][0]["results"][0]["dataset"]
    assert (dataset["type"], dataset["config"], dataset["split"]) == ("uoft-cs/cifar100", "cifar100", "test")
    assert "license" not in found and "Licence: not stated by the author" in card.text
    for said in (
        "[org/small](https://huggingface.co/org/small) at `abc`",
        "[me/t](https://huggingface.co/me/t), on the backbone [org/large](https://huggingface.co/org/large)",
        "[uoft-cs/cifar100](https://huggingface.co/datasets/uoft-cs/cifar100)",
        "It saw everything.",
        "Licence of the data: cc-by-4.0",
        'pipeline("image-classification", model="me/s")',
    ):
        assert said in card.text
    cited = re.findall(r"^@\w+{(\w+),", card.text, re.MULTILINE)
    assert cited == ["zhang2024cdl", "wang2022l2p", "hinton2015kd", "touvron2021deit"]
    teacher = model_card(results, "teacher", "me/t", "me/s")
    assert re.findall(r"^@\w+{(\w+),", teacher, re.MULTILINE) == ["zhang2024cdl", "wang2022l2p"]
    assert "Its student: [me/s]" in teacher


def test_how_to_use_it_depends_on_what_the_repository_holds(results: dict[str, Any]) -> None:
    plain = model_card(on_the_hub(results), "student", "me/s")
    assert "import hf_cdl" in plain and "heads alone" not in plain
    small = model_card(on_the_hub(results, save_backbone=False, save_code=True), "student", "me/s")
    assert 'model="me/s", trust_remote_code=True)' in small and "import hf_cdl" not in small
    assert "what was learnt alone" in small
    fields: dict[str, Any] = {"teacher": None, "distill": [], "ce_weight": 1.0, "baselines": []}
    student = {"backbone": "org/resnet", "model": "classifier"}
    classifier = ModelCard(model_card(on_the_hub(results, student=student, **fields), "student", "me/s"))
    assert "import hf_cdl" not in classifier.text and "begin_task" not in classifier.text
    assert classifier.data.to_dict()["base_model_relation"] == "finetune"
    random = on_the_hub(results, student={**student, "pretrained": False}, **fields)
    assert "base_model" not in ModelCard(model_card(random, "student")).data.to_dict()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"prompt": {"type": "l2p"}},
            "Its pre-trained backbone is frozen; prompts (`l2p`) and a head learnt. A",
        ),
        (
            {"train_backbone": True},
            "Its pre-trained backbone and a head learnt. A teacher learnt every task first",
        ),
        ({"head": {"type": "cosine"}}, "Its pre-trained backbone is frozen; a `cosine` head learnt."),
        (
            {"head": {"type": "ridge"}, "first_session": {"type": "linear"}, "train_backbone": True},
            "Its pre-trained backbone learnt on the first task alone, a `ridge` head on all tasks. A teacher learnt "
            "every task first and helped it on the first (`kd`).",
        ),
    ],
)
def test_what_learnt_and_when(results: dict[str, Any], fields: dict[str, Any], said: str) -> None:
    student = {"backbone": "org/small", **fields}
    text = model_card(on_the_hub(results, student=student, distill=[{"type": "kd"}]), "student")
    assert said in text and ("drop_sums()" in text) == ("first_session" in fields)


def test_the_card_of_a_run_that_goes_on(results: dict[str, Any]) -> None:
    text = model_card(cut(results, 3), "student", "me/s")
    assert "The run is still in progress: 3 of 5 tasks are learnt" in text
    assert "learnt 30 classes in 3 tasks" in text and '"task-03"' in text and "measured at the end" in text
    data: Any = ModelCard(text).data
    assert len(data.eval_results) == 3 + 3
    assert "learnt 10 classes in one task" in model_card(cut(results, 1), "student")
    for role in ("student", "linear_head"):
        with pytest.raises(ValueError, match="cards are for a student or teacher that has learnt a task"):
            model_card(cut(results, 0), role)


def test_the_picture_lies_beside_the_card(results: dict[str, Any]) -> None:
    files = card_files(cut(results, 2), "teacher")
    assert files["accuracy_matrix.png"].startswith(b"\x89PNG") and b"(accuracy_matrix.png)" in files["README.md"]
    assert "accuracy_matrix.png" not in model_card(results, "teacher", picture=False)


def test_every_method_has_a_citation_and_every_citation_a_row_in_papers() -> None:
    bib = (ROOT / "hf_cdl" / "hub" / "card" / "papers.bib").read_text()
    keywords = set(re.findall(r"\w+", " ".join(re.findall(r"keywords = {(.*?)}", bib))))
    assert keywords >= {*PROMPTS, *TERMS, "cdl", "one_pass", "lskd", "ridge", "lora"}
    papers = (ROOT / "docs" / "papers.md").read_text()
    eprints = re.findall(r"eprint = {(.*?)}", bib)
    assert len(eprints) == bib.count("@") and all(f"arxiv.org/abs/{eprint}" in papers for eprint in eprints)


def test_the_cost_of_a_model_is_measured(tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(make_backbone(tmp_path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = cost_in_use(model, (16, 16))
    assert cost["parameters"] == sum(value.numel() for value in before.values())
    assert 0 < cost["latency_ms"] < 10_000 and cost["device"].startswith("cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_fitted_head_computes_with_counts_and_its_sums_do_not(tmp_path: Path) -> None:
    head = {"type": "ridge", "features": 7, "standardise": "first_task"}
    model = CDLForImageClassification.from_backbone(str(make_backbone(tmp_path)), head=head)
    model.begin_task(["a", "b", "c"])
    width = model.config.backbone_config.hidden_size
    used = 7 * width + 3 * 7 + 2 * width  # random map, weight rows, means and deviations
    whole = cost_in_use(model, (16, 16))["parameters"]
    assert whole == sum(parameter.numel() for parameter in model.backbone.parameters()) + used
    model.drop_sums()
    assert cost_in_use(model, (16, 16))["parameters"] == whole


@pytest.mark.slow
def test_a_run_s_cards_at_any_stage_by_the_command(tmp_path: Path) -> None:
    file, out = write_recipe(tmp_path / "recipe.yaml", make_recipe(tmp_path)), tmp_path / "out"
    command = [sys.executable, "-m", "hf_cdl", "card", str(out)]
    arguments: tuple[Any, ...] = (file, "--output_dir", out)
    interrupt_when((out / "student" / "task-02").exists, *arguments)
    subprocess.run(command, check=True)
    assert "still in progress: 1 of 3" in (out / "student" / "README.md").read_text()
    code, output = train(*arguments, "--card.license", "mit")  # a card's texts may change on the way
    assert code == 0, output
    subprocess.run([*command, "--repo_id", "me/tiny"], check=True)
    for role in ("student", "teacher"):
        card = ModelCard.load(out / role / "README.md")
        assert card.data.to_dict()["license"] == "mit" and "ms for one image" in card.text
        assert (out / role / "accuracy_matrix.png").is_file()
        stored = json.loads((out / "results.json").read_text())["roles"][role]["cost"]
        assert stored["bytes"] == (out / role / "model.safetensors").stat().st_size


def test_the_words_on_licences_are_in_the_template() -> None:
    """Where one looks for them first; a card without the facts says so in the same place."""
    template = (ROOT / "model_cards" / "template.md.jinja").read_text()
    for line in ("- Licence: {{ licence or", "- Licence of the data: {{ data_licence or"):
        assert f'{line} "not stated by the author" }}}}' in template
