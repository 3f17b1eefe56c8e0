"""A Trainer for phases: data order, optimizer, schedule and losses of one role on one task, and the stored state."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import rotate_checkpoints

from hf_cdl.data.sampler import Companions, Rounds, ViewSampler
from hf_cdl.data.unlabelled import WithUnlabelled
from hf_cdl.runs.files import make_folder, replace, saving, sync_tree
from hf_cdl.runs.ledger import lasting
from hf_cdl.runs.settings import check_settings
from hf_cdl.training.arguments.workers import fitting_workers
from hf_cdl.training.compiling import hidden_from_transformers
from hf_cdl.training.progress import PhaseProgress
from hf_cdl.training.schedules import epoch_factor
from hf_cdl.training.settings import settings_of
from hf_cdl.training.sharding import gathered, is_sharded, replicated
from hf_cdl.training.steering import SteeredTrainer
from hf_cdl.training.stored_state import WEIGHTS, loading, newest_state, seal
from hf_cdl.training.trainer_contract import Total
from hf_cdl.types import Task


class TaskTrainer(SteeredTrainer):
    """A Trainer that trains in phases.

    Each phase has a new optimizer and schedule; the data order is a function of seed, task and epoch; the gradient of
    a step is the mean over its images, however they are split into micro-batches and across processes; only what the
    phase changes is stored, atomically. Subclasses set the attributes below.
    """

    objective: Any
    teacher: Any
    _sums: dict[str, torch.Tensor]
    """Sums by loss name over the `_steps_summed` steps since the last log line; each step adds its mean per image."""
    _unseen: list[tuple[int, list[str], torch.Tensor]]
    """Step, names and values of losses not checked yet."""
    _steps_summed: int
    _images: int
    """Images trained on by all processes in this phase, unlabelled ones too, since it started or resumed."""
    _phase: PhaseProgress
    _sampler: ViewSampler | None
    _rounds: Rounds
    _seconds_before: float
    """Seconds spent in this phase before it was interrupted."""
    _steps_learnt: int
    """Steps of this process's finished phases, for when there is no run to look them up in."""
    _total: Total
    """What `train()` did so far, over its tasks."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer, for an accelerator that compiles nothing: `compiled` does."""
        with hidden_from_transformers(self.args):
            super().create_accelerator_and_postprocess()

    # ---- what a phase counts ----

    def _begin_counting(self) -> None:
        """Reset the counters at the start of a phase."""
        self._sampler, self._sums, self._unseen = None, {}, []
        self._steps_summed = self._images = 0
        self._micro_batches, self._seconds_before = 1, 0.0

    def _add_to_total(self) -> None:
        """Add the counters of a finished phase to the totals over all tasks."""
        steps = self.state.global_step
        self._steps_learnt += steps
        self._total.steps += steps
        self._total.own_steps += steps - self._phase.first_step
        self._total.loss += self._total_loss_scalar
        self._total.images += self._images

    def floating_point_ops(self, inputs: Any) -> int:
        """0. Trainer's estimate takes pixels for tokens and reads all weights in every step; see `hf-cdl plan`."""
        return 0

    # ---- data order and schedule ----

    def create_optimizer(self, model: Any = None) -> Any:
        """As Trainer.create_optimizer, plus parameter groups for the learning rates that model and terms ask for."""
        if self.optimizer is None:
            rates = {**self.model.rates(), **self.objective.rates()}
            optimizer = super().create_optimizer(model)
            for group in [*optimizer.param_groups]:
                for factor in sorted({rates[p] for p in group["params"] if p in rates}):
                    moved = [p for p in group["params"] if rates.get(p) == factor]
                    group["params"] = [p for p in group["params"] if rates.get(p) != factor]
                    optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * factor})
        return self.optimizer

    def get_decay_parameter_names(self, model: Any) -> Any:
        """As in Trainer, for trainable parameters only; a set, because Trainer looks up every parameter twice."""
        return {*super().get_decay_parameter_names(_learning(model) or nn.Module())}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        task, companions = self.seen[-1], None
        shuffle = self.args.train_sampling_strategy != "sequential"
        seed = zlib.crc32(f"{self.args.data_seed}/{task.index}".encode())
        if isinstance(self.train_dataset, WithUnlabelled):
            own = zlib.crc32(f"unlabelled/{self.args.data_seed}/{self.role}/{task.index}".encode())
            companions = Companions(len(self.train_dataset.unlabelled), task.unlabelled_ratio, own, shuffle)
        block = self._train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        self._sampler = ViewSampler(len(task.train), seed, shuffle, companions, task.views, block)
        return self._sampler

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer, except that no image repeats; Accelerate would pad uneven processes with repeated images."""
        images: Any = self.train_dataset
        with fitting_workers(self.args, len(images), self._train_batch_size):
            loader = super().get_train_dataloader()
        assert self._sampler is not None
        drop_last, processes = self.args.dataloader_drop_last, self.accelerator.num_processes
        self._rounds = Rounds(self._sampler, self._train_batch_size, drop_last, processes)
        shard: Any = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):  # without a batch_size it deals out batches of any size in order
            shard.batch_sampler, shard.batch_size = self._rounds, None  # type: ignore[assignment]
            shard.drop_last = False
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, each with the `weight` of its loss: n_i k P / N.

        n_i: its images; k, P, N: micro-batches, processes and images of the step. Trainer divides the loss by k and
        gradients are averaged over processes, so the weighted micro-batch means add up to the mean over all N images.
        So do means over labelled and unlabelled images: there are equally many of these beside each labelled one.
        """
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        per_epoch = -(-self._rounds.count // self.args.gradient_accumulation_steps)
        first = self.state.global_step % per_epoch * self.args.gradient_accumulation_steps
        sizes = [self._rounds.sizes(first + number) for number in range(len(batches))]
        images, companions = sum(map(sum, sizes)), self._rounds.sampler.companions
        for batch, of_all in zip(batches, sizes, strict=True):
            own = of_all[self.accelerator.process_index]
            batch["weight"] = own * len(batches) * len(of_all) / images
        self._micro_batches = len(batches)
        self._steps_summed += 1
        self._images += images * (1 if companions is None else 1 + companions.ratio)
        self.objective.begin_step()
        return batches, counted

    def _set_epoch(self, epoch: int) -> None:
        """Set the sampler's epoch; in a resumed run Accelerate cannot reach it through its skipping and sharding."""
        if self._sampler is not None:
            self._sampler.epoch = epoch
        loader = getattr(self.callback_handler.train_dataloader, "base_dataloader", None)
        if getattr(loader, "_iterator", None) is not None:  # workers persist: what else torch draws in every epoch
            torch.empty((), dtype=torch.int64).random_()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create HF's schedule, or one constant within an epoch: `lr_steps`, or the CDL authors' `epoch_cosine`."""
        epochs = math.ceil(self.args.num_train_epochs)
        rate = epoch_factor(self.args, epochs)  # type: ignore[arg-type]  # CDLTrainingArguments
        if rate is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        per_epoch = math.ceil(num_training_steps / epochs)
        target: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, lambda step: rate(step // per_epoch))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- losses ----

    def _steps_before(self) -> int:
        """Optimizer steps of all earlier tasks, from which the trackers' step count continues."""
        if self.run is None:
            return self._steps_learnt
        steps = 0
        for task in self.seen[:-1]:
            with contextlib.suppress(OSError, ValueError):  # lost curves were reported when the run was opened
                history = json.loads(self.run.history_file(self.role, task).read_text())
                steps += max((line.get("step", 0) for line in history), default=0)
        return steps

    def _note_losses(self, losses: dict[str, torch.Tensor], weight: float) -> None:
        """Add the weighted losses to the sums for the next log line, and stop at one that is not finite.

        Reading a number waits for the GPU, so there several steps are checked together.
        """
        names, values = list(losses), torch.stack([value.detach().float() for value in losses.values()])
        self._unseen.append((self.state.global_step + 1, names, values))
        if len(self._unseen) >= steps_together(values.device):
            self._check_losses()
        for name, value in zip(names, values * (weight / self._micro_batches), strict=True):
            self._sums[name] = self._sums.get(name, 0) + value

    def _check_losses(self) -> None:
        """Raise FloatingPointError, naming the step and the term, for a loss so far that is not finite."""
        unseen, self._unseen = self._unseen, []
        finite = torch.stack([torch.isfinite(values).all() for *_, values in unseen]).tolist() if unseen else []
        for (step, names, values), whole in zip(unseen, finite, strict=True):
            if whole:
                continue
            bad = [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
            terms = [name for name in bad if name != "loss"] or bad
            raise FloatingPointError(
                f"Loss term {', '.join(terms)} is {values[names.index(terms[0])].item()} at step {step} of "
                f"{self._title(self.seen[-1])}. The stored state is from before this step. Lower the learning rate or "
                "the term's weight, or check the images of this task."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer.log, plus every term of the objective by name (`loss/kd`), averaged since the last line.

        Images per second count the images actually trained on; Trainer counts incomplete batches as full ones.
        """
        if self._seconds_before:
            logs.pop("train_loss", None)  # Trainer divides this process's losses by all steps
        self._check_losses()
        if "loss" in logs and self._steps_summed:
            for name, total in self._sums.items():
                mean: Any = self.accelerator.reduce(total / self._steps_summed, reduction="mean")
                logs[f"loss/{name}"] = mean.item()
            self._sums, self._steps_summed = {}, 0
        if "train_samples_per_second" in logs:
            logs["train_samples_per_second"] = round(self._images / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """As in Trainer; a model with sharded layers is wrapped here, since Accelerate does not."""
        if training and is_sharded(model):
            return replicated(model, self.accelerator)
        return super()._wrap_model(model, training, dataloader)

    # ---- files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for `from_pretrained`, with its image processor, in `output_dir` or that of the args."""
        if _internal_call:  # as part of a phase's stored state
            super().save_model(output_dir, _internal_call)
            return
        with gathered(self.model, self.args.should_save):
            if self.args.should_save:
                folder = Path(str(output_dir or self.args.output_dir))
                self.model.save_pretrained(folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Store the phase's state, under its final name only once complete; then delete older ones except the best.

        Without a run nothing is stored.
        """
        self._check_losses()
        if self.run is None:
            return
        partial = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with saving(f"store the state of {self._title(self.seen[-1])} in {partial}"):
            if self.args.should_save:
                make_folder(partial)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seconds = self._seconds_before + self._phase.seconds
                self.state.best_model_checkpoint = self._best_checkpoint
                self.state.save_to_json(str(partial / "trainer_state.json"))
                seal(partial, self._state_of(self.seen[-1]), seconds)
                sync_tree(partial)
                work = partial.parent.parent
                for old in work.glob(partial.name):
                    shutil.rmtree(old)
                replace(partial, work / partial.name)
                rotate_checkpoints(str(work), self.args.save_total_limit or 1, self._best_checkpoint)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        if self.run is None:
            return str(self.args.output_dir)
        return str(self.run.work_folder(self.role, self.seen[-1]) / "partial")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Store only what the phase changes; all else is in the backbone or the last task's checkpoint."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._get_output_dir(None))
        folder.mkdir(parents=True, exist_ok=True)
        changed = {name: value.detach().contiguous() for name, value in self._changing().items()}
        save_file(changed, folder / WEIGHTS)

    def _stored_state(self, task: Task) -> str | None:
        """Folder of the state the phase resumes from, or None to start over. Reports discarded states."""
        found: list[Any] = [None]
        if self.run is not None and self.is_world_process_zero():
            work = self.run.work_folder(self.role, task)
            with saving(f"clear {work / 'partial'}"):
                if (work / "partial").exists():  # left by a killed process
                    shutil.rmtree(work / "partial")
            stored = any(work.glob("checkpoint-*"))
            shapes = {name: list(value.shape) for name, value in self._changing().items()} if stored else {}
            state, discarded = newest_state(work, self._state_of(task), shapes, self.args.load_best_model_at_end)
            start = "the phase starts again from the last finished task" if state is None else f"{state} is taken"
            if discarded:
                self.run.say("\n".join([*discarded, f"{self._title(task)}: {start}."]))
            found = [state and str(state)]
        return broadcast_object_list(found)[0]

    def _settings(self) -> dict[str, Any]:
        """What the learning depends on besides the data."""
        return settings_of(self.args, self.objective, self.model, self.teacher.model)  # type: ignore[arg-type]

    def _check_settings(self) -> None:
        """Raise RunError if the run holds what the role has learnt with other settings."""
        if self.run is not None:
            check_settings(self.run.folder, self.run.ledger, self.role, self._settings())

    def _keep_settings(self) -> None:
        if self.run is not None:
            self.run.set_settings(self.role, self._settings())

    def _state_of(self, task: Task) -> dict[str, Any]:
        """What a stored state must match so that resuming from it is exact."""
        run: Any = self.run
        recipe = {} if run is None else lasting(run.recipe)
        return {
            "role": self.role,
            "task": task.name,
            "processes": self.args.world_size,
            "device": f"{max(1, self.args.n_gpu)} {self.args.device.type}",
            "recipe": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16],
            "stream": None if run is None else run.ledger.get("started_on", run.ledger["stream"]),
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore what the phase had changed. Raises RunError if it does not fit the model."""
        with loading(resume_from_checkpoint):
            self._put_back(load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def _changing(self) -> dict[str, torch.Tensor]:
        """The tensors a phase changes: trainable parameters and buffers (batch norm statistics), by name in memory.

        Checkpoint names will not do: some families keep older ones there, which only from_pretrained maps.
        """
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {**trained, **dict(self.model.named_buffers())}


def steps_together(device: torch.device) -> int:
    """Number of steps whose losses are checked together."""
    return 1 if device.type == "cpu" else 16


def _learning(module: nn.Module) -> nn.Module | None:
    """The tree of a module's parts that train, by their names; None without any."""
    learns = any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values())
    if not module._modules:
        return module if learns else None
    parts = [(name, _learning(part)) for name, part in module._modules.items() if part is not None]
    tree = nn.Module()
    tree._modules = {name: part for name, part in parts if part is not None}
    tree._parameters = module._parameters
    return tree if learns or tree._modules else None
