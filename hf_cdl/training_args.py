"""CDLTrainingArguments: transformers' TrainingArguments with the defaults of continual prompt learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class CDLTrainingArguments(TrainingArguments):
    """Arguments of one role (teacher or student); the same for each of its tasks.

    Defaults are the published protocol's where it says (Adam, lr 1e-3, no weight decay, no clipping, batch 64, 20
    epochs, constant rate unless `epoch_cosine`).
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of every task."})
    weight_decay: float = field(default=0.0, metadata={"help": "With 0, AdamW is the published Adam."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for none."})
    num_train_epochs: float = field(default=20, metadata={"help": "Epochs per task."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per process and step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per process in evaluation."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "transformers' schedule, over each task."})
    epoch_cosine: bool = field(
        default=False,
        metadata={
            "help": "The CDL authors' schedule instead, constant within an epoch: a quarter cosine over the epochs."
        },
    )
    lr_steps: list[int] = field(
        default_factory=list,
        metadata={"help": "Numbers of epochs after which the rate is multiplied by lr_decay, instead of a schedule."},
    )
    lr_decay: float = field(default=0.1, metadata={"help": "Factor of the rate at each of lr_steps."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to store the state that a resume starts from."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    data_seed: int | None = field(default=0, metadata={"help": "Seed of the order of the training images."})

    def __post_init__(self):
        self.disable_tqdm = bool(self.disable_tqdm)  # shown unless asked; transformers would go by its log level
        super().__post_init__()
        self.remove_unused_columns = False  # the stream's samples are exactly the models' inputs
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        own = [name for name in ("epoch_cosine", "lr_steps") if getattr(self, name)]
        if self.max_steps > 0 and own:
            raise ValueError(f"{own[0]} counts epochs; set num_train_epochs instead of max_steps.")
        if len(own) + (self.lr_scheduler_type != "constant") > 1:
            raise ValueError(
                f"{' and '.join(own)} with lr_scheduler_type {self.lr_scheduler_type}: keep one schedule (and "
                "lr_scheduler_type constant beside another)."
            )
        if self.lr_steps != sorted(set(self.lr_steps)) or min(self.lr_steps, default=1) < 1 or self.lr_decay <= 0:
            raise ValueError(
                f"lr_steps must be ascending numbers of epochs and lr_decay positive; got {self.lr_steps} and "
                f"{self.lr_decay}."
            )
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"gradient_accumulation_steps must be at least 1; got {self.gradient_accumulation_steps}."
            )

    def epoch_factor(self, epochs: int) -> Callable[[int], float] | None:
        """Factor of the learning rate in epoch e = 0 .. epochs - 1, for schedules that go by epochs; else None.

        `epoch_cosine`: cos(99 pi max(e - 1, 0) / (200 (K - 1))), K epochs. The CDL authors' scheduler starts one count
        late, so their second epoch still runs at the full rate and the last one does not reach the formula's end;
        trained models depend on it.
        """
        if self.epoch_cosine:
            return lambda epoch: math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * max(epochs - 1, 1)))
        if self.lr_steps:
            return lambda epoch: self.lr_decay ** sum(epoch >= step for step in self.lr_steps)
        return None
