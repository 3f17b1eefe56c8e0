"""CDLForImageClassification: a frozen backbone, a prompt pool and heads, for both teacher and student."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from hf_cdl.backbones import lora
from hf_cdl.backbones.families import check_image_size, check_patch_mean
from hf_cdl.backbones.loading import commit_of, digest, load_backbone
from hf_cdl.checked import build_fields, short
from hf_cdl.config import CDLConfig, check_names
from hf_cdl.heads import Head, build_head, drop_sums
from hf_cdl.heads.standardise import Standardise
from hf_cdl.labels import class_list
from hf_cdl.models import changes
from hf_cdl.models.changes import Change
from hf_cdl.models.input_checks import check_labels, check_pixels, check_task
from hf_cdl.models.prompted_backbone import Encoded
from hf_cdl.models.remote_code import check_code
from hf_cdl.models.sessions import LearnsInSessions, check_one_head, check_session
from hf_cdl.prompts import KDPrompt, PromptMapping, PromptPool
from hf_cdl.types import CDLOutput


class CDLForImageClassification(LearnsInSessions):
    """Image classifier that learns tasks sequentially.

    `begin_task(class_names)` adds a block of parameters to every part that grows and freezes the earlier blocks. The
    KD head, if there is one, reads the KD token, or CLS if prompts are mapped. With a fitted head everything else is
    fixed, except in a session: on the first task (with `later_sessions` also on later ones), the rest trains with a
    temporary head until `end_session()`. KD token and KD prompts train with a temporary KD head; the fitted head reads
    CLS and KD token.
    Raises ValueError for an unsupported backbone, prompt type, head or combination of them.
    """

    accepts_loss_kwargs = False  # the loss is a batch mean: Trainer must divide it for gradient accumulation

    served_plainly = False  # the pipeline must decode images the way training does

    def __init__(self, config: CDLConfig, **fields: Any):
        if fields:  # from_pretrained arguments that are neither its own nor config fields
            check_names(fields)
            raise ValueError(f"{', '.join(fields)}: a field of the config is set there, not beside it.")
        super().__init__(config)
        config = self.config
        self.head = build_head(config.head, self.feature_size, self.shape.hidden_size)
        config.head = {"type": config.head["type"], **dataclasses.asdict(self.head.config)}
        taught = self.kd_prompt or self.mapping
        kd_head = None if taught is None or self.fitted else build_head(config.head, self.shape.hidden_size)
        self.kd_head: Head | None = kd_head
        self.kd_alpha = 0.0 if taught is None else taught.config.alpha
        self.scaffold: nn.Module | None = None  # layers that training needs and inference does not; never saved
        self.trained_tasks = len(config.tasks)  # whose images it has seen: those of a checkpoint, or of a trainer
        self._before_change: Any = None
        self.session_head: Head | None = None  # the heads of a session while it runs; never saved
        self.session_kd_head: Head | None = None
        parts = {"prompts": self.pool, "KD prompts": self.kd_prompt, "a mapping": self.mapping}
        if config.patch_mean:
            check_patch_mean(config.backbone_config)
            check_one_head(parts, "patch_mean is true")
        if config.first_session is not None:
            build_head(config.first_session, self.session_size)
        check_code(config)
        check_session(config, [name for name, part in parts.items() if part is not None])
        self.later = self.later_options()
        if config.lora is not None:
            adapters = build_fields(lora.LoraOptions, config.lora, "lora")
            config.lora = dataclasses.asdict(lora.add_adapters(self.backbone, adapters))
        for number, task in enumerate(config.tasks):
            self._grow(number, len(task))
        self.post_init()
        if config.lora is not None:
            lora.reset_adapters(self.backbone)  # post_init initialised them like ordinary backbone layers
        self.freeze()

    # ---- building, growing, freezing ----

    @classmethod
    def from_backbone(
        cls,
        name: str | Path,
        revision: str | None = None,
        query_name: str | Path | None = None,
        query_revision: str | None = None,
        **fields: Any,
    ) -> CDLForImageClassification:
        """Create a model without tasks on a pre-trained backbone (Hub id or folder); `fields` are CDLConfig's.

        With `query_name` a second frozen backbone computes the queries: the student's, for a teacher that shares them.
        Raises ValueError for an unknown field, a revision given with a folder, and a backbone whose weights are
        incomplete, NaN or infinite.
        """
        check_names(fields, but={"backbone_config", "backbone_digest", "query_config", "query_digest"})
        if query_name is None and query_revision is not None:
            raise ValueError(
                f"query_revision is '{query_revision}', but there is no query_name that it is of. Give that too, "
                "or leave query_revision out."
            )
        backbone, of_backbone = _fetched("backbone", name, revision)
        query, of_query = (None, {}) if query_name is None else _fetched("query", query_name, query_revision)
        model = cls(CDLConfig(**of_backbone, **of_query, **fields))
        lora.load_frozen(model.backbone, backbone.state_dict())
        if model.query_backbone is not None and query is not None:
            model.query_backbone.load_state_dict(query.state_dict())
        if model.kd_prompt is not None and model.kd_prompt.config.token_init == "cls":
            model._copy_cls_token(model.kd_prompt)
        return model

    @property
    def tasks(self) -> list[list[str]]:
        """Class names of every task learnt or begun, in stream order; renaming a class in id2label renames it here."""
        self.config.agree()
        return self.config.tasks

    @property
    def num_labels(self) -> int:
        """Number of classes the model knows, which is its number of logits."""
        return self.config.num_labels

    @property
    def fitted(self) -> bool:
        """Whether the head is fitted in one pass over a task's images instead of being trained."""
        return self.head.fitted

    def begin_task(self, class_names: list[str] | tuple[str, ...]) -> None:
        """Add a task (its classes, prompt block and head block) and freeze what earlier tasks learnt.

        New parameters are drawn from PyTorch's global generator. Raises ValueError for a class that is already known,
        for anything but a list of names, or if the head's sums were dropped.
        """
        names = class_list(class_names)
        self.head.check_growth()
        device, dtype = self.device, self.dtype
        self.config.set_tasks([*self.tasks, names])
        task = len(self.config.tasks) - 1
        self._grow(task, len(names))
        self._init_task(task)
        if self.has_session(task):
            self.begin_session()
        made = torch.empty(())  # with the device and dtype of all new parameters
        if (made.device, made.dtype) != (device, dtype):
            self.to(device, dtype)  # type: ignore[call-arg]
        self.freeze()

    def drop_sums(self) -> None:
        """Drop what the head needs only to learn further tasks, which is most of a checkpoint's size.

        Raises ValueError for a head that keeps no such sums.
        """
        drop_sums(self.head)
        self.config.head = {**self.config.head, **dataclasses.asdict(self.head.config)}

    # ---- changing what was learnt ----

    def add(self, images: Any, labels: Sequence[str], processor: Any = None) -> Change:
        """Learn images of new and of known classes, in one pass; new classes become a task.

        `images`: pixel values (N, 3, H, W), or a list of PIL images or files, which `processor` prepares (by default
        the one stored with the model). `labels`: the class name of each image. Like all methods that change a student,
        it returns what it did, and leaves the model unchanged if it fails. Raises ValueError for a trained head, and
        for images or labels that cannot be used.
        """
        return changes.add(self, images, labels, processor)

    def correct(self, images: Any, labels: Sequence[str], was: Sequence[str], processor: Any = None) -> Change:
        """Give images that were learnt with the labels `was` their right `labels`.

        Raises ValueError as `add` does, and for images that were certainly never learnt.
        """
        return changes.correct(self, images, labels, was, processor)

    def remove(self, name: str, images: Any = None, processor: Any = None) -> Change:
        """Remove a class: the model never answers with it again.

        Given all its training `images`, or with a head that keeps sums per class, the head becomes one that never saw
        them. Raises ValueError if these are not the images that the class was learnt from.
        """
        return changes.remove(self, name, images, processor)

    def rename(self, old: str, new: str) -> Change:
        """Rename a class. Raises ValueError for an unknown class, and for a name that another class has."""
        return changes.rename(self, old, new)

    def merge(self, names: Sequence[str], name: str) -> Change:
        """Merge several classes into one called `name`, at the place of the first. Raises ValueError as `add` does."""
        return changes.merge(self, names, name)

    def undo(self) -> Change:
        """Undo the last change of this model in memory. Raises ValueError if there is none."""
        return changes.undo(self)

    def follow(self, teacher: CDLForImageClassification) -> None:
        """Update this model's copy of the teacher's prompt pool, once the teacher has learnt the newest task."""
        if self.mapping is not None and teacher.pool is not None:
            self.mapping.teacher_pool.load_state_dict(teacher.pool.state_dict())

    @property
    def unmeasured(self) -> bool:
        """Whether a head standardises its features but has no statistics yet."""
        return any(head.standard is not None and not head.standard.count for head in self._heads())

    def measure(self, output: CDLOutput) -> None:
        """Add the features of un-augmented images to the heads' standardisation statistics."""
        for head, features in zip(self._heads(), (self._of_head(output.features), output.kd_features), strict=False):
            if head.standard is not None and features is not None:
                head.standard.measure(features)

    def accumulate(self, output: CDLOutput, labels: torch.Tensor, taught: Any = None, sign: int = 1) -> None:
        """Add images to the sums of the fitted head, or take them away; see FittedHead.accumulate."""
        self.head.accumulate(output.features, labels, taught, sign, output.layers)  # type: ignore[operator]

    def end_task(self) -> None:
        """Tell the pool and the heads that the newest task has been learnt."""
        for part in (None if self.config.first_session else self.pool, *self._heads()):
            if part is not None:
                part.end_task()

    def freeze(self) -> None:
        """Freeze everything but the newest blocks and what all tasks share (KD prompts, the scaffold).

        With `train_backbone` the backbone trains too, except for parameters that never reach the output. With a fitted
        head nothing trains outside a session.
        """
        self.requires_grad_(False)
        if self.fitted and self.session_head is None:
            return
        if self.config.train_backbone:
            for name, parameter in self.backbone.named_parameters():
                parameter.requires_grad_("mask_token" not in name)
        for name, parameter in self.backbone.named_parameters():
            if lora.is_adapter(name):
                parameter.requires_grad_(True)
        for part in (self.pool, self.mapping, *self._heads()):
            if part is not None:
                newest = [*part.blocks][-1:]
                for module in (*newest, *(child for child in part.children() if child is not part.blocks)):
                    module.requires_grad_(True)
                for parameter in part.parameters(recurse=False):
                    parameter.requires_grad_(True)
        if self.mapping is not None:
            self.mapping.teacher_pool.requires_grad_(False)
        for part in (self.kd_prompt, self.scaffold):
            if part is not None:
                part.requires_grad_(True)

    def _heads(self) -> list[Head]:
        """The heads currently in use."""
        used = (self.head, self.kd_head) if self.session_head is None else (self.session_head, self.session_kd_head)
        return [head for head in used if head is not None]

    def _prompts(self, task: int) -> list[PromptPool | PromptMapping]:
        """The prompts that get a block for this task: with a fitted head, only if it has a session."""
        parts = [self.pool, self.mapping] if self.config.first_session is None or self.has_session(task) else []
        return [part for part in parts if part is not None]

    def _grow(self, task: int, num_classes: int) -> None:
        for part in self._prompts(task):
            part.add_task()
        for head in (self.head, self.kd_head):
            if head is not None:
                head.add_task(num_classes)

    def _init_task(self, task: int) -> None:
        for part in (*self._prompts(task), self.head, self.kd_head):
            if part is not None:
                part.init_task(task)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PromptPool | Head):
            module.init_shared()
        if isinstance(module, PromptPool | PromptMapping | Head):
            for task in range(len(module.blocks)):
                module.init_task(task)
        elif isinstance(module, KDPrompt):
            module.reset_parameters()
        elif isinstance(module, Standardise):
            module.reset()

    # ---- forward ----

    @property
    def reads_query(self) -> bool:
        """Whether a known query saves a pass of the backbone: the query pass, or without prompts the only one."""
        return self.needs_query or (self.is_plain and not self._heads()[0].reads_layers)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        query: torch.Tensor | None = None,
        task_id: int | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        labelled: int | None = None,
    ) -> CDLOutput:
        """Compute logits of images (B, 3, H, W) over all classes seen so far, and the loss given labels (B,).

        The loss is cross-entropy. A known `query` (B, D_q) saves the query pass; without prompts that is the only
        pass. `task_id` is the current task, for a model that trains on it or, in evaluation mode, teaches it. In
        training `logits` come from the CLS head, in evaluation they are (1 - alpha) * CLS head + alpha * KD head.
        `output_hidden_states` may list the indices of those to keep: 0 for the embeddings, -1 for the last layer.
        `labelled`: number of images, from the first, that count in the pool's loss; the others have no labels.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states or None
        if output_attentions is None:
            output_attentions = self.config.output_attentions or None
        self._check_inputs(pixel_values, labels, query, task_id, output_hidden_states, output_attentions)
        found = self._encode(
            pixel_values,
            query,
            None if self.fitted and self.session_head is None else task_id,  # fixed prompts no longer belong to a task
            labelled,
            reads_layers=self._heads()[0].reads_layers,
            asked=output_hidden_states,
            output_attentions=output_attentions,
        )
        return self._classify(found, labels)

    def _check_inputs(
        self, pixel_values: Any, labels: Any, query: Any, task_id: Any, states: Any, attentions: Any
    ) -> None:
        """Raise ValueError for inputs the model cannot handle; `states`: the requested hidden states."""
        if not self.config.tasks:
            raise ValueError("The model knows no classes yet; call begin_task(class_names) first.")
        config = self.backbone.config
        check_pixels(pixel_values, config.num_channels)
        check_image_size(config, (pixel_values.shape[2], pixel_values.shape[3]))
        check_task(task_id, len(self.config.tasks))
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels)
        if query is not None and (query.dim() != 2 or len(query) != len(pixel_values)):
            raise ValueError(f"query has shape {tuple(query.shape)}; give one of compute_query for these images.")
        depth = self.shape.num_layers
        if isinstance(states, list | tuple) and not all(-depth - 1 <= number <= depth for number in states):
            raise ValueError(
                f"output_hidden_states lists {short(states)}, but there are 0 to {depth}, or -1 for the last."
            )
        if attentions and self.config._attn_implementation != "eager":
            raise ValueError("Attention weights are shown by 'eager' alone: model.set_attn_implementation('eager').")

    @torch.no_grad()
    def answer(self, found: CDLOutput) -> CDLOutput:
        """The output, without loss, for images whose features are known: `features`, `kd_features`, `layers`."""
        features: Any = found.features
        token = features if found.kd_features is None else found.kd_features
        return self._classify(Encoded(features, token, None, None, None, None, None, found.layers), None)

    def _classify(self, found: Encoded, labels: torch.Tensor | None) -> CDLOutput:
        """The heads' output for an encoded batch."""
        (head, *others), known = self._heads(), None
        logits = self._of_all(head(self._of_head(found.features)))
        if found.layers is not None:
            known = head.known_score(found.features, found.layers, logits)
        kd_features: Any = None
        kd_logits: Any = None
        if others:
            kd_features = found.token
            kd_logits = self._of_all(others[0](kd_features))
            if not self.training and self.session_head is None:
                logits = torch.lerp(logits, kd_logits, self.kd_alpha)
        return CDLOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels.long()),
            logits=logits,
            kd_logits=kd_logits,
            prompt_loss=found.prompt_loss,
            query=found.query,
            features=found.features,
            kd_features=kd_features,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            similarities=found.similarities,
            layers=found.layers,
            known=known,
        )

    def _of_head(self, features: Any) -> Any:
        """The part of features (B, D) that the head in use reads; in a session the KD token has its own head."""
        return features if self.session_head is None else features[:, : self.session_size]

    def _of_all(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over all classes; in a session the head gives only those of the newest task."""
        return F.pad(logits, (self.num_labels - logits.shape[1], 0), value=-torch.inf)


def _fetched(part: str, name: str | Path, revision: str | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A pre-trained backbone, and the config fields that describe it (`backbone_...` or `query_...`)."""
    name = str(name)
    revision = commit_of(name, revision)
    backbone = load_backbone(name, revision)
    about = {"config": backbone.config, "name": name, "revision": revision, "digest": digest(backbone)}
    return backbone, {f"{part}_{field}": value for field, value in about.items()}
