"""--plan: its counts match what the trainer does and the known numbers of full-size ViTs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, SIZE, make_backbone, make_recipe, thinned, train, write_recipe
from test_kept_queries import passes
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, ViTConfig, ViTImageProcessor

from hf_cdl import CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.commands import costs as counting
from hf_cdl.commands import plan
from hf_cdl.recipe import Recipe, build_recipe, load_recipe
from hf_cdl.recipe.build import build_models, build_objective, build_processors

SIZES = {"small": (384, 6), "base": (768, 12)}


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the configs of ViT-B/16 and ViT-S/16, without weights."""
    folder = tmp_path_factory.mktemp("vits")
    for name, (width, heads) in SIZES.items():
        config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
        config.save_pretrained(folder / name)
        ViTImageProcessor().save_pretrained(folder / name)
    return folder


def cifar(vits: Path, method: str, term: str, *more: str) -> Recipe:
    files = [f"cifar100_10t/{method}.yaml", "pairs/base_small.yaml", f"terms/{term}.yaml"]
    backbones = ["--teacher.backbone", str(vits / "base")] if term != "none" else []
    backbones += ["--student.backbone", str(vits / "small")]
    arguments = [*(str(ROOT / "recipes" / file) for file in files), *backbones, *more]
    return load_recipe(arguments, "unused.yaml")


def giga(flops: float) -> float:
    return flops / 1e9


@pytest.mark.slow
def test_full_size_vits(vits: Path) -> None:
    """The known sizes: ViT-B/16 has 85.8 M parameters and 17.6 GFLOPs, ViT-S/16 21.7 M and 4.6.

    Of the last of twelve layers only CLS is read: of its products of size N D^2 ten in twelve are left out.
    """
    read = 1 - 10 / 12 / 12
    small, base = 4.6 * read, 17.6 * read
    recipe = cifar(vits, "coda", "kd")
    models, costs = counting.measure(recipe, counting.read_tasks(recipe))
    teacher, student = costs["teacher"], costs["student"]
    params = {role: sum(p.numel() for p in models[role].backbone.parameters()) for role in ("teacher", "student")}
    assert params == {"teacher": 85_798_656, "student": 21_665_664}
    assert giga(student.inference_flops) == pytest.approx(2 * small, rel=0.01)  # query pass and prediction
    assert giga(teacher.inference_flops) == pytest.approx(base + small, rel=0.01)  # the student's backbone answers
    # A step: the query, then forward and backward; the frozen weights need no gradient, so these two cost the same.
    assert giga(teacher.training_flops) == pytest.approx(small + 2 * base, rel=0.03)
    assert giga(student.training_flops) == pytest.approx(base + 2 * small, rel=0.03)  # the query is known
    assert student.steps == teacher.steps == 10 * 20 * (5000 // 64)
    assert student.images == 20 * 10 * (5000 // 64) * 64  # full batches only
    rows, layers = 10 * (8 * 384 + 2 * 384), 5
    assert student.trained == rows * layers + 10 * 384 + 10  # CODA's rows and the head of one task
    _, costs = counting.measure(cifar(vits, "coda", "kd", "--teacher_from", "elsewhere"), counting.read_tasks(recipe))
    assert (costs["teacher"].total_flops, costs["teacher"].steps) == (0, 0)
    asking = replace(student, training_flops=costs["student"].training_flops)
    assert costs["student"] == asking, "nobody has asked for its queries"
    assert giga(asking.training_flops - student.training_flops) == pytest.approx(small, rel=0.01)
    for query, flops in (("student", 2 * base), ("one_pass", base)):
        options = ("--student.backbone", str(vits / "base"), "--student.query", query)
        alone = cifar(vits, "coda", "none", *options)
        _, costs = counting.measure(alone, counting.read_tasks(alone))
        assert giga(costs["student"].inference_flops) == pytest.approx(flops, rel=0.005)


class Counted(TrainerCallback):
    """FLOPs of the last step, what it trains, and the bytes that it keeps for the backward pass, but for weights."""

    def __init__(self, *parts: torch.nn.Module) -> None:
        self.parts, self.stack = parts, contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        own = {tensor.data_ptr() for part in self.parts for tensor in part.state_dict().values()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.kept, self.counter = kept, FlopCounterMode(display=False, custom_mapping=counting.FUSED)
        self.stack.enter_context(self.counter)
        self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.stack.close()


def run_of(recipe: Recipe, folder: Path) -> dict[str, tuple[CDLTrainer, Counted, list[int]]]:
    """What `hf-cdl train` does: each role's trainer, its last step, and the batches of its queries' passes."""
    processors = build_processors(recipe)
    models, stream = build_models(recipe, processors), TaskStream(recipe.data, processors)
    found: dict[str, tuple[CDLTrainer, Counted, list[int]]] = {}
    for role, model in models.items():
        objective = build_objective(recipe, role, models)
        teacher = models["teacher"] if objective.needs_teacher else None
        arguments = CDLTrainingArguments(
            str(folder / "work"), **recipe.training_args("teacher" if role == "teacher" else "student")
        )
        trainer = CDLTrainer(model, arguments, objective, teacher, role)
        counted = Counted(*models.values(), objective)
        trainer.add_callback(counted)
        found[role] = trainer, counted, passes(trainer)
    for task in stream:
        for trainer, _, asked in found.values():
            asked.clear()
            trainer.learn(task)
    return found


@pytest.mark.parametrize(
    "term",
    thinned(
        [{"type": "kdp"}, {"type": "fitnets"}, {"type": "dual_path"}, {"type": "dual_path", "copy_from": "all"}], 3
    ),
)
def test_the_plan_counts_what_the_trainer_does(tmp_path: Path, term: dict[str, Any]) -> None:
    """FLOPs and the bytes kept for the backward pass are the same with fake tensors as in a run's last step."""
    recipe = build_recipe(make_recipe(tmp_path, distill=[term]))
    _, costs = counting.measure(recipe, counting.read_tasks(recipe))
    run = run_of(recipe, tmp_path)
    assert [len(asked) for _, _, asked in run.values()] == [4, 0, 1], "but for class means, un-augmented"
    for role in ("teacher", "student"):
        _, counted, _ = run[role]
        assert costs[role].training_flops == counted.counter.get_total_flops() / 2 / 8, role
        assert costs[role].kept == sum(counted.kept.values())
        assert costs[role].trained == counted.trained


@pytest.mark.parametrize(
    ("change", "student_asks"),
    [
        ({"query": "self"}, True),
        pytest.param({"train": {"per_device_train_batch_size": 4}}, True, marks=pytest.mark.slow),
        pytest.param({"train": {"data_seed": 7}}, True, marks=pytest.mark.slow),
        pytest.param({"train": {"num_train_epochs": 1}}, False, marks=pytest.mark.slow),
    ],
)
def test_queries_are_counted_where_they_are_computed(
    tmp_path: Path, change: dict[str, Any], student_asks: bool
) -> None:
    """A teacher with a query of its own, or other batches, leaves its student to ask."""
    fields = make_recipe(tmp_path, distill=[{"type": "kd"}])
    side = "teacher" if "query" in change else "student"
    fields[side] = {**fields[side], **change}
    recipe = build_recipe(fields)
    _, costs = counting.measure(recipe, counting.read_tasks(recipe))
    run = run_of(recipe, tmp_path)
    _, counted, asked = run["student"]
    batch = recipe.training_args("student")["per_device_train_batch_size"]
    assert bool(asked) == student_asks
    assert costs["student"].training_flops == counted.counter.get_total_flops() / 2 / batch


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, 2),
        ({"optim": "adamw_torch"}, 2),
        ({"optim": "sgd"}, 0),
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, 1),
        ({"optim": "sgd", "optim_args": "nesterov=False, momentum = 0.0"}, 0),
        ({"optim": "rmsprop"}, None),
    ],
)
def test_the_optimizer_s_states_are_counted(tmp_path: Path, options: dict[str, str], want: int | None) -> None:
    """As many as exist after a real step; for unknown optimizers the plan reports its assumption."""
    recipe = make_recipe(tmp_path, teacher=None, distill=[], baselines=[])
    recipe["train"] |= {**options, "max_steps": 1, "num_train_epochs": None}
    built = build_recipe(recipe)
    tasks = counting.read_tasks(built)
    student = counting.measure(built, tasks)[1]["student"]
    assert student.states == 4 * student.trained * (1 + (2 if want is None else want))
    note = "Of rmsprop two states for each parameter are assumed, as of Adam."
    assert (note in plan.plan(built)) == (want is None)
    if want is not None:
        processors = build_processors(built)
        model: Any = build_models(built, processors)["student"]
        args = CDLTrainingArguments(str(tmp_path / "work"), **built.training_args("student"), disable_tqdm=True)
        trainer: Any = CDLTrainer(model, args)
        task = TaskStream(built.data, processors)[0]
        trainer.learn(task)
        states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
        found = sum(tensor.numel() for tensor in states if tensor is not None and tensor.ndim > 0)
        assert found == want * sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])


def test_a_first_session_trains_on_the_first_task_alone(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, distill=[{"type": "kd"}])
    full = build_recipe(recipe)
    recipe["student"] |= {"head": {"type": "ridge"}, "first_session": {"type": "linear"}}
    session = build_recipe(recipe)
    (_, every), (_, once) = (counting.measure(r, counting.read_tasks(r)) for r in (full, session))
    assert once["teacher"] == every["teacher"]
    assert (once["student"].steps, once["student"].images) == (4, 32)  # 2 epochs of 16 images
    assert every["student"].steps == 3 * 4
    assert once["student"].trained == every["student"].trained


def test_a_teacher_may_see_larger_images_than_the_student_whose_backbone_it_asks(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    same = build_recipe(recipe)
    _, small = counting.measure(same, counting.read_tasks(same))
    make_backbone(Path(recipe["teacher"]["backbone"]), 48, 3, 1, size=2 * SIZE)
    larger = build_recipe(recipe)
    fakes, costs = counting.measure(larger, counting.read_tasks(larger))
    assert fakes["teacher"].config.query_view["size"] == [SIZE, SIZE]
    assert costs["teacher"].inference_flops > 2 * small["teacher"].inference_flops
    assert costs["student"].inference_flops == small["student"].inference_flops


@pytest.mark.slow
def test_small_checkpoints_are_planned_small(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, teacher=None, distill=[], ce_weight=1.0, save_backbone=False)
    recipe["student"]["prompt"] = {"type": "coda", "components": 60, "length": 200, "layers": [0, 1]}
    planned = float(plan.plan(build_recipe(recipe)).splitlines()[5].split()[-2])  # MiB
    code, output = train(write_recipe(tmp_path / "recipe.yaml", recipe), "--output_dir", tmp_path / "run")
    assert code == 0, output
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "student").glob("*.safetensors"))
    assert planned == pytest.approx(size / 2**20, abs=0.06)


def test_data_are_counted_and_benchmarks_are_known(tmp_path: Path, vits: Path) -> None:
    counted = counting.read_tasks(build_recipe(make_recipe(tmp_path)))
    assert (counted.classes, counted.images, counted.source) == ([2] * 3, [16] * 3, "counted in the data")
    recipe = cifar(vits, "l2p", "none", "--data.classes_per_task", "30", "--data.max_train_per_class", "100")
    known = counting.read_tasks(recipe)
    assert (known.classes, known.images) == ([30, 30, 30, 10], [3000, 3000, 3000, 1000])
    assert known.source == "cifar100 as published; the data were not read"
    renditions = counting.read_tasks(cifar(vits, "l2p", "none", "--data.path", "imagenet_r"))
    assert sum(renditions.images) == 24_000 and not renditions.notes
    split = counting.read_tasks(cifar(vits, "l2p", "none", "--data.test_fraction", "0.5"))
    assert sum(split.images) == 50_000
    assert split.notes == ["nothing is held out by test_fraction, since there is a test split, 'test'"]


def test_the_command_prints_a_plan_and_starts_nothing(tmp_path: Path, vits: Path) -> None:
    recipe = make_recipe(tmp_path, output_dir=str(tmp_path / "run"))
    code, output = train(write_recipe(tmp_path / "recipe.yaml", recipe), "--plan", "--train.num_train_epochs", 3)
    assert code == 0, output
    lines = output.splitlines()
    assert lines[:2] == ["tiny: 3 tasks, 6 classes", "48 training images (counted in the data)"]
    names = [line.split("  ")[0] for line in lines[5:8]]
    assert names == ["teacher", "student", "nearest class mean"]
    assert "  18  " in lines[6]  # 16 images a task in batches of 8, 3 epochs, 3 tasks
    assert max(map(len, lines)) <= 119
    assert not (tmp_path / "run").exists()
    known = ["--data.known_classes", "[[yak, zebu]]"]
    code, output = train(tmp_path / "recipe.yaml", "--plan", *known)
    assert code == 2 and "'data.known_classes' names tasks that the models have learnt" in output
    code, output = train(tmp_path / "recipe.yaml", "--plan", "--student.backbone", tmp_path / "nowhere")
    assert code == 2 and "Traceback" not in output
    assert f"error: The student on backbone '{tmp_path}/nowhere'" in output


def test_a_plan_of_classifiers_has_the_costs_that_papers_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet56 and ResNet20 at 32 px: 126 and 41 million multiply-adds; a backward pass takes twice a forward's."""
    monkeypatch.chdir(ROOT)
    said = plan.plan(load_recipe(["recipes/offline_kd/cifar100_resnet56_resnet20.yaml"], "unused.yaml"))
    teacher, student = (line.split() for line in said.splitlines() if line.startswith(("teacher", "student")))
    assert teacher[1:4] == ["0.86", "M", "0.86"] and student[1:4] == ["0.28", "M", "0.28"]
    assert teacher[7:10] == ["0.13", "/", "0.38"] and student[7:10] == ["0.04", "/", "0.25"]
    assert student[10] == f"{240 * 782:,}"
    ready = ["--teacher.pretrained", "true", "--teacher.train", "null"]
    said = plan.plan(load_recipe(["recipes/offline_kd/cifar100_resnet56_resnet20.yaml", *ready], "unused.yaml"))
    [teacher] = (line.split() for line in said.splitlines() if line.startswith("teacher"))
    assert teacher[7:11] == ["0.13", "/", "0.00", "-"]
