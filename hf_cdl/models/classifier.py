"""ImageClassifier: a plain transformers image classifier that trains all its weights, for offline distillation.

Its checkpoint is that of the plain model: `AutoModelForImageClassification` and `pipeline` load it without hf_cdl.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_cdl.backbones.loading import load_weights, read_config
from hf_cdl.backbones.stored import check_complete
from hf_cdl.checked import check_size, listed, short
from hf_cdl.counted import counted
from hf_cdl.labels import class_list, repeated
from hf_cdl.models.input_checks import check_labels, check_pixels
from hf_cdl.types import CDLOutput, ModelShape, is_ours


class ImageClassifier(nn.Module):
    """Wrapper that gives a plain classifier `model` the interface of CDLTrainer; learns one task with all weights.

    `begin_task` sets the task's classes; `use_as_is` instead freezes a classifier already trained on these classes.
    """

    accepts_loss_kwargs = False  # the loss is a batch mean: Trainer must divide it for gradient accumulation
    needs_query = False
    fitted = False
    unmeasured = False
    served_plainly = True  # by transformers' own pipeline
    shape = ModelShape(0, 0)  # loss terms get no hidden states

    def __init__(self, model: Any, pretrained: bool = True):
        super().__init__()
        self.model = model
        self.pretrained = pretrained
        self.tasks: list[list[str]] = []
        self.trained_tasks = 0  # whose images it has seen
        self.scaffold: nn.Module | None = None  # layers that training needs and inference does not; never saved

    @classmethod
    def from_backbone(cls, name: str | Path, revision: str | None = None, pretrained: bool = True) -> ImageClassifier:
        """Load a classifier from a Hub id or folder, without tasks; `pretrained=False`: its config, random weights.

        A backbone without a head will do, since `begin_task` makes a new one. Raises ValueError for a type without an
        image classifier, and for a checkpoint that lacks weights other than the head's.
        """
        name = str(name)
        config = read_config(name, revision)
        if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise ValueError(f"A model of type '{config.model_type}' has no image classifier in transformers.")
        if not pretrained:
            make = functools.partial(AutoModelForImageClassification.from_config, config, dtype=torch.float32)
            check_size(f"The model of '{name}'", make)
            return cls(make(), pretrained=False)
        model, info = load_weights(AutoModelForImageClassification, config, name, revision)
        if missing := sorted(set(info["missing_keys"]) - class_dimensions(model).keys()):
            raise ValueError(
                f"The checkpoint of '{name}' lacks {counted(len(missing), 'weight')} ({listed(missing)}), so they "
                "would be random. Give a complete checkpoint, or set pretrained: false."
            )
        return cls(model)

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None) -> ImageClassifier:
        """Load a classifier that has learnt its task from its plain checkpoint: a folder, or a Hub id at a revision.

        Raises ValueError for a checkpoint that is incomplete or has NaN or infinite weights.
        """
        config = read_config(str(folder), revision)
        if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or is_ours(config):
            raise ValueError(f"'{folder}' holds a model of type '{config.model_type}', not an ordinary classifier.")
        model, info = load_weights(AutoModelForImageClassification, config, str(folder), revision)
        check_complete(info, f"The checkpoint '{folder}'", folder)
        loaded = cls(model)
        loaded.tasks, loaded.trained_tasks = [labels_of(loaded.config)], 1
        return loaded

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the plain model."""
        self.model.save_pretrained(folder)

    @property
    def config(self) -> PreTrainedConfig:
        """The plain model's config."""
        return self.model.config

    def trains(self, task: int) -> bool:
        """Whether a loss trains the model: yes, unless it is used as is."""
        return not self.tasks or any(parameter.requires_grad for parameter in self.parameters())

    # ---- its one task ----

    def begin_task(self, class_names: Sequence[str]) -> None:
        """Create a head for these classes and, unless pre-trained, new weights, from PyTorch's global generator.

        Raises ValueError if it already knows classes, and for anything but a list of names.
        """
        class_names = _distinct(class_names)
        if self.tasks:
            raise ValueError(
                f"An ordinary classifier learns one task, and this one knows {counted(len(self.tasks[0]), 'class')} "
                "already. Give all classes in one task (data.classes_per_task), or learn them in turn with model: cdl."
            )
        old, config = self.model, copy.deepcopy(self.config)
        _name_classes(config, class_names)
        self.model = type(old)(config).to(next(old.parameters()).device)
        if self.pretrained:
            head = class_dimensions(old)
            kept = {name: value for name, value in old.state_dict().items() if name not in head}
            self.model.load_state_dict(kept, strict=False)
        self.tasks = [list(class_names)]
        self.freeze()

    def use_as_is(self, class_names: Sequence[str]) -> None:
        """Freeze a classifier already trained on exactly these classes and reorder its logits to match.

        Classes match by name. Raises ValueError if it knows other classes, and for anything but a list of names.
        """
        class_names = _distinct(class_names)
        own = labels_of(self.config)
        if sorted(own) != sorted(class_names):
            lacking, more = sorted(set(class_names) - set(own)), sorted(set(own) - set(class_names))
            raise ValueError(
                f"It is used as it is, so its classes must be those of the data, by name. It has {len(own)}, the data "
                f"{len(class_names)}; it lacks {lacking[:5]}, the data lack {more[:5]}. Rename the classes in the "
                "id2label of its config.json, or let it train (leave out train: null)."
            )
        order = [own.index(name) for name in class_names]
        state = self.model.state_dict()
        for name, dimension in class_dimensions(self.model).items():
            rows = torch.tensor(order, device=state[name].device)
            state[name].copy_(state[name].index_select(dimension, rows))
        _name_classes(self.config, class_names)
        self.tasks = [list(class_names)]
        self.requires_grad_(False)

    @property
    def encoders(self) -> list[nn.Module]:
        """The modules that a forward pass runs."""
        return [self.model]

    def freeze(self) -> None:
        """Make everything trainable except parameters that never reach the output."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("mask_token" not in name)

    def follow(self, teacher: Any) -> None:
        """Do nothing: a classifier keeps nothing of its teacher."""

    def rates(self) -> dict[nn.Parameter, float]:
        """No learning-rate factors: everything trains at the full rate."""
        return {}

    def later_session(self, task: int) -> None:
        """None: a classifier has no later sessions."""

    def end_session(self) -> None:
        """Do nothing: there are no sessions."""

    def end_task(self) -> None:
        """Do nothing."""

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        query: torch.Tensor | None = None,
        task_id: int | None = None,
        output_hidden_states: Any = None,
        labelled: int | None = None,
    ) -> CDLOutput:
        """Compute logits of images (B, 3, H, W) and, given labels (B,), cross-entropy; the rest is ignored.

        Raises ValueError if hidden states are requested.
        """
        if output_hidden_states:
            raise ValueError("An ordinary classifier shows its logits alone; use terms that compare logits.")
        check_pixels(pixel_values, getattr(self.config, "num_channels", 3))
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels or 0)
        logits = self.model(pixel_values=pixel_values).logits
        return CDLOutput(loss=None if labels is None else F.cross_entropy(logits, labels.long()), logits=logits)


def class_dimensions(model: PreTrainedModel) -> dict[str, int]:
    """Weights with a class dimension, and that dimension: found by comparing shapes with a model of one more class."""
    config: Any = copy.deepcopy(model.config)
    config.num_labels += 1
    with torch.device("meta"), init.no_init_weights():
        larger = type(model)(config).state_dict()
    return {
        name: [own == other for own, other in zip(value.shape, larger[name].shape, strict=True)].index(False)
        for name, value in model.state_dict().items()
        if value.shape != larger[name].shape
    }


def labels_of(config: Any) -> list[str]:
    """A classifier's class names in the order of its logits. Raises ValueError unless every class has a name."""
    if sorted(config.id2label) != [*range(config.num_labels)]:
        raise ValueError(f"Its id2label is {short(config.id2label)}; it must name the classes 0, 1, ... by number.")
    return [config.id2label[number] for number in range(config.num_labels)]


def _distinct(names: Any) -> list[str]:
    """The class names as a list. Raises ValueError for anything else, and for repeated names."""
    names = class_list(names)
    if twice := repeated(names):
        raise ValueError(f"Classes have different names; got {listed(twice)} more than once.")
    return names


def _name_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in config.id2label.items()}
