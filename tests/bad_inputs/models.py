"""Incomplete or wrong backbones and checkpoints, and mistaken calls of models and configs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bad_inputs.parts import COMPONENTS, GONE, Parts, change_json, change_weights, cut
from bad_inputs.runner import WAY, Command, Row, command, rows
from hf_cdl import CDLConfig, CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.distill import TERMS, Objective
from hf_cdl.unknown import thresholds

NAN, INF = math.nan, math.inf
MODULE = "open('footprint', 'w').close()\n"


def put(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def config(changes: dict[str, Any], file: str = "config.json") -> Callable[[Path], Any]:
    return lambda folder: change_json(folder / file, changes)


def weights(changes: dict[str, Any]) -> Callable[[Path], Any]:
    return lambda folder: change_weights(folder, changes)


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one number of a tensor to another value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def sharded(folder: Path) -> None:
    """Write an index that names a missing file."""
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"layernorm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remote_code(folder: Path) -> None:
    (folder / "evil.py").write_text(MODULE)
    change_json(folder / "config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "without config": (without("config.json"), "config"),
    "with a config that is cut off": (lambda folder: cut(folder / "config.json"), "config"),
    "with a config of no fields": (put("config.json", "{}"), "config|model_type"),
    "with a list for a config": (put("config.json", "[1]"), "config"),
    "with a word for a config": (put("config.json", '"vit"'), "config"),
    "of an unknown type": (config({"model_type": "vitt"}), "vitt|model_type|config"),
    "with code for its config": (remote_code, "evil|trust_remote_code|config"),
    "without weights": (without("model.safetensors"), "model.safetensors"),
    "with weights that are cut off": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors|weights"),
    "with an empty file of weights": (put("model.safetensors", ""), "model.safetensors|weights"),
    "with a text for weights": (
        put("model.safetensors", "version https://git-lfs\n" * 9),
        "model.safetensors|weights",
    ),
    "with a pickle alone": (pickled, "safetensors"),
    "without a shard": (sharded, "model-00001|weights"),
}


def backbone(name: str, damage: Callable[[Path], Any], *says: str, way: str = WAY, **fields: Any) -> Row:
    """A run with a damaged student backbone."""

    def make(parts: Parts) -> Command:
        damage(parts.copy("student", "bad"))
        section = {"student.backbone": "./bad", **{f"student.{key}": value for key, value in fields.items()}}
        return command("train", parts.write(section), "--output_dir", "run")

    return Row(name, make, ("bad", *says), way)


PROCESSOR = "preprocessor_config.json"


def telling(learnt: bool = False, **fields: Any) -> CDLForImageClassification:
    """A model whose head tells how known an image is."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = {"model_type": "vit", "image_size": 16, "patch_size": 8, **shape}
    first = {"first_session": {"type": "linear"}} if fields else {}
    head = {"type": "ridge", "known": 0.9}
    model = CDLForImageClassification(CDLConfig(backbone_config=backbone, head=head, **first, **fields))
    if learnt:
        model.add(torch.randn(8, 3, 16, 16), ["a", "b"] * 4)
    else:
        model.begin_task(["a", "b"])
    return model


BACKBONES = [
    *(backbone(name, *damage) for name, damage in DAMAGE.items()),
    backbone("that is missing", lambda folder: shutil.rmtree(folder)),
    backbone("that is a file", lambda folder: [shutil.rmtree(folder), folder.write_text("x")]),
    backbone("of a family that ignores prompts", config({"model_type": "swin"}), "swin"),
    backbone("that lacks a layer", weights({"layer.1.": GONE}), "layer.1|layers.1|lacks"),
    backbone(
        "with a tensor of another shape", weights({"layernorm.weight": lambda t: t[:7]}), "layernorm.weight|shape|size"
    ),
    backbone(
        "with NaN", weights({"layer.0.attention.attention.query.weight": filled(NAN)}), "q_proj.weight|query.weight"
    ),
    backbone("with infinity", weights({"layernorm.bias": filled(INF)}), "layernorm.bias"),
    backbone("of another width than its weights", config({"hidden_size": 64}), "64|shape|size"),
    backbone("of no layers", config({"num_hidden_layers": 0}), "layers"),
    backbone("of a billion layers", config({"num_hidden_layers": 10**9}), "layers"),
    backbone(
        "of a width of a billion", config({"hidden_size": 10**9, "intermediate_size": 10**9}), "hidden_size|large|size"
    ),
    backbone("of a negative width", config({"hidden_size": -32}), "hidden_size|-32"),
    backbone("with a word for a width", config({"hidden_size": "wide"}), "hidden_size"),
    backbone("with heads that do not divide", config({"num_attention_heads": 5}), "num_attention_heads|heads|shape"),
    backbone("with patches larger than images", config({"patch_size": 64}), "patch|16"),
    backbone("with an unknown activation", config({"hidden_act": "geluu"}), "geluu"),
    backbone("without image processor", without(PROCESSOR), PROCESSOR),
    backbone("with a processor that is cut off", lambda folder: cut(folder / PROCESSOR), PROCESSOR),
    backbone("with a list for a processor", put(PROCESSOR, "[]"), PROCESSOR),
    backbone("with a processor of no fixed size", config({"size": {"shortest_edge": 16}}, PROCESSOR), "size"),
    backbone("with a processor of another size", config({"size": {"height": 32, "width": 32}}, PROCESSOR), "32x32"),
    backbone("with a processor of no size", config({"size": {"height": 0, "width": 0}}, PROCESSOR), "size|0x0"),
    backbone("with a deviation of zero", config({"image_std": [0, 0, 0]}, PROCESSOR), "image_std|deviation"),
    backbone("with means of two channels", config({"image_mean": [0.5, 0.5]}, PROCESSOR), "image_mean|mean"),
    backbone("with a negative deviation", config({"image_std": [0.5, -0.5, 0.5]}, PROCESSOR), "image_std", PROCESSOR),
    backbone("with words for means", config({"image_mean": ["a", "b", "c"]}, PROCESSOR), "image_mean", PROCESSOR),
    backbone("with NaN for means", config({"image_mean": [NAN, 0.5, 0.5]}, PROCESSOR), "image_mean", PROCESSOR),
    backbone("with pixels times nothing", config({"rescale_factor": 0}, PROCESSOR), "rescale_factor", PROCESSOR),
    backbone("with an unknown resampling", config({"resample": 99}, PROCESSOR), "resampl", PROCESSOR),
    backbone(
        "with a processor of an unknown type", config({"image_processor_type": "Evil"}, PROCESSOR), "Evil|" + PROCESSOR
    ),
    *(
        backbone(f"with {name} for its processor", config(changes, PROCESSOR), says, PROCESSOR)
        for name, changes, says in (
            ("no resizing", {"do_resize": False}, "do_resize"),
            ("null for resizing", {"do_resize": None}, "do_resize"),
            ("a word for a switch", {"do_normalize": "no"}, "do_normalize"),
            ("a huge size", {"size": {"height": 10**300, "width": 16}}, "size"),
            ("a fraction of a size", {"size": {"height": 16.5, "width": 16}}, "16.5"),
            ("huge padding", {"do_pad": True, "pad_size": {"height": 10**5, "width": 10**5}}, "pad_size"),
            ("padding", {"do_pad": True, "pad_size": {"height": 32, "width": 32}}, "(3, 32, 32)"),
            ("a tiny deviation", {"image_std": [1e-45] * 3}, "finite"),
            (
                "a tiny crop",
                {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 1e-9},
                "crop_pct",
            ),
            (
                "a huge divisor",
                {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": 16}, "size_divisor": 10**9},
                "size_divisor",
            ),
        )
    ),
    *(
        backbone(f"with {name} in its config", config({key: value}), key, repr(value)[:20])
        for name, key, value in (
            ("an attention of the Hub", "_attn_implementation", "evil/kernels"),
            ("attentions of the Hub", "attn_implementation", {"": "evil/kernels"}),
            ("an attention that is not supported", "attn_implementation", "flash_attention_2"),
            ("a quantisation", "quantization_config", {"quant_method": "gptq", "bits": 4}),
            ("tuples for answers", "return_dict", False),
            ("a word for hidden states", "output_hidden_states", "x"),
            ("a negative epsilon", "layer_norm_eps", -1.0),
        )
    ),
    backbone(
        "with an attention of the Hub in a nested config",
        config({"vision_config": {"_attn_implementation": "evil/kernels"}}),
        "vision_config._attn_implementation",
    ),
    backbone("with adapters beside it", put("adapter_config.json", "{}"), "adapter_config.json", way="merge"),
]


def checkpoint(name: str, damage: Callable[[Path], Any], *says: str, kind: str = "checkpoint", **options: Any) -> Row:
    """Load a damaged checkpoint of two tasks; `options` are those of from_pretrained."""

    def make(parts: Parts) -> Callable[[], Any]:
        damage(parts.copy(kind, "bad"))
        return lambda: CDLForImageClassification.from_pretrained("./bad", **options)

    return Row(name, make, says, WAY)


def other_backbone(folder: Path) -> None:
    """Replace the backbone of a small checkpoint by one with other weights."""
    there = shutil.copytree(json.loads((folder / "config.json").read_text())["backbone_name"], "moved")
    change_weights(Path(there), {"layernorm.bias": filled(1.0)})
    change_json(folder / "config.json", {"backbone_name": "./moved"})


def two_in_a_circle(folder: Path) -> None:
    shutil.copytree(folder, "worse")
    change_json(folder / "config.json", {"backbone_name": "./worse"})
    change_json(Path("worse/config.json"), {"backbone_name": "./bad"})


CHECKPOINTS = [
    *(checkpoint(name, *damage) for name, damage in DAMAGE.items() if "unknown type" not in name),
    checkpoint("that is missing", lambda folder: shutil.rmtree(folder), "bad"),
    checkpoint("that is a file", lambda folder: [shutil.rmtree(folder), folder.write_text("x")], "bad"),
    checkpoint("of another kind", config({"model_type": "vit"}), "vit|cdl"),
    checkpoint("that lacks its head", weights({"head.blocks": GONE}), "head.blocks"),
    checkpoint("that lacks a task's head", weights({"head.blocks.1.": GONE}), "head.blocks.1"),
    checkpoint("that lacks its prompts", weights({"pool.": GONE}), "pool"),
    checkpoint("that lacks its KD token", weights({"kd_prompt.token": GONE}), "kd_prompt.token"),
    checkpoint("that lacks a layer of its backbone", weights({"encoder.layer.1.": GONE}), "layer.1.|layers.1."),
    checkpoint("that lacks its sums", weights({"head.gram": GONE}), "head.gram", kind="ridge"),
    checkpoint("that lacks its adapters", weights({".lora_A.": GONE}), "lora_A", kind="adapted"),
    checkpoint("with NaN in its head", weights({"head.blocks.0.weight": filled(NAN)}), "head.blocks.0.weight"),
    checkpoint("with NaN in its prompts", weights({"pool.blocks.0": filled(NAN)}), "pool.blocks.0"),
    checkpoint("with infinity in its backbone", weights({"backbone.layernorm.bias": filled(INF)}), "layernorm.bias"),
    checkpoint("with a head of fewer classes", weights({"head.blocks.0.": lambda t: t[:1]}), "head.blocks.0|shape"),
    checkpoint(
        "with more tasks than heads", config({"tasks.1": ["cat", "dog", "emu"]}), "head.blocks.1|shape|classes"
    ),
    checkpoint("of a word for tasks", config({"tasks": "ant"}), "tasks"),
    checkpoint("of words for tasks", config({"tasks": ["ant", "bee"]}), "task"),
    checkpoint("of numbers for classes", config({"tasks": [[1, 2], [3, 4]]}), "tasks|class"),
    checkpoint("of a number for tasks", config({"tasks": 4}), "tasks"),
    checkpoint("with a class twice", config({"tasks.1": ["ant", "dog"]}), "ant"),
    checkpoint("with an empty task", config({"tasks.1": []}), "task"),
    checkpoint("with an empty class", config({"tasks.1": ["", "dog"]}), "class|''"),
    checkpoint("with an unknown head", config({"head": {"type": "mlp"}}), "mlp"),
    checkpoint("with a head of no type", config({"head": {}}), "head"),
    checkpoint("with a word for a head", config({"head": "linear"}), "head"),
    checkpoint("with a field that its head has not", config({"head.width": 3}), "width"),
    checkpoint("with unknown prompts", config({"prompt.type": "codda"}), "codda"),
    checkpoint("with null for prompts", config({"prompt": None}), "prompt"),
    checkpoint("with prompts of an odd length", config({"prompt.length": 3}), "length"),
    checkpoint("with a billion prompts", config({"prompt.components": 10**9}), "components|large"),
    checkpoint("with prompts in layers it has not", config({"prompt.layers": [0, 7]}), "7"),
    checkpoint("with adapters of a billion", config({"lora.r": 10**9}), "lora|r", kind="adapted"),
    checkpoint("with a billion layers", config({"backbone_config.num_hidden_layers": 10**9}), "layers"),
    checkpoint("with a width of a billion", config({"backbone_config.hidden_size": 10**9}), "hidden_size|sizes"),
    checkpoint("with null for a backbone", config({"backbone_config": None}), "backbone_config"),
    checkpoint("with a word for a backbone", config({"backbone_config": "vit"}), "backbone_config"),
    checkpoint("with a backbone that ignores prompts", config({"backbone_config.model_type": "swin"}), "swin"),
    checkpoint("with an unknown query", config({"query": "three_pass"}), "three_pass"),
    *(
        checkpoint(f"with {key}", config({key: value}), key.split(".")[-1])
        for key, value in (
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ("return_dict", False),
            ("output_attentions", True),
            ("attn_implementation", "evil/kernels"),
            ("backbone_config._attn_implementation", "evil/kernels"),
            ("backbone_config.quantization_config", {}),
            ("backbone_config.layer_norm_eps", -1.0),
        )
    ),
    checkpoint("with a KD prompt that is none", config({"kd_prompt": {"lenght": 3}}), "lenght"),
    checkpoint("with KD prompts and a mapping", config({"mapping": {}}), "mapping"),
    checkpoint(
        "with a first session of no fitted head", config({"first_session": {"type": "linear"}}), "first_session|fitted"
    ),
    checkpoint(
        "with more labels than classes", config({"id2label": {str(n): f"n{n}" for n in range(9)}}), "id2label|label"
    ),
    checkpoint("small, its own backbone", config({"backbone_name": "./bad"}), "./bad", kind="small"),
    checkpoint("small, in a circle of two", two_in_a_circle, "worse|./bad", kind="small"),
    checkpoint("small, its backbone gone", config({"backbone_name": "./gone"}), "./gone", kind="small"),
    checkpoint("small, of no backbone", config({"backbone_name": None}), "backbone_name", kind="small"),
    checkpoint("small, of other weights", other_backbone, "moved", "fingerprint|weights", kind="small"),
    checkpoint("small, of another width", config({"backbone_config.hidden_size": 64}), "64|shape|size", kind="small"),
    checkpoint("loaded with other labels", lambda folder: None, "id2label|label", id2label={0: "x"}),
    checkpoint("loaded with a typo", lambda folder: None, "save_bakbone", save_bakbone=False),
]


VIEW = {"size": [16, 16], "scale": [1.0, 1.0, 1.0], "shift": [0.0, 0.0, 0.0]}


def fresh(parts: Parts, **fields: Any) -> CDLForImageClassification:
    return CDLForImageClassification.from_backbone(str(parts.student), **fields)


def call(name: str, act: Callable[[Parts], Any], *says: str, way: str = WAY) -> Row:
    return Row(name, lambda parts: lambda: act(parts), says, way)


def begun(name: str, classes: Any, *says: str) -> Row:
    """Begin a task with these classes on a model that knows ant and bee."""

    def act(parts: Parts) -> None:
        model = fresh(parts)
        model.begin_task(["ant", "bee"])
        model.begin_task(classes)

    return call(f"begin_task of {name}", act, *says)


def built(name: str, fields: dict[str, Any], *says: str) -> Row:
    return call(f"from_backbone with {name}", lambda parts: fresh(parts, **fields), *says)


def configured(name: str, fields: dict[str, Any], *says: str) -> Row:
    return call(f"CDLConfig of {name}", lambda parts: CDLConfig(**fields), *says, way=f"{WAY}|list")


def arguments(name: str, fields: dict[str, Any]) -> Row:
    return call(f"arguments with {name}", lambda parts: CDLTrainingArguments("work", **fields), next(iter(fields)))


def learn_alone(parts: Parts) -> None:
    kind = TERMS["kd"]
    model = fresh(parts)
    CDLTrainer(
        model,
        CDLTrainingArguments("work", use_cpu=True),
        Objective(0.5, [("kd", kind(kind.config_class(), model.shape, model.shape))]),
    )


CALLS = [
    begun("a word", "zebra", "zebra"),
    begun("bytes", b"zebra", "zebra|bytes"),
    begun("nothing", [], "class"),
    begun("None", None, "None|class"),
    begun("a number", 3, "3|class"),
    begun("numbers", [1, 2], "1|class"),
    begun("an empty name", ["", "cat"], "''|empty"),
    begun("a blank name", [" ", "cat"], "' '|empty|blank"),
    begun("a name twice", ["cat", "cat"], "cat"),
    begun("a name that is known", ["bee", "cat"], "bee"),
    begun("a set", {"cat", "dog"}, "set|order"),
    begun("a dict", {"cat": 1}, "dict"),
    begun("lists", [["cat"], ["dog"]], "class"),
    built("a typo", {"promt": COMPONENTS}, "promt"),
    built("a revision of a folder", {"revision": "v1"}, "revision"),
    built("a query's revision alone", {"query_revision": "v1"}, "query_revision"),
    built("a word for prompts", {"prompt": "coda"}, "prompt"),
    built("prompts of no type", {"prompt": {"length": 4}}, "prompt"),
    built("unknown prompts", {"prompt": {"type": "x"}}, "'x'"),
    built("a word for a head", {"head": "ridge"}, "head"),
    built("an unknown head", {"head": {"type": "mlp"}}, "mlp"),
    built(
        "adapters of no layers",
        {"lora": {"targets": ()}, "head": {"type": "ridge"}, "first_session": {"type": "linear"}},
        "targets",
    ),
    built("adapters without a session", {"lora": {}}, "first_session|session|fitted"),
    built(
        "a field of adapters that is none",
        {"lora": {"rank": 2}, "head": {"type": "ridge"}, "first_session": {"type": "linear"}},
        "rank",
    ),
    built("a mapping of no teacher", {"mapping": {}}, "teacher_pool"),
    built(
        "a small checkpoint of a trained backbone", {"save_backbone": False, "train_backbone": True}, "save_backbone"
    ),
    built("an unknown query", {"query": "both"}, "both"),
    *(
        built(
            f"a one-pass query beside {prompt['type']}", {"query": "one_pass", "prompt": prompt}, "one_pass", "query"
        )
        for prompt in ({"type": "none"}, {"type": "apt"}, {"type": "vpt"})
    ),
    built("a query's view that nothing reads", {"query_view": VIEW}, "query_view", "no effect"),
    call(
        "a query backbone that nothing reads",
        lambda parts: fresh(parts, prompt={"type": "vpt"}, query_name=parts.teacher),
        "query_name",
        "no effect",
    ),
    built(
        "a ridge head's idle temperature", {"head": {"type": "ridge", "temperature": 2.0}}, "temperature", "no effect"
    ),
    call("from_backbone of nothing", lambda parts: CDLForImageClassification.from_backbone("./gone"), "./gone"),
    call("from_backbone of a number", lambda parts: CDLForImageClassification.from_backbone(3), "3|name"),  # type: ignore[arg-type]
    call("a model without classes", lambda parts: fresh(parts)(torch.zeros(1, 3, 16, 16)), "class", way="begin_task"),
    call("drop_sums of a linear head", lambda parts: fresh(parts).drop_sums(), "linear"),
    call(
        "attention that ignores prompts",
        lambda parts: fresh(parts).set_attn_implementation("flash_attention_2"),
        "flash_attention_2",
    ),
    configured("a word for tasks", {"tasks": "ab"}, "tasks"),
    configured("words for tasks", {"tasks": ["ab", "cd"]}, "tasks|ab"),
    configured("a class twice", {"tasks": [["a"], ["a"]]}, "a"),
    configured("an empty task", {"tasks": [[]]}, "task"),
    configured("numbers for classes", {"tasks": [[1]]}, "class|tasks"),
    configured("an empty class", {"tasks": [[""]]}, "class|tasks"),
    configured("a number for prompts", {"prompt": 3}, "prompt"),
    configured("a word for a truth", {"train_backbone": "perhaps"}, "train_backbone"),
    configured(
        "a small checkpoint of nowhere",
        {"save_backbone": False, "backbone_config": {"model_type": "vit"}},
        "backbone_name",
    ),
    arguments("a negative rate", {"learning_rate": -1.0}),
    arguments("no epochs", {"num_train_epochs": 0}),
    arguments("an unknown schedule", {"lr_scheduler_type": "zigzag"}),
    arguments("steps out of order", {"lr_steps": [3, 2]}),
    arguments("no images in a batch", {"per_device_train_batch_size": 0}),
    call("unknown asked of a head that cannot tell", lambda parts: thresholds(fresh(parts), True), "known: 0.95"),
    call("unknown before anything was learnt", lambda parts: thresholds(telling(), True), "train it first"),
    call("a share of unknown that is none", lambda parts: thresholds(telling(learnt=True), 95), "95", "0.95"),
    call("a share of no class", lambda parts: thresholds(telling(learnt=True), {"x": 0.9}), "'x'", "no class"),
    call("a trainer without a teacher for its term", learn_alone, "kd", "teacher"),
    call("an objective of NaN", lambda parts: Objective(NAN, []), "ce_weight"),
    call("an objective of infinity", lambda parts: Objective(INF, []), "ce_weight"),
    call("an objective of a negative weight", lambda parts: Objective(-1.0, []), "ce_weight"),
]

ROWS = rows("backbone", BACKBONES) + rows("checkpoint", CHECKPOINTS) + rows("model", CALLS)
