"""Decoding, the stateless training view and the evaluation view."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    ImageClassificationPipeline,
    MobileViTImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from hf_cdl.data.views import (
    ImageError,
    Preprocess,
    crop_box,
    decode,
    output_size,
    query_view,
    same_view,
    stateless_rng,
)


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 24, "width": 24})


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_orientation_tag_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.fromarray(noise(4, 9)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").size == (4, 9)


def test_path_bytes_and_cells_give_the_same_image(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(noise(6, 7)).save(file)
    want = np.asarray(decode(file))
    for image in (str(file), file.read_bytes(), {"bytes": None, "path": str(file)}, Image.open(file)):
        assert np.array_equal(np.asarray(decode(image)), want)
    assert np.array_equal(np.asarray(decode({"bytes": file.read_bytes(), "path": "elsewhere.png"})), want)


def test_bad_images_are_named(tmp_path):
    file = tmp_path / "cut.png"
    Image.fromarray(noise(30, 30)).save(file)
    file.write_bytes(file.read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.png", "missing.png"):
        with pytest.raises(ImageError, match=name):
            decode(str(tmp_path / name), str(tmp_path / name))
        with pytest.raises(ImageError, match=name):
            decode({"bytes": None, "path": str(tmp_path / name)})
    for empty in (None, {"bytes": None, "path": None}):
        with pytest.raises(ImageError, match="row 3.*empty cell"):
            decode(empty, "row 3")


def test_stateless_rng_depends_on_its_four_numbers_only():
    keys = [(s, t, i, v) for s in (0, 1, -1) for t in (0, 1) for i in (0, 1, 10**12) for v in (0, 1)]
    draws = {key: stateless_rng(*key).random(3).tolist() for key in keys}
    np.random.default_rng(5).shuffle(keys)
    assert all(stateless_rng(*key).random(3).tolist() == draws[key] for key in keys)
    assert len({tuple(draw) for draw in draws.values()}) == len(keys)


def test_views_of_neighbouring_samples_are_independent():
    first = np.array([stateless_rng(0, 0, i, 0).random(2) for i in range(4000)])
    assert abs(first.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]) < 0.06  # three standard errors are 0.047
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.06


@pytest.mark.parametrize("size", [(64, 48), (500, 20), (1, 1), (3, 200)])
def test_crop_box_lies_inside_the_image_and_in_range(size):
    width, height = size
    for i in range(300):
        left, top, right, bottom = crop_box(width, height, (0.2, 0.9), (0.75, 4 / 3), stateless_rng(0, 0, i, 0))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        if size == (64, 48):  # sides are rounded to whole pixels, at most half a pixel each
            w, h = right - left, bottom - top
            assert (w - 0.5) * (h - 0.5) <= 0.9 * width * height and (w + 0.5) * (h + 0.5) >= 0.2 * width * height
            assert (w - 0.5) / (h + 0.5) <= 4 / 3 and (w + 0.5) / (h - 0.5) >= 0.75


def test_crop_area_is_uniform_and_aspect_log_uniform():
    """In a square of 1000 pixels no draw with an area up to 0.5 is rejected, so the draws keep their distribution."""
    boxes = [crop_box(1000, 1000, (0.1, 0.5), (0.75, 4 / 3), stateless_rng(1, 0, i, 0)) for i in range(4000)]
    sides = np.array([(right - left, bottom - top) for left, top, right, bottom in boxes])
    area, aspect = sides.prod(1) / 1e6, np.log(sides[:, 0] / sides[:, 1])
    assert abs(area.mean() - 0.3) < 0.006  # standard error 0.4 / sqrt(12 * 4000) = 0.0018
    assert abs(area.std() - 0.4 / math.sqrt(12)) < 0.004
    assert abs(aspect.mean()) < 0.01
    assert abs(aspect.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.006


@pytest.mark.parametrize("flip", [0.0, 0.25, 1.0])
def test_flip_probability(flip, processor):
    ramp = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 10, (24, 1))).convert("RGB")
    preprocess = Preprocess(processor, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=flip)
    pixels = preprocess.training([ramp] * 1000, [(0, i, 0) for i in range(1000)])
    flipped = (pixels[:, 0, 0, 0] > pixels[:, 0, 0, -1]).float().mean().item()
    assert abs(flipped - flip) < 0.05  # standard error at most 0.014
    assert torch.equal(pixels[0].flip(-1), pixels[0]) is False


@pytest.mark.parametrize("name", ["grey.png", "alpha.png", "photo.jpg", "wide.png"])
@pytest.mark.parametrize("crop", [False, True])
def test_evaluation_view_is_what_the_pipeline_feeds_its_model(name, crop, tmp_path, processor):
    file = tmp_path / name
    shape = {"grey.png": (20, 31, 1), "alpha.png": (40, 33, 4), "photo.jpg": (50, 60, 3), "wide.png": (9, 90, 3)}[name]
    Image.fromarray(noise(*shape)).save(file)
    if crop:
        processor = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24})
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=24, patch_size=8
    )
    pipe = ImageClassificationPipeline(model=ViTForImageClassification(config), image_processor=processor)
    want = pipe.preprocess(str(file))["pixel_values"]
    assert torch.equal(Preprocess(processor).evaluation([decode(file)]), want)


def test_training_view_of_the_whole_image_is_the_evaluation_view(processor):
    image = Image.fromarray(noise(24, 24))
    preprocess = Preprocess(processor, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    assert torch.equal(preprocess.training([image], [(0, 0, 0)]), preprocess.evaluation([image]))


def test_teacher_and_student_see_the_same_crop():
    """Processors of two sizes: the crop is at the same place in the image, as two colour ramps show."""
    y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
    image = Image.fromarray(np.stack([x, y, x], axis=-1))
    kept = {"do_normalize": False, "do_rescale": False}
    views = []
    for size in (64, 32):
        processor = ViTImageProcessor(size={"height": size, "width": size}, **kept)
        views.append(Preprocess(processor, seed=3).training([image] * 20, [(1, i, 2) for i in range(20)]).float())
    halved = torch.nn.functional.avg_pool2d(views[0], 2)
    assert (halved - views[1]).abs().max() < 4  # rounding and the two filters; another crop differs by tens
    assert (halved - views[1].roll(1, 0)).abs().max() > 20


def test_training_views_are_those_of_all_earlier_versions():
    """Otherwise stored teacher outputs or unfinished runs would meet different images after an update."""
    processor = ViTImageProcessor(size={"height": 20, "width": 24}, do_rescale=False, do_normalize=False)
    keys = [(task, sample, view) for task in (0, 3) for sample in (0, 12345) for view in (0, 7)]
    pixels = Preprocess(processor, seed=5).training([Image.fromarray(noise(50, 70))] * 8, keys)
    assert pixels.dtype == torch.uint8 and pixels.shape == (8, 3, 20, 24)
    found = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    assert found == "c08b74697aba1635bbbc3baa426af6b4a88538429068395639f4db54f5045cc1"


BASE = {"size": {"height": 24, "width": 24}}
OTHERS = {
    "size": {"height": 24, "width": 20},
    "image_mean": [0.5, 0.4, 0.5],
    "image_std": [0.5, 0.4, 0.5],
    "do_normalize": False,
    "do_rescale": False,
    "rescale_factor": 1 / 128,
    "resample": 3,
}


def test_processors_with_one_view(tmp_path):
    processor = ViTImageProcessor(**BASE)
    processor.save_pretrained(tmp_path)
    assert same_view(processor, ViTImageProcessor.from_pretrained(tmp_path))
    assert same_view(processor, ViTImageProcessor(**BASE, image_mean=[0.5] * 3))
    assert query_view(processor, ViTImageProcessor(**BASE)) is None


@pytest.mark.parametrize("field", OTHERS)
def test_processors_with_two_views(field):
    image, first = [Image.fromarray(noise(40, 30))], ViTImageProcessor(**BASE)
    second = ViTImageProcessor(**{**BASE, field: OTHERS[field]})
    pixels = [Preprocess(processor).evaluation(image).float() for processor in (first, second)]
    assert pixels[0].shape != pixels[1].shape or not torch.equal(*pixels)
    assert not same_view(first, second) and query_view(first, second) is not None


def test_processors_of_two_classes_have_two_views():
    """Even with equal fields they may process images differently."""
    fields = {**BASE, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert not same_view(ViTImageProcessor(**fields), CLIPImageProcessor(**fields, do_center_crop=False))


def test_output_size():
    assert output_size(ViTImageProcessor(size={"height": 20, "width": 30})) == (20, 30)
    assert output_size(CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 22})) == (
        24,
        22,
    )
    with pytest.raises(ValueError, match="one fixed height and width"):
        output_size(CLIPImageProcessor(size={"shortest_edge": 30}, do_center_crop=False))


@pytest.mark.parametrize("edge", [24, 384])
def test_the_square_of_a_convnext_processor(edge):
    """Used by ResNet, RegNet and ConvNeXt: below 384 px it resizes by crop_pct and crops, else it squeezes."""
    processor = ConvNextImageProcessorPil(size={"shortest_edge": edge}, crop_pct=0.875)
    preprocess = Preprocess(processor)
    image = Image.fromarray(noise(50, 70))
    assert preprocess.size == (edge, edge)
    assert (
        preprocess.evaluation([image]).shape == preprocess.training([image], [(0, 0, 0)]).shape == (1, 3, edge, edge)
    )
    assert not same_view(processor, ConvNextImageProcessorPil(size={"shortest_edge": edge}, crop_pct=0.9))


# ---- padded crops ----


def padded(size, padding, flip=0.0, image_size=20, resample=2):
    """Views of one image, and the image with a black border."""
    raw = {"do_rescale": False, "do_normalize": False, "resample": resample}
    processor = ViTImageProcessor(size={"height": size, "width": size}, **raw)
    image = noise(image_size, image_size)
    image[image == 0] = 1  # black is what was added
    preprocess = Preprocess(processor, seed=1, flip=flip, crop_padding=padding)
    views = preprocess.training([Image.fromarray(image)] * 500, [(0, i, 0) for i in range(500)])
    around = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return views, torch.from_numpy(around).permute(2, 0, 1)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_a_padded_crop_is_a_window_of_the_padded_image_and_every_window_comes(resample):
    views, around = padded(20, 2, resample=resample)
    windows = [around[:, top : top + 20, left : left + 20] for top in range(5) for left in range(5)]
    found = [[torch.equal(view, window) for window in windows] for view in views]
    assert all(sum(row) == 1 for row in found)
    counts = np.sum(found, axis=0)
    assert counts.min() > 5 and counts.max() < 45  # 20 on average


def test_padded_crops_are_flipped_and_nothing_is_cut_without_padding():
    views, around = padded(20, 0, flip=0.5)
    straight = [torch.equal(view, around) for view in views]
    flipped = [torch.equal(view, around.flip(2)) for view in views]
    assert all(a != b for a, b in zip(straight, flipped, strict=True)) and 180 < sum(flipped) < 320


def test_padded_crops_are_the_same_for_teacher_and_student_of_two_sizes():
    small, large = padded(20, 4, flip=0.5)[0].float(), padded(40, 4, flip=0.5, resample=0)[0].float()
    assert torch.equal(large[:, :, ::2, ::2], small)


SQUARE: dict[str, Any] = {"size": {"height": 16, "width": 16}}
PORTRAIT: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            MobileViTImageProcessorPil(**PORTRAIT, do_flip_channel_order=True),
            MobileViTImageProcessorPil(**PORTRAIT, do_flip_channel_order=False),
        ),
        (
            EfficientNetImageProcessorPil(**SQUARE, rescale_offset=True),
            EfficientNetImageProcessorPil(**SQUARE, rescale_offset=False),
        ),
        (
            EfficientNetImageProcessorPil(**SQUARE, include_top=True),
            EfficientNetImageProcessorPil(**SQUARE, include_top=False),
        ),
        (ViTImageProcessorPil(**SQUARE), EfficientNetImageProcessorPil(**SQUARE, include_top=True)),
    ],
)
def test_processors_that_treat_colours_otherwise_share_no_view(first: Any, second: Any) -> None:
    assert not same_view(first, second) and same_view(first, first)
    with pytest.raises(ValueError, match=r"Set teacher\.query to self"):
        query_view(first, second)


class _OwnContrast(ViTImageProcessor):
    """Not what a level is, but where it lies between the image's own extremes."""

    def __call__(self, images, **options):
        made = super().__call__(images, **options)
        pixels = made["pixel_values"]
        made["pixel_values"] = pixels / pixels.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
        return made


@pytest.mark.parametrize(
    "fields", [{}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0.3}], ids=str
)
def test_levels_that_are_looked_up_are_those_that_the_processor_computes(fields):
    processor = ViTImageProcessor(size={"height": 24, "width": 40}, image_mean=[0.1, 0.5, 0.7], **fields)
    view = Preprocess(processor, seed=3)
    images = [Image.fromarray(noise(20 + number, 30)) for number in range(5)]
    keys = [(0, number, 1) for number in range(5)]
    assert view._levels is not None
    looked_up = view.training(images, keys)
    view._levels = None
    computed = view.training(images, keys)
    assert torch.equal(looked_up, computed)
    assert (looked_up.dtype, looked_up.stride()) == (computed.dtype, computed.stride())


def test_a_processor_that_sees_more_than_levels_computes_them():
    assert Preprocess(_OwnContrast(size={"height": 24, "width": 40}))._levels is None
