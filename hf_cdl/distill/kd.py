r"""KD: the student's head follows the teacher's softened logits (Hinton et al. 2015, arXiv 1503.02531, Sec. 2).

In the stream only the current task's classes are compared (Continual Distillation Learning, arXiv 2407.13911).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_cdl.distill.objective import Term, kd_loss
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class KDConfig:
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (the paper's alpha; CE gets 1 - alpha)."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature tau of both softmaxes."})

    def __post_init__(self):
        if self.weight < 0 or self.temperature <= 0:
            raise ValueError(f"kd needs weight >= 0 and temperature > 0; got {self.weight} and {self.temperature}.")


class KD(Term):
    config_class = KDConfig

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        return kd_loss(student.logits, teacher.logits, self.config.temperature)
