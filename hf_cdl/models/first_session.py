"""Check that a fitted head gets fixed features, or features adapted by a first session on the first task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_cdl.config import CDLConfig
from hf_cdl.heads import HEADS, example


def check_session(config: CDLConfig, prompts: Sequence[str]) -> None:
    """Raise ValueError unless the head, the first session and the trainable parts fit together.

    `prompts`: which of "prompts", "KD prompts" and "a mapping" the model has. The last two come with a KD head.
    """
    first, kind = config.first_session, config.head["type"]
    fitted, has_kd_head = HEADS[kind].fitted, not {*prompts} <= {"prompts"}
    learns = "prompts" in prompts or config.train_backbone or config.lora is not None
    if config.lora is not None:
        if others := [*prompts, *["train_backbone"] * config.train_backbone]:
            raise ValueError(f"lora adapts the backbone alone, but the model has {', '.join(others)} too.")
        if first is None:
            raise ValueError(
                f"lora learns in a first session: give first_session a trained head, as {example(fitted=False)}, and "
                f"`head` a fitted one, as {example(fitted=True)}."
            )
    if first is not None:
        if not fitted or HEADS[first["type"]].fitted or not learns or has_kd_head:
            raise ValueError(
                f"first_session ({first['type']}) needs a trained head, a fitted `head` (got {kind}), prompts, "
                "lora or train_backbone, and no KD head."
            )
    elif fitted and (learns or has_kd_head):
        raise ValueError(
            f"A head of type {kind} is fitted to fixed features, but prompts or backbone would learn in every "
            f"task. Give first_session a trained head, as {example(fitted=False)}: they learn on the first task alone."
        )


def check_one_head(parts: Mapping[str, object], what: str) -> None:
    """Raise ValueError if a model whose head reads more than one token has another head, for the KD token alone.

    `parts`: name -> KD prompts and mapping, or None; `what`: the option that makes it read more, as in "it is true".
    """
    if taught := [name for name, part in parts.items() if part is not None and name != "prompts"]:
        raise ValueError(
            f"{what}, but the model has {taught[0]}, whose head reads one token. Leave {what.split()[0]} out."
        )
