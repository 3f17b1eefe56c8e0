"""CDLConfig: everything that rebuilds a continual model at any stage of its stream."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class CDLConfig(PreTrainedConfig):
    """Configuration of `CDLForImageClassification`.

    `tasks` (the class names of every task learnt or begun, in stream order) is the single source of truth for all
    sizes that grow: prompts, heads, id2label. Raises ValueError for a class name that occurs twice, and for a small
    checkpoint (`save_backbone` false) that could not be loaded again.
    """

    model_type = "cdl"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "query_config": SubConfigSpec(config_class=AutoConfig, model_type="vit", optional=True),
    }

    backbone_config: Any = field(default=None, metadata={"help": "Config of the backbone (any allow-listed family)."})
    backbone_name: str | None = field(default=None, metadata={"help": "Hub id or folder the backbone came from."})
    backbone_revision: str | None = field(default=None, metadata={"help": "Commit hash of that backbone."})
    backbone_digest: str | None = field(
        default=None, metadata={"help": "Fingerprint of its weights, checked when a small checkpoint fetches them."}
    )
    query_config: Any = field(
        default=None,
        metadata={"help": "Config of a separate frozen query backbone (the student's, for a teacher that shares its "
                  "query); None: the model's own un-prompted backbone answers."},
    )  # fmt: skip
    query_name: str | None = field(default=None, metadata={"help": "Hub id or folder of the query backbone."})
    query_revision: str | None = field(default=None, metadata={"help": "Commit hash of the query backbone."})
    query_digest: str | None = field(default=None, metadata={"help": "Fingerprint of its weights."})
    query: str = field(
        default="two_pass",
        metadata={"help": "Query of the prompts: two_pass (the CLS feature of an un-prompted pass) or one_pass (the "
                  "CLS token that enters each layer, OS-Prompt)."},
    )  # fmt: skip
    query_view: dict[str, list] | None = field(
        default=None,
        metadata={"help": "What the query backbone wants to see, if it differs from the model's own pixel values: "
                  "resized to `size` [H, W], times `scale` plus `shift` (three channels each)."},
    )  # fmt: skip
    prompt: dict[str, Any] = field(
        default_factory=lambda: {"type": "none"}, metadata={"help": "Prompt pool: its type and that type's fields."}
    )
    kd_prompt: dict[str, Any] | None = field(
        default=None, metadata={"help": "KD token, KD prompts and KD head (None: the model has none)."}
    )
    mapping: dict[str, Any] | None = field(
        default=None, metadata={"help": "Mapping of the teacher's prompts and a KD head (None: the model has none)."}
    )
    teacher_pool: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Of a mapping's teacher: its `prompt` section, hidden_size and num_layers, to rebuild the "
                  "copy of its prompt pool."},
    )  # fmt: skip
    head: dict[str, Any] = field(
        default_factory=lambda: {"type": "linear"}, metadata={"help": "Classification head: its type and fields."}
    )
    first_session: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "A trained head: with it prompts, adapters or backbone learn on the first task alone, then "
                  "`head` is fitted to what they have become (None: they learn in every task)."},
    )  # fmt: skip
    lora: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Low-rank adapters on the backbone, which learn in the first session (None: there are none)."
        },
    )
    train_backbone: bool = field(
        default=False, metadata={"help": "Train the backbone too (the sequential fine-tuning baseline)."}
    )
    save_backbone: bool = field(
        default=True,
        metadata={"help": "Checkpoints hold the frozen backbones too; false: what was learnt alone, and "
                  "from_pretrained fetches the backbones from where they came."},
    )  # fmt: skip
    save_code: bool = field(
        default=False,
        metadata={"help": "Checkpoints hold the model's code too, for trust_remote_code without hf_cdl."},
    )
    tasks: list[list[str]] = field(default_factory=list, metadata={"help": "Class names of every task, in order."})

    def __post_init__(self, **kwargs: Any):
        from hf_cdl.serving import serve  # not when hf_cdl is imported: the pipelines load tokenizers

        serve()  # a config comes before every model, and before `pipeline` chooses its class
        self.set_tasks(self.tasks)
        self.check_small()
        super().__post_init__(**kwargs)

    def set_tasks(self, tasks: list[list[str]]) -> None:
        """Set the class names of all tasks, and the label maps with them."""
        names = [name for task in tasks for name in task]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"Class names must be unique over the stream, but {repeated[:5]} occur more than once. More data for "
                "a known class is not a new task; rename the class if it is a different concept."
            )
        if any(not task for task in tasks):
            raise ValueError("A task needs at least one class; got an empty list of class names.")
        self.tasks = [list(task) for task in tasks]
        self.id2label = dict(enumerate(names))
        self.label2id = {name: number for number, name in self.id2label.items()}

    def check_small(self) -> None:
        """Raise ValueError if small checkpoints are wanted, but could not be loaded again."""
        if self.save_backbone:
            return
        if self.train_backbone:
            raise ValueError("save_backbone is false, but train_backbone is true: what it learns would be lost.")
        for part in ("backbone", "query"):
            if getattr(self, f"{part}_config") is not None and getattr(self, f"{part}_name") is None:
                raise ValueError(
                    f"save_backbone is false, but {part}_name does not say where its weights are. Build the model by "
                    "from_backbone, or save the backbone too."
                )

    @property
    def num_classes_per_task(self) -> list[int]:
        """Number of classes of each task."""
        return [len(task) for task in self.tasks]
