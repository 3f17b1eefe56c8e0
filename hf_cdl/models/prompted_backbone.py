"""A frozen backbone with prompts: the query, the prefixes of each layer, and the KD token in the sequence."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_cdl.backbones import families
from hf_cdl.backbones.last_layer import tokens_read
from hf_cdl.backbones.loading import build_backbone
from hf_cdl.checked import build_fields, check_numbers, check_size, fits, short
from hf_cdl.config import CDLConfig
from hf_cdl.heads.known import layers_read
from hf_cdl.models.hidden_states import image_tokens, patch_means, requested_only, to_keep
from hf_cdl.models.input_checks import check_attention
from hf_cdl.models.query_view import check_query, to_query_view
from hf_cdl.prompts import KDPrompt, KDPromptConfig, MappingConfig, PromptMapping, PromptPool, build_pool
from hf_cdl.prompts.one_pass import OnePass
from hf_cdl.types import ModelShape, Prompt, Prompts, Tokens, is_ours


class Encoded(NamedTuple):
    """Result of a prompted pass: CLS feature (B, D), KD token output (B, D; the CLS feature if none), and more.

    `layers`: (B, 3, D), the mean patch tokens of the layers that a head reads.
    """

    features: torch.Tensor
    token: torch.Tensor
    query: torch.Tensor | None
    prompt_loss: torch.Tensor | None
    similarities: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None
    hidden_states: tuple[torch.Tensor | None, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    layers: torch.Tensor | None = None


class PromptedBackbone(PreTrainedModel):
    """Backbone with a prompt pool and KD prompts or mapped prompts; the base of the models with heads.

    Sequence layout: [CLS, pool's tokens, patches, KD token]; keys and values of a layer: [pool's and mapped prefix,
    sequence, KD prompt]. Raises ValueError for an unsupported backbone, prompt type or combination of prompts.
    """

    config_class = CDLConfig
    config: CDLConfig
    reads_token: Any  # whether the head reads the KD token beside CLS
    base_model_prefix = ""  # "backbone" would apply transformers' renaming of old weights to the query backbone too
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: CDLConfig):
        if not is_ours(config):  # remote code defines its own config class
            raise ValueError(f"A model is made of a CDLConfig; got a {type(config).__name__}.")
        config = copy.deepcopy(config)
        config.check()
        check_attention(config._attn_implementation or "sdpa")
        super().__init__(config)
        self.backbone: Any = build_backbone(config.backbone_config, frozen=not config.train_backbone)
        config.backbone_config = self.backbone.config
        self.query_backbone = None if config.query_config is None else build_backbone(config.query_config)
        if self.query_backbone is not None:
            config.query_config = self.query_backbone.config
        self._build_prompts(config)
        if config.query == "one_pass" or self.num_tokens:
            for number, layer in enumerate(families.layers(self.backbone)):
                hook = functools.partial(self._enter_layer, number)
                layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        check_query(config, self.pool is not None and self.pool.needs_query, self.needs_query)
        self._with_token = False
        self.set_attn_implementation(config._attn_implementation or "sdpa")

    def _build_prompts(self, config: CDLConfig) -> None:
        """Build pool, KD prompts or mapping; store all fields in the config, so new defaults change no checkpoint."""
        size, depth = self.shape
        query_size = (self.query_backbone or self.backbone).config.hidden_size
        self.pool = build_pool(config.prompt, size, query_size, depth)
        if self.pool is not None:
            config.prompt = {"type": config.prompt["type"], **dataclasses.asdict(self.pool.config)}
        self.kd_prompt: KDPrompt | None = None
        if config.kd_prompt is not None:
            families.check_extra_token(self.backbone.config, "a KD token")
            options = build_fields(KDPromptConfig, config.kd_prompt, "kd_prompt")
            check_size("KD prompts", lambda: KDPrompt(options, size, depth))
            self.kd_prompt = KDPrompt(options, size, depth)
            config.kd_prompt = dataclasses.asdict(options)
            self.backbone.embeddings.register_forward_hook(self._add_kd_token)
        if self.num_tokens:
            families.check_extra_token(self.backbone.config, f"prompt tokens ({config.prompt['type']})")
        self.mapping: PromptMapping | None = None
        if config.mapping is not None:
            mapped = build_fields(MappingConfig, config.mapping, "mapping")
            check_size("A prompt mapping", lambda: self._mapping(mapped, query_size, tasks=1))
            self.mapping = self._mapping(mapped, query_size)
            config.mapping = dataclasses.asdict(mapped)
        elif config.teacher_pool is not None:
            raise ValueError(
                "teacher_pool is of a mapping, but the model has none; give mapping too, or leave it out."
            )
        if self.kd_prompt is not None and self.mapping is not None:
            raise ValueError("KD prompts and a prompt mapping both train the KD head; give the model one of them.")

    def _mapping(self, options: MappingConfig, query_size: int, tasks: int = 0) -> PromptMapping:
        made = PromptMapping(options, self._teacher_pool(query_size), *self.shape)
        for _ in range(tasks):
            made.add_task()
        return made

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As in PreTrainedModel, which would skip modules without direct weights (a pool of blocks)."""
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        super()._initialize_weights(module, is_custom_code and bool(own))

    def _teacher_pool(self, query_size: int) -> PromptPool:
        if self.config.teacher_pool is None:
            raise ValueError("A mapping needs the teacher's prompts: give teacher_pool=teacher.pool_config.")
        fields = self.config.teacher_pool
        sizes: list[Any] = [fields.get(name) for name in ModelShape._fields]
        if {*fields} != {"prompt", *ModelShape._fields} or not all(fits(size, int) and size > 0 for size in sizes):
            raise ValueError(f"teacher_pool is {short(fields)}; give teacher_pool=teacher.pool_config.")
        check_numbers(fields, "teacher_pool")
        pool = build_pool(fields["prompt"], fields["hidden_size"], query_size, fields["num_layers"])
        if pool is None:
            raise ValueError("The teacher has no prompts (type none), so there is nothing to map.")
        return pool

    @property
    def pool_config(self) -> dict[str, Any]:
        """Settings from which a student that maps prompts rebuilds this pool (CDLConfig.teacher_pool)."""
        return {"prompt": self.config.prompt, **self.shape._asdict()}

    @property
    def base_model(self) -> nn.Module:
        """The backbone, defined here in place of base_model_prefix."""
        return self.backbone

    @property
    def encoders(self) -> list[nn.Module]:
        """The backbones that a pass runs."""
        return [part for part in (self.backbone, self.query_backbone) if part is not None]

    @property
    def num_tokens(self) -> int:
        """Number of pool tokens in the sequence, from the pool's first layer on."""
        return 0 if self.pool is None else self.pool.num_tokens

    @property
    def needs_query(self) -> bool:
        """Whether a forward pass needs a query from an un-prompted pass."""
        own = self.pool is not None and self.pool.needs_query and self.config.query == "two_pass"
        return own or (self.mapping is not None and self.mapping.teacher_pool.needs_query)

    @property
    def is_plain(self) -> bool:
        """Whether the features equal a query: the CLS feature of the backbone, without any prompts."""
        prompted = (self.pool, self.mapping, self.kd_prompt, self.query_backbone)
        return prompted == (None,) * 4 and not self.config.patch_mean

    @property
    def shape(self) -> ModelShape:
        """Width and number of layers of the backbone."""
        return ModelShape(self.backbone.config.hidden_size, len(families.layers(self.backbone)))

    @property
    def feature_size(self) -> int:
        """Width of the features that the head reads."""
        return self.session_size + self.reads_token * self.shape.hidden_size

    @property
    def session_size(self) -> int:
        """Width of the leading features, which a session's head reads."""
        return self.shape.hidden_size * (2 if self.config.patch_mean else 1)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Set `sdpa` or `eager`, always in the variant with prefixes. Raises ValueError for anything else."""
        name = check_attention(attn_implementation)
        self.config._attn_implementation_internal = name
        for backbone in (self.backbone, self.query_backbone):
            if backbone is not None:
                backbone.config._attn_implementation = f"prefix_{name}"

    # ---- the query and the prompted pass ----

    @torch.no_grad()
    def compute_query(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the pools' query (B, D_q): the CLS feature of the frozen, un-prompted query backbone."""
        backbone = self.backbone if self.query_backbone is None else self.query_backbone
        if self.config.query_view is not None:
            pixel_values = to_query_view(pixel_values, **self.config.query_view)
        read = tokens_read(backbone, None)
        return families.pool(backbone, self._run(backbone, pixel_values, read=read).last_hidden_state)

    def _encode(
        self,
        pixel_values: torch.Tensor,
        query: torch.Tensor | None,
        task_id: int | None,
        labelled: int | None = None,
        reads_layers: bool = False,
        asked: bool | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> Encoded:
        """Run one prompted pass, preceded by a query pass if the prompts need one and `query` is None.

        Without prompts a known query is the result.
        """
        if query is not None and self.is_plain and not (reads_layers or asked or output_attentions):
            return Encoded(query, query, query, None, None, None, None)
        if query is None and self.needs_query:
            query = self.compute_query(pixel_values)
        one_pass = OnePass(functools.partial(self._ask_one_pass, query, task_id, labelled))
        two_pass = self.config.query != "one_pass"
        prefix, loss = self._prefixes(query, task_id, labelled) if two_pass else (one_pass, None)
        read = layers_read(self.shape.num_layers) if reads_layers else []
        more: dict[str, Any] = {"output_hidden_states": to_keep(asked, read), "output_attentions": output_attentions}
        more["read"] = self._tokens_read(more["output_hidden_states"], output_attentions)
        found = self._run(self.backbone, pixel_values, self.kd_prompt is not None, prefix, **more)
        if one_pass.losses:
            loss = torch.stack([*one_pass.losses.values()]).sum()
        last = found.last_hidden_state
        features, token = self._read(self._cut_tokens(last) if more["read"] is None else last)
        skip = families.num_extra_tokens(self.backbone.config)
        shown = image_tokens(found.hidden_states, self._unprompted, skip)
        return Encoded(
            features=features,
            token=token,
            query=query,
            prompt_loss=loss,
            similarities=tuple(one_pass.similarities.values()) or None,
            hidden_states=requested_only(shown, asked),
            attentions=found.attentions,
            layers=patch_means(shown, read, families.family(self.backbone.config).has_cls),
        )

    def _read(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads of the last layer's sequence, and what a KD head does."""
        hidden, token = self._take_token(last)
        features = families.pool(self.backbone, hidden)
        if self.config.patch_mean:
            features = torch.cat([features, families.patch_mean(self.backbone, hidden)], dim=-1)
        token = features if self.kd_prompt is None else families.final_norm(self.backbone, token)
        return torch.cat([features, token], dim=-1) if self.reads_token else features, token

    def _tokens_read(self, states: Any, attentions: bool | None) -> tuple[int, ...] | None:
        """Indices of the tokens that are read of the last layer, in its sequence; None for all of them."""
        if self.config.patch_mean or attentions:
            return None
        at = families.family(self.backbone.config).token_at
        token = None if self.kd_prompt is None else at + (self.num_tokens if at >= 0 else 0)
        return tokens_read(self.backbone, token, states)

    def _prefixes(
        self, query: torch.Tensor | None, task_id: int | None, labelled: int | None = None
    ) -> tuple[dict[int, list[Prompt]], torch.Tensor | None]:
        """The prompts of all layers, and the sum of the pool's losses."""
        found = [self._ask(query, query, task_id, labelled, layer) for layer in range(self.shape.num_layers)]
        losses = [loss for _, loss in found if loss is not None]
        prefix = {layer: prefixes for layer, (prefixes, _) in enumerate(found) if prefixes}
        return prefix, torch.stack(losses).sum() if losses else None

    def _ask(
        self, own: Any, query: Any, task_id: int | None, labelled: int | None, layer: int
    ) -> tuple[list[Prompt], torch.Tensor | None]:
        """A layer's prompts and the pool's loss; `own` is the query of this pool, `query` of the teacher's pool.

        The loss is that of the first `labelled` queries: keys are to match the images of their own task.
        """
        prefix, loss = (None, None) if self.pool is None else self.pool(layer, own, task_id)
        if loss is not None and labelled is not None and own is not None and self.pool is not None:
            loss = self.pool(layer, own[:labelled], task_id)[1]
        mapped = None if self.mapping is None else self.mapping(layer, query, task_id)
        kd = None if self.kd_prompt is None else self.kd_prompt(layer)
        return [prompt for prompt in (prefix, mapped, kd) if prompt is not None], loss

    def _ask_one_pass(
        self, query: torch.Tensor | None, task_id: int | None, labelled: int | None, layer: int, own: torch.Tensor
    ) -> Any:
        """The same on entering a layer, plus the similarities of the pool's keys with `own` and `query` if given."""
        prefixes, loss = self._ask(own, query, task_id, labelled, layer)
        pairs = () if query is None or self.pool is None else (own, query)
        similarity = tuple(self.pool.similarity(layer, q) for q in pairs)  # type: ignore[union-attr]
        return prefixes, loss, similarity if similarity and similarity[0] is not None else None

    def _enter_layer(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of a layer: inserts the pool's tokens and passes the prefixes on to attention.

        With one-pass queries both are computed here, from the sequence entering the layer.
        """
        prompts = kwargs.get("prefix")
        if prompts is None:  # the query pass
            return None
        rest = {name: value for name, value in kwargs.items() if name not in ("prefix", "hidden_states")}
        sequence = args[0] if args else kwargs["hidden_states"]
        if isinstance(prompts, OnePass):
            prompts = prompts.enter(number, self._own_query(number, sequence))
        found = prompts.get(number, [])
        for prompt in found:
            if isinstance(prompt, Tokens):
                sequence = self._put_tokens(number, sequence, prompt.tokens)
        rest["prefix"] = {number: [prompt for prompt in found if not isinstance(prompt, Tokens)]}
        return (sequence, *args[1:]), rest

    def _own_query(self, number: int, sequence: torch.Tensor) -> torch.Tensor:
        """The one-pass query (B, D) of a layer: CLS as it enters, or the mean of the patches if there is no CLS."""
        if families.family(self.backbone.config).has_cls:
            return sequence[:, 0]
        return self._take_token(self._cut_tokens(sequence, number))[0].mean(dim=1)

    def _put_tokens(self, number: int, sequence: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The sequence entering a layer, with these tokens (B or 1, P, D) after CLS in place of earlier ones."""
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f"The prompt pool gave layer {number} prompts of {tokens.shape[1]}, but its num_tokens is "
                f"{self.num_tokens}; give every layer that many."
            )
        at, there = self._tokens_at(number)
        tokens = tokens.to(sequence.dtype).expand(sequence.shape[0], -1, -1)  # len would fix the batch in an export
        return torch.cat([sequence[:, :at], tokens, sequence[:, at + there :]], dim=1)

    def _cut_tokens(self, sequence: torch.Tensor, number: int | None = None) -> torch.Tensor:
        """The sequence entering layer `number` (None: leaving the last layer), without the pool's tokens."""
        at, there = self._tokens_at(number)
        return torch.cat([sequence[:, :at], sequence[:, at + there :]], dim=1) if there else sequence

    def _tokens_at(self, number: int | None) -> tuple[int, int]:
        """Index and number of the pool's tokens in the sequence entering a layer."""
        entered = self.pool is not None and (number is None or number > min(self.pool.layers))
        return int(families.family(self.backbone.config).has_cls), self.num_tokens if entered else 0

    def _run(
        self,
        backbone: Any,
        pixel_values: torch.Tensor,
        with_token: bool = False,
        prefix: Prompts | OnePass | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a backbone once; the KD token is added only on request, since the query pass must not see it."""
        if prefix:
            if not backbone.config._attn_implementation.startswith("prefix_"):
                raise RuntimeError(
                    f"The backbone's attention is '{backbone.config._attn_implementation}', which ignores prompts. "
                    "Change it with model.set_attn_implementation('sdpa' or 'eager'), not on the backbone."
                )
            kwargs["prefix"] = prefix
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        self._with_token = with_token
        try:
            return backbone(pixel_values, **families.extra_inputs(backbone.config, pixel_values), **kwargs)
        finally:
            self._with_token = False

    def _add_kd_token(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the embeddings: adds the KD token to the sequence (B, N, D)."""
        if not self._with_token or self.kd_prompt is None:
            return output
        sequence = output[0] if isinstance(output, tuple) else output
        token = self.kd_prompt.token.to(sequence.dtype).expand(sequence.shape[0], 1, -1)
        at = self._token_index(sequence.shape[1] + 1)
        sequence = torch.cat([sequence[:, :at], token, sequence[:, at:]], dim=1)
        return (sequence, *output[1:]) if isinstance(output, tuple) else sequence

    def _take_token(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequence without the KD token, and that token's output (B, D); without one, the sequence and its CLS."""
        if self.kd_prompt is None:
            return sequence, sequence[:, 0]
        at = self._token_index(sequence.shape[1])
        return torch.cat([sequence[:, :at], sequence[:, at + 1 :]], dim=1), sequence[:, at]

    def _unprompted(self, number: int, sequence: torch.Tensor) -> torch.Tensor:
        """Hidden state `number` without tokens of ours."""
        # transformers records the first state when the first layer has its tokens, the others when a layer ends
        first = self.pool is not None and 0 in self.pool.layers
        return self._take_token(self._cut_tokens(sequence, number or (None if first else 0)))[0]

    def _token_index(self, length: int) -> int:
        return families.family(self.backbone.config).token_at % length

    @torch.no_grad()
    def _copy_cls_token(self, kd_prompt: KDPrompt) -> None:
        """Copy the embedded CLS token, position included; it is the same for every image, so a blank one will do."""
        size = families.pair(self.backbone.config.image_size)
        image = torch.zeros(1, self.backbone.config.num_channels, *size, device=self.device, dtype=self.dtype)
        embedded = self.backbone.embeddings(image)
        init.copy_(kd_prompt.token, (embedded[0] if isinstance(embedded, tuple) else embedded)[0, 0])
