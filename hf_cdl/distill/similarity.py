r"""Similarity: the student matches the teacher's pairwise image similarities.

Ours, after Tung & Mori 2019 (arXiv 1907.09682) and Park et al. 2019 (arXiv 1904.05068):

    S_{ij} = <u_i, u_j>    u_i = v_i / |v_i|    v_i = (f_i - mean f) / std f
    L = 1/B^2 \sum_{ij} (S^s_{ij} - S^t_{ij})^2

f (B, D) are the CLS features, mean and std are per dimension over the batch, S (B, B) are the cosines of all pairs;
teacher and student may differ in width, and neither labels nor a trained teacher are needed. Tung & Mori compare
S = f f^T with rows of unit length. It is meant for the first session before a `ridge` head: that head depends on its
features only through inner products, so a student with the teacher's S predicts what the teacher would. The batch is
one micro-batch on one process, so the micro-batch size decides which pairs are compared. Fewer than three images teach
nothing: two standardised images are always each other's opposite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from hf_cdl.distill.objective import Term, TermConfig, check_images
from hf_cdl.types import CDLOutput


@dataclass(frozen=True)
class SimilarityConfig(TermConfig):
    weight: float = field(default=1.0, metadata={"help": "Weight of the term."})
    label: ClassVar[str] = "similarity"


class Similarity(Term):
    config_class = SimilarityConfig
    reads_unlabelled = True
    needs_features = True
    compares_classes = False

    def check(self, classes: int, images: int) -> None:
        check_images("similarity", images, least=3)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(similarities(student.features), similarities(teacher.features))


def similarities(features: Any) -> torch.Tensor:
    """Cosines (B, B) of features (B, D), each dimension standardised over the batch.

    A dimension that hardly varies is divided by a hundredth of the mean deviation.
    """
    features = features.float()
    std = features.std(dim=0, correction=0)
    scale = torch.maximum(std, 0.01 * std.mean() + 1e-6)
    features = F.normalize((features - features.mean(dim=0)) / scale, dim=-1)
    return features @ features.T
