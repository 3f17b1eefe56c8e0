"""Images per second of a student in use, by prompt method and head, relative to a plain ViT of transformers.

python benchmarks/inference.py [--size vit] [--batch 64] [--repeats 10]

Forward passes of prepared batches, with 100 classes and random weights, all in turn: ViT-S/16 at 224 pixels (the
default on a GPU), or a tiny one. A two-pass query needs a pass of its own. On a GPU each runs in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from small import model_of, query_of
from step import PIXELS, backbones
from timing import CARD, call_of, in_turn, machine, ratio
from transformers import ViTForImageClassification
from transformers.utils import logging

from hf_cdl.prompts import PROMPTS

CLASSES = 100
PLAIN = "plain ViT"


def models(size: str) -> dict[str, Any]:
    """What is measured, by name, in evaluation mode."""
    config = backbones(size)["student"]
    names = [f"class {number}" for number in range(CLASSES)]
    found: dict[str, Any] = {PLAIN: None}
    for prompt in PROMPTS:
        for query in dict.fromkeys(query_of(prompt, query) for query in ("one_pass", "two_pass")):
            found[f"{prompt}, {query}"] = {"prompt": {"type": prompt}, "query": query}
    found["coda, one_pass, KD prompts"] = {"prompt": {"type": "coda"}, "query": "one_pass", "kd_prompt": {}}
    found["ridge head"] = {"head": {"type": "ridge"}}
    found["ridge head, known"] = {"head": {"type": "ridge", "known": 0.95}}
    for name, fields in found.items():
        if fields is None:
            labels: Any = {"id2label": dict(enumerate(names))}
            found[name] = ViTForImageClassification(type(config)(**{**config.to_diff_dict(), **labels}))
        else:
            found[name] = model_of(config, **fields)
            found[name].begin_task(names)
        found[name] = found[name].eval().to("cuda" if CARD else "cpu")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=["small", "vit"], default="vit" if CARD else "small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    made, unit = models(asked.size), "images/s" if CARD else "images/s of a core"
    print(f"| precision | model | {unit} | of the plain one's |\n|---|---|---:|---:|")
    for precision in (torch.float32, torch.bfloat16) if CARD else (torch.float32,):
        size = PIXELS[asked.size]
        pixels = torch.randn(asked.batch, 3, size, size, device="cuda" if CARD else "cpu", dtype=precision)
        parts = {name: call_of(partial(model.to(precision), pixel_values=pixels)) for name, model in made.items()}
        with torch.inference_mode():
            found = in_turn(parts, asked.repeats)
        for name, costs in found.items():
            rate = asked.batch / min(cost.seconds for cost in costs)
            share = ratio(costs, found[PLAIN])
            print(f"| {str(precision)[6:]} | {name} | {rate:,.0f} | {share} |", flush=True)
    print(f"\n{asked.repeats} batches of {asked.batch}, in turn; {machine()}.")


if __name__ == "__main__":
    main()
