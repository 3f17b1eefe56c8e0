"""Check against every reference vector in a folder: `pytest tests/test_conformance.py --references DIR`.

The vectors were made by running the authors' code; tests/references/README.md describes the format. A file of a kind
that CHECKS does not know is a failure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig

from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.distill import TERMS, Objective
from hf_cdl.prompts import PROMPTS
from hf_cdl.prompts.components import orthogonalise
from hf_cdl.runs import metrics
from hf_cdl.types import KV, CDLOutput, ModelShape, Task

Tensors = dict[str, torch.Tensor]


class Case:
    """One reference file: its description, its tensors, and the comparison it asks for."""

    def __init__(self, file: Path):
        self.folder = file.parent
        self.info: dict[str, Any] = json.loads(file.read_text())
        self.hyper: dict[str, Any] = self.info.get("hyper_parameters", {})
        self.tensors: Tensors = load_file(file.with_suffix(".safetensors"))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def same(self, name: str, got: torch.Tensor | None, tolerance: str | None = None) -> None:
        want = self.tensors[name]
        limits = self.info["tolerance"] if tolerance is None else self.info["tolerance"][tolerance]
        got = torch.zeros_like(want) if got is None else got.detach()
        torch.testing.assert_close(got, want, **limits, msg=lambda text: f"{self.info['name']}: {name}\n{text}")

    def vit(self, role: str) -> tuple[ViTConfig, Tensors]:
        weights = self.info["vit_weights"][role]
        return ViTConfig(**weights["config"]), load_file(self.folder / weights["file"])


# ---- building our models from the reference's parameters ----


def model_for(case: Case, role: str, **fields: Any) -> CDLForImageClassification:
    """A model without tasks on the case's ViT; the student's ViT answers the teacher's queries."""
    config, weights = case.vit(role)
    query_config, query_weights = (None, None)
    pool = PROMPTS.get(fields.get("prompt", {}).get("type"))
    if role == "teacher" and "student" in case.info["vit_weights"] and pool is not None and pool.needs_query:
        query_config, query_weights = case.vit("student")
    model = CDLForImageClassification(CDLConfig(backbone_config=config, query_config=query_config, **fields))
    model.backbone.load_state_dict(weights)
    if model.query_backbone is not None and query_weights is not None:
        model.query_backbone.load_state_dict(query_weights)
    return model


def prompt_section(flag: str, param: list[float], tasks: int, **fields: Any) -> dict[str, Any]:
    """Our `prompt` section for the reference's name and parameters of a method, and `fields`."""
    if flag == "apt":
        return {"type": "apt", "teach_with": "merged_before", **fields}
    pool_size, length, extra = int(param[0]), int(param[1]), param[2]  # `extra` differs in meaning
    sections: dict[str, dict[str, Any]] = {
        "coda": {"type": "coda", "components": pool_size // tasks, "length": length, "orthogonality": extra},
        "dual": {
            "type": "dualprompt",
            "expert_length": length,
            "general_length": int(extra),
            "reserved_tasks": pool_size,
        },
        "l2p": {
            "type": "l2p",
            "pool_size": pool_size,
            "length": length,
            "layers": (0, 1, 2, 3, 4) if extra > 0 else (0,),
        },
    }
    return {**sections[flag], **(fields if flag in ("dual", "l2p") else {})}


def head_section(flag: str) -> dict[str, Any]:
    return {"type": "weight_normalised" if flag == "apt" else "linear"}


SHORT = {"P": "prompt", "K": "key", "A": "attention"}


def pieces(pool: Any, short: str, layer: int) -> list[tuple[torch.Tensor, int]]:
    """Our parameters, with the index of the layer in them, that stacked are a tensor of the reference."""
    if short == "G":
        return [(pool.general, pool.config.general_layers.index(layer))]
    layers = getattr(pool.config, "expert_layers", pool.layers)
    parts = pool.blocks if len(pool.blocks) else [pool]  # L2P has one pool for all tasks
    return [(getattr(part, SHORT[short]), layers.index(layer)) for part in parts]


def rows(piece: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A layer's piece in the reference's shape: one row per expert."""
    return piece if piece.ndim == like.ndim else piece.unsqueeze(0)


def put_pool(pool: Any, tensors: Tensors, prefix: str = "") -> None:
    """Spread the reference's whole pools (`P.0`, `K.0` ...: one per layer) over our parameters."""
    with torch.no_grad():
        for name, whole in tensors.items():
            short, _, layer = name.removeprefix(prefix).partition(".")
            if name == f"{prefix}prompt_tokens":
                pool.prompt.copy_(whole.view_as(pool.prompt))
            if name == f"{prefix}global_merged_prompt":
                for block in pool.blocks:
                    block.merged.copy_(whole.view_as(pool.prompt))
            if not name.startswith(prefix) or short not in (*SHORT, "G") or not layer.isdigit():
                continue
            start = 0
            for parameter, index in pieces(pool, short, int(layer)):
                piece = rows(parameter[index], whole)
                piece.copy_(whole[start : start + len(piece)])
                start += len(piece)
            reserved = getattr(pool, f"reserved_{SHORT.get(short)}", None)
            if reserved is not None:
                reserved[:, pool.config.expert_layers.index(int(layer))] = whole


def take_pool(pool: Any, name: str, like: torch.Tensor, grad: bool = False) -> tuple[torch.Tensor, int]:
    """Our parameters (or gradients) as a tensor of the reference, like `P.0`, zero where unused; its rows in use."""
    if name in ("prompt_tokens", "global_merged_prompt"):  # APT: keys and values of the layers in turn
        value = pool.prompt if name == "prompt_tokens" else pool.blocks[-1].merged
        return (value.grad if grad else value.detach()).view_as(like), len(like)
    short, layer = name.split(".")
    whole, start = torch.zeros_like(like), 0
    for parameter, index in pieces(pool, short, int(layer)):
        value = parameter.grad if grad else parameter.detach()
        count = len(rows(parameter[index], like))
        if value is not None:
            whole[start : start + count] = rows(value[index], like)
        start += count
    return whole, start


def gather(blocks: Any, name: str, like: torch.Tensor, grad: bool = False) -> torch.Tensor:
    """Our blocks' parameters (or gradients) as one tensor of the reference's size, zero where unused."""
    whole = torch.zeros_like(like)
    start = 0
    for block in blocks:
        parameter = getattr(block, name)
        value = parameter.grad if grad else parameter.detach()
        if value is not None:
            whole[start : start + len(parameter)] = value
        start += len(parameter)
    return whole


def put_head(head: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    start = 0
    with torch.no_grad():
        for block in head.blocks:
            rows = len(block.bias)
            block.weight.copy_(weight[start : start + rows])
            block.bias.copy_(bias[start : start + rows])
            start += rows


def put_norm(head: Any, tensors: Tensors, prefix: str) -> None:
    """Set the layer norm of APT's head, if both sides have one."""
    for name in ("weight", "bias"):
        if head is not None and f"{prefix}.{name}" in tensors:
            getattr(head, f"norm_{name}").copy_(tensors[f"{prefix}.{name}"])


def put_mapper(mapping: Any, tensors: Tensors, prefix: str = "mapper.") -> None:
    """Set the mapper from those rows of the reference's that are ever used; it has more."""
    with torch.no_grad():
        for short, name in SHORT.items():
            for index, layer in enumerate(mapping.layers):
                parameter = getattr(mapping.blocks[0], name)[index]
                parameter.copy_(tensors[f"{prefix}{short}.{layer}"][: len(parameter)])


def take_mapper(mapping: Any, name: str, like: torch.Tensor, grad: bool = False) -> tuple[torch.Tensor, int]:
    """Our mapper's parameters (or gradients) as a tensor of the reference, like `P.0`, zero where unused."""
    short, layer = name.split(".")
    whole = torch.zeros_like(like)
    if int(layer) not in mapping.layers:  # the teacher has no prefix there
        return whole, 0
    parameter = getattr(mapping.blocks[0], SHORT[short])
    value, rows = parameter.grad if grad else parameter.detach(), parameter.shape[1]
    whole[:rows] = value[mapping.layers.index(int(layer))]
    return whole, rows


def put_kd_prompt(kd_prompt: Any, tensors: Tensors, prefix: str) -> None:
    prompts = [] if kd_prompt.prompt is None else kd_prompt.prompt
    with torch.no_grad():
        kd_prompt.token.copy_(tensors[f"{prefix}.0"][0])
        for layer, prompt in enumerate(prompts, start=1):
            prompt.copy_(tensors[f"{prefix}.{layer}"])


# ---- the kinds of cases ----


def check_vit_weights(case: Case) -> None:
    model = CDLForImageClassification(CDLConfig(backbone_config=ViTConfig(**case.info["config"])))
    model.backbone.load_state_dict(case.tensors)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, case[name]), name


def check_vit_plain(case: Case) -> None:
    model = model_for(case, case.hyper["role"]).eval()
    with torch.no_grad():
        case.same("last_hidden_state", model._run(model.backbone, case["pixel_values"]).last_hidden_state)


def check_vit_prefix(case: Case) -> None:
    for implementation in ("sdpa", "eager"):
        model = model_for(case, case.hyper["role"]).eval()
        model.set_attn_implementation(implementation)
        prefix, leaves = {}, {}
        for layer in map(int, case.hyper["prefix_lengths"]):
            for name in ("key_prefix", "value_prefix"):
                leaves[f"{name}.{layer}"] = case[f"{name}.{layer}"].clone().requires_grad_()
            prefix[layer] = [KV(leaves[f"key_prefix.{layer}"], leaves[f"value_prefix.{layer}"])]
        hidden = model._run(model.backbone, case["pixel_values"], prefix=prefix).last_hidden_state
        case.same("last_hidden_state", hidden)
        (hidden * case["upstream"]).sum().backward()
        for name, leaf in leaves.items():
            case.same(f"grad.{name}", leaf.grad)


def check_coda(case: Case) -> None:
    hyper = case.hyper
    section = prompt_section("coda", [hyper["pool_size"], hyper["prompt_length"], hyper["mu"]], hyper["n_tasks"])
    section.pop("type")
    config = PROMPTS["coda"].config_class(**section, layers=tuple(hyper["layers"]))
    for mode in ("train", "eval"):
        pool: Any = PROMPTS["coda"](config, hyper["emb_dim"], hyper["key_dim"], max(hyper["layers"]) + 1)
        for task in range(hyper["n_tasks"]):
            if f"t{task}.{mode}.key_prefix.{pool.layers[0]}" not in case.tensors:
                assert task > 1
                break
            pool.add_task()
            put_pool(pool, case.tensors)
            pool.train(mode == "train")
            pool.requires_grad_(False)
            pool.blocks[task].requires_grad_(True)
            outputs = {layer: pool(layer, case["query"], task if mode == "train" else None) for layer in pool.layers}
            products, penalties = [], []
            for layer, (prefix, loss) in outputs.items():
                case.same(f"t{task}.{mode}.key_prefix.{layer}", prefix.key)
                case.same(f"t{task}.{mode}.value_prefix.{layer}", prefix.value)
                products += [(prefix.key * case[f"upstream_k.{layer}"]).sum()]
                products += [(prefix.value * case[f"upstream_v.{layer}"]).sum()]
                penalty = torch.zeros(()) if loss is None else loss
                penalties.append(penalty)
                if mode == "train":
                    case.same(f"t{task}.train.penalty.{layer}", penalty)
            if mode == "eval":
                assert all(loss is None for _, loss in outputs.values())
                continue
            for quantity, total in (("prefix", sum(products)), ("penalty", sum(penalties))):
                pool.zero_grad()
                if torch.as_tensor(total).requires_grad:
                    total.backward()  # type: ignore[union-attr]
                same_gradients(case, pool, f"t{task}.grad_{quantity}.")


def same_gradients(case: Case, pool: Any, prefix: str) -> None:
    for name, want in case.tensors.items():
        if name.startswith(prefix):
            case.same(name, take_pool(pool, name.removeprefix(prefix), want, grad=True)[0])


def check_matched(case: Case) -> None:
    """L2P and DualPrompt: prefixes and match loss in both reductions, task by task."""
    hyper = case.hyper
    layers = {"layers": tuple(hyper["e_layers"])}
    if case.info["case"] == "dualprompt":
        layers = {"general_layers": tuple(hyper["g_layers"]), "expert_layers": tuple(hyper["e_layers"])}
    flag = {"dualprompt": "dual"}.get(case.info["case"], case.info["case"])
    extra, tasks = hyper["g_length"] or -1, hyper["n_tasks"]
    section = {**prompt_section(flag, [hyper["pool_size"], hyper["e_length"], extra], tasks), **layers}
    if flag == "l2p":
        section["top_k"] = hyper["top_k"]
    kind = PROMPTS[section.pop("type")]
    checked = set()
    for reduction in ("mean", "sum"):
        config = kind.config_class(**section, reduction=reduction)
        pool: Any = kind(config, hyper["emb_dim"], hyper["key_dim"], max(config.layers) + 1)
        for task in range(tasks):
            pool.add_task()
            put_pool(pool, case.tensors)
            pool.blocks.requires_grad_(False)
            pool.blocks[-1:].requires_grad_(True)
            if f"t{task}.match_loss_{reduction}_total" not in case.tensors:
                continue
            products, losses = [], []
            for mode, task_id in (("eval", None), ("train", task)):
                pool.train(mode == "train")
                for layer in pool.layers:
                    prefix, loss = pool(layer, case["query"], task_id)
                    for name, got in (("key", prefix.key), ("value", prefix.value)):
                        want = f"t{task}.{mode}.{name}_prefix.{layer}"
                        case.same(want, got.expand_as(case[want]))
                        if mode == "train":
                            products.append((got * case[f"upstream_{name[0]}.{layer}"]).sum())
                    assert (loss is not None) == (mode == "train" and layer in hyper["e_layers"])
                    if loss is not None:
                        case.same(f"t{task}.match_loss_{reduction}.{layer}", loss)
                        losses.append(loss)
            case.same(f"t{task}.match_loss_{reduction}_total", torch.stack(losses).sum())
            for quantity, total in (("prefix", torch.stack(products).sum()), (f"match_{reduction}", sum(losses))):
                pool.zero_grad()
                total.backward()  # type: ignore[union-attr]
                same_gradients(case, pool, f"t{task}.grad_{quantity}.")
            checked.add(reduction)
    assert checked == {"mean", "sum"}


def check_coda_gram_schmidt(case: Case) -> None:
    rows = case.hyper["per_task"]
    draws = [name for name in case.tensors if ".draws." in name]
    assert draws
    for name in draws:
        stage, _, pool, layer = name.split(".")
        task, after = int(stage[1:]), f"{stage}.{pool}.{layer}"
        new = case[name].reshape(rows, -1)
        before = case[f"{stage}.before.{pool}.{layer}"][: task * rows].flatten(1) if task else new[:0]
        later = torch.zeros(case.hyper["pool_size"] - (task + 1) * rows, new.shape[1])
        case.same(after, torch.cat([before, orthogonalise(new, before), later]).view_as(case[after]))


def check_kdp(case: Case) -> None:
    hyper = case.hyper
    tasks, param = hyper["prompt_param"]
    model = model_for(
        case,
        "student",
        prompt=prompt_section(hyper["prompt_flag"], param, tasks),
        head=head_section(hyper["prompt_flag"]),
        kd_prompt={"length": hyper["kd_length"], "layers": hyper["kd_layers"], "alpha": hyper["kd_alpha"]},
    )
    per_task = hyper["n_classes"] // (hyper["task_index"] + 1)
    for task in range(hyper["task_index"] + 1):
        model.begin_task([f"{task}-{number}" for number in range(per_task)])
    put_pool(model.pool, case.tensors, "prompt.")
    put_head(model.head, case["last.weight"], case["last.bias"])
    put_head(model.kd_head, case["kd_last.weight"], case["kd_last.bias"])
    put_norm(model.head, case.tensors, "clf_norm")
    put_norm(model.kd_head, case.tensors, "kd_cls_norm")
    put_kd_prompt(model.kd_prompt, case.tensors, "kd_prompt")
    for head in (model.head, model.kd_head):
        assert head is not None
        head.requires_grad_(True)  # the reference takes the gradient of all rows

    case.same("query", model.compute_query(case["pixel_values"]))
    model.train()
    output = model(case["pixel_values"], task_id=hyper["task_index"])
    case.same("train.logits", output.logits)
    case.same("train.kd_logits", output.kd_logits)
    case.same("train.cls_output", output.features)
    case.same("train.prompt_loss", torch.zeros(()) if output.prompt_loss is None else output.prompt_loss)
    prefix, _ = model._prefixes(output.query, hyper["task_index"])
    sequence = model._run(model.backbone, case["pixel_values"], with_token=True, prefix=prefix).last_hidden_state
    case.same("train.sequence", sequence)
    loss = (output.logits * case["upstream.logits"]).sum() + (output.kd_logits * case["upstream.kd_logits"]).sum()
    loss.backward()
    pool: Any = model.pool
    kd_prompt: Any = model.kd_prompt
    for name in case.tensors:
        if not name.startswith("grad."):
            continue
        part, *rest = name.split(".")[1:]
        if part == "prompt":
            case.same(name, take_pool(pool, ".".join(rest), case[name], grad=True)[0])
        elif part == "kd_prompt":
            layer = int(rest[0])
            case.same(name, kd_prompt.token.grad[None] if layer == 0 else kd_prompt.prompt.grad[layer - 1])
        else:
            head = model.head if part == "last" else model.kd_head
            case.same(name, gather(head.blocks, rest[0], case[name], grad=True))  # type: ignore[union-attr]
    model.eval()
    case.same("eval.logits_blended", model(case["pixel_values"]).logits)


def check_apt(case: Case) -> None:
    hyper = case.hyper
    prompt = {"type": "apt", "ema": hyper["ema_coeff"]}
    model = model_for(case, hyper["role"], prompt=prompt, head={"type": "weight_normalised"})
    head, pool = model.head, model.pool
    model.begin_task([str(number) for number in range(hyper["n_classes"])])
    put_pool(pool, case.tensors)
    put_head(head, case["last.weight"], case["last.bias"])
    put_norm(head, case.tensors, "clf_norm")
    weight: Any = head.norm_weight
    weight.requires_grad_()
    case.same("head.logits", head(case["head.features"]))
    for mode in ("train", "eval"):
        model.train(mode == "train")
        prefix, _ = model._prefixes(None, 0 if mode == "train" else None)
        case.same(f"{mode}.sequence", model._run(model.backbone, case["pixel_values"], prefix=prefix)[0])
        logits = model(case["pixel_values"], task_id=0 if mode == "train" else None).logits
        case.same(f"{mode}.logits", logits)
        if mode == "train":
            (logits * case["upstream"]).sum().backward()
            case.same("grad.prompt_tokens", take_pool(pool, "prompt_tokens", case["prompt_tokens"], grad=True)[0])
            for name in ("weight", "bias"):
                case.same(f"grad.last.{name}", gather(head.blocks, name, case[f"last.{name}"], grad=True))
            case.same("grad.clf_norm.weight", weight.grad)

    model = model_for(case, hyper["role"], prompt=prompt)
    for task in range(sum(name.startswith("ema.merged.") for name in case.tensors)):
        model.begin_task([str(task)])
        put_pool(model.pool, {"prompt_tokens": case[f"ema.prompt_tokens.{task}"]})
        model.end_task()
        case.same(f"ema.merged.{task}", take_pool(model.pool, "global_merged_prompt", case["prompt_tokens"])[0])


def mapped_pair(case: Case, tasks: int, param: list[float], rows: int, length: int) -> dict[str, Any]:
    """Teacher and student of CDL v1, without tasks; its learners sum the match loss."""
    hyper = case.hyper
    section = prompt_section(hyper["prompt_flag"], param, tasks, reduction="sum")
    teacher = model_for(case, "teacher", prompt=section)
    mapping = {"components": rows, "length": length, "grow": False, "alpha": 0.5}
    fields = {"mapping": mapping, "teacher_pool": teacher.pool_config}
    return {"teacher": teacher, "student": model_for(case, "student", prompt=section, **fields)}


def check_mapping(case: Case) -> None:
    hyper, mapper = case.hyper, case.hyper["mapper"]
    tasks, param = hyper["prompt_param"]
    models = mapped_pair(case, tasks, param, mapper["active_rows"], mapper["length"])
    teacher, student = models["teacher"], models["student"]
    task = hyper["task_index"]
    per_task = hyper["n_classes"] // (task + 1)
    for role, model in models.items():
        for number in range(task + 1):
            model.begin_task([f"{number}-{i}" for i in range(per_task)])
        put_pool(model.pool, case.tensors, f"{role}.prompt.")
        put_head(model.head, case[f"{role}.last.weight"], case[f"{role}.last.bias"])
    put_head(student.kd_head, case["student.kd_last.weight"], case["student.kd_last.bias"])
    put_mapper(student.mapping, case.tensors)
    student.follow(teacher)
    for head in (student.head, student.kd_head):
        head.requires_grad_(True)
    query = student.compute_query(case["pixel_values"])
    case.same("query", query)
    for mode, task_id in (("train", task), ("eval", None)):
        for model in models.values():
            model.train(mode == "train")
        for layer in range(len(student.backbone.layers)):
            theirs, _ = student.mapping.teacher_pool(layer, query, task_id)
            ours, _ = student.pool(layer, query, task_id)
            mapped = student.mapping(layer, query, task_id)
            found = {"teacher": theirs, "student": ours, "mapped": mapped}
            for name, prefix in found.items():
                for part in ("key", "value"):
                    key = f"{mode}.{name}_{part}_prefix.{layer}"
                    assert (prefix is not None) == (key in case.tensors), key
                    if prefix is not None:
                        case.same(key, getattr(prefix, part).expand_as(case[key]))
        taught = teacher(case["pixel_values"], query=query, task_id=task_id)
        case.same(f"{mode}.teacher_logits", taught.logits)
        output = student(case["pixel_values"], query=query, task_id=task_id)
        prefixes, _ = student._prefixes(query, task_id)
        sequence = student._run(student.backbone, case["pixel_values"], prefix=prefixes).last_hidden_state
        case.same(f"{mode}.sequence", sequence)
        if mode == "eval":
            case.same("eval.logits_blended", output.logits)
            break
        for name, losses in (("teacher", taught), ("student", output)):
            loss = losses.prompt_loss
            case.same(f"train.{name}_prompt_loss", torch.zeros(()) if loss is None else loss)
        case.same("train.logits", output.logits)
        case.same("train.kd_logits", output.kd_logits)
        ((output.logits * case["upstream.logits"]) + (output.kd_logits * case["upstream.kd_logits"])).sum().backward()
        for name, want in case.tensors.items():
            if name.startswith("grad.mapper."):
                case.same(name, take_mapper(student.mapping, name.removeprefix("grad.mapper."), want, grad=True)[0])
            elif name.startswith("grad.student.prompt."):
                case.same(name, take_pool(student.pool, name.removeprefix("grad.student.prompt."), want, grad=True)[0])
        assert all(parameter.grad is None for parameter in student.mapping.teacher_pool.parameters())


TERMS_OF = {  # the reference's FitNets and ReviewKD contain KD
    "KD": ["kd"],
    "KD_Token": ["kdp"],
    "DKD": ["dkd"],
    "FitNets": ["kd", "fitnets"],
    "ReviewKD": ["kd", "review_kd"],
    "mapping": ["prompt_mapping"],
}


def objective_of(hyper: dict[str, Any], temperature: float, student: ModelShape, teacher: ModelShape) -> Objective:
    """The reference's loss as a sum of our terms. Its DKD ignores the temperature of the others."""
    alpha, names = hyper["kd_alpha"], TERMS_OF[hyper["method"]]
    fields: dict[str, Any] = {"temperature": temperature}
    if names[0] == "dkd":
        fields = {name: hyper[f"dkd_{name}"] for name in ("alpha", "beta") if f"dkd_{name}" in hyper}
    configs = [{"weight": alpha, **fields}, *({} for _ in names[1:])]
    return Objective(
        1 - alpha,
        [
            (name, TERMS[name](TERMS[name].config_class(**config), student, teacher))
            for name, config in zip(names, configs, strict=True)
        ],
    )


def check_losses(case: Case) -> None:
    hyper = case.hyper
    alpha = hyper["kd_alpha"]
    objective = objective_of(hyper, hyper["temperature"], ModelShape(1, 1), ModelShape(1, 1))
    classes = slice(hyper["last_valid_out_dim"], hyper["valid_out_dim"])
    leaves = {name: case[name].clone().requires_grad_() for name in ("logits", "kd_logits") if name in case.tensors}
    student = CDLOutput(logits=leaves["logits"], kd_logits=leaves.get("kd_logits"))  # type: ignore[arg-type]
    losses = objective(student, CDLOutput(logits=case["teacher_logits"]), case["targets"], classes)
    case.same("total_loss", losses["loss"])
    case.same("ce_loss", losses["ce"])
    case.same("soft_loss", alpha * losses[TERMS_OF[hyper["method"]][0]])
    losses["loss"].backward(retain_graph=True)
    for name, leaf in leaves.items():
        case.same(f"grad.{name}", leaf.grad)
    case.same("grad_ce.logits", torch.autograd.grad(losses["ce"], leaves["logits"])[0])


def check_features(case: Case) -> None:
    """FitNets and ReviewKD, on hidden states that are given."""
    hyper = case.hyper
    kind = TERMS[{"FitNets": "fitnets", "ReviewKD": "review_kd"}[hyper["method"]]]
    hidden: dict[str, list[torch.Tensor]] = {}
    for role in ("student", "teacher"):
        count = sum(name.startswith(f"{role}_features.") for name in case.tensors)
        hidden[role] = [case[f"{role}_features.{i}"].clone().requires_grad_(role == "student") for i in range(count)]
    shapes = [ModelShape(hyper[f"{role}_dim"], len(states)) for role, states in hidden.items()]
    term: Any = kind(kind.config_class(weight=hyper["weight"]), *shapes)
    term.load_state_dict({name: case[name] for name in term.state_dict()})
    outputs: list[torch.Tensor] = []  # of ReviewKD's units, deepest first
    for unit in getattr(term, "abf", ()):
        unit.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    student, teacher = (CDLOutput(hidden_states=(None, *states)) for states in hidden.values())
    loss = term.config.weight * term(student, teacher, torch.empty(0))
    case.same("feature_loss", loss)
    for number, output in enumerate(reversed(outputs)):
        case.same(f"review_output.{number}", output)
    loss.backward()
    leaves = dict(term.named_parameters())
    leaves.update({f"student_features.{i}": leaf for i, leaf in enumerate(hidden["student"])})
    for name in case.tensors:
        if name.startswith("grad."):
            case.same(name, leaves[name.removeprefix("grad.")].grad)


def check_masked_ce(case: Case) -> None:
    classes = slice(case.hyper["last_valid_out_dim"], case.hyper["valid_out_dim"])
    logits = case["logits"].clone().requires_grad_()
    losses = Objective()(CDLOutput(logits=logits), None, case["targets"], classes)
    case.same("ce_loss", losses["ce"])
    case.same("current_logits", logits[:, classes])
    losses["loss"].backward()
    case.same("grad.logits", logits.grad)


def check_metrics(case: Case) -> None:
    values, limits = case.info["values"], case.info["tolerance"]
    close = {"rel": limits["rtol"], "abs": limits["atol"]}
    rows = [[m[t][: t + 1] for t in range(len(m))] for m in case["accuracy"].double().tolist()]
    assert [metrics.average_accuracy(m) for m in rows] == pytest.approx(values["official_average_accuracy"], **close)
    assert [metrics.official_forgetting(m) for m in rows] == pytest.approx(values["official_forgetting"], **close)
    one_step = [metrics.one_step_forgetting(m) for m in rows]
    assert one_step == pytest.approx(values["coda_prompt_forgetting_each"], **close)
    mean, std = torch.tensor(one_step).mean().item(), torch.tensor(one_step).std(correction=0).item()
    assert mean == pytest.approx(values["coda_prompt_forgetting_mean"], **close)
    assert std == pytest.approx(values["coda_prompt_forgetting_std"], **close)
    for m, steps in zip(rows, values["official_average_accuracy_per_step"], strict=True):
        assert [metrics.average_accuracy(m[: t + 1]) for t in range(len(m))] == pytest.approx(steps, abs=0.006)


class Batches(torch.utils.data.Dataset):
    """The reference's batches of one task, one after the other."""

    def __init__(self, case: Case, task: int):
        count = case.hyper["batches_per_epoch"]
        self.pixels = torch.cat([case[f"pixel_values.{task}.{i}"] for i in range(count)])
        self.targets = torch.cat([case[f"targets.{task}.{i}"] for i in range(count)])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key if isinstance(key, int) else key[0]
        return {"pixel_values": self.pixels[index], "labels": self.targets[index]}


def own_layers(model: Any) -> Tensors:
    """The parameters of the terms' own layers, by the reference's names."""
    terms = [] if model.scaffold is None else model.scaffold.terms.values()
    return {name: parameter for term in terms for name, parameter in term.named_parameters()}


def put_state(case: Case, model: Any, stage: str, role: str) -> None:
    prefix = f"{stage}.{role}."
    put_pool(model.pool, case.tensors, f"{prefix}prompt.")
    put_head(model.head, case[f"{prefix}last.weight"], case[f"{prefix}last.bias"])
    with torch.no_grad():
        for name, parameter in own_layers(model).items():
            parameter.copy_(case[f"{prefix}{name}"])
    if model.kd_prompt is not None:
        put_head(model.kd_head, case[f"{prefix}kd_last.weight"], case[f"{prefix}kd_last.bias"])
        put_kd_prompt(model.kd_prompt, case.tensors, f"{prefix}kd_prompt")
    if model.mapping is not None:
        put_head(model.kd_head, case[f"{prefix}kd_last.weight"], case[f"{prefix}kd_last.bias"])
        put_mapper(model.mapping, case.tensors, f"{prefix}mapper.")
    put_norm(model.head, case.tensors, f"{prefix}clf_norm")
    put_norm(model.kd_head, case.tensors, f"{prefix}kd_cls_norm")


def same_state(case: Case, model: Any, stage: str, role: str) -> None:
    """Compare what the model has; the rows of future tasks do not exist yet."""
    for name, want in case.tensors.items():
        if not name.startswith(f"{stage}.{role}."):
            continue
        part, *rest = name.split(".")[2:]
        if part in ("kd_last", "kd_cls_norm") and model.kd_head is None:
            continue  # the reference has the head whether its method uses it or not
        if part == "prompt":
            got, used = take_pool(model.pool, ".".join(rest), want)
        elif part == "kd_prompt":
            layer = int(rest[0])
            got = model.kd_prompt.token[None] if layer == 0 else model.kd_prompt.prompt[layer - 1]
            used = len(want)
        elif part in ("projection", "abf"):
            got, used = own_layers(model).get(".".join([part, *rest]), want), len(want)  # a norm is never used
        elif part == "mapper":
            got, used = take_mapper(model.mapping, ".".join(rest), want)
        elif part in ("clf_norm", "kd_cls_norm"):
            norm_of = model.head if part == "clf_norm" else model.kd_head
            got, used = getattr(norm_of, f"norm_{rest[0]}"), len(want)
        else:
            head: Any = model.head if part == "last" else model.kd_head
            got, used = gather(head.blocks, rest[0], want), sum(model.config.num_classes_per_task)
        got = torch.cat([got[:used].detach(), want[used:]])
        case.same(name, got, "parameters")


def check_train_trace(case: Case, tmp_path: Path) -> None:
    hyper = case.hyper
    if hyper["method"] == "mapping":
        return check_interleaved_trace(case)
    alpha = hyper["kd_alpha"]
    section = prompt_section(hyper["prompt_flag"], hyper["prompt_param"], hyper["n_tasks"])
    if hyper.get("ema_coeff") is not None:
        section["ema"] = hyper["ema_coeff"]
    head = head_section(hyper["prompt_flag"])
    kd_prompt = None
    if hyper["kd_layers"] is not None:
        kd_prompt = {"length": hyper["kd_length"], "layers": hyper["kd_layers"], "alpha": alpha}
    models = {
        "teacher": model_for(case, "teacher", prompt=section, head=head),
        "student": model_for(case, "student", prompt=section, head=head, kd_prompt=kd_prompt),
    }
    assert (hyper["optimizer"], hyper["betas"], hyper["eps"], hyper["weight_decay"]) == ("Adam", [0.9, 0.999], 1e-8, 0)
    arguments: dict[str, Any] = {
        "num_train_epochs": hyper["epochs"],
        "learning_rate": hyper["lr"],
        "epoch_cosine": hyper["lr_schedule"].startswith("cosine"),
        "per_device_train_batch_size": hyper["batch"],
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    objective = objective_of(hyper, hyper["Soft_T"], models["student"].shape, models["teacher"].shape)
    teacher = CDLTrainer(models["teacher"], CDLTrainingArguments(str(tmp_path / "t"), **arguments), role="teacher")
    student = CDLTrainer(
        models["student"],
        CDLTrainingArguments(str(tmp_path / "s"), **arguments),
        objective=objective,
        teacher=models["teacher"],
    )
    assert student.teacher.shares_query({}) == models["teacher"].needs_query
    per_task = hyper["classes_per_task"]
    for number in range(hyper["n_tasks"]):
        names = tuple(f"{number}-{i}" for i in range(per_task))
        task = Task(number, names, number * per_task, Batches(case, number), None, Batches(case, number))
        for role, trainer in (("teacher", teacher), ("student", student)):
            model = models[role]
            model.begin_task(names)
            put_state(case, model, "init" if number == 0 else f"boundary{number}", role)
            trainer.learn(task)
            log = [line for line in trainer.state.log_history if "loss/loss" in line]
            key = f"task{number}.{role}."
            case.same(f"{key}total_loss", torch.tensor([line["loss/loss"] for line in log]), "losses")
            case.same(f"{key}ce_loss", torch.tensor([line["loss/ce"] for line in log]), "losses")
            same_state(case, model, f"after{number}", role)
            model.eval()
            with torch.no_grad():
                case.same(f"task{number}.eval.{role}_logits", model(case["eval_pixel_values"]).logits, "eval_logits")
            if role == "student":
                kinds = ("soft_loss", "feature_loss")
                for kind, name in zip(kinds, TERMS_OF[hyper["method"]], strict=False):
                    term: Any = objective.terms[name]
                    values = [term.config.weight * line[f"loss/{name}"] for line in log]
                    case.same(f"{key}{kind}", torch.tensor(values), "losses")
        steps = [i for _ in range(hyper["epochs"]) for i in range(hyper["batches_per_epoch"])]
        with torch.no_grad():
            batches = [case[f"pixel_values.{number}.{i}"] for i in steps]
            given = [models["teacher"](batch, task_id=number).logits[:, task.classes] for batch in batches]
        case.same(f"task{number}.student.teacher_logits", torch.stack(given), "eval_logits")


def check_interleaved_trace(case: Case) -> None:
    """CDL v1: teacher and student steps alternate; the student learns from the teacher before the teacher's step."""
    hyper = case.hyper
    tasks, per_task, alpha = hyper["n_tasks"], hyper["classes_per_task"], hyper["kd_alpha"]
    pool_size, length, _ = param = hyper["prompt_param"]
    models = mapped_pair(case, tasks, param, pool_size // tasks, length)
    teacher, student = models["teacher"], models["student"]
    objective = objective_of(hyper, hyper["Soft_T"], student.shape, teacher.shape)
    assert (hyper["lr_schedule"], alpha) == ("constant", 0.5)
    for number in range(tasks):
        classes = slice(number * per_task, (number + 1) * per_task)
        adams = {}
        for role, model in models.items():
            model.begin_task([f"{number}-{i}" for i in range(per_task)])
            put_state(case, model, "init" if number == 0 else f"boundary{number}", role)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            adams[role] = torch.optim.Adam(trained, lr=hyper["lr"])
            model.train()
        log: dict[str, list[torch.Tensor]] = {}
        for step in [i for _ in range(hyper["epochs"]) for i in range(hyper["batches_per_epoch"])]:
            pixels, targets = case[f"pixel_values.{number}.{step}"], case[f"targets.{number}.{step}"]
            query = student.compute_query(pixels)
            student.follow(teacher)
            taught = teacher(pixels, query=query, task_id=number)
            given = CDLOutput(logits=taught.logits.detach())
            learnt = student(pixels, query=query, task_id=number)
            results = {
                "teacher": Objective()(taught, None, targets, classes),
                "student": objective(learnt, given, targets, classes),
            }
            for role, losses in results.items():
                adams[role].zero_grad()
                losses["loss"].backward()
                adams[role].step()
                log.setdefault(f"{role}.total_loss", []).append(losses["loss"].detach())
                log.setdefault(f"{role}.ce_loss", []).append(losses["ce"].detach())
            log.setdefault("student.soft_loss", []).append(alpha * results["student"]["prompt_mapping"].detach())
            log.setdefault("student.teacher_logits", []).append(given.logits[:, classes])
        for name, values in log.items():
            case.same(f"task{number}.{name}", torch.stack(values), "losses")
        student.follow(teacher)
        for role, model in models.items():
            same_state(case, model, f"after{number}", role)
            with torch.no_grad():
                logits = model.eval()(case["eval_pixel_values"]).logits
            case.same(f"task{number}.eval.{role}_logits", logits, "eval_logits")


CHECKS = {
    "vit_weights": check_vit_weights,
    "vit_plain": check_vit_plain,
    "vit_prefix": check_vit_prefix,
    "coda": check_coda,
    "coda_gram_schmidt": check_coda_gram_schmidt,
    "l2p": check_matched,
    "dualprompt": check_matched,
    "kdp": check_kdp,
    "apt": check_apt,
    "mapping": check_mapping,
    "losses": check_losses,
    "fitnets": check_features,
    "reviewkd": check_features,
    "masked_ce": check_masked_ce,
    "metrics": check_metrics,
    "train_trace": check_train_trace,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    files = sorted(Path(str(metafunc.config.getoption("--references"))).glob("*.json"))
    if "file" in metafunc.fixturenames:
        metafunc.parametrize("file", files, ids=[file.stem for file in files])


def test_reference(file: Path, tmp_path: Path) -> None:
    case = Case(file)
    kind = case.info["case"]
    assert kind in CHECKS, f"{file} has the unknown kind '{kind}'; known: {', '.join(CHECKS)}"
    check = CHECKS[kind]
    check(case, tmp_path) if kind == "train_trace" else check(case)  # type: ignore[operator]


def test_folder_is_not_empty(pytestconfig: pytest.Config) -> None:
    assert list(Path(str(pytestconfig.getoption("--references"))).glob("*.json")), "no reference file found"
