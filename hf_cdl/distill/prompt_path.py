"""The prompt path of a dual-path teacher: the teacher's modules, with prompt blocks between the stages.

It is a copy of the teacher that shares its weights, with hooks between the stages, so a teacher's prompts act on both
paths and any Hugging Face classifier works (stages.py). The teacher stays in evaluation mode and is never modified; in
copied stages (DFPT-KD+) only batch norms are in training mode. dual_path.py explains its purpose.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_cdl.distill.objective import Term
from hf_cdl.distill.prompt_blocks import MapBlock, TokenBlock
from hf_cdl.distill.stages import Stages, find_stages, first_tensor
from hf_cdl.types import CDLOutput, ModelShape


class PromptPath(Term):
    """A term's second path through a teacher, configured by fields of DualPathConfig in `config`."""

    def __init__(self, config: Any, student: ModelShape, teacher: ModelShape):
        super().__init__(config, student, teacher)
        self.prompts = nn.ModuleDict()  # stage number -> P_i and F_i
        self.copied = nn.ModuleList()  # theta', within a task
        self.head: nn.Module | None = None  # H_phi, within a task
        self.found: Stages | None = None
        # The prompt path and the recorders of A_1's output; in lists, as they must not register the teacher's weights.
        self._path: list[Any] = []
        self._records: list[_Record] = []
        self._image = (0, 0)

    # ---- building ----

    def attach(self, teacher: Any) -> None:
        """Find the teacher's stages and create the blocks between them. Raises ValueError if no stages fit."""
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
        """Build the prompt path of a teacher that has learnt the newest task, with a new head and copied stages."""
        self.end_task()  # of an interrupted task
        found = self._stages()
        first = min(int(number) for number in self.prompts)
        start = {None: len(found.stages), "first_prompt": first, "all": 0}[self.config.copy_from]
        copied = [name for stage in found.stages[start:] for name in stage.modules]
        if self.config.copy_from == "all" and found.stem is not None:
            copied.insert(0, found.stem)
        path = _copy(teacher, [*copied, found.head]).eval()
        self.copied = nn.ModuleList([path.get_submodule(name) for name in copied])
        for name, parameter in self.copied.named_parameters():
            if "mask_token" in name:  # unused by classifiers
                parameter.requires_grad_(False)
        self.head = head = path.get_submodule(found.head)
        for earlier in [*getattr(head, "blocks", ())][:-1]:  # earlier tasks' classes are not compared
            earlier.requires_grad_(False)
        if self.config.head_init == "random":
            on_cpu = next(head.parameters()).device.type == "cpu"
            drawn = head if on_cpu else copy.deepcopy(head).cpu()  # so that the draws do not depend on the device
            for module in drawn.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
            if drawn is not head:
                head.load_state_dict(drawn.state_dict())
        if self.config.copy_from != "all":  # stages before the first block are computed once, by the teacher
            for name in (name for stage in found.stages[:first] for name in stage.modules):
                self._records.append(_Record(teacher.get_submodule(name)))
                path.get_submodule(name).forward = self._records[-1]
        for number, block in self.prompts.items():
            path.get_submodule(found.stages[int(number) - 1].modules[-1]).register_forward_hook(self._behind(block))
        self._path = [path]
        self.train(self.training)

    def end_task(self) -> None:
        """Release the teacher and everything that the next task reinitialises; P_i and F_i are kept."""
        for record in self._records:
            record.handle.remove()
        self._path, self._records = [], []
        self.head, self.copied = None, nn.ModuleList()

    def train(self, mode: bool = True) -> Any:
        """Set training mode as for any module, but in copied stages for batch norms only."""
        super().train(mode)
        for module in self.copied.modules():
            module.training = mode and isinstance(module, _BatchNorm)
        return self

    def _stages(self) -> Stages:
        if self.found is None:
            raise ValueError("dual_path was given no teacher: call attach(teacher) first, as CDLTrainer does.")
        return self.found

    def _behind(self, block: nn.Module) -> Any:
        """Forward hook for a module of the prompt path that turns its features g into F(g + P(g))."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            size = () if isinstance(block, MapBlock) else (self._image, self._stages().patch_size)
            fused = block(first_tensor(output), *size)
            return (fused, *output[1:]) if isinstance(output, tuple) else fused

        return hook

    # ---- one batch ----

    def consult(self, answer: CDLOutput, asked: Mapping[str, Any]) -> CDLOutput:
        """Add the prompt path's logits (B, C) for the same images to the teacher's output, as `path_logits`.

        A batch of one image is normalised with running statistics, since batch norm cannot train on its 1x1 maps.
        """
        if not self._path:
            raise ValueError("dual_path has no prompt path: call begin_task(teacher) first, as CDLTrainer does.")
        self._image = asked["pixel_values"].shape[-2:]
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = self.training and len(asked["pixel_values"]) > 1
        inputs = {key: asked[key] for key in ("pixel_values", "task_id") if asked.get(key) is not None}
        if answer.query is not None:  # reuse it: in the path's own pass the prompt blocks would alter it
            inputs["query"] = answer.query
        return dataclasses.replace(answer, path_logits=self._path[0](**inputs).logits)


class _Record:
    """Records a module's latest output and returns it as the forward of its counterpart in the prompt path."""

    def __init__(self, module: nn.Module):
        self.output: Any = None
        self.dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
        self.handle = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = first_tensor(self.output)
        if torch.is_autocast_enabled(found.device.type) or found.dtype == self.dtype:
            return self.output
        found = found.to(self.dtype)  # the teacher's pass alone was in lower precision
        return (found, *self.output[1:]) if isinstance(self.output, tuple) else found


def _copy(model: Any, own: list[str]) -> Any:
    """Copy a model with its own trainable weights in the modules `own`; all others are shared and frozen."""
    parts = [model.get_submodule(name) for name in own]
    fresh = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    memo: dict[int, Any] = {id(b): b.clone() if id(b) in fresh else b for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().clone()) if id(p) in fresh else nn.Parameter(p.detach(), False)
    return copy.deepcopy(model, memo)
