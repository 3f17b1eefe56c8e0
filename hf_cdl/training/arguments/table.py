"""How each field of transformers' TrainingArguments is treated here: used, within a range, or refused.

tests/training/test_arguments.py requires a row for every field, and a check of the effect of each used one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Used:
    """A field with an effect. For a number: its allowed range, and whether it must be whole."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    whole: bool = False
    also: float | None = None
    """A value outside the range with a special meaning."""

    @property
    def is_number(self) -> bool:
        return self.least is not None or self.above is not None

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {limit:,}" for word, limit in limits.items() if limit is not None]
        also = "" if self.also is None else f", or {self.also:g}"
        return f"a {'whole' if self.whole else 'finite'} number {' and '.join(words)}{also}"

    def allows(self, value: Any) -> bool:
        """Whether a value is a number in the range; a field that may be a share of steps must be whole from 1 on."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        value = float(value)
        if not math.isfinite(value):
            return False
        if value == self.also:
            return True
        if self.whole and value != int(value):
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True)
class Steps(Used):
    """A number of steps, or a share of all steps if it is below 1."""

    def __str__(self) -> str:
        least = "0, " if self.least == 0 else ""
        return f"{least}a number of steps (1, 2, 3 ...) or a share of them between 0 and 1"

    def allows(self, value: Any) -> bool:
        return super().allows(value) and (value < 1 or value == int(value))


@dataclass(frozen=True)
class Refused:
    """A field with no effect here, or one that would break a guarantee; `why` says what to do instead."""

    why: str


_COUNT = Used(least=1, whole=True)
_SHARE = Used(least=0, below=1)
_SEED = Used(least=0, most=2**32 - 1, whole=True)
_HUB = Refused("what is pushed is said at the top level of the recipe: push_to_hub, hub_model_id ...")
_EVALUATION = Refused("evaluation counts right answers batch by batch; leave it out")
_FULL_EVAL = Refused("evaluation is in full precision; bf16 or fp16 alone trains in mixed precision")
_SCRIPT = Refused("a run trains and evaluates by its recipe; leave it out")
_TOKENS = Refused("images have no tokens; leave it out")
_SHARDED = Refused(
    "it would shard the student too, which every process has whole; a teacher too large for one device is sharded "
    "with shard_teacher true, and batches by `accelerate launch`"
)
_LAUNCHED = Refused("processes are set up by `accelerate launch` before it is read; leave it out")
_TRACKIO = Refused("trackers write to this machine; use `trackio sync` afterwards")
_LENGTHS = Refused("images have no lengths; train_sampling_strategy is random or sequential")

ARGUMENTS: dict[str, Used | Refused] = {
    "output_dir": Used(),
    # ---- duration and learning rate ----
    "per_device_train_batch_size": _COUNT,
    "num_train_epochs": Used(above=0),
    "max_steps": Used(least=1, whole=True, also=-1),
    "learning_rate": Used(least=0),
    "lr_scheduler_type": Used(),
    "lr_scheduler_kwargs": Used(),
    "warmup_steps": Steps(least=0),
    "gradient_accumulation_steps": _COUNT,
    "max_grad_norm": Used(least=0),
    "label_smoothing_factor": Refused("smoothing of the labels is a term: distill: [{type: label_smoothing}]"),
    # ---- optimizer ----
    "optim": Used(),
    "optim_args": Used(),
    "optim_target_modules": Refused("GaLore and APOLLO, which it is for, are not supported; leave it out"),
    "weight_decay": Used(least=0),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Used(least=0),
    # ---- precision, memory, speed ----
    "bf16": Used(),
    "fp16": Used(),
    "frozen_bf16": Used(),
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "tf32": Used(),
    "activation_checkpointing": Used(),
    "activation_checkpointing_kwargs": Refused("every layer is checkpointed, as torch does by default; leave it out"),
    "gradient_checkpointing": Used(),
    "gradient_checkpointing_kwargs": Refused("every layer is checkpointed, as torch does by default; leave it out"),
    "torch_compile": Used(),
    "torch_compile_backend": Used(),
    "torch_compile_mode": Used(),
    "torch_empty_cache_steps": _COUNT,
    "use_liger_kernel": Refused("Liger's kernels are for language models; leave it out"),
    "liger_kernel_config": Refused("Liger's kernels are for language models; leave it out"),
    "use_cache": Refused("it is a cache of generated text; leave it out"),
    "neftune_noise_alpha": Refused("NEFTune is noise on text embeddings; leave it out"),
    "auto_find_batch_size": Refused(
        "a batch size that depends on the memory would change the numbers; lower per_device_train_batch_size and "
        "raise gradient_accumulation_steps"
    ),
    "use_cpu": Used(),
    # ---- logging ----
    "logging_strategy": Used(),
    "logging_steps": Steps(above=0),
    "logging_first_step": Used(),
    "logging_nan_inf_filter": Refused("a loss that is not a number stops the training; leave it out"),
    "log_level": Used(),
    "log_level_replica": Refused("processes beside the first say nothing but warnings; leave it out"),
    "log_on_each_node": Refused("the first process of all logs, wherever it is; leave it out"),
    "disable_tqdm": Used(),
    "skip_memory_metrics": Refused("results.json has the peak memory of every phase; leave it out"),
    "include_num_input_tokens_seen": _TOKENS,
    "report_to": Used(),
    "run_name": Used(),
    "project": Used(),
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "debug": Refused("a loss that is not a number stops the training with its name and step; leave it out"),
    # ---- evaluation during training ----
    "eval_strategy": Used(),
    "eval_steps": Steps(above=0),
    "eval_delay": Used(least=0),
    "per_device_eval_batch_size": _COUNT,
    "eval_on_start": Refused("a phase that is resumed would be evaluated once more than the others; leave it out"),
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "load_best_model_at_end": Used(),
    "metric_for_best_model": Used(),
    "greater_is_better": Used(),
    # ---- the stored state of a phase ----
    "save_strategy": Used(),
    "save_steps": Steps(above=0),
    "save_total_limit": _COUNT,
    "save_only_model": Refused(
        "without the optimizer's state a run that is resumed would learn something else; leave it out"
    ),
    "save_on_each_node": Refused("a run's folder is one that all nodes share; leave it out"),
    "enable_jit_checkpoint": Refused(
        "a stopped run resumes from its last stored state; store it more often: save_strategy steps with save_steps"
    ),
    "ignore_data_skip": Refused("a run that is resumed would see the same images twice; leave it out"),
    "restore_callback_states_from_checkpoint": Refused(
        "a run that is resumed counts on where it stopped (early stopping); leave it true"
    ),
    "resume_from_checkpoint": Refused("the same command resumes a stopped run by itself; leave it out"),
    # ---- seeds and data ----
    "seed": _SEED,
    "data_seed": _SEED,
    "full_determinism": Used(),
    "dataloader_drop_last": Used(),
    "dataloader_num_workers": Used(least=0, whole=True),
    "dataloader_pin_memory": Used(),
    "dataloader_persistent_workers": Used(),
    "dataloader_prefetch_factor": _COUNT,
    "dataloader_multiprocessing_context": Used(),
    "dataloader_in_order": Refused("batches out of order would make every run another one; leave it true"),
    "train_sampling_strategy": Used(),
    "length_column_name": _LENGTHS,
    "remove_unused_columns": Refused("the stream's samples are exactly the models' inputs; leave it false"),
    "label_names": Refused("the labels of the stream are `labels`; leave it out"),
    # ---- several processes ----
    "average_tokens_across_devices": _TOKENS,
    "accelerator_config": Refused(
        "how batches are shared by processes is fixed, so that every image counts once; leave it out"
    ),
    "parallelism_config": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "deepspeed": _SHARDED,
    "ddp_find_unused_parameters": Refused("it follows from the terms that are trained; leave it out"),
    "ddp_bucket_cap_mb": _LAUNCHED,
    "ddp_broadcast_buffers": _LAUNCHED,
    "ddp_static_graph": _LAUNCHED,
    "ddp_backend": _LAUNCHED,
    "ddp_timeout": _LAUNCHED,
    "local_rank": _LAUNCHED,
    # ---- flags of transformers' scripts ----
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "push_to_hub": _HUB,
    "hub_token": Refused("log in with `hf auth login` or set HF_TOKEN"),
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    # ---- hf_cdl's own ----
    "epoch_cosine": Used(),
    "lr_steps": Used(),
    "lr_decay": Used(above=0),
    "early_stopping_patience": _COUNT,
    "early_stopping_threshold": Used(least=0),
    "shard_teacher": Used(),
}

NOT_IN_ALL = frozenset({"activation_checkpointing", "activation_checkpointing_kwargs"})
"""Fields that some supported versions of transformers lack."""

BESIDE = (
    "output_dir per_device_eval_batch_size use_cpu torch_empty_cache_steps activation_checkpointing "
    "gradient_checkpointing logging_strategy logging_steps logging_first_step log_level disable_tqdm report_to "
    "run_name project save_strategy save_steps save_total_limit dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context shard_teacher"
).split()
"""Fields that may change while a run goes on: of what is shown or stored and how fast, not of what is learnt."""

STEERING = "eval_strategy eval_steps eval_delay metric_for_best_model greater_is_better".split()
"""Fields that affect what is learnt only where the accuracy during training does."""

IN_PASSES = (
    "use_cpu bf16 fp16 frozen_bf16 tf32 log_level disable_tqdm run_name project per_device_eval_batch_size seed "
    "data_seed full_determinism dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context shard_teacher"
).split()
"""Fields that take effect even without training by a loss: a fitted head learns in one pass over the images."""
