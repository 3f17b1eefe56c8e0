r"""KDP / D-CDL: the teacher's logits teach the KD head, reached by a KD token and KD prompts (arXiv 2407.13911, v3+).

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha K_\tau(z_t || z_{kd})

Cross-entropy trains the CLS head, the distillation loss the KD head; both reach the prompts, since CLS attends to the
KD token. The token and prompts themselves are in prompts/kd_prompt.py; inference blends both heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_cdl.distill.objective import Term, kd_loss
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class KDPConfig:
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (the paper's alpha; CE gets 1 - alpha)."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature tau of both softmaxes."})

    def __post_init__(self):
        if self.weight < 0 or self.temperature <= 0:
            raise ValueError(f"kdp needs weight >= 0 and temperature > 0; got {self.weight} and {self.temperature}.")


class KDP(Term):
    config_class = KDPConfig
    student_parts: ClassVar = {"kd_prompt": {}}

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        return kd_loss(student.kd_logits, teacher.logits, self.config.temperature)
