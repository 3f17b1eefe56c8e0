r"""Methods of your own, as a plugin: a prompt pool, a distillation term and a head in a file outside the package.

A recipe names the file, and then the methods like the package's own (docs/guides/extend.md):

    plugins: [recipes/own_methods.py]
    student: {prompt: {type: prefix, length: 4}, head: {type: dropout_linear, dropout: 0.1}, ...}
    distill: [{type: logit_regression, weight: 0.1}]

The fields of a section are those of the method's dataclass: names, types, defaults and ranges are checked before
anything is loaded. A trained model is loaded again where this file was imported before.

The methods are simple ones, with the symbols of their papers:

- `prefix`: prefix tuning (Li and Liang 2021, arXiv 2101.00190), P (L, 2, l, D), the same for all images and tasks.
- `logit_regression`: the student's logits regress on the teacher's (Ba and Caruana 2014, arXiv 1312.6184, Sec. 2.2):
  mean over images and classes of (z_s - z_t)^2.
- `dropout_linear`: a linear layer per task on features of which a share is dropped in training (Srivastava et al.
  2014, JMLR 15).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_cdl.checked import check_types
from hf_cdl.distill import TERMS
from hf_cdl.distill.objective import Term, TermConfig
from hf_cdl.heads import HEADS
from hf_cdl.heads.base import Head, HeadConfig
from hf_cdl.prompts import PROMPTS
from hf_cdl.prompts.base import PromptPool
from hf_cdl.types import KV, CDLOutput


@dataclass(frozen=True)
class PrefixConfig:
    length: int = field(default=8, metadata={"help": "Tokens l for keys, and as many for values."})
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "Layers with a prefix; null: all."})

    def __post_init__(self):
        check_types(self, "prefix")
        if self.length < 1:
            raise ValueError(f"prefix needs length >= 1; got {self.length}.")


@PROMPTS.register("prefix")
class Prefix(PromptPool):
    config_class = PrefixConfig
    needs_query = False

    def __init__(self, config: PrefixConfig, hidden_size: int, query_size: int, num_layers: int):
        super().__init__(config, hidden_size, query_size, num_layers)
        self.prompt = nn.Parameter(torch.empty(len(self.layers), 2, config.length, hidden_size))

    def init_shared(self) -> None:
        init.normal_(self.prompt, std=0.02)

    def add_task(self) -> None:
        """Nothing to add: all tasks share one prompt."""

    def init_task(self, task: int) -> None:
        """Nothing to initialise: no task has its own parameters."""

    def forward(
        self, layer: int, query: torch.Tensor | None, task_id: int | None = None
    ) -> tuple[KV | None, torch.Tensor | None]:
        if layer not in self.layers:
            return None, None
        key, value = self.prompt[self.layers.index(layer)]
        return KV(key[None], value[None]), None


@dataclass(frozen=True)
class LogitRegressionConfig(TermConfig):
    weight: float = field(default=0.1, metadata={"help": "Weight of the term."})
    label: ClassVar[str] = "logit_regression"


@TERMS.register("logit_regression")
class LogitRegression(Term):
    config_class = LogitRegressionConfig
    compares_classes = False

    def forward(self, student: CDLOutput, teacher: CDLOutput, labels: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(student.logits, teacher.logits)


@dataclass(frozen=True)
class DropoutLinearConfig(HeadConfig):
    dropout: float = field(default=0.1, metadata={"help": "Share of the features that is dropped in training."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout_linear needs dropout from 0 to below 1; got {self.dropout}.")


@HEADS.register("dropout_linear")
class DropoutLinear(Head):
    config_class = DropoutLinearConfig

    def add_task(self, num_classes: int) -> None:
        self.blocks.append(nn.Linear(self.hidden_size, num_classes))

    @torch.no_grad()
    def init_task(self, task: int) -> None:
        linear: Any = self.blocks[task]
        bound = 1 / math.sqrt(self.hidden_size)
        init.uniform_(linear.weight, -bound, bound)
        init.uniform_(linear.bias, -bound, bound)

    def prepare(self, features: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().prepare(features), self.config.dropout, self.training)
