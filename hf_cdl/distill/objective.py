r"""The objective: masked cross-entropy, the prompt pool's loss, and a sum of named distillation terms.

    L = w_{ce} CE(z_s, y) + L_{pool} + \sum_i w_i term_i(student, teacher, y)

All losses see the current task's classes only: the logits are sliced once, here. CE over that slice is the reference
implementation's masked cross-entropy (earlier classes set to -inf, later ones cut).

Images without labels may come behind a batch's labelled ones. CE, the pool's loss and most terms see the labelled ones
alone; a term with `reads_unlabelled` sees both, and its mean is over both.

Every loss is a mean over the images of a batch; the trainer turns the means of a step's micro-batches on all processes
into the mean over all images of the step. A loss that is not a mean of per-image losses, because it compares or
normalises the images of a batch jointly, sees only one micro-batch on one process: `similarity`, the columns of
`dist`, batch norms in `dual_path` and in classifiers, and match losses with `reduction: sum`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hf_cdl.checked import check_types, fits, short
from hf_cdl.registry import usable
from hf_cdl.types import CDLOutput, ModelShape

Role = Literal["student", "teacher"]
LOSSES = ("loss", "ce", "prompt", "keep")
"""Names of the objective's own losses, and of a session's, which no term can have."""
PARTS = ("kd_prompt", "mapping")
"""Sections of a CDLConfig that terms may ask for."""


@dataclass(frozen=True)
class Asks:
    """A model's prompts in a recipe: whether it has any, and which model computes their queries (None: no queries)."""

    prompted: bool
    query: str | None


@dataclass(frozen=True)
class TermConfig:
    """Fields of a term's section in a recipe. Subclasses set the default `weight` and `label`, their name in messages.

    Raises ValueError for a value of the wrong type, and for a negative weight.
    """

    weight: float = field(default=1.0, metadata={"help": "Weight of the term."})
    label: ClassVar[str] = "A term"

    def __post_init__(self):
        check_types(self, self.label)
        if self.weight < 0:
            raise ValueError(f"{self.label} needs weight >= 0; got {self.weight}.")


class Term(nn.Module, ABC):
    r"""Base class of distillation terms: term(student, teacher, labels) -> scalar, before weighting.

    A loss with several parts may be returned as a dict of scalars, which are summed and also logged one by one as
    `term/part`. Logits are already cut to the current task's classes (B, C_t), and labels count from the task's first
    class. A method file defines a frozen dataclass derived from TermConfig, and a subclass with `forward` and that
    dataclass as `config_class`. `student` and `teacher` are the sizes of both models, for terms that own layers.
    `needs` lists the hidden states a term uses besides logits, by role, numbered as in CDLOutput (0 the embeddings, -1
    the last layer): {"student": (-1,), "teacher": (-1,)}; no others are kept. `student_parts` are the CDLConfig
    sections that the student must have, with their defaults for this term. A term with `needs_query` gets the one-pass
    student's `similarities` to a query; one without `needs_teacher` gets None if there is no teacher; one with
    `needs_hidden_states` uses some, so both models must have token layers; one with `needs_features` uses the CLS
    features, which ordinary classifiers do not expose. A term that does not compare classes (`compares_classes` false)
    also learns from a task with one class. A term with `reads_unlabelled` also learns from images without labels. Both
    models process them like the others; of B images in an output, the first `len(labels)` have labels. A term with
    `needs_unlabelled` learns from unlabelled images alone. A config field about them has `unlabelled` in its metadata.
    """

    config_class: ClassVar[type[TermConfig]] = TermConfig
    needs_teacher: ClassVar[bool] = True
    needs_query: ClassVar[bool] = False
    needs_hidden_states: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    compares_classes: ClassVar[bool] = True
    reads_unlabelled: ClassVar[bool] = False
    needs_unlabelled: ClassVar[bool] = False
    student_parts: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, config: Any, student: ModelShape, teacher: ModelShape):
        super().__init__()
        self.config, self.student, self.teacher = config, student, teacher
        self.needs: dict[Role, tuple[int, ...]] = {}

    @abstractmethod
    def forward(
        self, student: CDLOutput, teacher: Any, labels: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]: ...

    @classmethod
    def check_class(cls) -> str | None:
        """What the class lacks, worded to follow its name in a message; None if it is complete."""
        asked = [name for name in ("attach", "begin_task", "consult") if getattr(cls, name) is not getattr(Term, name)]
        if asked and not cls.needs_teacher:
            return f"has {', '.join(asked)}, which only a teacher leads to, but not needs_teacher; set that"
        if cls.reads_unlabelled and not cls.needs_teacher:
            return "has reads_unlabelled, but not needs_teacher: a teacher teaches on images without labels; set that"
        if cls.needs_unlabelled and not cls.reads_unlabelled:
            return "has needs_unlabelled, but not reads_unlabelled, so it would never see any; set that"
        parts: Any = cls.student_parts
        if (
            not isinstance(parts, dict)
            or not {*parts} <= {*PARTS}
            or not all(isinstance(p, dict) for p in parts.values())
        ):
            return (
                f"has student_parts {short(parts)}; allowed: fields of {' or '.join(PARTS)}, as {{'{PARTS[0]}': {{}}}}"
            )
        return None

    @classmethod
    def check_recipe(cls, student: Asks, teacher: Asks | None) -> list[tuple[str, str]]:
        """Problems of a recipe with this term, given both models' prompts, as pairs (field, problem and remedy).

        `teacher` is None if there is no teacher.
        """
        return []

    def check(self, classes: int, images: int) -> None:
        """Raise ValueError if the term cannot learn from a task with `classes` classes in batches of `images`."""

    def begin_step(self) -> None:
        """Called at the start of an optimizer step of one or more micro-batches."""

    # Only a term that extends the teacher needs the hooks below.

    def attach(self, teacher: Any) -> None:
        """Create the layers that depend on the teacher; called once, before training."""

    def begin_task(self, teacher: Any) -> None:
        """Create what is needed for one task only; called at its start, when the teacher has already learnt it."""

    def end_task(self) -> None:
        """Drop what this task alone needed; the rest is kept for the next task and for resuming."""

    def consult(self, answer: CDLOutput, asked: Mapping[str, Any]) -> CDLOutput:
        """Extend `answer`, the teacher's output without gradient for the inputs `asked`."""
        return answer

    def rates(self) -> dict[nn.Parameter, float]:
        """Learning-rate factors of parameters that do not train at the full rate."""
        return {}


class Objective(nn.Module):
    """Weighted sum of named losses. Terms may own layers, which are trained with the model but never saved with it."""

    def __init__(self, ce_weight: float = 1.0, terms: Sequence[tuple[str, Term]] = ()):
        super().__init__()
        if not fits(ce_weight, float) or ce_weight < 0:
            raise ValueError(f"ce_weight is {short(ce_weight)}, but a weight must be a finite number of at least 0.")
        for name, term in (pairs := list(terms.items() if isinstance(terms, Mapping) else terms)):
            if name in LOSSES or not usable(name):
                raise ValueError(
                    f"A term is named {short(name)}; allowed are words of letters, digits and _ without another "
                    f"meaning (which {', '.join(LOSSES)} have). Name it as its type: ('kd', term)."
                )
            if not isinstance(term, Term):
                raise ValueError(
                    f"The term {name} is {short(term)}, but must be one that was made for both models: "
                    "TERMS['kd'](config, student.shape, teacher.shape)."
                )
        self.ce_weight = ce_weight
        self.terms = nn.ModuleDict()
        for name, term in pairs:
            count = sum(key == name or key.startswith(f"{name}_") for key in self.terms)
            key = f"{name}_{count + 1}" if count else name
            if key in self.terms:
                raise ValueError(f"Two terms would be named {key}; give one of them another name than {name}.")
            self.terms[key] = term
        consulted = [name for name, term in pairs if type(term).consult is not Term.consult]
        if len(consulted) > 1:
            raise ValueError(f"The terms {', '.join(consulted)} each put a path beside the teacher's own; keep one.")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term uses a teacher."""
        return any(term.needs_teacher for term in self._terms())

    @property
    def needs_query(self) -> bool:
        """Whether any term compares the student's one-pass queries with the query of an un-prompted pass."""
        return any(term.needs_query for term in self._terms())

    @property
    def compares_classes(self) -> bool:
        """Whether any loss compares the classes of a task with each other."""
        terms = (term for term in self._terms() if term.config.weight > 0)
        return self.ce_weight > 0 or any(term.compares_classes for term in terms)

    @property
    def reads_unlabelled(self) -> bool:
        """Whether any term learns from images without labels."""
        return any(term.reads_unlabelled for term in self._terms() if term.config.weight > 0)

    @property
    def needs_unlabelled(self) -> list[str]:
        """Terms, and fields of terms, that have no effect without unlabelled images."""
        return [
            name if term.needs_unlabelled else f"{name}.{idle}"
            for name, term in self.terms.items()
            for idle in ([""] if term.needs_unlabelled else about_unlabelled(term.config))
        ]

    def check(self, classes: int, images: int) -> None:
        """Raise ValueError if the objective cannot learn from `classes` classes in batches of `images`."""
        if self.ce_weight <= 0 and all(term.config.weight <= 0 for term in self._terms()):
            raise ValueError(
                "ce_weight is 0 and no term has a weight above 0, so nothing would be learnt: give one of "
                "them a weight."
            )
        for term in self._terms():
            term.check(classes, images)

    def begin_step(self) -> None:
        """Tell the terms that an optimizer step begins."""
        for term in self._terms():
            term.begin_step()

    def attach(self, teacher: Any) -> None:
        """Show the terms the teacher, before training."""
        for term in self._terms():
            term.attach(teacher)

    def begin_task(self, teacher: Any) -> None:
        """Tell the terms that a task begins; the teacher has already learnt it."""
        for term in self._terms():
            term.begin_task(teacher)

    def end_task(self) -> None:
        """Tell the terms that the task is learnt."""
        for term in self._terms():
            term.end_task()

    def consult(self, answer: CDLOutput, asked: Mapping[str, Any]) -> CDLOutput:
        """Let the terms extend the teacher's output for the inputs `asked`."""
        for term in self._terms():
            answer = term.consult(answer, asked)
        return answer

    def rates(self) -> dict[nn.Parameter, float]:
        """Learning-rate factors of the terms' parameters that do not train at the full rate."""
        return {parameter: factor for term in self._terms() for parameter, factor in term.rates().items()}

    def _terms(self) -> Any:
        return self.terms.values()

    def hidden_states(self, role: Role) -> list[int]:
        """Indices of the hidden states of a role's model that the terms use; empty if none."""
        return sorted({number for term in self._terms() for number in term.needs.get(role, ())})

    def forward(
        self, student: CDLOutput, teacher: CDLOutput | None, labels: torch.Tensor, classes: slice
    ) -> dict[str, torch.Tensor]:
        """Compute all losses by name, unweighted, and their weighted sum `loss`; `classes`: current task's slice.

        `labels` (n,) are those of the first n images of the outputs. `TERM/counted`, only for logs, is the share of
        the other images that reach the term's threshold.
        """
        student, labels = current_classes(student, classes), labels - classes.start
        ours = first_images(student, len(labels))
        losses = {"ce": F.cross_entropy(ours.logits, labels)}
        total = self.ce_weight * losses["ce"]
        if student.prompt_loss is not None:
            losses["prompt"] = student.prompt_loss
            total = total + student.prompt_loss
        if teacher is not None:
            teacher = current_classes(teacher, classes)
        elif self.needs_teacher:
            raise ValueError(f"The terms {', '.join(self.terms)} need a teacher, but the trainer was given none.")
        theirs = None if teacher is None else first_images(teacher, len(labels))
        for name, module in self.terms.items():
            term: Any = module
            found = term(student, teacher, labels) if term.reads_unlabelled else term(ours, theirs, labels)
            if isinstance(found, dict):
                losses |= {f"{name}/{part}": value for part, value in found.items()}
                found = torch.stack([*found.values()]).sum()
            losses[name] = found
            counted = confident(teacher.logits, len(labels), threshold_of(term)) if teacher is not None else None
            if counted is not None:
                losses[f"{name}/counted"] = counted[len(labels) :].float().mean()
            total = total + term.config.weight * found
        return {"loss": total, **losses}


def current_classes(output: CDLOutput, classes: slice) -> CDLOutput:
    """The output with its logits cut to a task's classes, in float32."""
    cut = {
        name: value[:, classes].float()
        for name in ("logits", "kd_logits", "path_logits")
        if (value := getattr(output, name)) is not None
    }
    return replace(output, **cut)


def first_images(output: CDLOutput, count: int) -> CDLOutput:
    """The output for the first `count` images; losses stay as they are."""
    if len(output.logits) == count:
        return output

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cut, value))
        return value[:count] if isinstance(value, torch.Tensor) and value.dim() else value

    return replace(output, **{f.name: cut(getattr(output, f.name)) for f in fields(output)})


def kd_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, counted: torch.Tensor | None = None
) -> torch.Tensor:
    r"""K_\tau(t || s) = \tau^2 KL(softmax(z_t / \tau) || softmax(z_s / \tau)) of logits (B, C), mean over the batch.

    Hinton et al. 2015 (arXiv 1503.02531), Sec. 2; the factor \tau^2 keeps the gradient scale independent of \tau. Of
    images that are not `counted` (B,) the divergence is taken as 0.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    if counted is None:
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
    each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)
    return (each * counted).mean() * temperature**2


def threshold_field(default: float) -> Any:
    """The field `threshold` of a term's config: which of the unlabelled images it learns from."""
    text = "An unlabelled image counts if the teacher's largest probability over the task's classes is at least this."
    return field(default=default, metadata={"help": text, "unlabelled": True})


def check_threshold(config: Any) -> None:
    """Raise ValueError unless a term's `threshold` is a probability."""
    if not 0 <= config.threshold <= 1:
        raise ValueError(f"{config.label} needs threshold from 0 to 1, a probability; got {config.threshold}.")


def threshold_of(term: Term) -> float:
    """The threshold of a term that has one; 0 means none."""
    return getattr(term.config, "threshold", 0.0) if term.reads_unlabelled else 0.0


def confident(teacher: torch.Tensor, labelled: int, threshold: float) -> torch.Tensor | None:
    r"""Which images count (B,), given the teacher's logits (B, C): the first `labelled`, and 1(max_c p_c >= \tau).

    FixMatch's mask (Sohn et al. 2020, arXiv 2001.07685, Eq. 4). None if all count.
    """
    if threshold == 0 or labelled == len(teacher):
        return None
    counted = teacher.softmax(dim=-1).amax(dim=-1) >= threshold
    counted[:labelled] = True
    return counted


def about_unlabelled(config: Any) -> list[str]:
    """The fields of a term's config that are set and are about unlabelled images."""
    marked = [f for f in fields(config) if f.metadata.get("unlabelled")]
    return [f.name for f in marked if getattr(config, f.name) != f.default]


def check_classes(term: str, count: int, least: int = 2) -> None:
    """Raise ValueError if a task has fewer classes than a term that compares them with each other can learn from."""
    if count < least:
        raise ValueError(
            f"The term {term} compares the classes of a task with each other, but this task has {count}. Use larger "
            f"tasks (data.classes_per_task >= {least}) or another term."
        )


def check_images(term: str, count: int, least: int) -> None:
    """Raise ValueError if a batch has fewer images than a term that compares them with each other can learn from."""
    if count < least:
        raise ValueError(
            f"The term {term} compares the images of a batch with each other, but a batch of this task has {count}. "
            f"Set train.per_device_train_batch_size to {least} or more (and have as many images), or use another term."
        )


def hidden_state(output: CDLOutput, number: int) -> torch.Tensor:
    """Hidden state `number` (B, N, D), in float32. It must be among the term's `needs`."""
    state = None if output.hidden_states is None else output.hidden_states[number]
    if state is None:
        raise ValueError(f"The hidden state {number} was not computed: name it in the term's `needs`.")
    return state.float()


def same_tokens(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Match hidden states (B, N_s, D_s) and (B, N_t, D_t), CLS and patches, to the same tokens.

    If N_s = N_t they are returned unchanged, as in the reference code. Otherwise [ours] the student's square patch
    grid is interpolated to the teacher's (bilinear); CLS is kept if both have one. Raises ValueError for different
    grids that are not square.
    """
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    (s_cls, s_side), (t_cls, t_side) = _layout(student), _layout(teacher)
    patches = student[:, s_cls:]
    if s_side != t_side:
        grid = patches.transpose(1, 2).unflatten(2, (s_side, s_side))
        grid = F.interpolate(grid, size=(t_side, t_side), mode="bilinear", align_corners=False)
        patches = grid.flatten(2).transpose(1, 2)
    if s_cls and t_cls:
        return torch.cat([student[:, :1], patches], dim=1), teacher
    return patches, teacher[:, t_cls:]


def _layout(sequence: torch.Tensor) -> tuple[int, int]:
    """Number of CLS tokens (0 or 1) and side of the square patch grid: n^2 tokens mean no CLS, n^2 + 1 one."""
    count = sequence.shape[1]
    for cls in (0, 1):
        side = math.isqrt(count - cls)
        if side * side == count - cls:
            return cls, side
    raise ValueError(
        f"Teacher and student have different numbers of tokens, and {count} of them are no square grid of patches, so "
        "the grids cannot be matched. Use square images, or a teacher and a student with the same patch grid."
    )
