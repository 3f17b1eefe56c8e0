"""What every process of two checks of a sharded teacher; started by test_sharding.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import ViTConfig, ViTForImageClassification, set_seed

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments
from hf_cdl.distill import TERMS, Objective
from hf_cdl.models.classifier import ImageClassifier
from hf_cdl.training.kept import BatchKey, Kept
from hf_cdl.training.kept.weights import state_of
from hf_cdl.training.sharding import everywhere, gathered, is_sharded, local, shard

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 64, "image_size": 32, "patch_size": 8},
}


def arguments(folder: Path, **fields: Any) -> CDLTrainingArguments:
    return CDLTrainingArguments(str(folder), use_cpu=True, report_to="none", shard_teacher=True, **fields)


def teacher_of(backbone: str, **fields: Any) -> CDLForImageClassification:
    set_seed(0)
    prompt = {"type": "coda", "components": 3, "length": 4, "layers": [0, 1]}
    model = CDLForImageClassification.from_backbone(backbone, **{"prompt": prompt, **fields})
    model.begin_task(["cat", "dog"])
    return model.eval()


def holds_its_share_alone(teacher: Any, images: torch.Tensor) -> None:
    """A process keeps half of the layers' bytes, also after they ran; the answers are those of the whole model."""
    whole = sum(p.nbytes for p in teacher.backbone.parameters())
    layers = sum(p.nbytes for p in teacher.backbone.layers.parameters())
    with torch.no_grad():
        answer = teacher(images, output_hidden_states=True)
    shard(teacher, torch.device("cpu"), 2)
    for _ in range(2):
        held = sum(local(p).untyped_storage().nbytes() for p in teacher.backbone.parameters())
        assert held <= whole - layers + 0.55 * layers, "a share may be padded"
        with torch.no_grad():
            again = teacher(images, output_hidden_states=True)
        torch.testing.assert_close(again.logits, answer.logits, atol=0, rtol=0)
        for ours, theirs in zip(again.hidden_states, answer.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    trained = {name for name, p in teacher.named_parameters() if p.requires_grad}
    assert trained and not any(isinstance(p, DTensor) for name, p in teacher.named_parameters() if name in trained)


def is_stored_whole(teacher: Any, place: Path, before: dict[str, torch.Tensor]) -> None:
    """By its trainer, under the usual names; one process alone is refused. It loads whole weights, too."""
    with pytest.raises(RuntimeError, match="trainer.save_model"):
        teacher.save_pretrained(place / "shares")
    trainer = CDLTrainer(teacher, arguments(place), role="teacher")
    trainer.save_model(str(place / "teacher"))
    PartialState().wait_for_everyone()
    stored = load_file(place / "teacher" / "model.safetensors")
    fresh = CDLForImageClassification.from_pretrained(place / "teacher")
    assert {*fresh.state_dict()} == {*before}
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert sum(value.nbytes for value in stored.values()) == sum(value.nbytes for value in before.values())
    now = state_of(teacher)
    teacher.load_state_dict({name: value + 1 for name, value in before.items()})
    assert state_of(teacher) != now
    with gathered(teacher, PartialState().is_main_process):
        if PartialState().is_main_process:
            for name, value in teacher.state_dict().items():
                assert torch.equal(value, before[name] + 1), name
    teacher.load_state_dict(before)


def looks_up_what_all_know(teacher: Any, images: torch.Tensor) -> None:
    """A query that one process knows and the other does not is computed by both: alone, one would wait for ever."""
    rank, device = PartialState().process_index, torch.device("cpu")
    assert everywhere(True, device) and not everywhere(rank == 0, device)
    kept = Kept()
    read: Any = kept.reader(teacher)
    keys = [BatchKey(False, number) for number in range(2)]
    passes: list[int] = []
    hook = teacher.backbone.register_forward_hook(lambda *_: passes.append(1))
    first = read(images, keys[0])
    kept._images = kept._images if rank else {}
    for number, expected in ((0, 2), (0, 2), (1, 3)):
        found = read(images, keys[number])
        assert torch.equal(found, first) and len(passes) == expected
    hook.remove()


def refuses_what_it_cannot_share_out(backbone: str, place: Path) -> None:
    config = ViTConfig(**SIZES)
    learning = ImageClassifier(ViTForImageClassification(config))
    plain: Any = torch.nn.Linear(2, 2)
    plain.trained_tasks, plain.fitted, plain.trains = 0, False, lambda task: True
    for model, says in (
        (learning, "all its weights"),
        (teacher_of(backbone, train_backbone=True), "train_backbone.*Train it where it fits"),
        (plain, "a Linear, has none of transformers' layers"),
    ):
        with pytest.raises(ValueError, match=says):
            CDLTrainer(model, arguments(place), role="teacher")
        assert not is_sharded(model)
    student = teacher_of(backbone)
    with pytest.raises(ValueError, match="learns from no teacher"):
        CDLTrainer(student, arguments(place))
    kd = TERMS["kd"]
    objective = Objective(0.5, [("kd", kd(kd.config_class(), student.shape, learning.shape))])
    CDLTrainer(student, arguments(place), objective, learning)
    assert is_sharded(learning) and not is_sharded(student), "what only teaches is frozen for its student"


if __name__ == "__main__":
    backbone, place = sys.argv[1], Path(sys.argv[2])
    PartialState(cpu=True)
    model = teacher_of(backbone)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    size = model.backbone.config.image_size
    pixels = torch.rand(3, 3, size, size)
    holds_its_share_alone(model, pixels)
    is_stored_whole(model, place, weights)
    looks_up_what_all_know(model, pixels)
    refuses_what_it_cannot_share_out(backbone, place)
    print(f"process {PartialState().process_index}: all is well")
