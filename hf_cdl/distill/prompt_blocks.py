r"""Prompt and fusion blocks of the dual-forward-path teacher (distill/dual_path.py, DFPT-KD, arXiv 2506.18244).

Between two stages the prompt path maps g to F(g + P(g)). [paper] P: a 1x1 convolution down (rate r_1); cascaded
*partial* convolutions of several kernel sizes, each on a share r_2 of the channels and followed by a 1x1
convolution; a 1x1 convolution up. F: a 1x1 convolution. [ours] All else: m = max(C / r_1, 8) channels within P, p =
max(m r_2, 1) of them convolved, batch norm and ReLU after each step; P's last convolution initialised to zero and F to
the identity, so that the prompt path starts out equal to the teacher's own; the variant for tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_cdl.distill.stages import token_grid


class PartialConv(nn.Module):
    """A k x k convolution of the first p channels of a map (B, m, H, W); the others pass through unchanged."""

    def __init__(self, partial: int, kernel: int):
        super().__init__()
        self.partial = partial
        self.conv = nn.Conv2d(partial, partial, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x[:, : self.partial]), x[:, self.partial :]], dim=1)


def cascade(inner: int, partial: int, kernels: tuple[int, ...], norm: bool) -> nn.Sequential:
    """A partial and a 1x1 convolution for each kernel size in turn, with batch norm and ReLU, or with GELU only."""
    steps: list[nn.Module] = []
    for kernel in kernels:
        steps += [PartialConv(partial, kernel), nn.Conv2d(inner, inner, 1, bias=not norm)]
        steps += [nn.BatchNorm2d(inner), nn.ReLU()] if norm else [nn.GELU()]
    return nn.Sequential(*steps)


def sizes(channels: int, reduction: float, fraction: float) -> tuple[int, int]:
    """(m, p): channels within a prompt block, and how many of them its partial convolutions process."""
    inner = max(int(channels / reduction), 8)
    return inner, max(int(inner * fraction), 1)


class MapBlock(nn.Module):
    """F(g + P(g)) for maps (B, C, H, W)."""

    def __init__(self, channels: int, reduction: float, fraction: float, kernels: tuple[int, ...]):
        super().__init__()
        inner, partial = sizes(channels, reduction, fraction)
        self.down = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        self.mix = cascade(inner, partial, kernels, norm=True)
        self.up = _zero(nn.Conv2d(inner, channels, 1))
        self.fuse = nn.Conv2d(channels, channels, 1)
        nn.init.dirac_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fuse(x + self.up(self.mix(self.down(x))))


class TokenBlock(nn.Module):
    """F(g + P(g)) for tokens (B, N, D): patches on their grid; CLS and other extra tokens get the patches' mean.

    `image`, `patch`: (height, width) in pixels, which determine the grid.
    """

    def __init__(self, width: int, reduction: float, fraction: float, kernels: tuple[int, ...], extra: bool):
        super().__init__()
        inner, partial = sizes(width, reduction, fraction)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Sequential(nn.Linear(width, inner), nn.GELU())
        self.down_extra = nn.Sequential(nn.Linear(width, inner), nn.GELU()) if extra else None
        self.mix = cascade(inner, partial, kernels, norm=False)
        self.up = _zero(nn.Linear(inner, width))
        self.fuse = nn.Linear(width, width)
        nn.init.eye_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)

    def forward(self, x: torch.Tensor, image: tuple[int, int], patch: tuple[int, int]) -> torch.Tensor:
        grid = token_grid(x.shape[1], image, patch)
        count = x.shape[1] - grid[0] * grid[1]
        normed = self.norm(x)
        patches = self.down(normed[:, count:]).transpose(1, 2).unflatten(2, grid)
        patches = self.mix(patches).flatten(2).transpose(1, 2)
        if self.down_extra is not None:
            extra = self.down_extra(normed[:, :count]) + patches.mean(dim=1, keepdim=True)
            patches = torch.cat([extra, patches], dim=1)
        return self.fuse(x + self.up(patches))


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
