r"""The objective: masked cross-entropy, the pool's loss, and a sum of distillation terms, every one of them named.

    L = w_{ce} CE(z_s, y) + L_{pool} + \sum_i w_i term_i(student, teacher, y)

All of it sees the current task's classes only: the slice of the logits is made once, here. CE over that slice is the
reference's masked cross-entropy (earlier classes set to -inf, later ones cut).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hf_cdl.types import CDLOutput


class Term(nn.Module):
    r"""Base of the distillation terms: term(student, teacher, labels) -> scalar, before its weight.

    Logits arrive cut to the current task's classes (B, C_t), labels count from the task's first class.
    A method file defines a frozen dataclass `Config` with at least `weight`, and a subclass with `config_class` and
    `forward`. `needs` names what must be computed for it besides logits ("hidden_states" of both models);
    `student_parts` are the CDLConfig sections that the student must have, with their defaults for this term.
    """

    config_class: ClassVar[type]
    needs: ClassVar[frozenset[str]] = frozenset()
    student_parts: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Objective(nn.Module):
    """Weighted sum of named losses. Terms may own layers: they live in the trained module, never in its files."""

    def __init__(self, ce_weight: float = 1.0, terms: Sequence[tuple[str, Term]] = ()):
        super().__init__()
        self.ce_weight = ce_weight
        self.terms = nn.ModuleDict()
        for name, term in terms:
            count = sum(key == name or key.startswith(f"{name}_") for key in self.terms)
            self.terms[f"{name}_{count + 1}" if count else name] = term

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at a teacher."""
        return len(self.terms) > 0

    @property
    def needs(self) -> frozenset[str]:
        """What the terms look at besides logits."""
        terms: Any = self.terms.values()
        return frozenset().union(*(term.needs for term in terms))

    def forward(
        self, student: CDLOutput, teacher: CDLOutput | None, labels: torch.Tensor, classes: slice
    ) -> dict[str, torch.Tensor]:
        """Every loss by name, unweighted, and their weighted sum as `loss`; `classes` is the current task's slice."""
        student, labels = current_classes(student, classes), labels - classes.start
        losses = {"ce": F.cross_entropy(student.logits, labels)}
        total = self.ce_weight * losses["ce"]
        if student.prompt_loss is not None:
            losses["prompt"] = student.prompt_loss
            total = total + student.prompt_loss
        if self.terms:
            if teacher is None:
                raise ValueError(f"The terms {', '.join(self.terms)} need a teacher, but the trainer was given none.")
            teacher = current_classes(teacher, classes)
            for name, module in self.terms.items():
                term: Any = module
                losses[name] = term(student, teacher, labels)
                total = total + term.config.weight * losses[name]
        return {"loss": total, **losses}


def current_classes(output: CDLOutput, classes: slice) -> CDLOutput:
    """The output with its logits cut to a task's classes, in float32."""
    cut = {
        name: value[:, classes].float()
        for name, value in (("logits", output.logits), ("kd_logits", output.kd_logits))
        if value is not None
    }
    return dataclasses.replace(output, **cut)


def kd_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    r"""K_\tau(t || s) = \tau^2 KL(softmax(z_t / \tau) || softmax(z_s / \tau)) of logits (B, C), mean over the batch.

    Hinton et al. 2015 (arXiv 1503.02531), Sec. 2; the factor \tau^2 keeps the gradient's size independent of \tau.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
