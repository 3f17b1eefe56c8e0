r"""DFPT-KD and DFPT-KD+: a teacher with a second, prompt-based forward path (arXiv 2506.18244).

[paper] The teacher T = head . A_N ... A_1 is frozen. A second path runs through the same stages, with prompt blocks
P_i and fusion blocks F_i between them, and ends in a new head H_\phi. \phi (all P_i, F_i and H_\phi) is tuned while
the student learns, supervised by the original path and by the student; the student learns from both paths. DFPT-KD+
also fine-tunes copies of the stages on the prompt path. Loss formulas, weights, temperature and sizes are not public,
nor is the code: what follows is ours, and we claim no parity with the paper's numbers.

[ours] A_1's output g^1 is shared; then g^{i+1} = A_{i+1}(F_i(g^i + P_i(g^i))) on the prompt path's own features, and
z_p = H_\phi(g^N); z_o are the teacher's own logits, z_s the student's; sg stops the gradient:

    L_\phi = (1 - \rho) K_\tau(sg z_o || z_p) + \rho K_\tau(sg z_s || z_p) + \lambda_y CE(z_p, y)
    L_\psi = \alpha CE(z_s, y) + \beta_o K_\tau(z_o || z_s) + \beta_p K_\tau(sg z_p || z_s)

The term is L_\phi + L_\psi without \alpha CE, which is the recipe's `ce_weight`; one backward pass, one optimizer. In
the logs L_\phi is `dual_path/prompt_path` and the rest `dual_path/student`.
With \beta_p = 0 the student learns exactly as with KD of weight \beta_o. Over free logits the optimum of L_\phi
(with \lambda_y = 0) is the mixture (1 - \rho) softmax(z_o / \tau) + \rho softmax(z_s / \tau). Initially the prompt
path's features equal the teacher's. The defaults are for one offline distillation, with \alpha = 0.1; in a stream
we use \alpha = 0.5, \beta_o = \beta_p = 0.25, \tau = 2 and `head_init: teacher`. A student with a KD head (KDP)
learns both KLs with that head, which also gives z_s in L_\phi. KLs compare the current task's classes. P_i and F_i
are kept across tasks; H_\phi and copied stages are reinitialised in every task. None of it is saved with the student.

The path is built in prompt_path.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from hf_cdl.checked import check_effect
from hf_cdl.distill.objective import TermConfig, kd_loss
from hf_cdl.distill.prompt_path import PromptPath
from hf_cdl.types import CDLOutput, ModelShape


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DualPathConfig(TermConfig):
    weight: float = _help(1.0, "Weight of the whole term, in addition to those of its losses.")
    beta_o: float = _help(0.45, "Weight of the teacher's own logits in the student's loss.")
    beta_p: float = _help(0.45, "Weight of the prompt path's logits in the student's loss.")
    rho: float = _help(0.5, "Weight of the student's logits in the prompt path's loss; the teacher's have 1 - rho.")
    lambda_y: float = _help(0.0, "Weight of the labels in the prompt path's loss.")
    temperature: float = _help(4.0, "Temperature tau of all softmaxes.")
    warmup_steps: int = _help(0, "Steps of each task over which beta_p grows from 0; beta_o has the rest.")
    head_init: Literal["random", "teacher"] = _help("random", "Initialisation of the prompt path's head.")
    copy_from: Literal["all", "first_prompt"] | None = _help(
        None, "For DFPT-KD+: stages that the prompt path trains copies of; null: none (DFPT-KD)."
    )
    copy_rate: float = _help(0.1, "Factor of the learning rate of copied stages.")
    stages: tuple[str, ...] | None = _help(None, "Module paths of the teacher's stages; null: found automatically.")
    insert_after: tuple[int, ...] | None = _help(
        None, "Stages, counted from 1, followed by a prompt block; null: all but one."
    )
    reduction: float | None = _help(None, "Factor r1 by which a block narrows; null: 4 for maps, 8 for tokens.")
    fraction: float = _help(0.25, "Share r2 of the channels that a partial convolution reads.")
    kernels: tuple[int, ...] = _help((3, 5, 7), "Kernel sizes of the partial convolutions.")
    label: ClassVar[str] = "dual_path"

    def __post_init__(self):
        super().__post_init__()
        check_effect(
            self, "dual_path", "copy_rate", self.copy_from is not None, "copy_from is null: nothing is copied"
        )
        check_effect(self, "dual_path", "warmup_steps", self.beta_p != 0, "beta_p, which it grows to, is 0")
        check_effect(self, "dual_path", "fraction", bool(self.kernels), "there are no kernels")
        weights = (self.beta_o, self.beta_p, self.lambda_y, self.copy_rate, self.warmup_steps)
        if min(weights) < 0 or not 0 <= self.rho <= 1 or self.temperature <= 0:
            raise ValueError(
                "dual_path needs weights, copy_rate and warmup_steps >= 0, rho from 0 to 1 and temperature > 0; got "
                f"{self.beta_o}, {self.beta_p}, {self.lambda_y}; {self.copy_rate}, {self.warmup_steps}; {self.rho}; "
                f"{self.temperature}."
            )
        narrow = self.reduction is None or self.reduction > 0
        if not narrow or not 0 < self.fraction <= 1 or any(size < 1 or size % 2 == 0 for size in self.kernels):
            raise ValueError(
                "dual_path needs a reduction above 0, a fraction above 0 and up to 1, and odd kernel sizes; got "
                f"{self.reduction}, {self.fraction} and {self.kernels}."
            )
        if self.insert_after == ():
            raise ValueError("dual_path needs a prompt block: insert_after names stages, or is null for all but one.")


class DualPath(PromptPath):
    config_class = DualPathConfig
    reads_unlabelled = True
    config: DualPathConfig

    def __init__(self, config: DualPathConfig, student: ModelShape, teacher: ModelShape):
        super().__init__(config, student, teacher)
        self.batches: torch.Tensor  # optimizer steps in this task, if there is a warm-up
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def begin_task(self, teacher: Any) -> None:
        super().begin_task(teacher)
        self.batches.zero_()

    def begin_step(self) -> None:
        if self.config.warmup_steps:
            self.batches += 1

    def rates(self) -> dict[nn.Parameter, float]:
        return dict.fromkeys(self.copied.parameters(), self.config.copy_rate)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if teacher.path_logits is None:
            raise ValueError("dual_path needs the prompt path's logits: give the teacher's answer by consult().")
        config, tau = self.config, self.config.temperature
        ours = student.logits if student.kd_logits is None else student.kd_logits
        original, path = teacher.logits, teacher.path_logits
        beta_o, beta_p = self._betas()
        learn = beta_o * kd_loss(ours, original, tau) + beta_p * kd_loss(ours, path.detach(), tau)
        tune = (1 - config.rho) * kd_loss(path, original, tau) + config.rho * kd_loss(path, ours.detach(), tau)
        if config.lambda_y > 0:
            tune = tune + config.lambda_y * F.cross_entropy(path[: len(labels)], labels)
        return {"student": learn, "prompt_path": tune}

    def _betas(self) -> tuple[Any, Any]:
        """Weights (beta_o, beta_p) of the two paths in this step."""
        beta_o, beta_p, steps = self.config.beta_o, self.config.beta_p, self.config.warmup_steps
        if steps == 0:
            return beta_o, beta_p
        grown = beta_p * ((self.batches - 1) / steps).clamp(0, 1)
        return beta_o + beta_p - grown, grown
