"""CDLTrainingArguments: transformers' TrainingArguments with the defaults of continual prompt learning."""

from __future__ import annotations

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
        if self.max_steps > 0 and self.epoch_cosine:
            raise ValueError("epoch_cosine counts epochs; set num_train_epochs instead of max_steps.")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"gradient_accumulation_steps must be at least 1; got {self.gradient_accumulation_steps}."
            )
