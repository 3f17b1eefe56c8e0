r"""DIST: match relations instead of values (Huang et al. 2022, arXiv 2205.10536, Sec. 3).

With softened probabilities Y^s, Y^t (B, C_t) and Pearson's correlation \rho, 1 - \rho is a distance invariant to scale
and shift. Rows: how a sample ranks the classes (inter-class); columns: how a class ranks the samples (intra-class):

    L = \tau^2 ( \beta / B \sum_i (1 - \rho(Y^s_{i,:}, Y^t_{i,:}))
                + \gamma / C_t \sum_j (1 - \rho(Y^s_{:,j}, Y^t_{:,j})) )

`beta`, `gamma`, `temperature` are the paper's \beta, \gamma, \tau. Defaults \beta = \gamma = 2 as in the paper; the
authors' published code defaults to 1. Ours: a batch of one sample has no columns to compare, so their part is 0. For
two numbers \rho is always 1 or -1, so rows teach nothing in a task of two classes and columns nothing in a batch of
two samples. Columns run over one micro-batch on one process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_cdl.counted import counted
from hf_cdl.distill.objective import Term, TermConfig, check_classes, check_images
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class DISTConfig(TermConfig):
    weight: float = field(default=1.0, metadata={"help": "Weight of the term, in addition to beta and gamma."})
    beta: float = field(default=2.0, metadata={"help": "Weight of the rows (inter-class); the authors' code: 1."})
    gamma: float = field(default=2.0, metadata={"help": "Weight of the columns (intra-class); the authors' code: 1."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature tau of both softmaxes."})
    label: ClassVar[str] = "dist"

    def __post_init__(self):
        super().__post_init__()
        if min(self.beta, self.gamma) < 0 or self.beta + self.gamma == 0 or self.temperature <= 0:
            raise ValueError(
                f"dist needs beta and gamma >= 0, not both 0, and temperature > 0; got {self.beta}, {self.gamma} and "
                f"{self.temperature}."
            )


class DIST(Term):
    """The DIST loss. Raises ValueError in a task with one class."""

    config_class = DISTConfig
    reads_unlabelled = True

    def check(self, classes: int, images: int) -> None:
        check_classes("dist", classes)
        if self.config.gamma == 0:
            check_classes("dist with gamma 0", classes, least=3)
        elif classes < 3 or self.config.beta == 0:  # the columns alone teach
            check_images(f"dist with {counted(classes, 'class')} and beta {self.config.beta}", images, least=3)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        check_classes("dist", student.logits.shape[-1])
        ours = torch.softmax(student.logits / self.config.temperature, dim=1)
        theirs = torch.softmax(teacher.logits / self.config.temperature, dim=1)
        loss = self.config.beta * pearson_distance(ours, theirs)
        if len(ours) > 1:
            loss = loss + self.config.gamma * pearson_distance(ours.T, theirs.T)
        return self.config.temperature**2 * loss


def pearson_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""Mean over rows of 1 - \rho between the rows of two matrices."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return 1 - ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()
