"""Standardisation of features before a head, with fixed statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import initialization as init

from hf_cdl.checked import check_finite, one_line
from hf_cdl.counted import counted


class Standardise(nn.Module):
    """Features (B, D) -> (x - mean) / std, with statistics of `count` features, fixed once a head uses them.

    `given`: a file of such statistics. Without statistics (`count` 0) the features are unchanged. A dimension that
    hardly varies is divided by a hundredth of the mean deviation, so that it does not blow up in later tasks.
    """

    def __init__(self, hidden_size: int, given: Path | None = None):
        super().__init__()
        self.given = given
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.count: torch.Tensor
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("std", torch.ones(hidden_size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Reset to the given statistics or to none, with transformers' functions that skip loaded buffers.

        Raises ValueError if the file is missing, does not fit or holds invalid numbers.
        """
        if all(getattr(value, "_is_hf_initialized", False) for value in (self.mean, self.std, self.count)):
            return  # loaded: the file may be gone
        if self.given is None:
            init.zeros_(self.mean)
            init.ones_(self.std)
            init.zeros_(self.count)
            return
        try:
            found = load_file(self.given) if self.given.is_file() else {}
        except SafetensorError as error:
            raise ValueError(f"The file of statistics '{self.given}' cannot be read: {one_line(error)}") from error
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if any(shapes.get(name) != self.mean.shape for name in ("mean", "std")):
            raise ValueError(
                f"The file of statistics '{self.given}' has {shapes or 'no tensors, or is not there'}, but a head on "
                f"this backbone needs mean and std of shape {tuple(self.mean.shape)}. Give such a file, or first_task."
            )
        check_finite({name: found[name] for name in ("mean", "std")}, f"The file of statistics '{self.given}'")
        if (found["std"] < 0).any() or not (found["std"] > 0).any():
            raise ValueError(
                f"The file of statistics '{self.given}' has a std that is not a deviation: below 0, or all 0."
            )
        init.copy_(self.mean, found["mean"])
        init.copy_(self.std, found["std"])
        init.ones_(self.count)

    @torch.no_grad()
    def measure(self, features: torch.Tensor) -> None:
        """Add features (B, D) to the statistics (Chan's update of mean and squared deviations).

        Raises FloatingPointError for features that are NaN or infinite.
        """
        check_features(features)
        features, before, new = features.float(), int(self.count), len(features)
        mean, shift = features.mean(dim=0), features.mean(dim=0) - self.mean.float()
        squares = (features - mean).square().sum(dim=0)
        if before:
            squares += self.std.float().square() * before + shift.square() * before * new / (before + new)
        self.mean.add_(shift * new / (before + new))
        self.std.copy_((squares / (before + new)).sqrt())
        self.count.add_(new)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / torch.maximum(self.std, 0.01 * self.std.mean() + 1e-6)


def check_features(features: torch.Tensor) -> None:
    """Raise FloatingPointError for features (B, D) that are NaN or infinite, since no head can be fitted to them."""
    if (wrong := int((~torch.isfinite(features)).any(dim=-1).sum())) > 0:
        raise FloatingPointError(
            f"The backbone's features of {wrong} of {counted(len(features), 'image')} are NaN or infinite, so no head "
            "can be fitted to them. The weights are numbers, so they are too large for these pixels: check the image "
            "processor, or choose another backbone or precision (no fp16)."
        )
