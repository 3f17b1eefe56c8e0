"""hf-cdl shrink: make a smaller backbone from a pre-trained one, at an image size of your choice."""

from __future__ import annotations

import argparse

import transformers  # as a module: its names print messages on first access, which must come after quiet()

from hf_cdl.backbones.families import check_image_size, family, layers, resize
from hf_cdl.backbones.loading import load_backbone
from hf_cdl.commands.console import exit_code_of
from hf_cdl.commands.parsers import read
from hf_cdl.counted import counted
from hf_cdl.escape import visible
from hf_cdl.runs.files import check_new, fill_folder


def main(arguments: list[str]) -> int:
    options, _ = read("shrink", arguments)
    return exit_code_of(lambda: shrink(options))


def shrink(options: argparse.Namespace) -> None:
    """Write the smaller backbone. Raises ValueError if it cannot be made, RunError if the folder cannot be written."""
    check_new(options.folder)
    backbone = load_backbone(options.backbone, options.revision)
    depth = len(layers(backbone))
    count = depth if options.layers is None else options.layers
    if not 1 <= count <= depth:
        raise ValueError(f"--layers is {count}, but {options.backbone} has {depth}.")
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size is {options.size}, but an image must have at least one pixel a side.")
    source, revision = (options.processor, None) if options.processor else (options.backbone, options.revision)
    found = transformers.AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    processor = found
    if options.size is not None:
        look = {"image_mean": found.image_mean, "image_std": found.image_std, "resample": found.resample}
        processor = transformers.ViTImageProcessor(size={"height": options.size, "width": options.size}, **look)
        if family(backbone.config).resizes:
            resize(backbone, options.size)
        check_image_size(backbone.config, (options.size, options.size))
    del layers(backbone)[count:]
    fields = {**backbone.config.to_dict(), "num_hidden_layers": count}
    stages = ("stage_names", "out_features", "out_indices")  # these describe the full depth
    backbone.config = type(backbone.config).from_dict({key: v for key, v in fields.items() if key not in stages})
    fill_folder(options.folder, lambda path: (backbone.save_pretrained(path), processor.save_pretrained(path)))
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    made, source = visible(options.folder), visible(options.backbone)
    print(f"{made}: the first {count} of {counted(depth, 'layer')} of {source}, {millions:.1f} M parameters")
