"""Smaller weights in an exported graph: 8-bit integers, or half precision."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_cdl.export.graph import quietly

_PRODUCTS = ("MatMul", "Gemm")
_EXACT = re.compile(r"\.known/")
"""Names of nodes whose products are not quantised: squared distances are small differences of large numbers."""
_LEAST = 1024
"""Number of elements from which storing a tensor in half precision is worth the conversion."""


def plain(graph: Any, file: Path) -> None:
    """Write a graph with its weights in float32."""
    from onnxscript import ir

    ir.save(graph, file)


def int8(graph: Any, file: Path) -> None:
    """Write a graph whose matrix products use 8-bit integers, scaled per output channel.

    Activations are quantised dynamically, so no images are needed. Raises ValueError if a product with a constant was
    not quantised.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxscript import ir

    by_weights = [node for node in graph.graph if node.op_type in _PRODUCTS and node.inputs[1].is_initializer()]
    exact = [node.name for node in by_weights if _EXACT.search(node.name)]
    with quietly():
        quantize_dynamic(
            ir.to_proto(graph),
            file,
            op_types_to_quantize=[*_PRODUCTS],
            nodes_to_exclude=exact,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    made = sum(node.op_type == "MatMulInteger" for node in onnx.load(str(file)).graph.node)
    if made != (wanted := len(by_weights) - len(exact)):
        raise ValueError(
            f"onnxruntime quantised {made} of {wanted} matrix products by weights; all should be. Use --fp16, or "
            "update onnxruntime and onnxscript (pip install -U 'hf-cdl[export]')."
        )


def half(graph: Any, file: Path) -> None:
    """Write a graph that stores its weights in half precision and computes in float32."""
    from onnxscript import ir

    first = next(iter(graph.graph))
    for name, value in [*graph.graph.initializers.items()]:
        if value.dtype != ir.DataType.FLOAT or value.const_value.size < _LEAST:
            continue
        limit = np.finfo(np.float16).max
        stored = ir.tensor(value.const_value.numpy().clip(-limit, limit).astype(np.float16), name=f"{name}.half")
        small = ir.Value(name=stored.name, shape=value.shape, type=ir.TensorType(stored.dtype), const_value=stored)
        whole = ir.node("Cast", [small], attributes={"to": ir.DataType.FLOAT.value})
        graph.graph.insert_before(first, whole)
        value.replace_all_uses_with(whole.outputs[0])
        del graph.graph.initializers[name]
        graph.graph.initializers.add(small)
    ir.save(graph, file)


WRITERS: dict[str, Callable[[Any, Path], None]] = {"fp32": plain, "int8": int8, "fp16": half}
"""Precision of the weights -> what writes such a file."""
