"""Recipe fields that are unknown, of the wrong type, out of range, missing or contradictory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bad_inputs.parts import COMPONENTS, GONE, Parts
from bad_inputs.runner import WAY, Command, Row, command, rows

NAN, INF = math.nan, math.inf
LINEAR, RIDGE, NONE = {"type": "linear"}, {"type": "ridge"}, {"type": "none"}
PLAIN = {"model": "classifier", "backbone": "resnet"}
ALONE: dict[str, Any] = {"teacher": None, "distill": [], "ce_weight": 1.0}

SESSIONS: dict[str, Any] = {
    **{"student.head": RIDGE, "student.first_session": LINEAR, "student.later_sessions": {"anchors": "both"}},
    **ALONE,
}
"""Unlabelled images tell how features moved."""


def field(changes: dict[str, Any], *says: str, way: str = WAY) -> Row:
    """A valid recipe with these fields; without `says`, the message must name the first of them."""
    folder = () if {*changes} & {"name", "output_dir"} else ("--output_dir", "run")

    def make(parts: Parts) -> Command:
        return command("train", parts.write(changes), *folder)

    shown = {name: "left out" if value is GONE else value for name, value in changes.items() if name not in ALONE}
    name = ", ".join(f"{name} {value}" for name, value in (shown or changes).items())
    return Row(name, make, says or (next(iter(changes)),), way)


def term(kind: str, says: str, **values: Any) -> Row:
    """A distillation term with a wrong field."""
    row = field({"distill": [{"type": kind, **values}]}, says)
    return Row(f"{kind} {values}", row.make, (says, f"distill.0|{kind}"))


def prompt(kind: str, says: str, **values: Any) -> Row:
    """The student's prompts with a wrong field."""
    row = field({"student.prompt": {"type": kind, **values}}, says)
    return Row(f"{kind} {values}", row.make, (says, "student"))


def head(kind: str, says: str, **values: Any) -> Row:
    """The head of a student that learns alone, with a wrong field."""
    row = field({"student.head": {"type": kind, **values}, "student.prompt": NONE, **ALONE}, says)
    return Row(f"{kind} {values}", row.make, (says, "student"))


def lora(says: str, way: str = WAY, **values: Any) -> Row:
    """Adapters with a wrong field."""
    section = {"head": RIDGE, "first_session": LINEAR, "lora": values, "prompt": NONE}
    row = field({**{f"student.{name}": value for name, value in section.items()}, **ALONE}, says)
    return Row(f"lora {values}", row.make, ("lora", says), way)


def plugin(name: str, source: str, says: str) -> Row:
    """A plugin named by the user that cannot be run."""

    def make(parts: Parts) -> Command:
        Path("mine.py").write_text(source)
        return command("train", parts.write({"plugins": ["mine.py"]}), "--output_dir", "run")

    return Row(f"a plugin {name}", make, ("mine.py", says), way="Fix it, or leave it out")


def training(says: str, way: str = WAY, **values: Any) -> Row:
    """Training arguments."""
    row = field({f"train.{name}": value for name, value in values.items()}, says, way=way)
    return Row(f"train {values}", row.make, row.says, way)


UNKNOWN = [
    field({"epochs": 3}),
    field({"studnet": {}}, way="did you mean 'student'"),
    field({"data.label_colum": "x"}, way="did you mean 'label_column'"),
    field({"data.transform": "resize"}, "transform"),
    field({"student.bacbone": "x"}, way="did you mean 'backbone'"),
    field({"teacher.prompts": COMPONENTS}, "teacher.prompts"),
    field({"student.prompt.lenght": 4}, way="did you mean 'length'"),
    field({"student.head.width": 3}, "student.head"),
    field({"student.kd_prompt": {"lenght": 4}}, "kd_prompt.lenght"),
    field({"train.learning_rat": 1}, way="did you mean 'learning_rate'"),
    field({"teacher.train": {"epochs": 1}}, "teacher.train.epochs"),
    field({"card": {"licence": "mit"}}, "card.licence", way="license"),
    field({"student.prompt.type": "codda"}, "codda", way="allowed.*coda"),
    field({"student.prompt.type": GONE}, "student.prompt.type", way="allowed.*coda"),
    field({"student.prompt.type": ["coda"]}, "student.prompt.type", way="allowed.*coda"),
    field({"student.head": {"type": "mlp"}}, "mlp", way="allowed.*linear"),
    field({"distill": [{"type": "dkdd"}]}, "dkdd", way="allowed.*dkd"),
    field({"distill": [{"weight": 0.5}]}, "distill.0.type", way="allowed.*kdp"),
    term("kd", "tau", tau=4),
    lora("rank", rank=4),
]

TYPES = [
    field({"name": 3}, "name"),
    field({"name": ["a", "b"]}, "name"),
    field({"name": ""}, "name"),
    field({"name": "."}, "name"),
    field({"name": "./."}, "name"),
    field({"name": "a\0b"}, "name", "null byte"),
    field({"name": "../../elsewhere"}, "name"),
    field({"seed": "one"}, "seed"),
    field({"seed": 1.5}, "seed"),
    field({"seed": [0, 1, 2]}, "seed"),
    field({"ce_weight": "much"}, "ce_weight"),
    field({"data": "icons"}, "data"),
    field({"data.path": ["a", "b"]}, "data.path"),
    field({"student": "vit"}, "student"),
    field({"student": [1]}, "student"),
    field({"teacher": True}, "teacher"),
    field({"student.backbone": 7}, "student.backbone"),
    field({"student.prompt": "coda"}, "student.prompt"),
    field({"student.prompt.layers": "all"}, "student.prompt.layers"),
    field({"student.prompt.layers": [0.5]}, "student.prompt.layers"),
    field({"student.train_backbone": "perhaps"}, "train_backbone"),
    field({"distill": {"type": "kd"}}, "distill"),
    field({"distill": ["kd"]}, "distill"),
    field({"train": 3}, "train"),
    field({"train": [{"learning_rate": 1}]}, "train"),
    field({"baselines": "linear_head"}, "baselines"),
    field({"baselines": ["knn"]}, "baselines", way="nearest_class_mean"),
    field({"plugins": {"a": 1}}, "plugins"),
    field({"plugins": ["gone.py"]}, "gone.py"),
    plugin("of another syntax", "def build(:\n", "line 1: SyntaxError"),
    plugin("without its import", "import os\nimport no_such_package\n", "line 2: ModuleNotFoundError"),
    plugin("that fails", "\n\nassert 2 == 3, 'no'\n", "line 3: AssertionError: no"),
    plugin("that fails in a function", "def f():\n    return {}['key']\n\nf()\n", "line 2: KeyError"),
    plugin("that ends the process", "import sys\nsys.exit(0)\n", "line 2: SystemExit"),
    plugin("of bytes", "\0", "SyntaxError|ValueError"),
    field({"student.prompt.components": True}, "components", way="should be a number, not yes or no"),
    field({"data.classes_per_task": True}, "classes_per_task", way="should be a number, not yes or no"),
    field({"student.prompt.layers": [0, True]}, "student.prompt.layers", way="should be a number, not yes or no"),
    field({"ce_weight": True, "teacher": None, "distill": []}, "ce_weight", way="should be a number, not yes or no"),
    field({"seed": False}, "seed", way="should be a number, not yes or no"),
    field({"card": "mit"}, "card"),
    field({"protocol": "cld"}, "protocol", way="cdl"),
    field({"output_dir": 3}, "output_dir"),
    field({"output_dir": " "}, "output_dir"),
    field({"output_dir": "a\0b"}, "output_dir", "null byte"),
    field({"data.image_column": ""}, "image_column"),
    field({"save_backbone": "partly"}, "save_backbone"),
    field({"teacher.query": "both"}, "teacher.query", way="one_pass"),
    field({"student.model": "resnet"}, "student.model", way="classifier"),
    field({"data.classes_per_task": "ten"}, "classes_per_task"),
    field({"data.classes_per_task": 1.5}, "classes_per_task"),
    field({"data.crop_scale": [0.5]}, "crop_scale"),
    field({"data.eval_split": "train"}, "eval_split", way="validation"),
    field({"data.known_classes": ["a", "b"]}, "known_classes"),
    training("learning_rate", learning_rate="fast"),
    training("lr_scheduler_type|zigzag", lr_scheduler_type="zigzag"),
    training("optim|adammm", optim="adammm"),
    training("save_strategy", save_strategy="sometimes"),
    training("save_strategy", save_strategy=True),  # YAML's `no`
    training("eval_strategy", eval_strategy="epochs"),
    training("report_to|tensorbord", report_to="tensorbord"),
]

RANGES = [
    field({"ce_weight": -1}),
    field({"ce_weight": NAN}),
    field({"ce_weight": INF}),
    field({"seed": 10**400}, "seed"),
    field({"train.per_device_train_batch_size": 10**400}, "per_device_train_batch_size"),
    field({"train.learning_rate": 10**400}, "learning_rate"),
    field({"seed": -1}),
    field({"seed": 2**40}),
    field({"data.classes_per_task": 0}, "classes_per_task"),
    field({"data.classes_per_task": []}, "classes_per_task"),
    field({"data.classes_per_task": [2, 0]}, "classes_per_task"),
    field({"data.classes_per_task": [["class a"], []]}, "classes_per_task"),
    field({"data.class_order_seed": -1}, "class_order_seed"),
    field({"data.max_classes": 0}, "max_classes"),
    field({"data.max_train_per_class": -1}, "max_train_per_class"),
    field({"data.max_eval_per_class": 0}, "max_eval_per_class"),
    field({"data.max_pixels": 0}, "max_pixels"),
    field({"data.check": "some"}, "check", "headers"),
    field({"data.check": None}, "check"),
    field({"data.unlabelled_ratio": 0, "data.unlabelled": "photos"}, "unlabelled_ratio"),
    field({"data.unlabelled": " "}, "unlabelled"),
    field({"data.foreign": ""}, "foreign"),
    field({"data.foreign": "photos"}, "data.foreign", "no head says", way="known: 0.95"),
    field({"data.test_fraction": 1.0}, "test_fraction"),
    field({"data.test_fraction": NAN}, "test_fraction"),
    field({"data.crop_scale": [0, 1]}, "crop_scale"),
    field({"data.crop_scale": [NAN, 1]}, "crop_scale"),
    field({"data.crop_ratio": [2, 1]}, "crop_ratio"),
    field({"data.crop_ratio": [1, INF]}, "crop_ratio"),
    field({"data.crop_padding": -1}, "crop_padding"),
    field({"data.crop_padding": 10**9}, "crop_padding"),
    field({"data.crop_padding": 1001}, "crop_padding"),
    field({"data.flip": 2}, "flip"),
    field({"data.flip": NAN}, "flip"),
    field({"data.views": 0}, "views"),
    field({"data.views": 2}, "data.views", way="fewer views"),
    field({"data.views": 1, "student.head": RIDGE, "student.prompt": NONE, "baselines": [], **ALONE}, "data.views"),
    field(
        {"train.max_steps": 2, "train.num_train_epochs": GONE, "data.views": 9}, "data.views", "max_steps", way="fewer"
    ),
    field({"cache": " "}, "cache", way="name a folder"),
    field({"cache": "run/student/kept"}, "cache", way="another folder"),
    prompt("coda", "components", components=0),
    prompt("coda", "length", length=7),
    prompt("coda", "orthogonality", orthogonality=NAN, layers=[0]),
    prompt("coda", "layers", layers=[]),
    prompt("coda", "layers", layers=[0, 0]),
    prompt("coda", "layers", layers=[0, 9]),
    prompt("coda", "layers", layers=[-1]),
    prompt("coda", "length|components", components=10**9, layers=[0]),
    prompt("l2p", "pool_size", pool_size=0),
    prompt("l2p", "top_k", top_k=31),
    prompt("l2p", "reduction", reduction="max"),
    prompt("dualprompt", "expert_length", expert_length=0),
    prompt("dualprompt", "reserved_tasks", reserved_tasks=-1, general_layers=[0], expert_layers=[1]),
    prompt("dualprompt", "layer", general_layers=[0], expert_layers=[0]),
    prompt("l2p", "length", length=5, layers=[0]),
    prompt("apt", "ema", ema=1.5),
    prompt("apt", "ema", ema=NAN),
    prompt("apt", "teach_with", teach_with="mean"),
    field({"student.kd_prompt": {"length": 3}}, "length"),
    field({"student.kd_prompt": {"alpha": NAN}}, "alpha"),
    field({"student.kd_prompt": {"layers": 9}}, "layers"),
    field({"student.kd_prompt": {"later_rate": INF}}, "later_rate"),
    field({"student.mapping": {"components": 0}, "distill": [{"type": "prompt_mapping"}]}, "components"),
    head("ridge", "strength", strength=-1),
    head("ridge", "strength", strength=NAN),
    head("ridge", "features", features=0),
    head("ridge", "soft_targets", strength=10.0, soft_targets=0.5),
    head("ridge", "sums", sums=False),
    head("ridge", "known", known=1.0),
    head("ridge", "known", known=0),
    head("lda", "known", known=95),
    head("ridge", "known", known="high"),
    head("ridge", "known", known=0.95, features=20),
    head("ncm", "known", known=0.95),
    head("ncm", "scale", scale=0),
    head("cosine", "scale", scale=INF),
    head("linear", "standardise", standardise="every_task"),
    head("linear", "gone.safetensors", standardise="gone.safetensors"),
    lora("r 0|'r'|lora.r", r=0),
    lora("r is 1000000000|r 1000000000|'r'|lora.r", r=10**9),
    lora("alpha", alpha=-8),
    lora("dropout", dropout=1.0),
    lora("dropout", dropout=NAN),
    lora("nope", way="q_proj", targets=["nope"]),
    lora("targets", targets=[]),
    term("kd", "weight", weight=-1),
    term("kd", "temperature", temperature=NAN),
    term("dkd", "alpha", alpha=-1),
    term("dist", "temperature", temperature=0),
    term("kdp", "weight", weight=INF),
    term("kd_token", "temperature", temperature=-2),
    term("fitnets", "weight", weight=NAN),
    term("review_kd", "weight", weight="big"),
    term("similarity", "weight", weight=-0.1),
    term("kdp_labels", "weight", weight=NAN),
    term("label_smoothing", "epsilon", epsilon=2),
    term("dual_path", "rho", rho=2),
    term("dual_path", "fraction", fraction=0),
    term("dual_path", "kernel", kernels=[4]),
    term("prompt_mapping", "weight", weight=-1),
    training("learning_rate", learning_rate=-0.1),
    training("learning_rate", learning_rate=NAN),
    training("num_train_epochs", num_train_epochs=0),
    training("num_train_epochs", num_train_epochs=-1),
    training("num_train_epochs", num_train_epochs=INF),
    training("per_device_train_batch_size", per_device_train_batch_size=0),
    training("per_device_eval_batch_size", per_device_eval_batch_size=-4),
    training("gradient_accumulation_steps", gradient_accumulation_steps=0),
    training("weight_decay", weight_decay=-1),
    training("weight_decay", weight_decay=NAN),
    training("max_grad_norm", max_grad_norm=NAN),
    training("adam_beta1", adam_beta1=2),
    training("adam_epsilon", adam_epsilon=-1),
    training("lr_steps", lr_steps=[3, 2]),
    training("lr_decay", lr_steps=[1], lr_decay=0),
    training("lr_decay", lr_steps=[1], lr_decay=NAN),
    training("warmup_steps", warmup_steps=-1, lr_scheduler_type="linear"),
    training("logging_steps", logging_steps=-1),
    training("dataloader_num_workers", dataloader_num_workers=-1),
]

MISSING = [
    field({"name": GONE}, "'name' is missing"),
    field({"data": GONE}, "'data' is missing"),
    field({"data.path": GONE}, "data.path"),
    field({"student": GONE}, "'student' is missing"),
    field({"student.backbone": GONE}, "student.backbone"),
    field({"student": None}, "student"),
]

AGAINST_EACH_OTHER = [
    field({"ce_weight": 0, "distill": []}, "ce_weight", "distill"),
    field({"ce_weight": 0, "distill": [{"type": "kd", "weight": 0}]}, "ce_weight", "distill"),
    training("tf32", tf32=True),
    training("torch_empty_cache_steps", torch_empty_cache_steps=2),
    training("eval_delay", eval_strategy="epoch", eval_delay=5),
    training("num_train_epochs", num_train_epochs="1:30"),
    field({"teacher": None}, "distill.0", "teacher"),
    field({"distill": [{"type": "kdp"}, {"type": "kd_token"}]}, "distill.1", "kd_prompt"),
    field({"distill": [{"type": "prompt_mapping"}, {"type": "kdp"}]}, "mapping", "kd_prompt"),
    field({"distill": [{"type": "os_prompt"}]}, "os_prompt", way="one_pass"),
    field({"distill": [{"type": "pseudo_labels"}]}, "pseudo_labels", way="data.unlabelled"),
    field({"distill": [{"type": "kdp", "threshold": 0.5}]}, "distill.0.threshold", way="data.unlabelled"),
    field({"data.unlabelled_ratio": 2}, "unlabelled_ratio", "data.unlabelled"),
    field({"data.unlabelled_split": "train"}, "unlabelled_split", "data.unlabelled"),
    field({"student.later_sessions": {"anchors": "both"}}, "anchors", way="data.unlabelled.*own: task"),
    field(
        {"teacher.later_sessions": {"keep": 1, "keep_on": "both"}},
        "teacher.later_sessions.keep_on",
        way="data.unlabelled",
    ),
    field({"teacher.later_sessions": {"keep_on": "both"}}, "keep_on", way="keep is 0.*[Ll]eave"),
    field({"data.unlabelled": "untaught", **ALONE}, "data.unlabelled", way="no teacher.*leave it out"),
    field({"data.unlabelled": "unread", "distill": [{"type": "dkd"}]}, "data.unlabelled", way="similarity"),
    field(
        {"data.unlabelled": "photos", "distill": [{"type": "kd", "weight": 0}]}, "data.unlabelled", way="similarity"
    ),
    field({"data.unlabelled": "photos", "protocol": "cdl"}, "data.unlabelled", way="epoch_cosine"),
    field({"data.unlabelled": "photos", "protocol": "cdl", **SESSIONS}, "data.unlabelled", way="epoch_cosine"),
    field(
        {"data.unlabelled": "photos", "data.unlabelled_ratio": 2, **SESSIONS}, "unlabelled_ratio", way="leave it out"
    ),
    field({"train.frozen_bf16": True, "student.prompt": NONE, "baselines": [], **ALONE}, "train.frozen_bf16"),
    field(
        {"teacher.train.frozen_bf16": True, "teacher.prompt": {"type": "vpt"}, "baselines": []},
        "teacher.train.frozen_bf16",
    ),
    field({"data.unlabelled": "photos", "student.head": RIDGE, "student.prompt": NONE, **ALONE}, "fitted without"),
    field({"distill": [{"type": "dkd"}], "data.classes_per_task": 1}, "one class", way="classes_per_task"),
    field({"distill": [{"type": "dist"}], "data.classes_per_task": [3, 1]}, "dist", way="classes_per_task|another"),
    field({"student.train_backbone": True}, "student.train_backbone", way="prompt.type none"),
    field({"student.train_backbone": True, "student.prompt": NONE, "save_backbone": False}, "save_backbone"),
    field({"teacher.kd_prompt": {}}, "teacher.kd_prompt"),
    field({"student.kd_prompt": {}, "distill": [{"type": "kd"}]}, "student.kd_prompt"),
    field({"student.head": {"type": "ncm"}}, "student.head", way="first_session"),
    field({"student.first_session": LINEAR}, "student.first_session", way="ncm|ridge"),
    field({"student.lora": {}, "student.prompt": NONE}, "student.lora", way="first_session"),
    field({"student.pretrained": False}, "student.pretrained", way="classifier"),
    field({"teacher.train": None}, "teacher.train", way="classifier"),
    field({"student": PLAIN}, "kdp", "classifier"),
    field({"teacher": {**PLAIN, "prompt": COMPONENTS}}, "teacher.prompt"),
    field({"teacher_from": "nowhere", **ALONE}, "teacher_from", "teacher", way="describe"),
    field({"train.shard_teacher": True, **ALONE}, "train.shard_teacher", "teacher"),
    training("accelerate launch", shard_teacher=True),
    field({"teacher_from": "elsewhere"}, "teacher_from", "elsewhere"),
    field({"push_teacher": True, "push_to_hub": True, **ALONE}, "push_teacher"),
    field({"hub_model_id": "a/b/c", "push_to_hub": True}, "hub_model_id"),
    field({"push_teacher": True}, "push_teacher", "push_to_hub"),
    field({"hub_private_repo": False}, "hub_private_repo", "push_to_hub"),
    field({"hub_strategy": "end"}, "hub_strategy", "push_to_hub"),
    *(
        field({f"{role}.prompt": prompts, f"{role}.query": query}, f"{role}.query", query, way="leave it out")
        for role, prompts, query in (
            ("student", {"type": "vpt"}, "one_pass"),
            ("student", {"type": "apt"}, "one_pass"),
            ("student", NONE, "one_pass"),
            ("teacher", {"type": "vpt"}, "one_pass"),
            ("teacher", NONE, "self"),
        )
    ),
    field({"student.prompt": {"type": "apt", "teach_with": "merged_before"}}, "student.prompt.teach_with"),
    field({**ALONE, "student.prompt": NONE, "student.head": RIDGE, "ce_weight": 0.5}, "ce_weight", way="leave it out"),
    field({**ALONE, "student": PLAIN, "save_backbone": False}, "save_backbone", "classifier", way="leave it out"),
    field({**ALONE, "student": PLAIN, "save_code": True}, "save_code", "classifier", way="leave it out"),
    head("ridge", "temperature", temperature=2.0),
    prompt("dualprompt", "general_length", general_length=4, general_layers=[], expert_layers=[1]),
    field({"student.kd_prompt": {"length": 0, "layers": 2}}, "kd_prompt", "layers", way="Leave layers out"),
    field({"student.kd_prompt": {"length": 0, "prompt_init": "normal"}}, "kd_prompt", way="Leave prompt_init out"),
    term("dual_path", "copy_rate", copy_rate=0.5),
    term("dual_path", "warmup_steps", warmup_steps=5, beta_p=0.0),
    term("dual_path", "fraction", fraction=0.5, kernels=[]),
    term("dist", "beta", beta=0.0, gamma=0.0),
    term("dkd", "alpha", alpha=0.0, beta=0.0),
    field({"data.known_train": "ignore"}, "known_train", "known_classes", way="leave it out"),
    field({"data.train_split": "train", "data.test_split": "train"}, "train_split", "test_split"),
    field({"data.classes_per_task": [["class a"], ["class a"]]}, "class a", way="one task"),
    field({"data.classes_per_task": [["class a"]], "data.max_classes": 1}, "max_classes"),
    field({"data.known_classes": [["x"], ["x"]]}, "known_classes", way="one task"),
    field({"data.revision": "main"}, "revision"),  # of a folder
    field({"student.revision": "v1"}, "revision"),
    field({"data.crop_padding": 4, "data.crop_scale": [0.5, 1.0]}, "crop_padding", "crop_scale"),
    field({"data.crop_padding": 0, "data.crop_ratio": [1, 1]}, "crop_padding", "crop_ratio"),
    training("epoch_cosine", max_steps=3, epoch_cosine=True),
    training("lr_steps", lr_steps=[1], epoch_cosine=True),
    training("lr_steps", lr_steps=[1], lr_scheduler_type="linear"),
    training("warmup_steps", warmup_steps=2),  # with a constant rate
    training("bf16|fp16", bf16=True, fp16=True),
    training("frozen_bf16", bf16=True, frozen_bf16=True),
    training("drop_last", per_device_train_batch_size=64, dataloader_drop_last=True),
    training("output_dir", output_dir="x"),
    training("seed", seed=3),
    training("hub_token", hub_token="hf_x"),
    training("push_to_hub", push_to_hub=True),
    training("save_only_model", save_only_model=True),
    training("ignore_data_skip", ignore_data_skip=True),
    training("neftune_noise_alpha", neftune_noise_alpha=5),
    training("train_sampling_strategy|length", train_sampling_strategy="group_by_length"),
    training("reduce_lr_on_plateau|validation", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"),
    training("load_best_model_at_end|eval", load_best_model_at_end=True),
    training("bitsandbytes|adamw_8bit|bnb", optim="adamw_bnb_8bit", way="install|optim"),
    training("liger", use_liger_kernel=True, way="install|leave|remove|set"),
    training("comet", report_to="comet_ml", way="allowed.*tensorboard"),
]

ROWS = rows("recipe", UNKNOWN, TYPES, RANGES, MISSING, AGAINST_EACH_OTHER)
