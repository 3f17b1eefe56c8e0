r"""Distillation into a separate KD head, shared by all terms that use one.

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha K_\tau(z_t || z_{kd})

Cross-entropy trains the CLS head, the distillation loss the KD head z_kd (B, C_t); inference blends both. The terms
differ in what the KD head reads and which prompts feed it. `weight` is \alpha, `temperature` is \tau; `threshold`
masks unlabelled images as in kd.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_cdl.distill.objective import Term, TermConfig, check_threshold, confident, kd_loss, threshold_field
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class KDHeadConfig(TermConfig):
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (the paper's alpha; CE gets 1 - alpha)."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature tau of both softmaxes."})
    threshold: float = threshold_field(0.0)
    label: ClassVar[str] = "A KD head"

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"A KD head needs temperature > 0; got {self.temperature}.")
        check_threshold(self)


class KDHead(Term):
    config_class = KDHeadConfig
    reads_unlabelled = True

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        counted = confident(teacher.logits, len(labels), self.config.threshold)
        return kd_loss(student.kd_logits, teacher.logits, self.config.temperature, counted)
