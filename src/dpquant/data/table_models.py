# SPDX-License-Identifier: Apache-2.0
"""Networks for rows of tables: categories are embedded, numbers are taken as they are.

Source of the residual network: Gorishniy et al. 2021, arXiv:2106.11959, with LayerNorm in the place of BatchNorm, which
mixes examples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EMBEDDING = 8  # entries of a category's embedding
_MLP_WIDTH, _RESNET_WIDTH, _RESNET_DEPTH = 128, 128, 3


class TableInputs(nn.Module):
    """Embeds the categories of encoded rows: [B, columns] to [B, outputs].

    Args:
      columns: of a row; the last are the codes of categories.
      categories: number of codes of each category.
    Attributes:
      outputs: width of an embedded row.
    """

    def __init__(self, columns: int, categories: Sequence[int]) -> None:
        super().__init__()
        self._numbers, self._sizes = columns - len(categories), tuple(categories)
        self.outputs = self._numbers + _EMBEDDING * len(categories)
        self.embedding = nn.Embedding(sum(categories), _EMBEDDING)  # one table, in which each category has its rows

    def forward(self, rows: Tensor) -> Tensor:
        """Return numbers and embeddings side by side. A code out of range counts as the nearest."""
        sizes = torch.tensor(self._sizes, device=rows.device)
        codes = torch.minimum(rows[:, self._numbers :].long().clamp(min=0), sizes - 1) + sizes.cumsum(0) - sizes
        return torch.cat([rows[:, : self._numbers], self.embedding(codes).flatten(1)], dim=1)


def _first(columns: int, categories: Sequence[int]) -> tuple[list[nn.Module], int]:
    """Return what makes one vector of a row, and its width."""
    if not categories:
        return [nn.Flatten()], columns
    inputs = TableInputs(columns, categories)
    return [inputs], inputs.outputs


def mlp(columns: int, categories: Sequence[int], num_outputs: int, scale: float) -> nn.Module:
    """Build a network with two hidden layers of 128."""
    first, inputs = _first(columns, categories)
    hidden = max(1, round(_MLP_WIDTH * scale))
    return nn.Sequential(
        *first,
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_outputs),
    )


class _Block(nn.Module):
    """Two linear layers beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.widen(self.norm(x))))


def tabular_resnet(columns: int, categories: Sequence[int], num_outputs: int, scale: float) -> nn.Module:
    """Build a residual network of three blocks, 128 wide."""
    first, inputs = _first(columns, categories)
    width = max(1, round(_RESNET_WIDTH * scale))
    blocks = [_Block(width) for _ in range(_RESNET_DEPTH)]
    return nn.Sequential(
        *first, nn.Linear(inputs, width), *blocks, nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, num_outputs)
    )
