"""Which query passes the roles of a run compute: of passes on the same batches with the same weights, only the first.

`--plan` uses this to count what hf_cdl.training.kept does.
"""

from __future__ import annotations

from typing import Any

from hf_cdl.data.views import same_view
from hf_cdl.training.kept import MOST


class QueryPasses:
    """The queries that the roles, in the order in which they learn, have computed so far."""

    def __init__(self) -> None:
        self._asked: list[tuple[Any, Any, int]] = []

    def known(self, model: Any, processor: Any, arguments: Any, steps: int, images: int, beside: int) -> bool:
        """Whether a model's queries in a role's steps are known from another role; from now on they are.

        `processor`: of the view that the model sees; `steps` and `images` (over all epochs) of the role's longest
        task; `beside`: unlabelled images per image.
        """
        if not _keeps(model) or 4 * images * (model.query_backbone or model.backbone).config.hidden_size > MOST:
            return False
        config = model.config
        own = {"backbone": (config.backbone_name, config.backbone_revision)}
        asked = {"query": (config.query_name, config.query_revision)} if model.query_backbone is not None else own
        names = "per_device_train_batch_size data_seed train_sampling_strategy dataloader_drop_last bf16 fp16".split()
        key = [*asked.values(), config.query_view, beside, *(getattr(arguments, name) for name in names)]
        for known, view, most in self._asked:
            if known == key and steps <= most and same_view(view, processor):
                return True
        self._asked.append((key, processor, steps))
        return False


def _keeps(model: Any) -> bool:
    """Whether queries of a model can be kept: nothing trains what they come from."""
    if not getattr(model, "reads_query", False):
        return False
    return model.query_backbone is not None or not (model.config.train_backbone or model.config.lora)
