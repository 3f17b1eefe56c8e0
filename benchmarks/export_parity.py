"""Whether an exported file answers like its model: every method of the package in small, exported three times.

python benchmarks/export_parity.py [WORD ...]     (rows whose name has all the words; default: all)

Prints a Markdown table. Difference: the largest one of a logit, as a share of the largest logit, on generated images;
same: of the answers of the int8 file, in percent. The models are random, with weights large enough that every part
matters and logits close to each other, so an int8 file keeps fewer answers than one of a trained model would.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_cdl import CDLConfig, CDLForImageClassification
from hf_cdl.backbones.families import FAMILIES, adds_patch_mean
from hf_cdl.export.checking import Model, compare, opened
from hf_cdl.export.graph import onnx_graph, prepared
from hf_cdl.export.preprocessing import steps_of
from hf_cdl.export.weights import WRITERS
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS

SIZE, IMAGES = 32, 48
TASKS = (["ant", "bee", "cat"], ["dog", "owl"])
Make = Callable[[], Any]


class Parity(NamedTuple):
    """What a row shows: differences of logits as shares, same answers in percent."""

    fp32: float
    fp16: float
    int8: float
    same: float


def rows() -> dict[str, Make]:
    """Every model by name, and what makes it."""
    return dict([*_prompts(), *_heads(), *_families(), *_others()])


def _prompts() -> Iterator[tuple[str, Make]]:
    kinds: dict[str, dict[str, Any]] = {name: {"type": name} for name, pool in PROMPTS.items()}
    kinds["vpt shallow"] = {"type": "vpt", "layers": [0]}
    taught: dict[str, dict[str, Any]] = {"": {}, " + KD token": {"kd_prompt": {"alpha": 0.3}}, " + mapping": {}}
    for name, prompt in kinds.items():
        for query in ("two_pass", "one_pass") if PROMPTS[prompt["type"]].needs_query else ("two_pass",):
            for more, fields in taught.items():
                if more == " + mapping":
                    pool = _model(prompt=prompt, width=48, query=query).pool_config
                    fields = {"mapping": {}, "teacher_pool": pool}
                yield f"{name}{more}, {query}", _maker(prompt=prompt, query=query, **fields)


def _heads() -> Iterator[tuple[str, Make]]:
    for name in HEADS:
        yield f"{name} head", _maker(head={"type": name, "standardise": "first_task"})
    features = {"type": "ridge", "features": 64, "own_features": True, "scale": "auto", "strength": "auto"}
    yield "ridge head, known", _maker(head={"type": "ridge", "known": 0.95, "standardise": "first_task"})
    yield "ridge head, random features", _maker(head=features, patch_mean=True)


def _families() -> Iterator[tuple[str, Make]]:
    for kind in FAMILIES:
        ridge = {"head": {"type": "ridge"}, "patch_mean": adds_patch_mean(_config(kind))}
        yield f"{kind}, ridge head", _maker(kind, **ridge)
        yield f"{kind}, coda + KD token", _maker(kind, prompt={"type": "coda"}, kd_prompt={})


def _others() -> Iterator[tuple[str, Make]]:
    lora = {"lora": {"r": 4}, "first_session": {"type": "linear"}}
    yield "LoRA, ridge head", _maker(head={"type": "ridge"}, **lora)
    names: dict[str, Any] = {"id2label": dict(enumerate(TASKS[0]))}
    resnet = ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=8, **names)
    yield "classifier: vit", lambda: _stirred(ViTForImageClassification(ViTConfig(**_sizes(32), **names)))
    yield "classifier: resnet", lambda: _stirred(ResNetForImageClassification(resnet))


def _sizes(width: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {"num_hidden_layers": 6, "num_attention_heads": 4, "image_size": SIZE, "patch_size": 8}
    return {"hidden_size": width, "intermediate_size": 64, **sizes}


def _config(kind: str, width: int = 32) -> Any:
    return AutoConfig.for_model(kind, **_sizes(width))


def _maker(kind: str = "vit", **fields: Any) -> Make:
    return lambda: _model(kind, **fields)


def _model(kind: str = "vit", width: int = 32, **fields: Any) -> CDLForImageClassification:
    """A model whose tasks are learnt, as far as random weights can stand for that."""
    set_seed(1)
    model = CDLForImageClassification(CDLConfig(backbone_config=_config(kind, width), **fields))
    for names in TASKS:
        model.begin_task(names)
        _stirred(model).end_session()
        if model.unmeasured:
            model.measure(model(_noise(24)))
        if model.fitted:
            model.accumulate(model(_noise(24)), torch.arange(24) % len(names) + model.num_labels - len(names))
        model.end_task()
    return model.eval()


@torch.no_grad()
def _stirred(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _noise(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE)


def image(index: int) -> Image.Image:
    """A generated image, of its own shape."""
    small = np.random.default_rng(index).integers(0, 256, (3 + index % 5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIZE + 5 * index, 2 * SIZE))


def parity(make: Make, folder: Path) -> Parity:
    """Export a model in every precision and compare; files are written to a folder."""
    model = make()
    own = Model(model, ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}))
    steps, found = steps_of(own.processor), {}
    graph = onnx_graph(prepared(*own), own.processor, steps)
    for precision, write in WRITERS.items():
        write(graph, folder / f"{precision}.onnx")
        session = opened(folder / f"{precision}.onnx")
        found[precision] = compare(session, own, own, steps, image, np.full(IMAGES, -1))
    fp32, fp16, int8 = (found[name].difference for name in ("fp32", "fp16", "int8"))
    return Parity(fp32, fp16, int8, found["int8"].same)


def main(*words: str) -> None:
    print("| model | fp32: difference | fp16 | int8 | int8: same (%) |\n|---|---:|---:|---:|---:|")
    for name, make in rows().items():
        if all(word in name for word in words):
            with tempfile.TemporaryDirectory() as folder:
                fp32, fp16, int8, same = parity(make, Path(folder))
            print(f"| {name} | {fp32:.1e} | {fp16:.1e} | {int8:.1e} | {same:.1f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
