r"""ReviewKD: every student layer, fused with features of deeper layers, predicts a teacher layer.

Chen et al. 2021 (arXiv 2104.09044), in the ViT form of the CDL authors' code (arXiv 2407.13911).

Let h_s (B, N, D_s) and h_t (B, N, D_t) be the outputs, before the final norm, of a pair of student and teacher layers:
the k = min(L_s, L_t) deepest layers of both are paired, deepest with deepest. From deep to shallow, j = 0 .. k-1, with
attention-based fusion (ABF) units:

    x_0 = LN1(W1 h_s)                                                               out_0 = W2 x_0
    x_j = LN2( a Z(a) + x_{j-1} Z(x_{j-1}) ),  a = LN1(W1 h_s),  Z(.) = LNz(Wz .)   out_j = W2 x_j
    L = 1/k \sum_j MSE(out_j, h_t)

W1, Wz: D_s -> D_s and W2: D_s -> D_t, all with bias, belong to each unit, are trained with the student and then
discarded; x_{j-1} is the residual from the deeper layers. The paper's pyramid pooling and sigmoid fusion are left out,
as in the authors' code, which supports 12 layers only. Ours: any depth; different numbers of tokens are interpolated
as in FitNets. The authors combine it with KD: `distill: [{type: kd}, {type: review_kd}]`.
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
class ReviewKDConfig(TermConfig):
    weight: float = field(default=0.2, metadata={"help": "Weight of the term."})
    label: ClassVar[str] = "review_kd"


class ABF(nn.Module):
    """Attention-based fusion of one layer; the deepest has nothing to fuse with."""

    def __init__(self, student_size: int, teacher_size: int, fuse: bool):
        super().__init__()
        self.proj1, self.norm1 = nn.Linear(student_size, student_size), nn.LayerNorm(student_size)
        self.proj2 = nn.Linear(student_size, teacher_size)
        if fuse:
            self.projz, self.normz = nn.Linear(student_size, student_size), nn.LayerNorm(student_size)
            self.norm2 = nn.LayerNorm(student_size)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction of the teacher's layer (B, N, D_t), and the residual (B, N, D_s) for the next shallower layer."""
        x = self.norm1(self.proj1(hidden))
        if residual is not None:
            weigh_x, weigh_residual = (self.normz(self.projz(value)) for value in (x, residual))
            x = self.norm2(x * weigh_x + residual * weigh_residual)
        return self.proj2(x), x


class ReviewKD(Term):
    config_class = ReviewKDConfig
    reads_unlabelled = True
    needs_hidden_states = True
    compares_classes = False

    def __init__(self, config: ReviewKDConfig, student: ModelShape, teacher: ModelShape):
        super().__init__(config, student, teacher)
        numbers = tuple(range(-1, -min(student.num_layers, teacher.num_layers) - 1, -1))  # deepest first
        self.needs = {"student": numbers, "teacher": numbers}
        self.abf = nn.ModuleList(ABF(student.hidden_size, teacher.hidden_size, fuse=n < -1) for n in numbers)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        losses, residual = [], None
        for number, unit in zip(self.needs["student"], self.abf, strict=True):
            output, residual = unit(hidden_state(student, number), residual)
            losses.append(F.mse_loss(*same_tokens(output, hidden_state(teacher, number))))
        return torch.stack(losses).mean()
