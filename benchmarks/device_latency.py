"""The latency of one image in an exported file, in ONNX Runtime and, if it is installed, OpenVINO.

python benchmarks/device_latency.py FILE.onnx ... [--threads N ...]

Prints a Markdown table: the least milliseconds of 30 passes of one image, taken in turn, and the largest difference of
a logit from the first file's in ONNX Runtime, as a share of its largest logit. OpenVINO: pip install openvino.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hf_cdl.export.checking import opened

PASSES = 30
Run = Callable[[np.ndarray], np.ndarray]


def with_onnxruntime(file: Path, threads: int) -> tuple[Run, list[int]]:
    """A function that computes logits, and the shape of its input."""
    session = opened(file, threads)
    return lambda pixels: session.run(["logits"], {"pixels": pixels})[0], session.get_inputs()[0].shape


def with_openvino(file: Path, threads: int) -> Run:
    """The same in OpenVINO, in float32 as ONNX Runtime, so that both do the same work."""
    openvino: Any = import_module("openvino")
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda pixels: model({"pixels": pixels})["logits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.onnx")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print("| file | runtime | threads | ms | difference |\n|---|---|---:|---:|---:|")
    for threads in options.threads:
        runs: dict[tuple[str, str], Run] = {}
        shape: list[int] = []
        for file in options.files:
            runs[file.name, "ONNX Runtime"], shape = with_onnxruntime(file, threads)
            if find_spec("openvino") is not None:
                runs[file.name, "OpenVINO"] = with_openvino(file, threads)
        pixels = np.random.default_rng(0).integers(0, 256, (1, *shape[1:]), dtype=np.uint8)
        logits = {key: run(pixels) for key, run in runs.items()}
        least = dict.fromkeys(runs, float("inf"))
        for _ in range(PASSES):
            for key, run in runs.items():
                start = time.perf_counter()
                run(pixels)
                least[key] = min(least[key], time.perf_counter() - start)
        first = next(iter(logits.values()))
        for (name, runtime), seconds in least.items():
            apart = abs(logits[name, runtime] - first).max() / abs(first).max()
            print(f"| {name} | {runtime} | {threads} | {1000 * seconds:.1f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
