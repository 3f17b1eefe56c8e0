r"""DFPT-KD and DFPT-KD+: a teacher with a second, prompt-based forward path (arXiv 2506.18244).

[paper] The teacher T = head . A_N ... A_1 is frozen. A second path runs through the same stages, with prompt blocks
P_i and fusion blocks F_i between them, and ends in a new head H_\phi. \phi (all P_i, F_i and H_\phi) is tuned while
the student learns, supervised by the original path and by the student; the student learns from both paths. DFPT-KD+
also fine-tunes the stages of the prompt path, beside the original. Loss formulas, weights, temperature and sizes are
not public, nor is code: what follows is ours, and no parity with the paper's numbers is claimed.

[ours] With A_1's output g^1 shared, g^{i+1} = A_{i+1}(F_i(g^i + P_i(g^i))) from the prompt path's own features, and
z_p = H_\phi(g^N); z_o are the teacher's own logits, z_s the student's, sg stops the gradient:

    L_\phi = (1 - \rho) K_\tau(sg z_o || z_p) + \rho K_\tau(sg z_s || z_p) + \lambda_y CE(z_p, y)
    L_\psi = \alpha CE(z_s, y) + \beta_o K_\tau(z_o || z_s) + \beta_p K_\tau(sg z_p || z_s)

The term is L_\phi + L_\psi without \alpha CE, which is the recipe's `ce_weight`; one backward pass, one optimizer.
With \beta_p = 0 the student learns exactly as with KD of weight \beta_o. Over free logits the optimum of L_\phi
(with \lambda_y = 0) is the mixture (1 - \rho) softmax(z_o / \tau) + \rho softmax(z_s / \tau). At first the prompt
path's features are the teacher's own. The defaults are for distilling once, offline, with \alpha = 0.1; in a stream
we take \alpha = 0.5, \beta_o = \beta_p = 0.25, \tau = 2 and `head_init: teacher`. A student with a KD head (KDP)
learns both KLs with it, and its z_s for L_\phi is the KD head's. KLs compare the current task's classes. P_i and F_i
stay warm over the tasks; H_\phi and copied stages start anew in every task. None of it gets into the student's
files.

The prompt path is a copy of the teacher's modules that shares its weights, with hooks between the stages, so that a
teacher's prompts act on both paths and any Hugging Face classifier will do (stages.py). The teacher stays in
evaluation mode and is never written to; of the copied stages only batch norms are in training mode.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hf_cdl.distill.objective import Term, kd_loss
from hf_cdl.distill.prompt_blocks import MapBlock, TokenBlock
from hf_cdl.distill.stages import Stages, find_stages, first_tensor
from hf_cdl.types import CDLOutput, ModelShape


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DualPathConfig:
    weight: float = _help(1.0, "Weight of the whole term; the losses have weights of their own.")
    beta_o: float = _help(0.45, "Weight of the teacher's own logits for the student.")
    beta_p: float = _help(0.45, "Weight of the prompt path's logits for the student.")
    rho: float = _help(0.5, "Share of the student in what the prompt path learns from; the rest is the teacher's.")
    lambda_y: float = _help(0.0, "Weight of the labels for the prompt path.")
    temperature: float = _help(4.0, "Temperature tau of all softmaxes.")
    warmup_steps: int = _help(0, "Batches of each task over which beta_p grows from 0, beta_o being what it lacks.")
    head_init: Literal["random", "teacher"] = _help("random", "How the prompt path's head begins.")
    copy_from: Literal["all", "first_prompt"] | None = _help(
        None, "DFPT-KD+: which stages the prompt path has as trainable copies; null: none, DFPT-KD."
    )
    copy_rate: float = _help(0.1, "Learning rate of copied stages, as a factor of the others'.")
    stages: tuple[str, ...] | None = _help(None, "Module paths of the teacher's stages; null: found.")
    insert_after: tuple[int, ...] | None = _help(
        None, "Stages (from 1) with a prompt block behind; null: all but one."
    )
    reduction: float | None = _help(None, "Rate r1 of a block's narrowing; null: 4 for maps, 8 for tokens.")
    fraction: float = _help(0.25, "Share r2 of its channels that a partial convolution sees.")
    kernels: tuple[int, ...] = _help((3, 5, 7), "Kernel sizes of the partial convolutions.")

    def __post_init__(self):
        weights = (self.weight, self.beta_o, self.beta_p, self.lambda_y, self.copy_rate, self.warmup_steps)
        if min(weights) < 0 or not 0 <= self.rho <= 1 or self.temperature <= 0:
            raise ValueError(
                "dual_path needs weights, copy_rate and warmup_steps >= 0, rho from 0 to 1 and temperature > 0; got "
                f"{self.weight}, {self.beta_o}, {self.beta_p}, {self.lambda_y}; {self.copy_rate}, "
                f"{self.warmup_steps}; {self.rho}; {self.temperature}."
            )
        narrow = self.reduction is None or self.reduction > 0
        if not narrow or not 0 < self.fraction <= 1 or any(size < 1 or size % 2 == 0 for size in self.kernels):
            raise ValueError(
                "dual_path needs a reduction above 0, a fraction above 0 and up to 1, and odd kernel sizes; got "
                f"{self.reduction}, {self.fraction} and {self.kernels}."
            )
        if self.insert_after == ():
            raise ValueError("dual_path needs a prompt block: insert_after names stages, or is null for all but one.")


class DualPath(Term):
    config_class = DualPathConfig
    config: DualPathConfig

    def __init__(self, config: DualPathConfig, student: ModelShape, teacher: ModelShape):
        super().__init__(config, student, teacher)
        self.prompts = nn.ModuleDict()  # stage number -> P_i and F_i
        self.copied = nn.ModuleList()  # theta', within a task
        self.head: nn.Module | None = None  # H_phi, within a task
        self.found: Stages | None = None
        self.batches: torch.Tensor
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        # No submodules, since they hold the teacher's weights: the prompt path, and what records A_1's output.
        self._path: list[Any] = []
        self._records: list[_Record] = []
        self._image = (0, 0)

    # ---- building ----

    def attach(self, teacher: Any) -> None:
        """Find the teacher's stages and make the blocks between them. Raises ValueError if it has none that fit."""
        self.found = found = find_stages(teacher, self.config.stages)
        stages = found.stages
        names = {number: stage.modules[-1] for number, stage in enumerate(stages[:-1], start=1)}
        chosen = self.config.insert_after or tuple(names)
        if any(number not in names for number in chosen):
            raise ValueError(
                f"dual_path: insert_after is {list(chosen)}, but the teacher's stages that another one follows are "
                + ", ".join(f"{number} (up to {name})" for number, name in names.items())
            )
        for number in sorted(chosen):
            stage = stages[number - 1]
            is_map = len(stage.shape) == 4
            rate = self.config.reduction or (4 if is_map else 8)
            sizes = stage.shape[1 if is_map else 2], rate, self.config.fraction, self.config.kernels
            block = MapBlock(*sizes) if is_map else TokenBlock(*sizes, extra=stage.extra_tokens)
            self.prompts[str(number)] = block

    def begin_task(self, teacher: Any) -> None:
        """Make the prompt path of a teacher that has learnt the newest task, with a new head and new copied stages."""
        self.end_task()  # of a task that was cut off
        found = self._stages()
        first = min(int(number) for number in self.prompts)
        start = {None: len(found.stages), "first_prompt": first, "all": 0}[self.config.copy_from]
        copied = [name for stage in found.stages[start:] for name in stage.modules]
        if self.config.copy_from == "all" and found.stem is not None:
            copied.insert(0, found.stem)
        path = _copy(teacher, [*copied, found.head]).eval()
        self.copied = nn.ModuleList([path.get_submodule(name) for name in copied])
        for name, parameter in self.copied.named_parameters():
            if "mask_token" in name:  # which no classifier uses
                parameter.requires_grad_(False)
        self.head = head = path.get_submodule(found.head)
        for earlier in [*getattr(head, "blocks", ())][:-1]:  # of earlier tasks, whose classes are not compared
            earlier.requires_grad_(False)
        if self.config.head_init == "random":
            for module in head.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        if self.config.copy_from != "all":  # what lies before the first block is computed once, by the teacher
            for name in (name for stage in found.stages[:first] for name in stage.modules):
                self._records.append(_Record(teacher.get_submodule(name)))
                path.get_submodule(name).forward = self._records[-1]
        for number, block in self.prompts.items():
            path.get_submodule(found.stages[int(number) - 1].modules[-1]).register_forward_hook(self._behind(block))
        self._path = [path]
        self.batches.zero_()
        self.train(self.training)

    def end_task(self) -> None:
        """Let go of the teacher and of all that the next task begins anew; P_i and F_i stay."""
        for record in self._records:
            record.handle.remove()
        self._path, self._records = [], []
        self.head, self.copied = None, nn.ModuleList()

    def train(self, mode: bool = True) -> DualPath:
        """As of any module, but of the copied stages only batch norms are ever in training mode."""
        super().train(mode)
        for module in self.copied.modules():
            module.training = mode and isinstance(module, _BatchNorm)
        return self

    def rates(self) -> dict[nn.Parameter, float]:
        return dict.fromkeys(self.copied.parameters(), self.config.copy_rate)

    def _stages(self) -> Stages:
        if self.found is None:
            raise ValueError("dual_path was given no teacher: call attach(teacher) first, as CDLTrainer does.")
        return self.found

    def _behind(self, block: nn.Module) -> Any:
        """Forward hook of a module of the prompt path: its features g become F(g + P(g))."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            size = () if isinstance(block, MapBlock) else (self._image, self._stages().patch_size)
            fused = block(first_tensor(output), *size)
            return (fused, *output[1:]) if isinstance(output, tuple) else fused

        return hook

    # ---- one batch ----

    def consult(self, answer: CDLOutput, asked: Mapping[str, Any]) -> CDLOutput:
        """The teacher's answer with the prompt path's logits (B, C) to the same images as `path_logits`."""
        if not self._path:
            raise ValueError("dual_path has no prompt path: call begin_task(teacher) first, as CDLTrainer does.")
        self._image = asked["pixel_values"].shape[-2:]
        inputs = {key: asked[key] for key in ("pixel_values", "task_id") if asked.get(key) is not None}
        if answer.query is not None:  # asked once: by another pass the prompt blocks would change it
            inputs["query"] = answer.query
        return dataclasses.replace(answer, path_logits=self._path[0](**inputs).logits)

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        if teacher.path_logits is None:
            raise ValueError("dual_path needs the prompt path's logits: give the teacher's answer by consult().")
        config, tau = self.config, self.config.temperature
        ours = student.logits if student.kd_logits is None else student.kd_logits
        original, path = teacher.logits, teacher.path_logits
        beta_o, beta_p = self._betas()
        learn = beta_o * kd_loss(ours, original, tau) + beta_p * kd_loss(ours, path.detach(), tau)
        tune = (1 - config.rho) * kd_loss(path, original, tau) + config.rho * kd_loss(path, ours.detach(), tau)
        if config.lambda_y > 0:
            tune = tune + config.lambda_y * F.cross_entropy(path, labels)
        return learn + tune

    def _betas(self) -> tuple[Any, Any]:
        """Weights of the two paths for this batch."""
        beta_o, beta_p, steps = self.config.beta_o, self.config.beta_p, self.config.warmup_steps
        if steps == 0:
            return beta_o, beta_p
        grown = beta_p * (self.batches / steps).clamp(max=1)
        if self.training:
            self.batches += 1
        return beta_o + beta_p - grown, grown


class _Record:
    """What a module has just given: the forward of its counterpart in the prompt path."""

    def __init__(self, module: nn.Module):
        self.output: Any = None
        self.handle = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def _copy(model: Any, own: list[str]) -> Any:
    """A copy of a model with trainable weights of its own in the modules `own`; it shares all others, frozen."""
    parts = [model.get_submodule(name) for name in own]
    fresh = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    memo: dict[int, Any] = {id(b): b.clone() if id(b) in fresh else b for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().clone()) if id(p) in fresh else nn.Parameter(p.detach(), False)
    return copy.deepcopy(model, memo)
