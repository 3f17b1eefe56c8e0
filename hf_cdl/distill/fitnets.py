r"""FitNets: the student's last layer predicts the teacher's (Romero et al. 2015, arXiv 1412.6550).

This is the ViT form of the CDL authors' code (arXiv 2407.13911):

    L = mean over samples, tokens and channels of (W h_s + b - h_t)^2

h_s (B, N, D_s), h_t (B, N, D_t): output of the last layer before the final norm, CLS and patches; W (D_t, D_s) and b
are trained with the student and then discarded. The paper takes hints from a middle layer, in a stage before training;
here it is always the last layer. Ours: if the numbers of tokens differ (another patch size), the student's patches are
interpolated to the teacher's grid; KD tokens, registers and the like are not compared. The authors combine it with KD:
`distill: [{type: kd}, {type: fitnets}]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hf_cdl.distill.objective import Term, TermConfig, hidden_state, same_tokens
from hf_cdl.types import CDLOutput, ModelShape


@dataclass(frozen=True)
class FitNetsConfig(TermConfig):
    weight: float = field(default=0.1, metadata={"help": "Weight of the term."})
    label: ClassVar[str] = "fitnets"


class FitNets(Term):
    config_class = FitNetsConfig
    reads_unlabelled = True
    needs_hidden_states = True
    compares_classes = False

    def __init__(self, config: FitNetsConfig, student: ModelShape, teacher: ModelShape):
        super().__init__(config, student, teacher)
        self.needs = {"student": (-1,), "teacher": (-1,)}
        self.projection = nn.Linear(student.hidden_size, teacher.hidden_size)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        ours, theirs = same_tokens(hidden_state(student, -1), hidden_state(teacher, -1))
        return F.mse_loss(self.projection(ours), theirs)
