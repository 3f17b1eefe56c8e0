r"""OS-Prompt++: the one-pass query is regularised towards that of an un-prompted pass (Kim et al., arXiv 2402.16189).

    L = \lambda \sum_l || softmax(cos(K_l, q_l)) - softmax(cos(K_l, r)) ||^2

Notation: K_l (M, D) are the pool's keys in layer l, q_l the CLS token entering that layer, r the final CLS feature of
the frozen, un-prompted student. The output's `similarities` hold both cosines (B, M) for every layer with keys; with
CODA-Prompt's attention vectors A they are its weights. Mean over the batch [ours]. `weight` is \lambda. Training needs
a query pass for r, inference does not. It needs no teacher, but a student with `query: one_pass`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_cdl.distill.objective import Term, TermConfig
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class OSPromptConfig(TermConfig):
    weight: float = field(default=1e-4, metadata={"help": "Weight lambda of the regulariser."})
    label: ClassVar[str] = "os_prompt"


class OSPrompt(Term):
    config_class = OSPromptConfig
    needs_teacher: ClassVar = False
    needs_query: ClassVar = True
    compares_classes: ClassVar = False

    def forward(self, student: CDLOutput, teacher: CDLOutput | None, labels: torch.Tensor) -> torch.Tensor:
        if student.similarities is None:
            raise ValueError("os_prompt needs a pool with keys and query: one_pass; the student has none.")
        distances = [
            (one_pass.float().softmax(dim=-1) - reference.float().softmax(dim=-1)).square().sum(dim=-1).mean()
            for one_pass, reference in student.similarities
        ]
        return torch.stack(distances).sum()
