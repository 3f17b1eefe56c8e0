r"""KD token: DeiT's distillation token in the stream (Touvron et al. 2021, arXiv 2012.12877, Sec. 4).

    L = (1 - \alpha) CE(z_{cls}, y) + \alpha K_\tau(z_t || z_{kd})

A learnable token joins the embedded sequence and is read out after the final norm by a head of its own, z_kd (B, C_t);
inference blends both heads. It is D-CDL without KD prompts: prompts/kd_prompt.py with length 0. `weight` is \alpha,
`temperature` \tau. Of DeiT's two losses this is the soft one (its Eq. 2), as in the CDL authors' code (arXiv
2407.13911); DeiT itself prefers the hard one, CE with the teacher's decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_cdl.distill.objective import Term, kd_loss
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class KDTokenConfig:
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (the paper's alpha; CE gets 1 - alpha)."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature tau of both softmaxes."})

    def __post_init__(self):
        if self.weight < 0 or self.temperature <= 0:
            raise ValueError(
                f"kd_token needs weight >= 0 and temperature > 0; got {self.weight} and {self.temperature}."
            )


class KDToken(Term):
    config_class = KDTokenConfig
    student_parts: ClassVar = {"kd_prompt": {"length": 0}}

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        return kd_loss(student.kd_logits, teacher.logits, self.config.temperature)
