"""CDLConfig: everything needed to rebuild a continual model at any stage of its stream."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_cdl.checked import check_generic, check_numbers, check_types, fits, near, one_line, short
from hf_cdl.counted import counted
from hf_cdl.labels import class_list, is_inverse, label_names, repeated
from hf_cdl.types import OURS

_GENERIC = {
    *("model_type", "auto_map", "name_or_path", "_name_or_path", "_commit_hash", "torch_dtype", "num_labels"),
    *("attn_implementation", "experts_implementation", "per_layer_config", "quantization_config", "fusion_config"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "distributed_config"),
    *("output_attentions", "custom_pipelines", "transformers.js_config"),
}
"""Keys that transformers or its tools add to any config."""
_HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "gguf_file"}
_HUB |= {
    "use_safetensors",
    "low_cpu_mem_usage",
    "device_map",
    "max_memory",
    "variant",
    "weights_only",
    "offload_folder",
}
"""Loading arguments, which `pipeline` passes to the config too."""


class CDLConfig(PreTrainedConfig):
    """Configuration of `CDLForImageClassification`.

    `tasks` (the class names of every task learnt or begun, in stream order) determines all sizes that grow: prompts,
    heads, id2label. Renaming a class in `id2label` renames it in `tasks` too.
    All arguments are copied. Raises ValueError for an unknown field or a value of the wrong type, for duplicate class
    names, for labels that do not match the tasks, and for a small checkpoint (`save_backbone` false) that could not be
    loaded again.
    """

    model_type = OURS
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
    query: Literal["two_pass", "one_pass"] = field(
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
        metadata={"help": "A trained head: with it prompts, adapters or backbone learn on the first task, then `head` "
                  "is fitted to what they have become (None: they learn in every task, and so does `head`)."},
    )  # fmt: skip
    later_sessions: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "How prompts, adapters or backbone learn after the first session (None: they are fixed)."},
    )
    lora: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Low-rank adapters on the backbone, which learn in a session (None: there are none)."},
    )
    patch_mean: bool = field(
        default=False,
        metadata={"help": "The heads read the mean of the patch tokens beside CLS, as transformers' own DINOv2 "
                  "classifiers do."},
    )  # fmt: skip
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
        from hf_cdl.serving import serve  # not at import of hf_cdl, as pipelines load tokenizers

        serve()  # a config is made before any model, and before `pipeline` chooses its class
        check_names({**kwargs})
        id2label, label2id, classes = self.id2label, self.label2id, kwargs.pop("num_labels", None)
        self.set_tasks(self.tasks)
        for name in _FIELDS - {"tasks"}:
            setattr(self, name, copy.deepcopy(getattr(self, name)))
        if classes is not None:
            self.num_labels = classes
        if id2label is not None:
            self.id2label = copy.copy(id2label)
        if label2id is not None:
            self.label2id = copy.copy(label2id)
        self.check()
        try:
            super().__post_init__(**kwargs)
        except ValueError:
            raise
        except Exception as error:  # the nested configs' own checks raise many error types
            raise ValueError(f"No usable backbone_config or query_config: {one_line(error)}") from error

    def check(self) -> None:
        """Apply renamed classes. Raises ValueError if any field is invalid."""
        self.agree()
        check_types(self, "CDLConfig")
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"problem_type is {short(self.problem_type)}, but the model tells one class from others; leave it out."
            )
        if self.query_view is not None and not _is_view(self.query_view):
            raise ValueError(
                f"query_view is {short(self.query_view)}; allowed: size [H, W], scale and shift of three numbers."
            )
        for name in self.sub_configs_defaults:
            nested = getattr(self, name)
            if isinstance(nested, dict) and not isinstance(nested.get("model_type"), str):
                raise ValueError(f"{name} has no model_type, which says of what family it is, as 'vit'.")
            if not isinstance(nested, dict | PreTrainedConfig | None):
                raise ValueError(f"{name} is {short(nested)}; allowed: a config of transformers, or its fields.")
            if nested is not None:
                check_numbers(nested if isinstance(nested, dict) else vars(nested), name)
        self.check_small()

    # ---- files ----

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in PreTrainedConfig. Raises ValueError for a file that does not hold a config."""
        try:
            found, rest = super().get_config_dict(*args, **kwargs)
        except (TypeError, RecursionError) as error:  # JSON but not an object, or nested too deeply
            raise ValueError(f"The config.json of '{args[0]}' holds no config: {one_line(error)}") from error
        except OSError as error:
            if isinstance(error.__context__, ValueError):  # not JSON
                raise ValueError(f"{one_line(error)} Get it again from where it came.") from error
            raise
        if not isinstance(found, dict):
            raise ValueError(
                f"The config.json of '{args[0]}' holds no config, but {short(found)}. Get it again from where it came."
            )
        return found, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in PreTrainedConfig, with `kwargs` overriding what is stored.

        Raises ValueError for a config of another model type, without a backbone config, or with unknown fields.
        """
        kind, with_rest = config_dict.get("model_type", cls.model_type), kwargs.pop("return_unused_kwargs", False)
        if kind != cls.model_type:
            raise ValueError(
                f"This is a model of type {short(kind)}, not {cls.model_type}. To make one of a backbone, use "
                "CDLForImageClassification.from_backbone."
            )
        check_generic(config_dict, "config.json", output_attentions=(None, False))
        if not isinstance(config_dict.get("backbone_config"), dict | PreTrainedConfig):
            found = config_dict.get("backbone_config")
            raise ValueError(
                f"Its config.json is missing, or its backbone_config is not a config, but {short(found)}. Get "
                "the file again from where it came."
            )
        if unknown := _unknown(set(config_dict) - _FIELDS):
            raise ValueError(
                f"Its config.json has a field '{unknown[0]}', which hf_cdl {_version()} does not know"
                f"{near(unknown[0], _FIELDS)} If a newer hf_cdl wrote it, upgrade: pip install -U hf-cdl."
            )
        try:
            made: Any = super().from_dict({**config_dict}, return_unused_kwargs=True, **kwargs)
            config, rest = made
            config.check()  # for what `kwargs` changed
        except RecursionError as error:
            raise ValueError("Its config.json is nested too deep.") from error
        if with_rest:
            return config, rest
        check_names({name: value for name, value in rest.items() if name not in _HUB})
        return config

    def check_saving(self) -> None:
        """Raise ValueError if the saved config could not be loaded again."""
        self.check()
        if unknown := _unknown(name for name in set(vars(self)) - _FIELDS if not name.startswith("_")):
            raise ValueError(
                f"The config has got an attribute '{unknown[0]}', which is not a field of CDLConfig"
                f"{near(unknown[0], _FIELDS)} It would not be loaded again: del model.config.{unknown[0]}."
            )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in PreTrainedConfig. Raises ValueError for a config that could not be loaded again."""
        self.check_saving()
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in PreTrainedConfig."""
        content = super().to_dict()
        content.pop("_names", None)
        return content

    # ---- classes ----

    def set_tasks(self, tasks: Any) -> None:
        """Set the class names of all tasks and update the label maps. Raises ValueError for invalid class names."""
        if not isinstance(tasks, list | tuple):
            raise ValueError(
                "tasks must be a list of the class names of every task, as [['cat', 'dog'], ['owl']]; got "
                f"{short(tasks)}."
            )
        tasks = [class_list(task) for task in tasks]
        names = [name for task in tasks for name in task]
        if twice := repeated(names):
            raise ValueError(
                f"Class names must be unique over the stream, but {twice[:5]} occur more than once. More data for "
                "a known class is not a new task; rename the class if it is a different concept."
            )
        self.tasks, self._names = tasks, names
        self.id2label = dict(enumerate(names))
        self.label2id = {name: number for number, name in enumerate(names)}

    def agree(self) -> None:
        """Apply class names that were changed in id2label (or in `tasks`) everywhere.

        Raises ValueError for labels that are incomplete or contradict each other.
        """
        before, listed = self._names, [name for task in map(class_list, self.tasks) for name in task]
        old = dict(enumerate(before))
        labels = old if self.id2label is None else self.id2label
        names = listed if labels == old and listed != before else label_names(labels, len(listed))
        if listed not in (before, names):
            raise ValueError(
                "tasks and id2label were both changed and name other classes now; rename in id2label alone."
            )
        if self.label2id is not None and not any(is_inverse(self.label2id, of) for of in (names, before)):
            raise ValueError(
                f"label2id is {short(self.label2id)}, which contradicts id2label {short(labels)}. Rename classes in "
                "id2label, all of them, and leave label2id out: it follows."
            )
        if names == before == listed and self.label2id is not None and self.id2label == old:
            return
        rest = iter(names)
        self.set_tasks([[next(rest) for _ in task] for task in self.tasks])

    @property
    def num_labels(self) -> int:
        """Total number of classes over all tasks."""
        return sum(self.num_classes_per_task)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if num_labels != self.num_labels:
            raise ValueError(
                f"num_labels is {short(num_labels)}, but the tasks have {counted(self.num_labels, 'class')}. Leave it "
                "out; more classes come with model.begin_task(class_names)."
            )

    def check_small(self) -> None:
        """Raise ValueError if small checkpoints are requested but could not be loaded again."""
        if self.save_backbone:
            return
        if self.train_backbone:
            raise ValueError(
                "save_backbone is false, but train_backbone is true: what it learns would be lost; change one."
            )
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


def check_names(fields: Iterable[str], but: Iterable[str] = ()) -> None:
    """Raise ValueError for unknown field names, and for those in `but`, which follow from the backbone."""
    if unknown := _unknown(set(fields) - _FIELDS):
        raise ValueError(f"CDLConfig has no field '{unknown[0]}'{near(unknown[0], _FIELDS)}")
    if found := sorted({*fields} & {*but}):
        raise ValueError(f"{found[0]} follows from the backbone that is given; leave it out.")


def _is_view(view: dict[str, Any]) -> bool:
    size: Any = view.get("size")
    factors: list[Any] = [view.get(name) for name in ("scale", "shift")]
    whole = fits(size, list[int]) and len(size) == 2 and all(0 < side <= 10**4 for side in size)
    return whole and len(view) == 3 and all(fits(values, list[float]) and len(values) == 3 for values in factors)


def _unknown(names: Iterable[str]) -> list[str]:
    return sorted(str(name) for name in names if name not in _GENERIC)


def _version() -> str:
    try:
        return version("hf-cdl")
    except PackageNotFoundError:  # code loaded from a checkpoint
        return "as it is here"


_FIELDS = {f.name for f in dataclasses.fields(CDLConfig)}
