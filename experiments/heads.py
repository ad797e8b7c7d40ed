# SPDX-License-Identifier: Apache-2.0
"""Networks without a hidden layer, for `--model experiments.heads:NAME`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Logistic(nn.Module):
    """Logistic regression on the rows of a table: a weight for each number and for each value of each category."""

    def __init__(self, columns: int, categories: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self._sizes = tuple(categories)
        self.numbers = nn.Linear(columns - len(categories), num_classes)
        self.values = nn.Embedding(sum(categories), num_classes)
        nn.init.zeros_(self.values.weight)

    def forward(self, rows: Tensor) -> Tensor:
        sizes = torch.tensor(self._sizes)
        codes = rows[:, -len(sizes) :].long() + sizes.cumsum(0) - sizes
        return self.numbers(rows[:, : -len(sizes)]) + self.values(codes).sum(1)


def logistic(num_classes: int, input_shape: tuple[int, ...], categories: Sequence[int] = ()) -> nn.Module:
    """Build a logistic regression; of numbers alone, as features are, it is a linear layer."""
    if not categories:
        return nn.Sequential(nn.Linear(input_shape[0], num_classes))
    return Logistic(input_shape[0], categories, num_classes)
