r"""Distillation into a separate KD head, shared by all terms that use one.

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha K_\tau(z_t || z_{kd})

Cross-entropy trains the CLS head, the distillation loss the KD head z_kd (B, C_t); inference blends both. The terms
differ in what the KD head reads and which prompts feed it. `weight` is \alpha, `temperature` is \tau.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_cdl.distill.objective import Term, TermConfig, kd_loss
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class KDHeadConfig(TermConfig):
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (the paper's alpha; CE gets 1 - alpha)."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature tau of both softmaxes."})
    said: ClassVar[str] = "A KD head"

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"A KD head needs temperature > 0; got {self.temperature}.")


class KDHead(Term):
    config_class = KDHeadConfig

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        return kd_loss(student.kd_logits, teacher.logits, self.config.temperature)
