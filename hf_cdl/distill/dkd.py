r"""DKD: decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679, Sec. 3).

Per sample with label y and softened probabilities p of the teacher, q of the student (temperature \tau), let
b = (p_y, 1 - p_y), "is it y?", and \hat p = p without y, renormalised, "which of the others?":

    KL(p || q) = KL(b_t || b_s) + (1 - p_y) KL(\hat p_t || \hat p_s)      = TCKD + (1 - p_y) NCKD
    L = \tau^2 (\alpha TCKD + \beta NCKD),  mean over the batch

so \beta frees the knowledge about the other classes from the factor 1 - p_y. `alpha`, `beta`, `temperature` are the
paper's \alpha, \beta, T (CIFAR-100). Logits (B, C_t) of the current task, C_t >= 2; with two classes only one is left
besides y, so NCKD is 0 and TCKD is KD. Ours: the paper's warm-up over the first 20 epochs is left out, as in the CDL
authors' code (arXiv 2407.13911), whose values are the defaults here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from hf_cdl.distill.objective import Term, TermConfig, check_classes
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class DKDConfig(TermConfig):
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (CDL: 1 - the weight of CE)."})
    alpha: float = field(default=1.0, metadata={"help": "Weight of the target class's part (TCKD)."})
    beta: float = field(default=4.0, metadata={"help": "Weight of the other classes' part (NCKD)."})
    temperature: float = field(default=4.0, metadata={"help": "Temperature tau of all softmaxes."})
    label: ClassVar[str] = "dkd"

    def __post_init__(self):
        super().__post_init__()
        if min(self.alpha, self.beta) < 0 or self.alpha + self.beta == 0 or self.temperature <= 0:
            raise ValueError(
                f"dkd needs alpha and beta >= 0, not both 0, and temperature > 0; got {self.alpha}, {self.beta} and "
                f"{self.temperature}."
            )


class DKD(Term):
    """The DKD loss. Raises ValueError in a task with one class."""

    config_class = DKDConfig

    def check(self, classes: int, images: int) -> None:
        check_classes("dkd", classes)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        check_classes("dkd", student.logits.shape[-1])
        binary_s, others_s = decouple(student.logits / self.config.temperature, labels)
        binary_t, others_t = decouple(teacher.logits / self.config.temperature, labels)
        target = F.kl_div(binary_s, binary_t, reduction="batchmean", log_target=True)
        others = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
        return self.config.temperature**2 * (self.config.alpha * target + self.config.beta * others)


def decouple(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, 2) of the label against all other classes, and (B, C - 1) among those others."""
    count = logits.shape[1]
    steps = torch.arange(1, count, device=logits.device)
    others = logits.gather(1, (labels[:, None] + steps) % count)  # every class but the label, starting after it
    both = torch.cat([logits.gather(1, labels[:, None]), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(others, dim=1)
