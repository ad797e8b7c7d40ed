# SPDX-License-Identifier: Apache-2.0
"""Synthetic classified records for measuring speed: `assess` trains on them, `bench` takes its batch from them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SyntheticRecords:
    """A map-style data set of normal deviates with labels in [0, num_classes); the same values every time.

    Args:
      shape: of an input.
      num_classes: of labels.
      size: how many records.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(size, *shape, generator=generator)
        self._labels = torch.randint(0, num_classes, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._inputs[index], self._labels[index]

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of so many records, collated; the same ones again where there are fewer."""
        record_ids = torch.arange(count) % len(self)
        return self._inputs[record_ids], self._labels[record_ids]
