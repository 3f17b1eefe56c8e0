"""Linear discriminant analysis, from the same sums as ridge regression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from hf_cdl.heads.bits import add, movable, read
from hf_cdl.heads.class_sums import ClassSums
from hf_cdl.heads.sums import SumsConfig, SumsHead
from hf_cdl.heads.validation import choose_strength

_LEAST = 1e-6
"""Least mean variance within classes, as a share of the mean square: classes of one image have none."""


@dataclass(frozen=True)
class LdaConfig(SumsConfig):
    scale: float | Literal["auto"] = field(
        default=1.0,
        metadata={"help": "Factor of the scores (log-likelihoods); it changes confidence, not accuracy."},
    )
    shrinkage: float | Literal["auto"] = field(
        default="auto",
        metadata={"help": "Share a, above 0 and up to 1, of a multiple of the identity in the covariance; auto: as "
                  "ridge regression would choose, after every task."},
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.shrinkage != "auto" and not 0 < self.shrinkage <= 1:
            raise ValueError(f"An lda head needs shrinkage above 0 to 1, or auto; got {self.shrinkage}.")


class LdaHead(SumsHead):
    r"""Linear discriminant analysis with one shrunk covariance of all classes (Fisher 1936; Hastie et al., Sec. 4.3).

        \Sigma = (G - \sum_c n_c \mu_c \mu_c^T) / n    \Sigma_a = (1 - a) \Sigma + a (tr \Sigma / M) I
        scores_c = \mu_c^T \Sigma_a^{-1} h - \mu_c^T \Sigma_a^{-1} \mu_c / 2

    with class means \mu_c and `shrinkage` a. The classes have equal priors, however many images they have. SLDA (Hayes
    and Kanan 2020, arXiv 1909.01520) updates the same statistics image by image. With `auto` (ours) n \Sigma gets the
    same multiple of the identity that ridge regression would choose for G.
    """

    config_class: ClassVar[type] = LdaConfig
    choice: ClassVar[str] = "shrinkage"
    has_bias: ClassVar[bool] = True
    config: LdaConfig

    def drop_means(self, block: ClassSums, gone: list[int]) -> None:
        """Of a dropped class whose images stay in G, the scatter is kept, but not the mean."""
        total = read(block.total)[gone]
        add(self.gram, -total.T @ (total / movable(block.count)[gone, None]))

    def choose(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> float:
        strength = choose_strength(gram, total, count, int(self.images))
        return strength / (strength + self._variance(gram, total, count.to(total)) * int(self.images))

    def solve(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = total / count.clamp(min=1)[:, None]
        self._factor = self._factorised(gram, means, count)
        weight = torch.cholesky_solve(means.T, self._factor).T
        return weight, -(weight * means).sum(dim=1) / 2

    def _variance(self, gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> float:
        """Mean variance of a feature within its class."""
        between = (total.square().sum(dim=1) / count.clamp(min=1)).sum()
        least = _LEAST * gram.diagonal().sum()
        return float(torch.maximum(gram.diagonal().sum() - between, least)) / len(gram) / int(self.images)

    def _factorised(self, gram: torch.Tensor, means: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Cholesky factor of the shrunk covariance (M, M)."""
        within = (gram - means.T @ (count[:, None] * means)) / int(self.images)
        share = self.choice_made
        within = (1 - share) * within
        within.diagonal().add_(share * self._variance(gram, count[:, None] * means, count))
        factor, failed = torch.linalg.cholesky_ex(within)
        if failed:
            raise FloatingPointError(
                f"The lda head's shrinkage {share} is too small for these features; raise head.shrinkage."
            )
        return factor

    def leave_one_out(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        r"""Scores from means and covariance without each image; the share of the identity is not changed.

        With d = h - \mu_y, the mean becomes \mu_y - d / (n_y - 1) and the covariance \Sigma_a - k d d^T, whose inverse
        follows by Sherman and Morrison.
        """
        count, means, inverse = self._solved()
        h, labels = movable(features).double(), movable(labels)
        rest = (count[labels] - 1).clamp(min=1).to(h)[:, None]
        d = h - means[labels]
        mapped, weight = d @ inverse, means @ inverse
        own = F.one_hot(labels, len(means)).to(h) / rest  # mu_c moves by -own d
        size = (d * mapped).sum(dim=1, keepdim=True)
        k = (1 - self.choice_made) / int(self.images) * (rest + 1) / rest
        gain = k / (1 - k * size).clamp(min=1e-6)
        along = mapped @ means.T - own * size  # d^T Sigma^-1 mu of the moved means
        linear = h @ weight.T - own * (mapped * h).sum(dim=1, keepdim=True)
        square = (weight * means).sum(dim=1) - 2 * own * (mapped @ means.T) + own.square() * size
        linear = linear + gain * along * (mapped * h).sum(dim=1, keepdim=True)
        return linear - (square + gain * along.square()) / 2

    def class_left_out(self, features: torch.Tensor, label: int) -> torch.Tensor:
        r"""Scores from the covariance without these images; the share of the identity is not changed.

        With U the images' deviations from their mean and P = \Sigma_a^{-1}, the inverse of \Sigma_a - k U^T U is
        P + k P U^T (I - k U P U^T)^{-1} U P (Woodbury).
        """
        _, means, inverse = self._solved()
        h = movable(features).double()
        u = h - means[label]
        mapped = u @ inverse
        k = (1 - self.choice_made) / int(self.images)
        gain = k * torch.linalg.solve(torch.eye(len(h)).to(h) - k * mapped @ u.T, mapped)
        weight = means @ inverse + means @ mapped.T @ gain
        fewer = 1 - len(h) / int(self.images)  # the covariance is one of fewer images
        return fewer * (h @ weight.T - (weight * means).sum(dim=1) / 2)

    def _solved(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class counts and means, and the inverse of the shrunk covariance."""
        count = self.of_classes("count")
        means = self.of_classes("total") / count.clamp(min=1)[:, None]
        factor = self._factor
        if factor is None:
            factor = self._factorised(self.gram_matrix(), means, count.to(means))
        return count, means, torch.cholesky_inverse(factor)
