# SPDX-License-Identifier: Apache-2.0
"""A split of a data set of images: its training or test records, in memory."""

import math

import torch
import torch.utils.data
from torch import Tensor

from dpquant.data.normalisation import PLAIN, Constant

FULL_SCALE = 255
FULL_SCALE_16 = 65_535  # of images from files, whatever their depth: a record may not decide the type of the others


class Split(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The training or the test records of a data set: map-style, in memory, normalised when read.

    An item is (image, target): float32 [C, H, W] and int64 scalar. `batch` returns many at once, bitwise equal to the
    stacked items.

    Args:
      pixels: Shape (N, C, H, W), uint8 or uint16.
      targets: Shape (N,), int64, in [0, num_classes).
      readable: Shape (N,), bool; a False record reads as NaN. None: all are readable.
      full_scale: The pixel value that stands for white.
    Attributes: normalisation, of pixels; `load` sets it.
    Privacy: per example, reads no other record.
    """

    in_memory = True  # reading a batch takes no time worth a thread

    def __init__(
        self, pixels: Tensor, targets: Tensor, *, readable: Tensor | None = None, full_scale: int = FULL_SCALE
    ) -> None:
        self.pixels = pixels
        self.targets = targets
        self.readable = torch.ones(len(targets), dtype=torch.bool) if readable is None else readable
        self.full_scale = full_scale
        self.normalisation = PLAIN

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(torch.tensor([index]))
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the items of many records; torch's DataLoader calls this to fetch a batch."""
        inputs, targets = self.batch(torch.tensor(indices, dtype=torch.int64))
        return list(zip(inputs.unbind(), targets.unbind(), strict=True))

    def arrays(self) -> dict[str, Tensor]:
        """Return what `pack` writes, by name, with one row for each record."""
        return {"pixels": self.pixels, "targets": self.targets, "readable": self.readable}

    def dpquant_batch(self, record_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `batch(record_ids)`: the method of data sets that collate themselves, see `make_private`."""
        return self.batch(record_ids)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the given records, collated; an empty batch keeps its shape.

        Args:
          indices: Shape (B,), int64, record ids.
        Returns: Inputs [B, C, H, W] float32 and targets [B] int64.
        Privacy: per example.
        """
        # To float32 first: torch has few operators on uint16, and on uint8 one that gives float32 takes longer.
        mean, std = (of_channels(one) for one in (self.normalisation.mean, self.normalisation.std))
        inputs = self.pixels[indices].float().mul_(1.0 / (self.full_scale * std)).sub_(mean / std)
        inputs[~self.readable[indices]] = math.nan
        return inputs, self.targets[indices]


def of_channels(constant: Constant) -> float | Tensor:
    """Return a constant of normalisation as it stands beside pixels: a number, or float32 [C, 1, 1]."""
    return torch.tensor(constant)[:, None, None] if isinstance(constant, tuple) else constant


Loaded = tuple[Split, Split, tuple[str, ...]]  # training records, test records, class names
