r"""Pseudo-labels: on images without labels, the class that the teacher is sure of (FixMatch's loss l_u).

Sohn et al. 2020 (arXiv 2001.07685, Eq. 4), with \mu B unlabelled images u_b, q_b = softmax(z_t(u_b)) the prediction
that makes the pseudo-label, and \hat q_b = argmax(q_b):

    L = 1 / (\mu B) \sum_b 1(max(q_b) >= \tau) CE(z_s(u_b), \hat q_b)

`threshold` is the paper's \tau = 0.95, `weight` its \lambda_u = 1; \mu is `data.unlabelled_ratio` (7 in the paper).
Ours: the prediction is the teacher's instead of the model's own; both see the same augmented view, where the paper has
a weak one for q_b and a strong one for the model; as for every loss, the classes are those of the current task, so an
image of another class counts only if the teacher takes it for one of these. The student learns with its CLS head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from hf_cdl.distill.objective import Term, TermConfig, check_classes, check_threshold, confident, threshold_field
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class PseudoLabelsConfig(TermConfig):
    weight: float = field(default=1.0, metadata={"help": "Weight of the term (the paper's lambda_u)."})
    threshold: float = threshold_field(0.95)
    label: ClassVar[str] = "pseudo_labels"

    def __post_init__(self):
        super().__post_init__()
        check_threshold(self)


class PseudoLabels(Term):
    """The loss on images without labels. Raises ValueError if there are none."""

    config_class = PseudoLabelsConfig
    reads_unlabelled = True
    needs_unlabelled = True

    def check(self, classes: int, images: int) -> None:
        check_classes("pseudo_labels", classes)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        ours, theirs = student.logits[len(labels) :], teacher.logits[len(labels) :]
        if not len(ours):
            raise ValueError("pseudo_labels learns from images without labels, but the batch has none.")
        each = F.cross_entropy(ours, theirs.argmax(dim=-1), reduction="none")
        counted = confident(theirs, 0, self.config.threshold)
        return each.mean() if counted is None else (each * counted).mean()
