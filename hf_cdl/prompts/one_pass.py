r"""One-pass query: the CLS token entering a layer is that layer's query (OS-Prompt, Kim et al., arXiv 2402.16189).

No query backbone runs: a prediction costs one pass instead of two. This works with any pool. In layer 0 the CLS token
is the same for every image, and so is the prompt. The query is detached [ours]: it selects prompts and is not trained
by what it selects, as in the two-pass case.

Queries exist only while the backbone runs, so the `prefix` keyword argument is an object that computes a layer's
prefixes when the layer is entered. Being an argument and not model state, it is safe under gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_cdl.types import Prompt

Answer = tuple["list[Prompt]", "torch.Tensor | None", "tuple[torch.Tensor, torch.Tensor] | None"]


class OnePass:
    """Prefixes of one pass; `ask(layer, query)` returns a layer's prefixes, the pool's loss and its similarities."""

    def __init__(self, ask: Callable[[int, torch.Tensor], Answer]):
        self.ask = ask
        self.losses: dict[int, torch.Tensor] = {}
        self.similarities: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def enter(self, layer: int, query: torch.Tensor) -> dict[int, list[Prompt]]:
        """Compute the `prefix` argument of a layer for queries (B, D)."""
        prefixes, loss, similarity = self.ask(layer, query.detach())
        if loss is not None:
            self.losses.setdefault(layer, loss)  # a checkpointed layer is entered again in the backward pass
        if similarity is not None:
            self.similarities.setdefault(layer, similarity)
        return {layer: prefixes}
