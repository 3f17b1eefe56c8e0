"""A comparison: what its spec allows, its tables as text, its report and figures as real files."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from helpers import ROOT, make_recipe, thinned, write_recipe
from PIL import Image

from hf_cdl.compare.page import save_report
from hf_cdl.compare.records import Measured, class_values, values
from hf_cdl.compare.spec import Comparison, read_comparison
from hf_cdl.compare.statistics import contrasts_of
from hf_cdl.compare.summary import CDL, contrasts_table, metrics_table
from hf_cdl.recipe import RecipeError
from hf_cdl.runs.metrics import continual_metrics

for needed in ("matplotlib", "scipy", "statsmodels"):
    pytest.importorskip(needed)

RECIPES = ROOT / "recipes"
ALONE = {"teacher": None, "distill": [], "ce_weight": 1.0, "baselines": []}


def small(**fields: Any) -> dict[str, Any]:
    """A spec of the quickstart's recipe; nothing of it is run here."""
    spec: dict[str, Any] = {
        "recipe": "quickstart.yaml",
        "seeds": [0, 1, 2],
        "variants": {
            "kdp": {"rows": {"teacher": "teacher", "student": "KDP"}},
            "kd": {"teacher_from": "kdp", "set": {"distill": [{"type": "kd"}]}, "rows": {"student": "KD | $x_1$"}},
            "alone": {"set": ALONE, "rows": {"student": "<alone>"}},
        },
        "contrasts": [["KDP", "<alone>"], ["KD | $x_1$", "<alone>"]],
    }
    return {**spec, **fields}


def read(folder: Path, spec: dict[str, Any]) -> Comparison:
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return read_comparison(folder / "spec.yaml", folder / "runs")


@pytest.mark.parametrize("file", thinned(sorted(RECIPES.glob("comparisons/*.yaml")), 4), ids=lambda file: file.stem)
def test_the_comparisons_of_the_repository_can_be_run(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    comparison = read_comparison(file)
    assert len(comparison.runs) == len(comparison.spec.seeds) * len(comparison.spec.variants)
    assert f"recipes/comparisons/{file.stem.split('_')[0]}" in file.read_text()


def test_the_runs_are_a_paired_design(tmp_path: Path):
    """All variants of a unit share seed and class order; a teacher is trained before it is reused."""
    comparison = read(tmp_path, small())
    units = {run.variant: set() for run in comparison.runs}
    for run in comparison.runs:
        units[run.variant].add((run.seed, run.class_order))
        assert (run.recipe.seed, run.recipe.data.eval_split) == (run.seed, "validation")
        assert run.recipe.folder == run.folder
    assert units["kdp"] == units["kd"] == units["alone"] == {(0, 0), (1, 1), (2, 2)}
    assert len({run.recipe_hash for run in comparison.runs}) == 9
    order = [run.folder for run in comparison.runs]
    for run in comparison.runs:
        if run.variant == "kd":
            assert (
                run.teacher_from is not None and run.teacher_from == run.folder.parent.parent / "kdp" / run.folder.name
            )
            assert order.index(run.teacher_from) < order.index(run.folder)


def test_class_orders_are_crossed_with_the_seeds(tmp_path: Path):
    comparison = read(tmp_path, small(class_orders=[5, 6]))
    units = [(run.seed, run.class_order) for run in comparison.runs if run.variant == "alone"]
    assert units == [(0, 5), (0, 6), (1, 5), (1, 6), (2, 5), (2, 6)]
    assert len({run.folder for run in comparison.runs}) == len(comparison.runs) == 18


def test_variants_share_a_cache_beside_them_unless_there_is_to_be_none(tmp_path: Path):
    hashes = [run.recipe_hash for run in read(tmp_path, small()).runs]
    assert {run.recipe.cache for run in read(tmp_path, small()).runs} == {str(tmp_path / "runs" / "spec" / "cache")}
    without = read(tmp_path, small(cache=None)).runs
    assert {run.recipe.cache for run in without} == {None}
    assert hashes == [run.recipe_hash for run in without], "no number depends on it"
    only = small(variants={"kdp": {"rows": {"student": "KDP"}}}, contrasts=[])
    assert {run.recipe.cache for run in read(tmp_path, only).runs} == {None}, "nobody to share it with"
    own = small(variants={"kdp": {"rows": {"student": "KDP"}, "set": {"cache": "here"}}}, contrasts=[])
    with pytest.raises(RecipeError, match="'variants.kdp.set' has 'cache', which the comparison sets; leave it out"):
        read(tmp_path, own)
    with pytest.raises(RecipeError, match="'cache' is 'here', but should be 'cache'"):
        read(tmp_path, small(cache="here"))


def test_the_hash_is_that_of_what_defines_the_numbers(tmp_path: Path):
    def hashes(folder: str, **fields: Any) -> list[str]:
        (tmp_path / folder).mkdir()
        return [run.recipe_hash for run in read(tmp_path / folder, small(**fields)).runs]

    first = hashes("first")
    assert hashes("elsewhere") == first
    stored_small = small()
    for variant in stored_small["variants"].values():
        variant["set"] = {
            **variant.get("set", {}),
            "save_backbone": False,
        }  # what is stored does not affect the numbers
    assert hashes("small", variants=stored_small["variants"]) == first
    assert not {*hashes("split", split="test")} & {*first}
    changed = small()
    changed["variants"]["kdp"]["set"] = {"teacher.train": {"learning_rate": 0.5}}
    ours = hashes("changed", variants=changed["variants"])
    same = [run.variant for run, a, b in zip(read(tmp_path, small()).runs, ours, first, strict=True) if a == b]
    assert same == ["alone"] * 3  # kd has another teacher now, though none of its fields differ


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"contrast": []}, "unknown field 'contrast'; did you mean 'contrasts'?"),
    "unknown field of a variant": (
        {"variants": {"a": {"sets": {}, "rows": {"student": "x"}}}, "contrasts": []},
        "unknown field 'variants.a.sets'; did you mean 'set'?",
    ),
    "no variants": ({"variants": {}, "contrasts": []}, "'variants' names none"),
    "no rows": ({"variants": {"a": {}}, "contrasts": []}, "'variants.a.rows' is missing"),
    "seed twice": ({"seeds": [1, 1]}, "'seeds' has 1 twice"),
    "no seeds": ({"seeds": []}, "'seeds' is empty"),
    "contrast": ({"contrasts": [["KDPP", "<alone>"]]}, "names 'KDPP', which is not a row; did you mean 'KDP'?"),
    "with itself": ({"contrasts": [["KDP", "KDP"]]}, "compares 'KDP' with itself"),
    "metric": ({"metric": "accuracy"}, "'metric' is 'accuracy'; allowed: average_accuracy"),
    "split": ({"split": "train"}, "'split' is 'train', but should be 'validation' or 'test'"),
    "curves": ({"curves": {"alon": "x"}}, "'curves' names 'alon', which is not a variant; did you mean 'alone'?"),
    "no curves": ({"curves": {"kd": "KD"}}, "variant 'kd': 'curves' .* set student.train: {eval_strategy: epoch}"),
    "both orders": ({"class_orders": [1], "seed_fields": ["seed", "data.class_order_seed"]}, "keep one of them"),
    "no seed": ({"seed_fields": ["data.class_order_seed"]}, "'seed_fields' must have 'seed'"),
    "recipe": ({"recipe": "nowhere.yaml"}, "Cannot read the recipe .*nowhere.yaml"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec_says_what_to_do(name: str, tmp_path: Path):
    fields, message = WRONG[name]
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, small(**fields))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"teacher_from": "none", "rows": {"student": "x"}}, "teacher_from' is 'none'; allowed are .*: kdp, alone"),
        ({"teacher_from": "kd", "rows": {"student": "x"}}, "teacher_from' is 'kd'; allowed are"),
        ({"teacher_from": "alone", "rows": {"student": "x"}}, "asks for its teacher, but its recipe has none"),
        ({"rows": {"student": "KDP"}}, "'rows' has KDP twice"),
        ({"rows": {"liner_head": "x"}}, "the role 'liner_head', but its runs have teacher, student, nearest"),
        ({"set": {"seed": 3}, "rows": {"student": "x"}}, "has 'seed', which the comparison sets"),
        ({"set": {"data.eval_split": "test"}, "rows": {"student": "x"}}, "has 'data.eval_split', which"),
        ({"set": {"ce_wieght": 3}, "rows": {"student": "x"}}, "variant 'new': unknown field 'ce_wieght'"),
        ({"set": {"push_to_hub": True}, "rows": {"student": "x"}}, "would overwrite each other"),
    ],
)
def test_a_wrong_variant_says_what_to_do(variant: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, small(variants={**small()["variants"], "new": variant}))


def test_a_variants_name_is_a_folder(tmp_path: Path):
    for name in ("a/b", "test", "../x"):
        with pytest.raises(RecipeError, match="becomes a folder"):
            read(tmp_path, small(variants={name: {"rows": {"student": "x"}}}, contrasts=[]))


# ---- results of the runs ----


def entry(matrix: list[list[float]], **fields: Any) -> dict[str, Any]:
    count = len(matrix)
    return {
        "accuracy_matrix": matrix,
        "metrics": continual_metrics(matrix, [10] * count),
        "within_task": [[100.0 for _ in row] for row in matrix],
        "task_identification": matrix,
        "confidence": [80.0] * count,
        "calibration_error": [12.5] * count,
        "train_seconds": [2.0] * count,
        "eval_seconds": [1.0] * count,
        "peak_memory_bytes": [5] * count,
        "cost": {"parameters": 1000, "bytes": 2**20, "latency_ms": 1.5, "device": "cpu"},
        **fields,
    }


def measured(comparison: Comparison, split: str = "validation", tasks: int = 3) -> list[Measured]:
    """Made-up results of all runs: rows further down are better, the more so for larger seeds."""
    found = []
    for number, (label, variant, role) in enumerate(comparison.rows):
        for run in [run for run in comparison.runs if run.variant == variant]:
            matrix = [[60.0 + number + number * run.seed - 5 * (t - i) for i in range(t + 1)] for t in range(tasks)]
            flops = {"training_flops": 1e12 * (number + 1), "inference_flops": 1e6}
            where = (label, variant, role, (run.seed, run.class_order), run.recipe_hash, split, "0123456789abcdef")
            found.append(Measured(*where, entry(matrix), flops))
    return found


def one(label: str, seed: int, matrix: list[list[float]], **fields: Any) -> Measured:
    return Measured(label, "v", "student", (seed, None), "hash", "test", "stream", entry(matrix, **fields), {})


def test_the_table_of_metrics():
    runs = [one("kd|dist", seed, [[80.0], [60.0, last]]) for seed, last in enumerate([80.0, 88.0, 96.0])]
    table = metrics_table([*runs, one("one", 0, [[50.0]])], ["average_accuracy", "forgetting"], "average_accuracy")
    assert table.markdown() == (
        "| row | n | average accuracy | 95 % interval | forgetting |\n"
        "|---|---:|---:|---:|---:|\n"
        "| kd\\|dist | 3 | 74.00 ± 4.00 | 64.06 to 83.94 | 20.00 ± 0.00 |\n"
        "| one | 1 | 50.00 ± – | – | 0.00 ± – |\n"
    )
    assert metrics_table(runs, CDL).headings[3] == "official forgetting"


def test_the_table_of_contrasts():
    runs = [one("kd", seed, [[value]]) for seed, value in enumerate([52.0, 13.0, 94.0])]
    runs += [one("alone", seed, [[value]]) for seed, value in enumerate([51.0, 11.0, 91.0])]
    found = contrasts_of(values(runs, "average_accuracy"), [("kd", "alone")])
    assert contrasts_table(found, "average_accuracy").markdown().splitlines() == [
        "| paired difference | n | average accuracy | 95 % interval | p | p (Holm) | above 0 |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| kd − alone | 3 | +2.00 ± 1.00 | -0.48 to +4.48 | 0.250 | 0.250 | 3 of 3 |",
    ]


def test_the_interval_over_the_classes_stands_beside_that_over_the_units():
    """Rows without accuracies per class, as of older runs, have none."""
    values_of = {"kd": [{"x": 60.0, "y": 44.0}, {"x": 66.0, "y": 40.0}], "alone": [{"x": 50.0, "y": 50.0}] * 2}
    runs = [one("old", seed, [[51.0]]) for seed in range(2)]
    for label, units in values_of.items():
        for seed, by_class in enumerate(units):
            runs.append(one(label, seed, [[sum(by_class.values()) / 2]], class_accuracy=[{}, by_class]))
    pairs = [("kd", "alone"), ("kd", "old")]
    found = contrasts_of(values(runs, "average_accuracy"), pairs, class_values(runs))
    table = contrasts_table(found, "average_accuracy")
    assert table.headings[4] == "over classes"
    assert [row[4] for row in table.rows] == ["-130.92 to +135.92", "–"]  # 13 and -8; t(1) = 12.71


def test_what_was_not_measured_is_left_out(tmp_path: Path):
    """Results from before the decomposition existed, and a task without test images."""
    old = one("old", 0, [[70.0]], within_task=[None], task_identification=[None], confidence=[None])
    gap = one("gap", 0, [[None], [None, 50.0]], within_task=[[None], [None, 60.0]])  # type: ignore[list-item]
    assert [run.metric("within_task_accuracy") for run in (old, gap)] == [None, None]
    assert metrics_table([old, gap], ["average_accuracy", "confidence"]).rows == [
        ["old", "1", "70.00 ± –", "–"],
        ["gap", "1", "–", "80.00 ± –"],
    ]


def test_the_report_is_whole(tmp_path: Path):
    comparison = read(tmp_path, small(seeds=list(range(10))))
    text = save_report(comparison, measured(comparison), tmp_path / "out")
    assert (tmp_path / "out/table.md").read_text() == text
    frame = pandas.read_parquet(tmp_path / "out/table.parquet")
    again = pandas.read_csv(tmp_path / "out/table.csv")
    assert len(frame) == 40 and frame["recipe_hash"].nunique() == 30
    assert list(frame.columns) == list(again.columns) and again["average_accuracy"].tolist() == (
        pytest.approx(frame["average_accuracy"].tolist())
    )
    first = frame.iloc[0]
    assert (first["row"], first["role"], first["seed"], first["class_order"]) == ("teacher", "teacher", 0, 0)
    assert (first["train_seconds"], first["training_flops"], first["parameters"]) == (6.0, 1e12, 1000)
    page = (tmp_path / "out/report.html").read_text()
    assert "&lt;alone&gt;" in page and "<alone>" not in page
    assert not re.findall(r"https?://|<script|<link|@import|url\(", page)  # nothing outside of the file
    inside = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    files = sorted((tmp_path / "out/plots").iterdir())
    assert [file.stem for file in files] == ["contrasts", "cost", "curves", "decomposition", "matrices"]
    assert sorted(inside) == sorted(file.read_bytes() for file in files)
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 50
    for run in comparison.runs:
        assert run.recipe_hash in page
    assert "Validation images" in page and "TEST SPLIT" not in page and "Not finished" not in page
    assert "within 5 %" in page and "cannot win: p ≥ 0.062" in page
    assert "10 units" in page and "Too few to prove" not in page
    assert page.count("<td>0.004 *</td>") == 2  # twice 2 / 1024, by Holm of two contrasts


def test_the_report_says_what_one_must_know(tmp_path: Path):
    comparison = read(tmp_path, small(split="test"))
    found = [run for run in measured(comparison, "test", tasks=1) if run.label != "teacher"][:-1]
    save_report(comparison, found, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "TEST SPLIT: every number here is from the test images" in page and "split: test" in page
    assert "Not finished: 8 of 12 results so far; nothing yet of teacher." in page
    assert "Too few to prove anything: 2 pairs. With 2 contrasts" in page and "It takes 7 pairs." in page
    assert sorted(file.stem for file in (tmp_path / "out/plots").iterdir()) == ["contrasts", "cost", "decomposition"]


def test_curves_over_training_have_a_line_for_every_path():
    from hf_cdl.compare.figures import training_figure

    def log(seed: int, *names: str) -> list[dict[str, float]]:
        return [{"loss": 1.0}, *({name: 40.0 * i + seed for i, name in enumerate(names)} for _ in range(5))]

    taught = [log(seed, "eval_accuracy", "eval_teacher_accuracy", "eval_prompt_path_accuracy") for seed in range(3)]
    axes = training_figure({"KD": [log(0, "eval_accuracy")], "DFPT": taught}).axes
    assert [len(panel.lines) for panel in axes] == [1, 3]
    lines = {str(line.get_label()): list(line.get_ydata()) for line in axes[1].lines}  # type: ignore[arg-type]
    assert lines == {"student": [1.0] * 5, "teacher, original path": [41.0] * 5, "teacher, prompt path": [81.0] * 5}
    with pytest.raises(ValueError, match="'KD' hold no accuracies; .*eval_strategy"):
        training_figure({"KD": [[{"loss": 1.0}]]})


def test_the_fields_of_a_comparison_are_documented():
    import dataclasses

    from hf_cdl.compare.spec import Spec

    text = (RECIPES.parent / "docs" / "guides" / "comparisons.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == {f.name for f in dataclasses.fields(Spec)} - {
        "recipe"
    }
    [spec] = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(spec)["variants"].keys() == {"kdp", "kd", "alone"}


def test_the_documented_comparison_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (RECIPES.parent / "docs" / "guides" / "comparisons.md").read_text()
    (tmp_path / "spec.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert len(read_comparison(tmp_path / "spec.yaml", tmp_path).runs) == 30


def test_a_recipe_of_files_and_one_of_a_variants_own(tmp_path: Path):
    own = write_recipe(tmp_path / "own.yaml", make_recipe(tmp_path))
    variants = {"a": {"rows": {"student": "a"}}, "b": {"recipe": str(own), "rows": {"student": "b"}}}
    files = ["quickstart.yaml", str(write_recipe(tmp_path / "more.yaml", {"ce_weight": 0.25}))]
    comparison = read(tmp_path, small(recipe=files, variants=variants, contrasts=[["a", "b"]]))
    assert [(run.variant, run.recipe.ce_weight) for run in comparison.runs[::3]] == [("a", 0.25), ("b", 0.5)]
