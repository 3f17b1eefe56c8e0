"""hf-cdl shrink: the first layers of a real backbone file, with its final norm, at another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import little_room, make_backbone
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model, ViTImageProcessor

from hf_cdl.backbones.loading import load_backbone
from hf_cdl.commands.shrink import main as shrink


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    }
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return folder


def test_the_first_layers_and_the_final_norm(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shrink([str(large), str(tmp_path / "small"), "--layers", "2", "--size", "21"]) == 0
    said = capsys.readouterr().out
    assert said == f"{tmp_path / 'small'}: the first 2 of 4 layers of {large}, 0.0 M parameters\n"
    whole, small = AutoModel.from_pretrained(large).eval(), load_backbone(str(tmp_path / "small")).eval()
    pixels = torch.randn(2, 3, 21, 21)
    with torch.no_grad():
        between = whole(pixels, output_hidden_states=True).hidden_states[2]
        found = small(pixels)
    torch.testing.assert_close(found.last_hidden_state, whole.layernorm(between))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "small")
    assert dict(processor.size) == {"height": 21, "width": 21} and list(processor.image_mean) == [0.1, 0.2, 0.3]


def test_a_vit_at_another_size_has_its_position_embeddings_interpolated(tmp_path: Path) -> None:
    """Its outputs are those of transformers' own interpolation, at a smaller and at a larger size."""
    large = make_backbone(tmp_path / "large", size=32)
    whole = AutoModel.from_pretrained(large, add_pooling_layer=False).eval()
    for size in (16, 32, 48):
        assert shrink([str(large), str(tmp_path / str(size)), "--size", str(size)]) == 0
        other = load_backbone(str(tmp_path / str(size))).eval()
        pixels = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = whole(pixels, interpolate_pos_encoding=True).last_hidden_state
            torch.testing.assert_close(other(pixels).last_hidden_state, expected)
        assert AutoImageProcessor.from_pretrained(tmp_path / str(size)).size["height"] == size
    assert shrink([str(large), str(tmp_path / "20"), "--size", "20"]) == 2
    assert not (tmp_path / "20").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layers", "5"), "--layers is 5, but"),
        (("--size", "20"), "20"),
        (("--processor", "nowhere/at/all"), "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    large: Path, tmp_path: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shrink([str(large), str(tmp_path / "small"), *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "small").exists()


def test_a_folder_with_something_in_it_is_left_alone(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in large.iterdir()}
    assert shrink([str(large), str(large), "--layers", "1"]) == 2
    assert f"{large} is not empty; choose another folder." in capsys.readouterr().err
    assert {file: file.read_bytes() for file in large.iterdir()} == before


def test_a_full_disk_leaves_nothing_behind(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with little_room(4_000):
        assert shrink([str(large), str(tmp_path / "small"), "--layers", "1"]) == 2
    said = capsys.readouterr().err
    assert f"error: Could not write into {tmp_path / 'small'}: " in said and "Make room" in said
    assert not (tmp_path / "small").exists()
    assert shrink([str(large), str(tmp_path / "small"), "--layers", "1"]) == 0
    assert not [*(tmp_path / "small").glob(".*")]
