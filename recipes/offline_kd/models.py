"""The small convolutional networks of the CIFAR-100 distillation tables, for images of 32 px.

Their stems keep the resolution, which transformers' own ResNet and MobileNetV2 cannot. One config and one model class;
`family` says which network, `widths` the channels of the stem and of every stage, `depths` the blocks of every stage:

| family | network | from |
|---|---|---|
| resnet | ResNet of basic blocks (1x1 convolution and batch norm where a shortcut changes its shape) | He et al. 2016, arXiv 1512.03385, Sec. 4.2 |
| resnet_bottleneck | ResNet of bottleneck blocks, which widen four times | He et al. 2016, arXiv 1512.03385, Sec. 4.1 |
| wide_resnet | Wide ResNet: pre-activation basic blocks | Zagoruyko, Komodakis 2016, arXiv 1605.07146, Sec. 2 |
| vgg | VGG with batch norm and one linear layer; pooled after each of the first three stages | Simonyan, Zisserman 2015, arXiv 1409.1556 |
| mobilenet_v2 | MobileNetV2: inverted residuals | Sandler et al. 2018, arXiv 1801.04381, Sec. 3 |
| shufflenet_v2 | ShuffleNetV2: channel split and shuffle | Ma et al. 2018, arXiv 1807.11164, Sec. 3.2 |

Sizes and strides are those of the tables' common protocol (Tian et al. 2020, arXiv 1910.10699). The modules are
`stem`, `stages` (a ModuleList: the places for anything that works stage by stage), `neck`, `classifier`.

A recipe names this file in `plugins`, which makes the Auto classes know the model. A saved model has a copy of this file
beside it: elsewhere it loads with `trust_remote_code=True`, or without once this file was imported.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple


class CifarConfig(PreTrainedConfig):
    """Configuration of `CifarForImageClassification`: see the table above."""

    model_type = "cifar_cnn"

    family: str = "resnet"
    depths: list[int] = field(default_factory=lambda: [3, 3, 3])
    widths: list[int] = field(default_factory=lambda: [16, 16, 32, 64])


def conv(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def conv_bn(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs)]


def conv_bn_relu(*shape: int) -> list[nn.Module]:
    return [*conv_bn(*shape), nn.ReLU()]


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), or without the relu."""

    def __init__(self, body: list[nn.Module], shortcut: list[nn.Module], activation: nn.Module):
        super().__init__()
        self.body, self.shortcut, self.activation = nn.Sequential(*body), nn.Sequential(*shortcut), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def basic(inputs: int, width: int, stride: int) -> nn.Module:
    body = [*conv_bn_relu(inputs, width, 3, stride), *conv_bn(width, width, 3)]
    return Residual(body, [] if (inputs, stride) == (width, 1) else conv_bn(inputs, width, 1, stride), nn.ReLU())


def bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    inner = width // 4
    body = [*conv_bn_relu(inputs, inner), *conv_bn_relu(inner, inner, 3, stride), *conv_bn(inner, width)]
    return Residual(body, [] if (inputs, stride) == (width, 1) else conv_bn(inputs, width, 1, stride), nn.ReLU())


class PreActivation(nn.Module):
    """Wide ResNet's block; where the shape changes, the shortcut starts after the first activation."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.start = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(*conv_bn_relu(inputs, width, 3, stride), conv(width, width, 3))
        self.shortcut = None if inputs == width else conv(inputs, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        started = self.start(x)
        return self.body(started) + (x if self.shortcut is None else self.shortcut(started))


def vgg_layer(inputs: int, width: int, stride: int) -> nn.Module:
    """A VGG layer; with `stride` 2 it starts with the pooling that ends the previous stage."""
    pool: list[nn.Module] = [nn.MaxPool2d(2)] if stride == 2 else []
    return nn.Sequential(*pool, nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


def inverted_residual(inputs: int, width: int, stride: int, expansion: int = 6) -> nn.Module:
    inner = inputs * expansion
    body = [
        *conv_bn_relu(inputs, inner),
        *conv_bn_relu(inner, inner, 3, stride, inner),
        *conv_bn(inner, width),
    ]
    return Residual(body, [], nn.Identity()) if (inputs, stride) == (width, 1) else nn.Sequential(*body)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass, or with `stride` 2 all take both branches; then a shuffle."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.split, inner = stride == 1, width // 2
        enters = inner if self.split else inputs
        self.right = nn.Sequential(
            *conv_bn_relu(enters, inner), *conv_bn(inner, inner, 3, stride, inner), *conv_bn_relu(inner, inner)
        )
        left = [] if self.split else [*conv_bn(inputs, inputs, 3, stride, inputs), *conv_bn_relu(inputs, inner)]
        self.left = nn.Sequential(*left)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passing, entering = x.chunk(2, dim=1) if self.split else (x, x)
        both = torch.stack([self.left(passing), self.right(entering)], dim=2)
        return both.flatten(1, 2)


# Family -> (block(inputs, width, stride), strides of the stages).
FAMILIES: dict[str, tuple[Callable[[int, int, int], nn.Module], tuple[int, ...]]] = {
    "resnet": (basic, (1, 2, 2)),
    "resnet_bottleneck": (bottleneck, (1, 2, 2, 2)),
    "wide_resnet": (PreActivation, (1, 2, 2)),
    "vgg": (vgg_layer, (1, 2, 2, 2, 1)),
    "mobilenet_v2": (inverted_residual, (1, 1, 2, 2, 1, 2, 1)),
    "shufflenet_v2": (ShuffleUnit, (2, 2, 2)),
}


class CifarForImageClassification(PreTrainedModel):
    """stem -> stages -> neck -> mean over all positions -> classifier.

    Raises ValueError for an unknown family, or widths and depths that do not fit its number of stages.
    """

    config_class = CifarConfig
    config: CifarConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["Residual", "PreActivation", "ShuffleUnit"]

    def __init__(self, config: CifarConfig):
        super().__init__(config)
        family, (stem, *widths) = config.family, config.widths
        block, strides = FAMILIES.get(family, (basic, ()))
        if not len(widths) == len(config.depths) == len(strides):
            raise ValueError(
                f"Family '{family}' with depths {config.depths} and widths {config.widths}; allowed: "
                + ", ".join(f"{name} of {len(steps)} stages" for name, (_, steps) in FAMILIES.items())
                + "; one depth for each stage, one width more (the stem's)."
            )
        self.stages = nn.ModuleList()
        inputs = 3 if family == "vgg" else stem
        for number, (width, depth, stride) in enumerate(zip(widths, config.depths, strides, strict=True)):
            blocks = []
            for step in range(depth):
                more = {"expansion": 1} if family == "mobilenet_v2" and number == 0 else {}
                blocks.append(block(inputs, width, stride if step == 0 else 1, **more))
                inputs = width
            self.stages.append(nn.Sequential(*blocks))
        self.stem, self.neck = nn.Identity(), nn.Identity()
        if family == "wide_resnet":  # its blocks contain the activations
            self.stem, self.neck = conv(3, stem, 3), nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        elif family == "shufflenet_v2":
            self.stem = nn.Sequential(*conv_bn_relu(3, stem, 1))
        elif family != "vgg":
            self.stem = nn.Sequential(*conv_bn_relu(3, stem, 3, 2 if family == "mobilenet_v2" else 1))
        last = {"mobilenet_v2": 1280, "shufflenet_v2": 1024}.get(family)
        if last is not None:
            self.neck, inputs = nn.Sequential(*conv_bn_relu(inputs, last)), last
        self.classifier = nn.Linear(inputs, len(config.id2label or ()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He et al.'s initialisation by fan-out for convolutions; PyTorch's own for the classifier."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits of images (B, 3, 32, 32); hidden states are the outputs of the stem and of every stage."""
        states = [self.stem(pixel_values)]
        for stage in self.stages:
            states.append(stage(states[-1]))
        logits = self.classifier(self.neck(states[-1]).mean(dim=(2, 3)))
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


AutoConfig.register(CifarConfig.model_type, CifarConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarConfig, CifarForImageClassification, exist_ok=True)
CifarConfig.register_for_auto_class()
CifarForImageClassification.register_for_auto_class("AutoModelForImageClassification")
