"""hf-cdl plan: what a run would need, as text; costs.py does the counting."""

from __future__ import annotations

from typing import Any

from hf_cdl.backbones.lora import is_adapter
from hf_cdl.commands import train
from hf_cdl.commands.costs import Cost, bytes_of, measure, read_tasks, unknown_optimizers
from hf_cdl.counted import counted
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.recipe import Recipe
from hf_cdl.runs.shards import WORTH

HEADINGS = [
    ["", "backbone", "trained", "stored", "GFLOPs per image", "", "total", "kept for", "peak", "check-"],
    ["role", "params", "a task", "at the end", "inference / step", "steps", "PFLOPs", "backward", "memory", "point"],
]
NOTES = """\
FLOPs count a multiply-add once, as papers do. A step of a role: its query pass unless an earlier role has asked for
the same batch, the teacher's forward pass if it is taught, its own forward and backward pass. Evaluation and the pass
that fits a head after a first session are left out. Peak memory is an estimate: the weights of all models, gradients
and the optimizer's states of what is trained, and what a step keeps for the backward pass, with fused attention and
without the largest passing tensors."""


def main(arguments: list[str]) -> int:
    """Print the plan of what `hf-cdl train` would do with these arguments."""
    return train.main([*arguments, "--plan"])


def plan(recipe: Recipe) -> str:
    """The plan as text.

    Raises ValueError if a backbone's config, a processor or the data cannot be read, or if a role could not learn a
    task.
    """
    tasks = read_tasks(recipe)
    models, costs = measure(recipe, tasks)
    weights = sum(map(bytes_of, models.values()))
    files = {role: _stored_bytes(recipe, model) for role, model in models.items()}
    shared = sum(_shared_bytes(recipe, model) for model in models.values())
    lines = [*HEADINGS, *(cells(role, models[role], cost, weights, files[role]) for role, cost in costs.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = []
    for first, *rest in lines:
        table.append("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]))
    total = sum(cost.total_flops for cost in costs.values())
    unknown = unknown_optimizers(recipe, costs)
    notes = [NOTES, *(f"Of {name} two states for each parameter are assumed, as of Adam." for name in unknown)]
    return "\n".join(
        [
            f"{recipe.name}: {counted(len(tasks.classes), 'task')}, {counted(sum(tasks.classes), 'class')}",
            f"{counted(sum(tasks.images), 'training image')} ({tasks.source})",
            *(f"note: {note}" for note in tasks.notes),
            *_beside(recipe),
            "",
            *table,
            "",
            f"All training: {_peta(total)} PFLOPs. All checkpoints (after every task, and the newest again): at most "
            f"{_size(sum(files.values()) * (len(tasks.classes) + 1) - shared * (len(tasks.classes) - 1))}.",
            *notes,
        ]
    )


def _beside(recipe: Recipe) -> list[str]:
    if recipe.data.unlabelled is None:
        return []
    return [
        f"note: a step on an image is counted with the {recipe.data.unlabelled_ratio} unlabelled beside it, if any"
    ]


def cells(role: str, model: Any, cost: Cost, weights: int, file: int) -> list[str]:
    """A role's line of the table; `weights`: bytes of all models of the run, `file`: bytes of its checkpoint."""
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
    """FLOPs in units of 1e15: one decimal, or two significant digits below 0.1."""
    return f"{flops / 1e15:,.1f}" if flops >= 1e14 else f"{flops / 1e15:.2g}"


def _backbone_sizes(model: Any) -> list[int]:
    """Parameter counts of the backbone and of the query backbone, without adapters."""
    parts = (model.model,) if isinstance(model, ImageClassifier) else (model.backbone, model.query_backbone)
    backbones = [part for part in parts if part is not None]
    return [sum(p.numel() for name, p in part.named_parameters() if not is_adapter(name)) for part in backbones]


def _stored_bytes(recipe: Recipe, model: Any) -> int:
    """Bytes of a checkpoint of the model: a small one leaves out the backbones."""
    small = not recipe.save_backbone and not isinstance(model, ImageClassifier)
    return bytes_of(model) - 4 * small * sum(_backbone_sizes(model))


def _shared_bytes(recipe: Recipe, model: Any) -> int:
    """Bytes that a role's checkpoints share, except the copy of the newest: frozen backbones in their own files."""
    if isinstance(model, ImageClassifier) or model.config.train_backbone or not recipe.save_backbone:
        return 0
    frozen = 4 * sum(_backbone_sizes(model))
    return frozen if frozen >= WORTH else 0


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
