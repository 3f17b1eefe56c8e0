"""What a run would need: parameters, FLOPs, steps, memory and files (recipes/train.py RECIPE.yaml ... --plan).

Models are built from the backbones' configs with fake tensors, which have shapes and no content: no weights are loaded
and nothing is computed. FLOPs, and what is kept for the way back, are counted on one step of each role, at the
recipe's batch size and in the last task, when prompts and heads are largest.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForImageClassification
from transformers import initialization as init

from hf_cdl import CDLForImageClassification, CDLTrainingArguments, TaskStream
from hf_cdl.backbones.loading import load_config, read_config
from hf_cdl.backbones.lora import is_adapter
from hf_cdl.config import CDLConfig
from hf_cdl.data import nothing_held_out
from hf_cdl.data.benchmarks import BENCHMARKS, SIZES
from hf_cdl.data.sampler import count_rounds
from hf_cdl.data.views import output_size
from hf_cdl.distill import Objective
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.recipe import Recipe
from hf_cdl.recipe.build import build_models, build_objective, build_processors, load_plugins
from hf_cdl.training.checking import check_training

aten: Any = torch.ops.aten
# torch counts the fused attention of GPUs, but not the CPU's. Arguments are the tensors' shapes.
FUSED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **more: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Tasks:
    """Class names and number of training images of every task, where they are from, and what a user should know."""

    names: list[list[str]]
    images: list[int]
    source: str
    notes: Sequence[str]

    @property
    def classes(self) -> list[int]:
        """How many each task has."""
        return [len(task) for task in self.names]


@dataclass(frozen=True)
class Cost:
    """What training a role takes. FLOPs are per image, a multiply-add being one.

    `kept`: bytes for the way back; `states`: bytes of gradients, the optimizer's states and the terms' own layers;
    `trained`: parameters, with the terms' layers; `images`: in all epochs.
    """

    inference_flops: float
    training_flops: float
    kept: int
    states: int
    trained: int
    steps: int
    images: int

    @property
    def total_flops(self) -> float:
        return self.training_flops * self.images


HEADINGS = [
    ["", "backbone", "trained", "stored", "GFLOPs per image", "", "total", "kept for", "peak", "check-"],
    ["role", "params", "a task", "at the end", "inference / step", "steps", "PFLOPs", "way back", "memory", "point"],
]
NOTES = """\
FLOPs count a multiply-add once, as papers do. A step of a role: its query pass, the teacher's forward pass if it is
taught, its own forward and backward pass. Evaluation and the pass that fits a head after a first session are left out.
Peak memory is an estimate: the weights of all models, gradients and the optimizer's states of what is trained, and
what a step keeps for the way back, with fused attention and without the largest passing tensors."""


def plan(recipe: Recipe) -> str:
    """The plan as text. Raises ValueError for a backbone's config, a processor or data that cannot be read, and for a
    task that a role could not learn."""
    load_plugins(recipe.plugins)
    tasks = read_tasks(recipe)
    models, costs = measure(recipe, tasks)
    weights = sum(map(_bytes, models.values()))
    files = {role: _stored_bytes(recipe, model) for role, model in models.items()}
    lines = [*HEADINGS, *(cells(role, models[role], cost, weights, files[role]) for role, cost in costs.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = []
    for first, *rest in lines:
        table.append("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]))
    total = sum(cost.total_flops for cost in costs.values())
    unknown = {args.optim.value for role in costs if optimizer_states(args := _arguments(recipe, role)) is None}
    notes = [NOTES, *(f"Of {name} two states for each parameter are assumed, as of Adam." for name in sorted(unknown))]
    return "\n".join(
        [
            f"{recipe.name}: {len(tasks.classes)} tasks, {sum(tasks.classes)} classes",
            f"{sum(tasks.images):,} training images ({tasks.source})",
            *(f"note: {note}" for note in tasks.notes),
            "",
            *table,
            "",
            f"All training: {_peta(total)} PFLOPs. All checkpoints (after every task, and the newest again): "
            f"{_size(sum(files.values()) * (len(tasks.classes) + 1))}.",
            *notes,
        ]
    )


def cells(role: str, model: Any, cost: Cost, weights: int, file: int) -> list[str]:
    """A role's line of the table; `weights`: bytes of all models of the run, `file`: of its checkpoint."""
    sizes = _backbone_sizes(model)
    stored = sum(tensor.numel() for tensor in model.state_dict().values()) - sum(sizes)
    return [
        role.replace("_", " "),
        *(f"{number / 1e6:,.2f} M" for number in (sizes[0], cost.trained, stored)),
        f"{cost.inference_flops / 1e9:.2f} / {cost.training_flops / 1e9:.2f}",
        f"{cost.steps:,}" if cost.steps else "-",
        _peta(cost.total_flops),
        *map(_size, (cost.kept, weights + cost.states + cost.kept, file)),
    ]


def _peta(flops: float) -> str:
    """In units of 1e15, one decimal or, of less than a tenth, two digits."""
    return f"{flops / 1e15:,.1f}" if flops >= 1e14 else f"{flops / 1e15:.2g}"


def _backbone_sizes(model: Any) -> list[int]:
    """Parameters of the backbone and of the query's, without adapters."""
    parts = (model.model,) if isinstance(model, ImageClassifier) else (model.backbone, model.query_backbone)
    backbones = [part for part in parts if part is not None]
    return [sum(p.numel() for name, p in part.named_parameters() if not is_adapter(name)) for part in backbones]


def _stored_bytes(recipe: Recipe, model: Any) -> int:
    """What a checkpoint of the model takes: a small one leaves the backbones out."""
    small = not recipe.save_backbone and not isinstance(model, ImageClassifier)
    return _bytes(model) - 4 * small * sum(_backbone_sizes(model))


def read_tasks(recipe: Recipe) -> Tasks:
    """The tasks' sizes: of a benchmark as published, so that nothing is downloaded; else counted in the data."""
    data = recipe.data
    if data.path not in SIZES:
        stream = TaskStream(data, build_processors(recipe), seed=recipe.seed)
        names = [list(task.class_names) for task in stream]
        return Tasks(names, [len(task.train) for task in stream], "counted in the data", stream.notes)
    classes, images = SIZES[data.path]
    held_out, notes = data.test_fraction or BENCHMARKS[data.path].get("test_fraction") or 0.0, []
    if held_out and (test := data.test_split or BENCHMARKS[data.path].get("test_split")):
        held_out, notes = 0.0, [nothing_held_out(test)]
    per_class = min(images * (1 - held_out) / classes, data.max_train_per_class or math.inf)
    if isinstance(data.classes_per_task, list):
        sizes = [size if isinstance(size, int) else len(size) for size in data.classes_per_task]
    else:
        count = data.max_classes or classes
        size = data.classes_per_task or count
        sizes = [min(size, count - first) for first in range(0, count, size)]
    names = [[f"class {number + 1} of task {task + 1}" for number in range(size)] for task, size in enumerate(sizes)]
    counts = [round(size * per_class) for size in sizes]
    return Tasks(names, counts, f"{data.path} as published; the data were not read", notes)


def measure(recipe: Recipe, tasks: Tasks) -> tuple[dict[str, Any], dict[str, Cost]]:
    """The models after the last task, as fake tensors, and what training each of them takes."""
    processors, names = build_processors(recipe), tasks.names

    def classifier(name: str, revision: Any = None, pretrained: bool = True) -> ImageClassifier:
        config = read_config(name, revision)
        config.num_labels = len(names[0])
        with init.no_init_weights():
            model = ImageClassifier(AutoModelForImageClassification.from_config(config, dtype=torch.float32))
        model.tasks = names[:1]
        for task in names[1:]:  # which it refuses
            model.begin_task(task)
        return model

    def cdl(name: str, revision: Any = None, query_name: Any = None, query_revision: Any = None, **fields: Any):
        config = CDLConfig(
            backbone_name=name,
            backbone_config=_config(name, revision),
            query_name=query_name,
            query_config=None if query_name is None else _config(query_name, query_revision),
            tasks=names,
            **fields,
        )
        with init.no_init_weights():
            return CDLForImageClassification(config)

    with FakeTensorMode():
        models = build_models(recipe, processors, create={"cdl": cdl, "classifier": classifier})
        return models, {role: _cost(recipe, role, models, tasks, processors) for role in models}


def _config(name: str, revision: str | None) -> Any:
    config = load_config(name, revision)
    config.dtype = torch.float32  # what the weights are loaded as
    return config


def _cost(recipe: Recipe, role: str, models: Any, tasks: Tasks, processors: dict[str, Any]) -> Cost:
    model, objective = models[role], build_objective(recipe, role, models)
    teacher = models["teacher"] if objective.needs_teacher else None
    if teacher is not None:
        objective.attach(teacher)
        objective.begin_task(teacher)
    arguments = _arguments(recipe, role)
    batch = arguments.per_device_train_batch_size
    views = {name: torch.zeros(batch, 3, *output_size(processor)) for name, processor in processors.items()}
    pixels = views[role]
    for part in (model, teacher):  # torch's counter cannot follow trainable parameters where no gradient is taken
        if part is not None:
            part.eval().requires_grad_(False)
    inference, _ = _count(lambda: model(pixels), model)
    if role == "teacher" and (recipe.teacher_from is not None or (recipe.teacher and recipe.teacher.train is None)):
        return Cost(inference / batch, 0, 0, 0, 0, 0, 0)
    for index, (names, count) in enumerate(zip(tasks.names, tasks.images, strict=True)):
        if count and model.trains(index):  # a task without images was learnt elsewhere
            check_training(role, model, objective, arguments, index, names, count)
    classes, images = tasks.classes, tasks.images
    section = getattr(recipe, "teacher" if role == "teacher" else "student")
    if role in ("teacher", "student") and section.first_session is not None:
        classes, images = classes[:1], images[:1]
        model.begin_session()
    model.freeze()
    trained = [p for part in (model, objective) for p in part.parameters() if p.requires_grad]
    if not trained:  # the head is fitted by one pass
        return Cost(inference / batch, inference / batch, 0, 0, 0, 0, sum(tasks.images))
    steps, seen = map(sum, zip(*(_phase(arguments, count) for count in images), strict=True))
    model.train()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        taught = functools.partial(_step, model, objective, pixels, classes, teacher, views.get("teacher"))
        flops, kept = _count(taught, *(part for part in (model, objective, teacher) if part is not None))
    count = sum(parameter.numel() for parameter in trained)
    kept_by_optimizer = optimizer_states(arguments)
    states = 4 * count * (1 + (2 if kept_by_optimizer is None else kept_by_optimizer)) + _bytes(objective)
    return Cost(inference / batch, flops / batch, kept, states, count, steps, seen)


def _phase(arguments: CDLTrainingArguments, images: int) -> tuple[int, int]:
    """The steps of a phase with so many training images, and the images it learns from, counted in every epoch."""
    batch, processes = arguments.per_device_train_batch_size, arguments.world_size
    rounds = count_rounds(images, batch, arguments.dataloader_drop_last, processes)
    per_epoch = math.ceil(rounds / arguments.gradient_accumulation_steps)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    if not per_epoch:
        return 0, 0
    epochs, rest = divmod(steps, per_epoch)
    whole = arguments.gradient_accumulation_steps * batch * processes
    in_epoch = min(images, rounds * batch * processes)
    return steps, epochs * in_epoch + min(rest * whole, in_epoch)


def optimizer_states(arguments: CDLTrainingArguments) -> int | None:
    """How many numbers the optimizer keeps of each parameter; None where that is not known here."""
    if arguments.optim == "sgd":
        options = dict(pair.split("=") for pair in (arguments.optim_args or "").replace(" ", "").split(",") if pair)
        return int(float(options.get("momentum", 0)) > 0)
    return 2 if arguments.optim in ("adamw_torch", "adamw_torch_fused") else None


def _arguments(recipe: Recipe, role: str) -> Any:
    section = recipe.training_args("teacher" if role == "teacher" else "student")
    return CDLTrainingArguments(output_dir="work", **section)


def _step(model: Any, objective: Objective, pixels: Any, classes: list[int], teacher: Any, theirs: Any) -> None:
    """What CDLTrainer.compute_loss does with a batch of the last task, and the way back; the teacher sees `theirs`."""
    task, current = len(classes) - 1, slice(sum(classes[:-1]), sum(classes))
    query, answers, asked = None, None, {}
    shares = False
    if teacher is not None and teacher.needs_query and teacher.query_backbone is not None:
        shares = model.needs_query and teacher.config.query_view is None
    with torch.no_grad():
        if shares or objective.needs_query:
            query = model.compute_query(pixels)
        if teacher is not None:
            hidden = objective.hidden_states("teacher") or None
            asked = {"pixel_values": theirs, "query": query if shares else None, "task_id": task}
            answers = teacher(**asked, output_hidden_states=hidden)
    if answers is not None:
        answers = objective.consult(answers, asked)
    hidden = objective.hidden_states("student") or None
    student = model(pixels, query=query, task_id=task, output_hidden_states=hidden)
    labels = torch.full(pixels.shape[:1], current.start)
    objective(student, answers, labels, current)["loss"].backward()


def _count(step: Callable[[], Any], *parts: torch.nn.Module) -> tuple[float, int]:
    """(FLOPs, bytes kept for the way back) of a step: of tensors that are no weights of `parts`."""
    own = {tensor.untyped_storage()._cdata for part in parts for tensor in part.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=FUSED)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return counter.get_total_flops() / 2, sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


if __name__ == "__main__":  # python recipes/plan.py RECIPE.yaml ...: the same
    import train

    train.quiet()
    sys.exit(train.main([*sys.argv[1:], "--plan"]))
