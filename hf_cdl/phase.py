"""A Trainer for phases: data order, optimizer, schedule and losses of one role on one task, and the stored state."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import Trainer

from hf_cdl.progress import PhaseProgress
from hf_cdl.run import Run
from hf_cdl.storing import saving
from hf_cdl.tasks.sampler import ViewSampler
from hf_cdl.training_args import CDLTrainingArguments
from hf_cdl.types import Task


class PhaseTrainer(Trainer):
    """What transformers' Trainer does otherwise where training comes in phases.

    Optimizer and schedule are new in each; the order of the data is a function of seed, task and epoch; only what the
    phase changes is stored, and never half. A subclass sets the attributes below.
    """

    args: CDLTrainingArguments
    model: Any
    objective: Any
    run: Run | None
    role: str
    seen: list[Task]
    """The tasks so far; the last one is the phase's."""
    num_tasks: int | None
    _sums: dict[str, torch.Tensor]
    """Of the losses by name, over the `_steps_summed` steps since the last log line."""
    _steps_summed: int
    _phase: PhaseProgress
    _sampler: ViewSampler | None
    _seconds_before: float
    """Those of the phase before it was cut off."""

    # ---- data order and schedule ----

    def create_optimizer(self, model: Any = None) -> Any:
        """As Trainer.create_optimizer, with groups for what model and terms want to train at other rates."""
        if self.optimizer is None:
            rates = {**self.model.rates(), **self.objective.rates()}
            optimizer = super().create_optimizer(model)
            for group in [*optimizer.param_groups]:
                for factor in sorted({rates[p] for p in group["params"] if p in rates}):
                    moved = [p for p in group["params"] if rates.get(p) == factor]
                    group["params"] = [p for p in group["params"] if rates.get(p) != factor]
                    optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * factor})
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        task = self.seen[-1]
        shuffle = self.args.train_sampling_strategy != "sequential"
        seed = zlib.crc32(f"{self.args.data_seed}/{task.index}".encode())
        self._sampler = ViewSampler(len(task.train), seed, shuffle)
        return self._sampler

    def _set_epoch(self, epoch: int) -> None:
        """Not left to Accelerate, which does not reach a sampler below the skipping and sharding of a resumed run."""
        if self._sampler is not None:
            self._sampler.epoch = epoch

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """HF's schedule, or one that is constant within an epoch: `lr_steps`, or the CDL authors' `epoch_cosine`."""
        epochs = math.ceil(self.args.num_train_epochs)
        rate = self.args.epoch_factor(epochs)
        if rate is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        per_epoch = math.ceil(num_training_steps / epochs)
        target: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, lambda step: rate(step // per_epoch))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _unprepare(self, model: Any) -> Any:
        """The bare model. A mark of Accelerate's left on it would keep it from being wrapped for the next task."""
        model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False
        return model

    # ---- losses ----

    def _watch(self, losses: dict[str, torch.Tensor]) -> None:
        """Stop at a loss that is no number, naming the term; sum the others for the next log line."""
        names, values = list(losses), torch.stack([value.detach().float() for value in losses.values()])
        if not bool(torch.isfinite(values).all()):
            bad = [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
            terms = [name for name in bad if name != "loss"] or bad
            raise FloatingPointError(
                f"Loss term {', '.join(terms)} is {values[names.index(terms[0])].item()} at step "
                f"{self.state.global_step + 1} of {self._title(self.seen[-1])}. The stored state is from before this "
                "step. Lower the learning rate or the term's weight, or check the images of this task."
            )
        for name, value in zip(names, values, strict=True):
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps_summed += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer.log, with every term of the objective by name (`loss/kd`), averaged since the last line."""
        if self._seconds_before:
            logs.pop("train_loss", None)  # at the end: the losses since this process began, by all steps
        if "loss" in logs and self._steps_summed:
            for name, total in self._sums.items():
                mean: Any = self.accelerator.reduce(total / self._steps_summed, reduction="mean")
                logs[f"loss/{name}"] = mean.item()
            self._sums, self._steps_summed = {}, 0
        super().log(logs, start_time)

    # ---- files ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Store the phase's state under its name only when it is whole; then drop the one before."""
        partial = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with saving(f"store the state of {self._title(self.seen[-1])} in {partial}"):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seconds = self._seconds_before + self._phase.seconds
                (partial / "phase.json").write_text(json.dumps({"seconds": seconds}))
                work = partial.parent.parent
                for old in work.glob(partial.name):
                    shutil.rmtree(old)
                os.replace(partial, work / partial.name)
                for old in work.glob("checkpoint-*"):
                    if old.name != partial.name:
                        shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        if self.run is None:
            return str(self.args.output_dir)
        return str(self.run.work_folder(self.role, self.seen[-1]) / "partial")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Within a phase only what it changes is stored: all else is in the backbone or the last task's checkpoint."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._get_output_dir(None))
        folder.mkdir(parents=True, exist_ok=True)
        changed = {name: value.detach().contiguous() for name, value in self._changing().items()}
        save_file(changed, folder / "trained.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put back what the phase had changed. Raises ValueError if it does not fit the model."""
        file = Path(resume_from_checkpoint) / "trained.safetensors"
        stored, wanted = load_file(file), self._changing()
        if stored.keys() != wanted.keys():
            raise ValueError(f"{file} does not fit the model: {sorted(stored.keys() ^ wanted.keys())[:5]}.")
        with torch.no_grad():
            for name, value in wanted.items():
                value.copy_(stored[name])

    def _changing(self) -> dict[str, torch.Tensor]:
        """What a phase changes: trainable parameters, and buffers (batch norm's statistics), by their names in memory.

        Not by a checkpoint's: of some families it has older names, which only from_pretrained knows.
        """
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {**trained, **dict(self.model.named_buffers())}

    def _title(self, task: Task) -> str:
        return f"task {task.index + 1}{f'/{self.num_tasks}' if self.num_tasks else ''} · {self.role}"


def peak_memory() -> int:
    """Bytes: the most this phase held on the GPU, or on a CPU the most that the process held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
