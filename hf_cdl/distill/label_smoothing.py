r"""Label smoothing (Szegedy et al. 2016, arXiv 1512.00567, Sec. 7): cross-entropy with uniformly smoothed labels.

    L = -\sum_c q_c \log p_c,    q = (1 - \epsilon) 1[c = y] + \epsilon / C_t

over the current task's C_t classes, p = softmax(z). It is a control for `kd` without a teacher: what distillation
gains beyond this term does not come from soft targets as such. Combined with w_{ce} CE, a weight w smooths by
w \epsilon / (w + w_{ce}) overall; the paper's own form is weight 1 with ce_weight 0. `epsilon` is its \epsilon = 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from hf_cdl.distill.objective import Term, TermConfig
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class LabelSmoothingConfig(TermConfig):
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (CE gets 1 - weight)."})
    epsilon: float = field(default=0.1, metadata={"help": "Share of the uniform distribution in the labels."})
    label: ClassVar[str] = "label_smoothing"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"label_smoothing needs epsilon from 0 to 1; got {self.epsilon}.")


class LabelSmoothing(Term):
    config_class = LabelSmoothingConfig
    needs_teacher: ClassVar[bool] = False

    def forward(self, student: CDLOutput, teacher: Any, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(student.logits, labels, label_smoothing=self.config.epsilon)
