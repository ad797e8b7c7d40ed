# SPDX-License-Identifier: Apache-2.0
"""Rows of a table in memory, encoded, and synthetic rows in the domain of a spec."""

import torch
import torch.utils.data
from torch import Tensor

from dpquant.data.spec import Spec
from dpquant.data.task import Task

_SYNTHETIC = 3


class Rows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The training or the test records of a table: map-style, in memory.

    An item is (inputs, target): float32 [columns] and an int64 or float32 scalar.

    Args:
      inputs: Shape (N, columns), float32.
      targets: Shape (N,), int64 classes or float32 numbers in -1 .. 1.
      readable: Shape (N,), bool; a False record has the target UNREADABLE or NaN.
    Privacy: per example, reads no other record.
    """

    in_memory = True  # reading a batch takes no time worth a thread

    def __init__(self, inputs: Tensor, targets: Tensor, readable: Tensor) -> None:
        self.inputs, self.targets, self.readable = inputs, targets, readable

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def arrays(self) -> dict[str, Tensor]:
        """Return what `pack` writes, by name, with one row for each record."""
        return {"inputs": self.inputs, "targets": self.targets, "readable": self.readable}

    def dpquant_batch(self, record_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `batch(record_ids)`: the method of data sets that collate themselves, see `make_private`."""
        return self.batch(record_ids)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs [B, columns] and targets [B] of the records with these ids, int64 (B,)."""
        return self.inputs[indices], self.targets[indices]


def synthetic_rows(spec: Spec) -> list[tuple[Tensor, Tensor]]:
    """Return synthetic records in the domain of a spec, on which a model is checked before a record is used."""
    generator = torch.Generator().manual_seed(0)
    sizes = [category.size for category in spec.categories.values()]
    whole = spec.width - len(sizes)
    records = []
    for number in range(_SYNTHETIC):
        inputs = torch.rand(spec.width, generator=generator) * 2 - 1
        inputs[len(spec.numbers) : whole] = (inputs[len(spec.numbers) : whole] > 0).float()
        for place, size in enumerate(sizes, whole):
            inputs[place] = float((number + torch.randint(size, (), generator=generator).item()) % size)
        records.append((inputs, _target(spec.task, len(spec.classes), number)))
    return records


def _target(task: Task, classes: int, number: int) -> Tensor:
    if task.kind == "regression":
        return torch.tensor(0.8 * (number - 1) + 0.1)
    return torch.tensor(number % classes)
