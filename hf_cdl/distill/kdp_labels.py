r"""KDP without a teacher: its KD token, prompts and head, trained on the labels instead (ours, a control).

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha CE(z_{kd}, y)

The student has the same parts as with `kdp` (arXiv 2407.13911), the same parameters and the same inference cost, so
the difference between the two is the effect of the teacher; that between `kdp` and a plain student is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from hf_cdl.distill.objective import Term, TermConfig
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class KDPLabelsConfig(TermConfig):
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (the CLS head's CE gets 1 - weight)."})
    label: ClassVar[str] = "kdp_labels"


class KDPLabels(Term):
    config_class = KDPLabelsConfig
    needs_teacher: ClassVar[bool] = False
    student_parts: ClassVar = {"kd_prompt": {}}

    def forward(self, student: CDLOutput, teacher: Any, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(student.kd_logits, labels)
