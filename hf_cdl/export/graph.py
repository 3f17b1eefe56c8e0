"""A trained model as one ONNX graph: from RGB pixels to logits and scores, with its class names inside.

If the backbone runs twice, torch's graph has two transpositions of each of its weights, and quantisation finds no
constant weights behind them. So equal nodes are merged here, and all constants are folded, whatever their size.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hf_cdl.data.views import normalisation, output_size
from hf_cdl.models.classifier import labels_of

NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages that exporting needs: those of the extra `export`."""
_LARGEST = 2**31 - 2**24
"""Bytes of weights that one .onnx file can hold: protobuf's two gigabytes, with room for the rest."""
_BATCH = 2**16
"""Largest batch that a file accepts; memory runs out earlier."""


def check_packages() -> None:
    """Raise ValueError if a package that exporting needs is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"Exporting needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            "Install them with: pip install 'hf-cdl[export]'"
        )


class OnDevice(nn.Module):
    """RGB pixels (B, H, W, 3), uint8 -> logits (B, C), scores (B, C), and `known` (B,) if the model has it.

    Scores are those of transformers' pipeline: softmax, or for one class and for several labels an image the sigmoid.
    """

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model = model
        scale, shift = (torch.tensor(value, dtype=torch.float32).view(3, 1, 1) for value in normalisation(processor))
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        kind = model.config.problem_type
        one = model.config.num_labels == 1
        self.sigmoid, self.plain = one or kind == "multi_label_classification", kind == "regression"

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(pixel_values=pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift)
        logits, known = found.logits, getattr(found, "known", None)
        scores = logits if self.plain else logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)
        return (logits, scores) if known is None else (logits, scores, known)


def prepared(model: Any, processor: Any) -> OnDevice:
    """A copy of a model for export: in float32, without sums for further learning.

    Raises ValueError for a model that is too large for one file.
    """
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    for head in (getattr(model, "head", None), getattr(model, "kd_head", None)):
        if getattr(head, "keeps_sums", False):
            head.drop_sums()  # type: ignore[union-attr]
    if (size := sum(4 * p.numel() for p in model.parameters())) > _LARGEST:
        raise ValueError(
            f"The model's weights take {size / 1e9:.1f} GB, but one .onnx file holds at most {_LARGEST / 1e9:.1f} GB. "
            "Export a smaller student."
        )
    model.set_attn_implementation("eager")  # plain products: fewer nodes than what torch makes of its fused attention
    return OnDevice(model, processor)


def onnx_graph(device: OnDevice, processor: Any, steps: Mapping[str, Any]) -> Any:
    """Export to an onnxscript.ir.Model with folded constants, class names and `steps` of preprocessing.

    Raises ValueError for a model whose computation depends on the values in its images.
    """
    from onnxscript import ir, optimizer

    passes: Any = ir.passes.common  # type: ignore[attr-defined]

    size, names = output_size(processor), ["logits", "scores", "known"]
    pixels = torch.zeros(2, *size, 3, dtype=torch.uint8)
    with quietly(), torch.no_grad():
        names = names[: len(device(pixels))]
        batch = torch.export.Dim("batch", min=1, max=_BATCH)
        try:
            program: Any = torch.onnx.export(
                device,
                (pixels,),
                dynamo=True,
                dynamic_shapes={"pixels": {0: batch}},
                input_names=["pixels"],
                output_names=names,
                verbose=False,
            )
        except Exception as error:  # torch raises many types
            raise ValueError(_refusal(error)) from error
        graph: Any = program.model
        passes.CommonSubexpressionEliminationPass()(graph)
        optimizer.optimize(graph, input_size_limit=_LARGEST, output_size_limit=_LARGEST)
        passes.DeduplicateInitializersPass(size_limit=_LARGEST)(graph)
        _name(graph)
        passes.ClearMetadataAndDocStringPass()(graph)  # torch notes its stack, with paths of this machine
    about = {"labels": labels_of(device.model.config), "preprocessing": steps, **unknown_of(device.model)}
    graph.metadata_props.update({name: json.dumps(value) for name, value in about.items()})
    return graph


def unknown_of(model: Any) -> dict[str, Any]:
    """The threshold of `known` for an image of a known class, and the quantiles of `known` over such images."""
    known = getattr(getattr(model, "head", None), "known", None)
    if known is None or not known.fitted:
        return {}
    threshold = known.threshold(model.head.config.known)
    return {"unknown": {"threshold": threshold, "quantiles": known.quantiles.tolist()}}


def _name(graph: Any) -> None:
    """Name every node after the module that it is from, such as `model.head/MatMul_12`."""
    for number, node in enumerate(graph.graph):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")) or [""]
        place = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        node.name = f"{place}/{node.op_type}_{number}"


def _refusal(error: BaseException) -> str:
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    said = " ".join(str(causes[-1]).split())[:200]
    return (
        "This model cannot be exported: its computation takes a way that depends on the values in its images (an `if` "
        "or a loop over numbers of a tensor), or uses an operation that ONNX lacks. Write that part, a plugin's or "
        f"the backbone's, with torch.where and the like. torch said: {said}"
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppress the messages of the exporter and the quantiser about their internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
