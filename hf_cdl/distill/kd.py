r"""KD: the student matches the teacher's softened logits (Hinton et al. 2015, arXiv 1503.02531, Sec. 2).

In the stream only the current task's classes are compared (Continual Distillation Learning, arXiv 2407.13911).
`standardise` is logit standardisation (LSKD, Sun et al. 2024, arXiv 2403.01427): z <- (z - mean(z)) / std(z) over
those classes, for teacher and student alike, so their scales need not match. std is the sample standard deviation
(C_t - 1) plus 1e-7, as in the authors' code. It needs at least three classes in a task: with two, the standardised
logits are always +-0.7, whatever the student predicts.

`threshold` masks unlabelled images of which the teacher is not sure, as FixMatch does (Sohn et al. 2020, arXiv
2001.07685, Eq. 4), but the answers that count stay soft [ours]; 0 counts them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_cdl.distill.objective import (
    Term,
    TermConfig,
    check_classes,
    check_threshold,
    confident,
    kd_loss,
    threshold_field,
)
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class KDConfig(TermConfig):
    weight: float = field(default=0.5, metadata={"help": "Weight of the term (the paper's alpha; CE gets 1 - alpha)."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature tau of both softmaxes."})
    standardise: bool = field(default=False, metadata={"help": "Standardise the logits of each sample first (LSKD)."})
    threshold: float = threshold_field(0.0)
    label: ClassVar[str] = "kd"

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"kd needs temperature > 0; got {self.temperature}.")
        check_threshold(self)


class KD(Term):
    config_class = KDConfig
    reads_unlabelled = True

    def check(self, classes: int, images: int) -> None:
        if self.config.standardise:
            check_classes("kd with standardise", classes, least=3)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        ours, theirs = student.logits, teacher.logits
        counted = confident(theirs, len(labels), self.config.threshold)
        if self.config.standardise:
            check_classes("kd with standardise", ours.shape[-1], least=3)
            ours, theirs = standardised(ours), standardised(theirs)
        return kd_loss(ours, theirs, self.config.temperature, counted)


def standardised(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) with each row scaled to mean 0 and standard deviation 1."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)
