"""Whether the package computes correctly on a GPU: every prompt method, head and term, learnt there and on the CPU.

python benchmarks/gpu_check.py [WORD ...] [--device cuda] [--jobs 4] [--out FILE]     (rows named with all the words)

Every row is a small model that learns two tasks twice, with the same seed: on the CPU and on the device, in float32
without TF32. It passes if the weights differ by at most 1e-3 of a tensor's largest value (rounding, carried through
the steps), and if the saved model gives the same logits on the CPU and on the device, to 1e-4 of the largest. Rows of
gpu_use.py follow: sums of heads, killed and resumed runs, changes, the pipeline and commands. A Markdown table; the
exit code is the number of rows that fail. Nothing is downloaded. With --device cpu it compares the CPU with itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small import Images, model_of, pair_of, query_of, task_of, trainer_of, vit
from timing import precision
from transformers.utils import logging

from hf_cdl import CDLForImageClassification
from hf_cdl.distill import TERMS
from hf_cdl.heads import HEADS
from hf_cdl.prompts import PROMPTS

WEIGHTS, LOGITS = 1e-3, 1e-4
"""Largest allowed difference of a weight after two tasks, and of a logit, as shares of their tensor's largest."""
Row = Callable[[str, Path], str]


def rows() -> dict[str, Row]:
    """What is checked, by name: a function of the device and a folder that returns what it found, or raises."""
    import gpu_use  # not above: it uses this module

    found: dict[str, Row] = {}
    for prompt in (*PROMPTS, "none"):
        for query in dict.fromkeys(query_of(prompt, query) for query in ("two_pass", "one_pass")):
            terms: dict[str, list[dict[str, Any]]] = {"": [], " + KD prompts": [{"type": "kdp"}]}
            terms |= {} if prompt == "none" else {" + mapping": [{"type": "prompt_mapping"}]}
            for name, distill in terms.items():
                found[f"prompt {prompt}{name}, {query}"] = partial(learnt_twice, prompt, distill, query=query)
    for term in TERMS:
        more = {"query": "one_pass"} if TERMS[term].needs_query else {}
        found[f"term {term}"] = partial(learnt_twice, "coda", [{"type": term}], **more)
    found["term dual_path, copies"] = partial(learnt_twice, "coda", [{"type": "dual_path", "copy_from": "all"}])
    for name, head in heads().items():
        found[f"head {name}"] = partial(learnt_twice, "none", [], head=head)
    lora = {"lora": {"r": 4}, "first_session": {"type": "linear"}, "head": {"type": "ridge"}}
    found["LoRA in a first session, ridge head"] = partial(learnt_twice, "none", [], **lora)
    found["query of another backbone and size"] = other_query
    found["bfloat16"] = partial(learnt_twice, "coda", [{"type": "kdp"}], train={"bf16": True}, tolerance=0.2)
    return {**found, **gpu_use.rows()}


def heads() -> dict[str, dict[str, Any]]:
    """Settings of every head, with what it may choose by itself."""
    found: dict[str, dict[str, Any]] = {name: {"type": name, "standardise": "first_task"} for name in HEADS}
    auto = {"ridge": "strength", "lda": "shrinkage"}
    for name, option in auto.items():
        found[f"{name}, all auto, known"] = {"type": name, option: "auto", "scale": "auto", "known": 0.9}
    found["ridge, sums per class"] = {"type": "ridge", "sums": "per_class", "known": 0.9}
    found["ridge, random features"] = {"type": "ridge", "features": 64, "own_features": True}
    return found


def learnt(device: str, folder: Path, prompt: str, distill: list[dict[str, Any]], **fields: Any) -> Any:
    """A student that has learnt two tasks on a device, each after its teacher."""
    train = {"use_cpu": device == "cpu", **fields.pop("train", {})}
    student, teacher, objective = pair_of(vit(32), vit(48), prompt, distill, **fields)
    teaching = None if teacher is None else trainer_of(teacher, folder, role="teacher", **train)
    learning = trainer_of(student, folder, objective, teacher, **train)
    for index in range(2):
        task = task_of(index)
        if objective.needs_unlabelled:
            task = replace(task, unlabelled=Images(7))
        for trainer in (teaching, learning):
            if trainer is not None:
                trainer.learn(task)
                trainer.evaluate_seen()
    on = {str(value.device.type) for value in student.state_dict().values()}
    assert on == {device}, f"after learning, tensors are on {sorted(on)}"
    return student


def learnt_twice(
    prompt: str, distill: list[dict[str, Any]], device: str, folder: Path, tolerance: float = WEIGHTS, **fields: Any
) -> str:
    """Compare a student that learnt on a device with one that did on the CPU, then the first with itself, reloaded."""
    ours, theirs = (learnt(place, folder, prompt, distill, **fields) for place in (device, "cpu"))
    apart = largest_difference(ours.state_dict(), theirs.state_dict())
    logits = reloaded(ours, device, folder)
    assert apart[0] <= tolerance, f"{apart[1]} differs by {apart[0]:.1e} of its largest value after learning"
    return f"weights {apart[0]:.0e}, logits {logits:.0e}"


def reloaded(model: Any, device: str, folder: Path) -> float:
    """The largest difference of logits between a model and itself saved and loaded, on the CPU and on a device."""
    model.save_pretrained(folder / "saved")
    pixels = Images(12, size=model.backbone.config.image_size).images
    found = [model.eval()(pixel_values=pixels.to(device)).logits]
    for place in ("cpu", device):
        loaded = CDLForImageClassification.from_pretrained(folder / "saved").eval().to(place)
        with torch.no_grad():
            found.append(loaded(pixel_values=pixels.to(place)).logits)
    first, *others = (logits.detach().cpu().double() for logits in found)
    apart = max(float((other - first).abs().max() / first.abs().max()) for other in others)
    assert apart <= LOGITS, f"logits differ by {apart:.1e} of the largest"
    return apart


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of two models' tensors as a share of the tensor's largest value, and where it is.

    Float64 numbers that are stored as bits are compared as numbers.
    """
    assert ours.keys() == theirs.keys(), f"other tensors: {sorted(ours.keys() ^ theirs.keys())}"
    found = [(0.0, "nothing")]
    for name, value in ours.items():
        pair = [each.detach().cpu() for each in (value, theirs[name])]
        if value.dtype == torch.int64 and value.abs().max() > 2**40:
            pair = [each.view(torch.float64) for each in pair]
        own, other = (each.double() for each in pair)
        assert own.shape == other.shape and own.isfinite().all(), f"{name} is not finite, or has another shape"
        if own.numel():
            found.append((float((own - other).abs().max() / other.abs().max().clamp(min=1e-12)), name))
    return max(found)


def other_query(device: str, folder: Path) -> str:
    """A query from a second backbone, of another resolution and normalisation."""
    view = {"size": [16, 16], "scale": [0.5, 1.0, 2.0], "shift": [0.1, 0.0, -0.1]}
    found = []
    for place in (device, "cpu"):
        model = model_of(vit(48, image_size=24), prompt={"type": "coda"}, query_config=vit(32), query_view=view)
        trainer = trainer_of(model, folder, role="teacher", use_cpu=place == "cpu")
        for index in range(2):
            trainer.learn(task_of(index, size=24))
        found.append(model)
    apart = largest_difference(*(model.state_dict() for model in found))
    assert apart[0] <= WEIGHTS, f"{apart[1]} differs by {apart[0]:.1e} of its largest value after learning"
    return f"weights {apart[0]:.0e}, logits {reloaded(found[0], device, folder):.0e}"


def checked(name: str, device: str) -> tuple[bool, str, float]:
    """Whether a row passes, what it found or its error's message and places, and its seconds."""
    logging.set_verbosity_error()
    precision("ieee", "ieee")
    torch.use_deterministic_algorithms(False)  # which another row of this process may have asked for
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            passed, said = True, rows()[name](device, Path(folder))
        except Exception as error:
            at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            line = (str(error).strip().splitlines() or ["no message"])[0]
            passed, said = False, f"{type(error).__name__}: {line[:300]} ({' '.join(at[-4:])})"
    return passed, said.replace("|", "/"), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="rows whose name has all of them (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="file for the table")
    asked = parser.parse_args()
    names = [name for name in rows() if all(word in name for word in asked.words)]
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for full_determinism, before cuBLAS begins
    out, failed = open(asked.out, "w") if asked.out else sys.stdout, 0  # noqa: SIM115
    print("| row | | found | s |\n|---|---|---|---:|", file=out, flush=True)
    with ProcessPoolExecutor(asked.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(checked, name, asked.device): name for name in reversed(names)}  # the longest first
        for job in as_completed(jobs):
            try:
                passed, said, seconds = job.result()
            except Exception as error:  # its process died
                passed, said, seconds = False, f"{type(error).__name__}: {error}", 0.0
            failed += not passed
            print(f"| {jobs[job]} | {'pass' if passed else 'FAIL'} | {said} | {seconds:.1f} |", file=out, flush=True)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{len(names) - failed} of {len(names)} rows pass; torch {torch.__version__}, {where}.", file=out)
    print(f"{failed} of {len(names)} rows fail")
    sys.exit(failed)


if __name__ == "__main__":
    main()
