# SPDX-License-Identifier: Apache-2.0
"""Synthetic labelled records for measuring speed: `assess` trains on them, `bench` takes its batch from them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dpquant.data.form import Form


class SyntheticRecords:
    """Map-style data set of standard normal inputs, float32, and uniform labels in [0, num_classes), int64.

    The generator's seed is fixed: two data sets with equal arguments hold equal values.

    Args:
      shape: shape of one input.
      num_classes: number of classes.
      size: number of records.
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
        """Return inputs `(count, *shape)` and labels `(count,)` of the first `count` records, repeated if fewer."""
        record_ids = torch.arange(count) % len(self)
        return self._inputs[record_ids], self._labels[record_ids]


class RepeatedRecords:
    """Map-style data set of a few synthetic records in the data's own domain, over and over.

    Args:
      records: to be repeated; texts among them have the largest length.
      size: number of records.
    """

    def __init__(self, records: Sequence[Any], size: int):
        self._records, self._size = records, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        return self._records[range(self._size)[index] % len(self._records)]

    def first(self, count: int) -> Any:
        """Return the first `count` records, collated; repeated if there are fewer."""
        return default_collate([self[index % len(self)] for index in range(count)])


Synthetic = SyntheticRecords | RepeatedRecords


def records_like(form: Form, size: int) -> Synthetic:
    """Return synthetic records of a form: those that it has, repeated, or normal inputs."""
    if form.synthetic is None:
        return SyntheticRecords(form.input_shape, form.num_classes, size)
    return RepeatedRecords(form.synthetic, size)
