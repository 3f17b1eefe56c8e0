"""Features of evaluation images are computed once, and again when the weights that make them change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_backbone, make_data
from transformers import AutoImageProcessor

from hf_cdl import CDLForImageClassification, CDLTrainer, CDLTrainingArguments, TaskStream
from hf_cdl.data import StreamConfig
from hf_cdl.training import kept
from hf_cdl.training.kept import features
from hf_cdl.training.kept.weights import state_of

HEAD = {"type": "ridge", "scale": "auto", "known": 0.9}


def trainer_with(place: Path, backbone: Path, **fields: Any) -> CDLTrainer:
    model = CDLForImageClassification.from_backbone(backbone, **{"head": HEAD, **fields})
    arguments = CDLTrainingArguments(
        str(place), per_device_eval_batch_size=5, report_to="none", disable_tqdm=True, use_cpu=True
    )
    return CDLTrainer(model, arguments)


def tasks_of(place: Path, backbone: Path) -> TaskStream:
    config = StreamConfig(path=str(make_data(place / "data")), classes_per_task=2)
    return TaskStream(config, AutoImageProcessor.from_pretrained(backbone))


def passes(trainer: CDLTrainer) -> list[int]:
    """Sizes of the batches that the backbone sees from now on."""
    seen: list[int] = []
    trainer.model.backbone.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def test_the_backbone_sees_every_image_once_and_the_answers_stay_the_same(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "vit")
    stream = tasks_of(tmp_path, backbone)
    trainer = trainer_with(tmp_path / "out", backbone)
    seen = passes(trainer)
    for number, task in enumerate(stream):
        trainer.learn(task)
        later = list(stream)[number + 1 :]
        seen.clear()
        found = trainer.answer(trainer.seen, later)
        assert sum(seen) == (sum(len(task.test) for task in stream) if number == 0 else 0)
        trainer._kept_features.__init__()
        again = trainer.answer(trainer.seen, later)
        assert found == again, "to the bit"
        assert found["counts"] == [len(task.test) for task in trainer.seen]


def test_all_weights_are_read_once_in_an_evaluation_however_many_tasks_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone(tmp_path / "vit")
    stream = tasks_of(tmp_path, backbone)
    trainer, read = trainer_with(tmp_path / "out", backbone), []
    for task in stream:
        trainer.learn(task)
    for module in (features, kept):
        monkeypatch.setattr(
            module, "state_of", lambda model, heads=False: read.append(model) or state_of(model, heads)
        )
    counts = []
    for number in range(1, len(stream) + 1):
        read.clear()
        trainer.answer(trainer.seen[:number], list(stream)[number:])
        counts.append(len(read))
    assert 0 < counts[-1] == counts[0], "a model's weights for the features, a backbone's for the queries"


def scaled(model: Any) -> None:
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(1.5)


def scaled_as_data(model: Any) -> None:
    next(model.backbone.parameters()).data.mul_(1.5)


def replaced_as_data(model: Any) -> None:
    weight = next(model.backbone.parameters())
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("change", [scaled, scaled_as_data, replaced_as_data, torch.nn.Module.bfloat16])
def test_other_weights_make_other_features(change: Any, tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "vit")
    stream = tasks_of(tmp_path, backbone)
    trainer = trainer_with(tmp_path / "out", backbone)
    trainer.learn(stream[0])
    trainer.answer(trainer.seen)
    seen = passes(trainer)
    change(trainer.model)
    trainer.answer(trainer.seen)
    assert sum(seen) == len(stream[0].test)


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "vit")
    stream = tasks_of(tmp_path, backbone)
    trainer = trainer_with(tmp_path / "out", backbone)
    trainer.learn(stream[0])
    pixels = torch.randn(3, 3, 16, 16)
    for unlearnt in (stream[1], [stream[1].test]):
        with pytest.raises(ValueError, match="Give tasks of a stream"):
            trainer.evaluate_seen(unlearnt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unlearnt has .*, which was learnt; give tasks that come later"):
        trainer.evaluate_seen([stream[0]])
    for foreign in ([], "folder", stream[1], pixels):
        with pytest.raises(ValueError, match="foreign takes a dataset with images"):
            trainer.evaluate_seen([], foreign)
    found = [
        trainer.evaluate_seen([stream[1]], foreign) for foreign in (stream[2].test, [{"pixel_values": pixels[0]}])
    ]
    assert all({"unlearnt_auroc", "foreign_auroc"} <= result.known.keys() for result in found)


def test_models_whose_features_learn_are_asked_again(tmp_path: Path) -> None:
    backbone = make_backbone(tmp_path / "vit")
    stream = tasks_of(tmp_path, backbone)
    trainer = trainer_with(tmp_path / "out", backbone, head={"type": "linear"}, train_backbone=True)
    trainer.learn(stream[0])
    seen = passes(trainer)
    for _ in range(2):
        trainer.answer(trainer.seen)
    assert sum(seen) == 2 * len(stream[0].test)


def test_a_loader_that_was_left_open_cuts_nothing(tmp_path: Path) -> None:
    """Accelerate remembers it for the whole process, with the size of its last batch."""
    backbone = make_backbone(tmp_path / "vit")
    stream = tasks_of(tmp_path, backbone)
    trainer = trainer_with(tmp_path / "out", backbone)
    trainer.learn(stream[0])
    before = trainer.answer(trainer.seen)
    left_open: Any = iter(trainer.accelerator.prepare(torch.utils.data.DataLoader([*range(7)], batch_size=5)))  # type: ignore[arg-type]
    assert [len(batch) for batch in (next(left_open), next(left_open))] == [5, 2]
    assert trainer.accelerator.gradient_state.end_of_dataloader
    assert trainer.answer(trainer.seen) == before
    left_open.close()
