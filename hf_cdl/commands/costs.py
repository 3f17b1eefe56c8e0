"""Training costs: parameters, FLOPs, steps and memory of each role of a recipe.

Models are built from the backbones' configs with fake tensors, which have shapes but no data: no weights are loaded
and nothing is computed. FLOPs, and what is kept for the backward pass, are counted on one step of each role, at the
recipe's batch size and in the last task, when prompts and heads are largest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForImageClassification
from transformers import initialization as init

from hf_cdl import CDLForImageClassification, CDLTrainingArguments, TaskStream
from hf_cdl.backbones.loading import load_config, read_config
from hf_cdl.commands.query_passes import QueryPasses
from hf_cdl.config import CDLConfig
from hf_cdl.data import nothing_held_out
from hf_cdl.data.benchmarks import BENCHMARKS, SIZES
from hf_cdl.data.sampler import count_rounds
from hf_cdl.data.views import output_size, same_view
from hf_cdl.distill import Objective
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.recipe import Recipe
from hf_cdl.recipe.build import build_models, build_objective, build_processors
from hf_cdl.training.checking import check_training
from hf_cdl.training.teacher import Teacher

aten: Any = torch.ops.aten
# torch counts fused attention on GPUs, but not on the CPU. The arguments are tensor shapes.
FUSED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **more: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Tasks:
    """Class names and number of training images of every task, where they come from, and notes for the user."""

    names: list[list[str]]
    images: list[int]
    source: str
    notes: Sequence[str]

    @property
    def classes(self) -> list[int]:
        """Number of classes of each task."""
        return [len(task) for task in self.names]


@dataclass(frozen=True)
class Cost:
    """What it takes to train a role. FLOPs are per image; a multiply-add counts as one.

    In training an image's FLOPs include those of the unlabelled ones beside it. `kept`: bytes for the backward pass;
    `states`: bytes of gradients, optimizer states and the terms' own layers; `trained`: trained parameters, including
    the terms' layers; `images`: seen over all epochs.
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


def read_tasks(recipe: Recipe) -> Tasks:
    """Sizes of the tasks: the published ones for a benchmark, so nothing is downloaded; else counted in the data."""
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
    """The models after the last task, as fake tensors, and the training cost of each."""
    processors, names = build_processors(recipe), tasks.names
    fake = FakeTensorMode()  # for the models alone: image processors work with real pixels

    def classifier(name: str, revision: Any = None, pretrained: bool = True) -> ImageClassifier:
        config = read_config(name, revision)
        config.num_labels = len(names[0])
        with fake, init.no_init_weights():
            model = ImageClassifier(AutoModelForImageClassification.from_config(config, dtype=torch.float32))
            model.tasks = names[:1]
            for task in names[1:]:  # a classifier refuses a second task
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
        with fake, init.no_init_weights():
            return CDLForImageClassification(config)

    models = build_models(recipe, processors, create={"cdl": cdl, "classifier": classifier})
    with fake:
        asked = QueryPasses()
        return models, {role: _cost(recipe, role, models, tasks, processors, asked) for role in models}


def _config(name: str, revision: str | None) -> Any:
    config = load_config(name, revision)
    config.dtype = torch.float32  # the dtype that weights are loaded in
    return config


def _cost(
    recipe: Recipe, role: str, models: Any, tasks: Tasks, processors: dict[str, Any], asked: QueryPasses
) -> Cost:
    model, objective = models[role], build_objective(recipe, role, models)
    teacher = Teacher(models["teacher"] if objective.needs_teacher else None, model, objective, _same_source)
    teacher.begin_task(model)
    arguments = _arguments(recipe, role)
    batch = arguments.per_device_train_batch_size
    beside = 0 if recipe.data.unlabelled is None else recipe.data.unlabelled_ratio
    pixels = _batch(role, teacher, processors, batch)["pixel_values"]
    # torch's counter cannot handle trainable parameters when no gradient is taken
    for part in (model, teacher.model):
        if part is not None:
            part.eval().requires_grad_(False)
    inference, _ = _count(lambda: model(pixels), model)
    if role == "teacher" and (recipe.teacher_from is not None or (recipe.teacher and recipe.teacher.train is None)):
        return Cost(inference / batch, 0, 0, 0, 0, 0, 0)
    for index, (names, count) in enumerate(zip(tasks.names, tasks.images, strict=True)):
        if count and model.trains(index):  # a task without images was learnt in another run
            check_training(role, model, objective, arguments, index, names, count)
    classes, images, later = _trained_on(model, tasks)
    of_task, others = model.later.held if later else (False, False)
    model.freeze()
    trained = [p for part in (model, objective) for p in part.parameters() if p.requires_grad]
    if not trained:  # the head is fitted in one pass
        return Cost(inference / batch, inference / batch, 0, 0, 0, 0, sum(tasks.images))
    phases = [_phase(arguments, count) for count in images]
    steps, seen = map(sum, zip(*phases, strict=True))
    model.train()
    asking = ((model, processors[role]), (teacher.model, processors.get("teacher")))
    flops, kept = later * (of_task + others * beside) * inference, 0
    for count, share in _beside(objective, beside, others, later).items():
        shown = {**_batch(role, teacher, processors, batch * (1 + count)), "labels": torch.zeros(batch)}
        answer = functools.partial(_known_query, shown, asked, arguments, max(phases), count)
        known = functools.partial(starmap, answer, asking)
        of_step, held = _count_step(model, objective, shown, classes, teacher, arguments, known)
        flops, kept = flops + share * of_step, max(kept, held)
    numbers = sum(parameter.numel() for parameter in trained)
    kept_by_optimizer = optimizer_states(arguments)
    states = 4 * numbers * (1 + (2 if kept_by_optimizer is None else kept_by_optimizer)) + bytes_of(objective)
    return Cost(inference / batch, flops / batch, kept, states, numbers, steps, seen)


def _trained_on(model: Any, tasks: Any) -> tuple[list[int], list[int], float]:
    """Classes and images of the tasks that a loss trains the model on, and the share of images in later sessions.

    Begins the last session of a model that learns in sessions.
    """
    if not model.fitted or not model.has_session(0):
        return tasks.classes, tasks.images, 0.0
    sessions = sum(map(model.has_session, range(len(tasks.images))))
    classes, images = tasks.classes[:sessions], tasks.images[:sessions]
    model.begin_session(sessions - 1)
    return classes, images, 1 - images[0] / max(1, sum(images)) if model.later is not None else 0.0


def _beside(objective: Objective, ratio: int, held: bool, later: float) -> dict[int, float]:
    """Number of unlabelled images beside a training image -> share of the training images that have so many.

    `later`: the share in later sessions; `held`: whether `keep` holds features of unlabelled images there.
    """
    if objective.reads_unlabelled or not ratio:
        return {ratio: 1.0}
    return {0: 1 - later, ratio: later} if held and later else {0: 1.0}


def _batch(role: str, teacher: Teacher, processors: dict[str, Any], size: int) -> dict[str, Any]:
    """Images as a role sees them, and as its teacher does if its view differs."""
    views = {name: torch.zeros(size, 3, *output_size(processors[name])) for name in (role, *teacher.views)}
    own = {"pixel_values": views[role]}
    same = not teacher.views or same_view(processors[role], processors["teacher"])
    return own if same else {**own, "teacher_pixel_values": views["teacher"]}


def _phase(arguments: CDLTrainingArguments, images: int) -> tuple[int, int]:
    """(steps, images) of a phase with this many training images; images are counted again in every epoch."""
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
    """How many numbers the optimizer keeps per parameter; None if that is not known."""
    if arguments.optim == "sgd":
        options = dict(pair.split("=") for pair in (arguments.optim_args or "").replace(" ", "").split(",") if pair)
        return int(float(options.get("momentum", 0)) > 0)
    return 2 if arguments.optim in ("adamw_torch", "adamw_torch_fused") else None


def unknown_optimizers(recipe: Recipe, roles: Iterable[str]) -> list[str]:
    """Names of the roles' optimizers whose state size is only assumed."""
    found = (_arguments(recipe, role) for role in roles)
    return sorted({arguments.optim.value for arguments in found if optimizer_states(arguments) is None})


def _arguments(recipe: Recipe, role: str) -> Any:
    section = recipe.training_args("teacher" if role == "teacher" else "student")
    return CDLTrainingArguments(output_dir="work", **section)


def _count_step(
    model: Any,
    objective: Objective,
    shown: dict[str, Any],
    classes: list[int],
    teacher: Teacher,
    arguments: Any,
    known: Callable[[], Iterable[torch.Tensor | None]],
) -> tuple[float, int]:
    """`_count` of a step in the precision of the arguments, without computing the `known` queries."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        taught = functools.partial(_step, model, objective, shown, classes, teacher, *known())
        return _count(taught, *(part for part in (model, objective, teacher.model) if part is not None))


def _known_query(
    images: dict[str, Any],
    asked: QueryPasses,
    arguments: Any,
    longest: tuple[int, int],
    beside: int,
    model: Any,
    processor: Any,
) -> torch.Tensor | None:
    """A model's query if the run has computed it before, in its (steps, images) of the longest task; else None."""
    if model is None or not asked.known(model, processor, arguments, *longest, beside):
        return None
    with torch.no_grad():
        return model.compute_query(images["pixel_values"])  # of the shape that counts


def _step(
    model: Any,
    objective: Objective,
    images: dict[str, Any],
    classes: list[int],
    teacher: Teacher,
    query: torch.Tensor | None = None,
    teachers: torch.Tensor | None = None,
) -> None:
    """Do what CDLTrainer.compute_loss does with a batch of the last task, and the backward pass.

    `query`, `teachers`: of model and teacher, if they are known.
    """
    task, current = len(classes) - 1, slice(sum(classes[:-1]), sum(classes))
    pixels, hidden = images["pixel_values"], objective.hidden_states("student") or None
    query = None if hidden and getattr(model, "is_plain", False) else query
    if query is None and (objective.needs_query or teacher.shares_query(images)):
        with torch.no_grad():
            query = model.compute_query(pixels)
    images = {**images, "images": dict.fromkeys(images)}
    teacher.read = (None if teachers is None else lambda *of: teachers, None)
    answers = teacher.answer(images, query, task)
    count = len(images["labels"])
    more = {"labelled": count} if count < len(pixels) else {}
    student = model(pixels, query=query, task_id=task, output_hidden_states=hidden, **more)
    labels = torch.full((count,), current.start)
    objective(student, answers, labels, current)["loss"].backward()


def _same_source(student: Any, teacher: Any) -> bool:
    """Whether both models query the same weights; judged by the backbones' names, as no weights are loaded."""
    return student.config.backbone_name == (teacher.config.query_name or teacher.config.backbone_name)


def _count(step: Callable[[], Any], *parts: torch.nn.Module) -> tuple[float, int]:
    """(FLOPs, bytes kept for the backward pass) of a step, not counting the bytes of the weights of `parts`."""
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


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of a module's state dict."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())
