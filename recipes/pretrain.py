"""Pre-trains a tiny ViT backbone on the base classes of an image data set, and measures what its features are worth.

    python recipes/pretrain.py --data icons-full --stream recipes/quickstart/icons --output recipes/quickstart/teacher

The folder written holds the backbone without its head, the image processor and a card with every number of this run.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from hf_cdl_command import stopping

if __name__ == "__main__":
    stopping.listen(resumes=False)  # before imports that take seconds

import torch
from datasets import Image, load_dataset
from torch.nn.functional import normalize
from transformers import AutoModel, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.trainer_callback import TrainerCallback

from hf_cdl.data.views import Preprocess, decode
from hf_cdl.escape import visible, visible_lines
from hf_cdl.runs.files import RunError, saving

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---
# A tiny ViT for icons ({parameters:,} parameters)

A Vision Transformer of width {a.hidden_size} with {a.layers} layers and {a.heads} heads ({a.image_size} px, patch {a.patch_size}), pre-trained by [pretrain.py](../../pretrain.py) on
{images:,} images of {classes} icon concepts. It has seen no class of [the stream](../icons/README.md). It knows icons and nothing else: use it for
tests and demonstrations of continual learning.
```python
from transformers import AutoImageProcessor, AutoModel

folder = "recipes/quickstart/{a.output.name}"
backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False)  # float32, from weights stored as float16
processor = AutoImageProcessor.from_pretrained(folder)
```
Made by (`{a.data.name}` is the full icon data, which is not in this repository; [where it is from](../icons/README.md)):
```
{command}
```
| measured in this run (seed {a.seed}, {seconds:.0f} s of training on a shared machine, threads: {a.threads}) | % |
|---|---|
| base-validation accuracy, {classes} classes, with the head it was trained with (not shipped) | {validation:.1f} |
| base-test accuracy, {classes} classes, with that head | {test:.1f} |
| nearest class mean on all {ncm[classes]} stream classes jointly, validation | {ncm[validation]:.1f} |
| nearest class mean on all {ncm[classes]} stream classes jointly, test | {ncm[test]:.1f} |

Validation and test images are of icon families that no training image is from. Nearest class mean: the files of this folder, CLS token after the final
norm, cosine to the mean of a class's training images.
"""  # noqa: E501


class Images(torch.utils.data.Dataset):
    """A Parquet file, decoded once. In training, a sample's augmented view depends on the current epoch."""

    def __init__(self, file: Path, preprocess: Preprocess, training: bool = False):
        rows = load_dataset("parquet", data_files=str(file), split="train").cast_column("image", Image(decode=False))
        self.names, self.labels = rows.features["label"].names, torch.tensor(rows["label"])
        self.images = [decode(image, f"{file.name}, row {i}") for i, image in enumerate(rows["image"])]
        self.preprocess, self.training, self.epoch = preprocess, training, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        image, p = self.images[i], self.preprocess
        pixels = p.training([image], [(0, i, self.epoch)]) if self.training else p.evaluation([image])
        return {"pixel_values": pixels[0], "labels": self.labels[i]}


class CountEpochs(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        kwargs["train_dataloader"].dataset.epoch = round(state.epoch)


def initialise(model: ViTForImageClassification) -> None:
    """Initialise linear weights with std fan_in^-0.5: HF's 0.02 suits width 768 and learns slowly at tiny widths."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.5)
    torch.nn.init.normal_(model.vit.embeddings.cls_token, std=0.5)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@torch.no_grad()
def nearest_class_mean(folder: Path, stream: Path, preprocess: Preprocess) -> dict[str, float | int]:
    """Accuracy in percent per split, over all classes jointly, and the number of classes."""
    backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    features, data = {}, {}
    for split in ("train", "validation", "test"):
        data[split] = Images(stream / f"{split}.parquet", preprocess)
        views = [preprocess.evaluation(data[split].images[i : i + 256]) for i in range(0, len(data[split]), 256)]
        features[split] = normalize(torch.cat([backbone(view).last_hidden_state[:, 0] for view in views]), dim=-1)
    classes = len(data["train"].names)
    means = torch.stack([features["train"][data["train"].labels == c].mean(0) for c in range(classes)])
    guess = {split: (x @ normalize(means, dim=-1).T).argmax(-1) for split, x in features.items()}
    return {"classes": classes, **{s: 100 * float((guess[s] == data[s].labels).float().mean()) for s in guess}}


def options(arguments: list[str]) -> Namespace:
    """Parse the arguments; exits with code 2 on wrong arguments and missing files."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with base-{train,validation,test}.parquet")
    parser.add_argument("--stream", type=Path, required=True, help="folder with {train,validation,test}.parquet")
    parser.add_argument("--output", type=Path, required=True)
    sizes = {"hidden-size": 144, "layers": 6, "heads": 3, "image-size": 48, "patch-size": 8}
    for name, default in (sizes | {"epochs": 12, "batch-size": 64, "threads": 2, "seed": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    a = parser.parse_args(arguments)
    needed = [a.data / f"base-{split}.parquet" for split in ("train", "validation", "test")]
    needed += [a.stream / f"{split}.parquet" for split in ("train", "validation", "test")]
    if missing := [str(file) for file in needed if not file.is_file()]:
        parser.error(f"there is no {visible(missing[0])}; --data and --stream must hold the files that --help names")
    return a


def main(arguments: list[str]) -> int:
    a = options(arguments)
    try:
        pretrain(a)
    except (OSError, ValueError, RunError) as error:
        print(f"error: {visible_lines(error)}", file=sys.stderr)
        return 2
    return 0


def pretrain(a: Namespace) -> None:
    """Train and write the backbone. Raises ValueError for unsuitable data or sizes, RunError for a full disk."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)

    # White becomes 0: with the usual mean of 0.5, the background outweighs the ink and learning is slower.
    size = {"height": a.image_size, "width": a.image_size}
    processor = ViTImageProcessorPil(size=size, image_mean=[1.0] * 3, image_std=[0.4] * 3)
    preprocess = Preprocess(processor, a.seed, crop_scale=(0.5, 1.0), flip=0.0)  # base classes know left from right
    train = Images(a.data / "base-train.parquet", preprocess, training=True)
    validation, test = (Images(a.data / f"base-{split}.parquet", preprocess) for split in ("validation", "test"))
    shape = {"hidden_size": a.hidden_size, "num_hidden_layers": a.layers, "num_attention_heads": a.heads}
    shape |= {"intermediate_size": 4 * a.hidden_size, "image_size": a.image_size, "patch_size": a.patch_size}
    model = ViTForImageClassification(ViTConfig(**shape, id2label=dict(enumerate(train.names))))
    initialise(model)
    arguments = training_arguments(a, len(train))
    trainer = Trainer(model, arguments, train_dataset=train, compute_metrics=accuracy, callbacks=[CountEpochs()])
    start = time.perf_counter()
    trainer.train()
    numbers: dict[str, Any] = {"seconds": time.perf_counter() - start}
    numbers |= {"images": len(train), "classes": len(train.names)}
    for split, data in {"validation": validation, "test": test}.items():
        numbers[split] = trainer.evaluate(data)["eval_accuracy"]
    with saving(f"write the backbone into {a.output}"):
        save(a, model, processor, preprocess, numbers)
    print(numbers)


def training_arguments(a: Namespace, images: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(a.output),
        num_train_epochs=a.epochs,
        per_device_train_batch_size=a.batch_size,
        learning_rate=a.learning_rate,
        weight_decay=0.05,
        label_smoothing_factor=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=images // a.batch_size,
        bf16=a.bf16,
        use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU requires use_cpu
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="epoch",
        disable_tqdm=True,
        seed=a.seed,
    )


def save(
    a: Namespace,
    model: ViTForImageClassification,
    processor: ViTImageProcessorPil,
    preprocess: Preprocess,
    numbers: dict[str, Any],
) -> None:
    """Write backbone, processor and card, and add the quality of its features to `numbers`."""
    backbone = model.vit.half()  # a smaller file; config.json says float32, so it loads as a float32 model
    backbone.config.num_labels = 2  # HF's default, so that no class list is written
    backbone.save_pretrained(a.output)
    saved = json.loads((a.output / "config.json").read_text()) | {"dtype": "float32"}
    (a.output / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    processor.save_pretrained(a.output)
    numbers |= {"ncm": nearest_class_mean(a.output, a.stream, preprocess), "parameters": backbone.num_parameters()}
    command = shlex.join(["python", *(a.data.name if word == str(a.data) else word for word in sys.argv)])
    (a.output / "README.md").write_text(CARD.format(a=a, command=command, **numbers))


if __name__ == "__main__":
    stopping.end_with(lambda: main(sys.argv[1:]))
