"""CDLTrainingArguments: transformers' TrainingArguments with the defaults of continual prompt learning.

table.py says whether each field is used or refused, checks.py which ones do not go together.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cdl.training.arguments.checks import STEERED, Problem, find_problems
from hf_cdl.training.arguments.table import ARGUMENTS, Used
from hf_cdl.training.arguments.workers import useful_workers
from hf_cdl.training.compiling import check_compiler, hidden_from_transformers

__all__ = ["STEERED", "CDLTrainingArguments"]


@dataclass
class CDLTrainingArguments(TrainingArguments):
    """Training arguments of one role (teacher or student), the same for all of its tasks.

    Defaults follow the published protocol where it states them (Adam, lr 1e-3, no weight decay, no clipping, batch 64,
    20 epochs, constant rate unless `epoch_cosine`). Raises ValueError for fields that would have no effect here and
    for numbers out of range, all in one message.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of every task."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay; with 0, AdamW is the published Adam."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for none."})
    num_train_epochs: float = field(default=20, metadata={"help": "Epochs per task."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per process and step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per process in evaluation."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of transformers, over each task."})
    epoch_cosine: bool = field(
        default=False,
        metadata={"help": "The CDL authors' schedule: a quarter cosine over the epochs, constant within each."},
    )
    lr_steps: list[int] = field(
        default_factory=list,
        metadata={"help": "Epochs after which the learning rate is multiplied by lr_decay, instead of a schedule."},
    )
    lr_decay: float = field(default=0.1, metadata={"help": "Factor of the learning rate at each of lr_steps."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End a task after so many evaluations without a better accuracy on validation images."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "Percentage points by which accuracy must improve to count as better."}
    )
    shard_teacher: bool = field(
        default=False,
        metadata={
            "help": "Shard the layers of a frozen teacher, too large for one device, over all processes (FSDP2)."
        },
    )
    frozen_bf16: bool = field(
        default=False,
        metadata={
            "help": "Run forward passes without gradients in bfloat16: the teacher's, those for queries, and those to "
            "which a head is fitted. Training and evaluation stay in float32."
        },
    )
    save_strategy: SaveStrategy | str = field(
        default="epoch", metadata={"help": "When to store the state from which a run resumes."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Fixed: after a resume, early stopping continues its count."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Fixed: the stream's samples are exactly the models' inputs."}
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that load images; null: up to 8 persistent ones on a GPU, none on a CPU."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    data_seed: int | None = field(
        default=0, metadata={"help": "Seed of the order of the training images; null: `seed`."}
    )

    @classmethod
    def problems(cls, given: dict[str, Any]) -> list[Problem]:
        """Problems of these arguments, with defaults for the rest, as (field, text that follows its name)."""
        defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls) if f.init
        }
        return find_problems({**defaults, **given}, defaults)

    @classmethod
    def of(cls, args: Any) -> CDLTrainingArguments:
        """Copy these arguments, or convert transformers' own TrainingArguments to the same training.

        In a conversion, every field that has an effect keeps its value, even a default that differs from ours (rate,
        batch, epochs, schedule, clipping). Fields that TrainingArguments derives from others count as unset: with
        load_best_model_at_end, for example, it would choose by the loss, and we choose by accuracy. Raises ValueError
        for fields that were set but can have no effect, all in one message.
        """
        if isinstance(args, cls):
            return copy.copy(args)
        if type(args) is not TrainingArguments:
            raise ValueError(
                f"args are {type(args).__name__}; give CDLTrainingArguments, whose defaults are others, or "
                "transformers' TrainingArguments."
            )
        unset = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu)
        values = {f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init}
        used = {name for name, row in ARGUMENTS.items() if isinstance(row, Used)}
        said = {"output_dir", "use_cpu", "disable_tqdm"} | (used & _with_other_defaults(cls))
        said -= {"logging_steps"} if args.logging_strategy != IntervalStrategy.STEPS else set()
        said -= {"num_train_epochs"} if args.max_steps > 0 else set()
        idle = {name for name, value in values.items() if value == getattr(unset, name)} - said
        metric, greater = args.metric_for_best_model, args.greater_is_better
        if metric is not None and greater is not metric.endswith("loss"):
            idle |= {"greater_is_better"}
            steered = args.load_best_model_at_end or args.lr_scheduler_type in STEERED
            idle |= {"metric_for_best_model"} if metric == "loss" and steered else set()
        if "activation_checkpointing" in values:  # the same fields under their older names
            idle |= {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
        return cls(**{name: value for name, value in values.items() if name not in idle})

    def __post_init__(self):
        wrong = self.problems({f.name: getattr(self, f.name) for f in fields(self) if f.init})
        if wrong:
            raise ValueError("; ".join(f"{name} {what}" for name, what in wrong) + ".")
        self.disable_tqdm = bool(self.disable_tqdm)  # shown unless disabled; transformers would go by its log level
        stops = self.early_stopping_patience is not None
        if stops or self.load_best_model_at_end or self.save_strategy == "best" or self.lr_scheduler_type in STEERED:
            self.choose_by_accuracy()
        if self.data_seed is None:
            self.data_seed = self.seed
        self.torch_compile |= self.torch_compile_backend is not None or self.torch_compile_mode is not None
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"
        self.chose_workers = self.dataloader_num_workers is None
        self.dataloader_num_workers = self.dataloader_num_workers or 0
        with hidden_from_transformers(self):
            super().__post_init__()
        if self.chose_workers:
            self.dataloader_num_workers = useful_workers(self.device.type)  # type: ignore[assignment]
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.lr_scheduler_type in STEERED:  # by default a rising accuracy would count as a plateau
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}  # type: ignore[dict-item]
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 is true, but a CPU does not train in it; use bf16.")
        if self.frozen_bf16 and not computes_bf16(self.device.type):
            warnings.warn(
                f"frozen_bf16 is true, but this machine's {'GPU' if self.device.type == 'cuda' else 'processor'} does "
                "not compute in bfloat16 by itself: training will be slower, not faster.",
                stacklevel=2,
            )
        check_compiler(self)
        if self.torch_empty_cache_steps is not None and self.device.type == "cpu":
            raise ValueError("torch_empty_cache_steps is set, but a CPU has no cache to empty; leave it out.")

    def choose_by_accuracy(self) -> None:
        """Choose the best state by accuracy, the only thing that evaluation during training measures."""
        self.metric_for_best_model, self.greater_is_better = "accuracy", True


def computes_bf16(device: str) -> bool:
    """Whether a type of device has instructions for bfloat16; others convert every number back and forth."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


def _with_other_defaults(kind: type[TrainingArguments]) -> set[str]:
    """The fields of TrainingArguments whose defaults differ in a subclass."""
    theirs, ours = ({f.name: f.default for f in fields(of)} for of in (TrainingArguments, kind))
    return {name for name, default in theirs.items() if ours[name] != default}
