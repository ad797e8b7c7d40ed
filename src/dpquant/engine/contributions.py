# SPDX-License-Identifier: Apache-2.0
"""The per-example gradients of one parameter, from one call of the module that owns it, evaluated as late as possible.

A contribution can say every example's squared norm, and add the examples' gradients, weighted, to a total. What it
holds in between is its own affair: the gradients, or operands that give them (`engine/weight_gradients.py`). Norm and
sum are of the same gradients, so that what was clipped is what is summed. Nothing here knows of clipping.

Symbols: B examples, T positions, D features, S pairs of an example and a table row that it looks up.
Source: book-keeping, Bu et al., arXiv 2210.00038.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from dpquant.backends.algebra import ROUND_OFF, row_norms

_FLOAT64_AT_ONCE = 2**17  # numbers: a copy of so many stays in a cache


class Contribution(Protocol):
    """The per-example gradients of one parameter from one call of a layer, evaluated as late as possible."""

    def squared_norms(self) -> Tensor:
        """||G_i||^2, float64 `(B,)`, never less than the true value of what the sum adds up."""
        ...

    def per_example(self) -> Tensor:
        """G_i, float32 `(B, *parameter shape)`."""
        ...

    def inner_products(self, other: "Contribution") -> Tensor:
        """<G_i, G'_i> with other gradients of the same parameter and examples, `(B,)`."""
        ...

    def squared_distances(self, other: "Contribution") -> Tensor:
        """||G_i - G'_i||^2 from other gradients of the same parameter and as many examples, float64 `(B,)`."""
        ...

    @property
    def kind(self) -> Hashable:
        """What contributions to the same parameter must share to be added to one sum."""
        ...

    def begin_sum(self) -> "WeightedSum[Self]":
        """An empty sum of gradients of this kind."""
        ...

    def take(self, rows: Tensor) -> "Contribution":
        """The same for some of the examples."""
        ...


Part = TypeVar("Part", contravariant=True)


class WeightedSum(Protocol[Part]):
    """A weighted sum of one parameter's per-example gradients, over any number of microbatches."""

    def add(self, part: Part, weights_B: Tensor) -> None:
        """Add sum_i w_i G_i, float32 weights `(B,)`."""
        ...

    def value(self) -> Tensor:
        """The sum so far, float32, of the parameter's shape."""
        ...


def distances(one: Contribution, other: Contribution) -> Tensor:
    """`Contribution.squared_distances` of any two, by forming both."""
    return Materialised(one.per_example() - other.per_example()).squared_norms()


@dataclasses.dataclass
class Materialised:
    """Materialised gradients, `(B, *parameter shape)`."""

    gradients: Tensor

    @property
    def kind(self) -> Hashable:
        return type(self)

    def squared_norms(self) -> Tensor:
        return row_norms(self.gradients)

    def per_example(self) -> Tensor:
        return self.gradients

    def inner_products(self, other: Contribution) -> Tensor:
        return (self.per_example() * other.per_example()).reshape(len(self.gradients), -1).sum(1)

    def squared_distances(self, other: Contribution) -> Tensor:
        return distances(self, other)

    def begin_sum(self) -> "DenseSum":
        return DenseSum(self.gradients)

    def factors(self, weights_B: Tensor) -> Tensor:
        """What the gradients are multiplied by where their examples have these weights, `(B,)`."""
        return weights_B

    def take(self, rows: Tensor) -> "Materialised":
        return dataclasses.replace(self, gradients=self.gradients[rows])


class DenseSum:
    """The weighted sum of materialised gradients, by matrix-vector products."""

    def __init__(self, gradients: Tensor, finish: Callable[[Tensor], Tensor] = lambda total: total):
        """Begin a sum of gradients of this shape; `finish` gives the total the parameter's shape."""
        self._total, self._finish = gradients.new_zeros(gradients.shape[1:]), finish

    def add(self, part: Materialised, weights_B: Tensor) -> None:
        rows = part.gradients.reshape(len(part.gradients), self._total.numel())
        self._total.view(-1).addmv_(rows.t(), part.factors(weights_B).to(self._total.dtype))

    def value(self) -> Tensor:
        return self._finish(self._total)


class TableSum:
    """The weighted sum of lookups, in a table of the embedding's shape."""

    def __init__(self, total: Tensor):
        self._total = total

    def add(self, part: "Lookup", weights_B: Tensor) -> None:
        self._total.index_add_(0, *part.weighted_rows(weights_B))

    def value(self) -> Tensor:
        return self._total


class Lookup:
    """The gradient of an embedding table: rows `g` added at positions `ids`.

    An example's positions are added up first, one sum for each table row that it looks up. Its norm is the norm of
    these sums, and they are what is added to the total. This takes memory for the positions only: not for the table's
    rows, nor for pairs of positions.

    Args:
      ids_BT: the row that each position looks up, int32 or int64, in [0, num_rows).
      g_BTD: what each position adds to its row.
      num_rows: of the table.
      float64_at_once: numbers of which float64 copies are made at a time.
    """

    def __init__(self, ids_BT: Tensor, g_BTD: Tensor, num_rows: int, *, float64_at_once: int = _FLOAT64_AT_ONCE):
        self._ids, self._g, self._num_rows = ids_BT, g_BTD, num_rows
        self._float64_at_once = float64_at_once

    @staticmethod
    def merged(lookups: Sequence["Lookup"]) -> "Lookup":
        """The gradient of one table from several calls on the same examples, as that of one call."""
        ids, g = (torch.cat(parts, 1) for parts in zip(*((lookup._ids, lookup._g) for lookup in lookups), strict=True))
        return Lookup(ids, g, lookups[0]._num_rows)

    def squared_norms(self) -> Tensor:
        keys_S, sums_SD = self._sums
        # From the float32 sums, not from the exact ones: a sum that float32 cannot hold is infinite here too.
        squares_S = torch.cat([sums.double().square().sum(1) for sums in sums_SD.split(self._at_once)])
        # Rounded up, so that the exact sums, which float32 may have made smaller, are no longer than said either.
        return self._by_example(keys_S, squares_S) * (1 + ROUND_OFF)

    def per_example(self) -> Tensor:
        keys_S, sums_SD = self._sums
        table = self._g.new_zeros(len(self._ids) * self._num_rows, self._g.shape[2])
        return table.index_copy_(0, keys_S, sums_SD).unflatten(0, (-1, self._num_rows))

    def inner_products(self, other: Contribution) -> Tensor:
        if not isinstance(other, Lookup):
            return (self.per_example() * other.per_example()).flatten(1).sum(1)
        keys, ours, theirs = self._aligned(other)
        return self._by_example(keys, ours.mul_(theirs).sum(1))

    def squared_distances(self, other: Contribution) -> Tensor:
        if not isinstance(other, Lookup):
            return distances(self, other)
        keys, ours, theirs = self._aligned(other)
        return self._by_example(keys, ours.sub_(theirs).double().square().sum(1))

    @property
    def kind(self) -> Hashable:
        return type(self)

    def begin_sum(self) -> "TableSum":
        return TableSum(self._g.new_zeros(self._num_rows, self._g.shape[2]))

    def weighted_rows(self, weights_B: Tensor) -> tuple[Tensor, Tensor]:
        """The row of the table that each pair of an example and a row adds to, `(S,)`, and what, `(S, D)`."""
        keys_S, sums_SD = self._sums
        weights_S = weights_B.to(sums_SD.dtype)[keys_S // self._num_rows]
        return keys_S % self._num_rows, sums_SD * weights_S[:, None]

    def take(self, rows: Tensor) -> "Lookup":
        return Lookup(self._ids[rows], self._g[rows], self._num_rows)

    def _aligned(self, other: "Lookup") -> tuple[Tensor, Tensor, Tensor]:
        """The pairs that one of both looks up at least, and what each adds there.

        Those of one are kept: a product of zero and infinity shall be seen.
        """
        keys, places = torch.cat([self._sums[0], other._sums[0]]).unique(return_inverse=True)
        ours, theirs = (
            sums.new_zeros(len(keys), sums.shape[1]).index_copy_(0, its_places, sums)
            for its_places, sums in zip(
                places.split([len(self._sums[0]), len(other._sums[0])]), (self._sums[1], other._sums[1]), strict=True
            )
        )
        return keys, ours, theirs

    @functools.cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """One for every pair of an example and a row that it looks up: the pair's key, and what is added there.

        Keys `(S,)` are example * num_rows + row. Sums `(S, D)` are of float64 numbers, as float32 loses 1.5e-4 of
        16,384 equal terms, and of some examples at a time, as float64 copies of all would not stay in a cache.
        """
        keys, sums = [], []
        firsts = torch.arange(len(self._ids), device=self._ids.device)[:, None] * self._num_rows
        num_examples = max(self._at_once // max(self._ids.shape[1], 1), 1)
        for keys_BT, g_BTD in zip((firsts + self._ids).split(num_examples), self._g.split(num_examples), strict=True):
            keys_S, places_BT = keys_BT.unique(return_inverse=True)
            total_SD = torch.zeros(len(keys_S), g_BTD.shape[2], dtype=torch.float64, device=g_BTD.device)
            total_SD.index_add_(0, places_BT.flatten(), g_BTD.flatten(0, 1).double())
            keys.append(keys_S)
            sums.append(total_SD.to(g_BTD.dtype))
        return torch.cat(keys), torch.cat(sums)

    @property
    def _at_once(self) -> int:
        """How many rows of D features are float64 at a time."""
        return max(self._float64_at_once // max(self._g.shape[2], 1), 1)

    def _by_example(self, keys: Tensor, values: Tensor) -> Tensor:
        """The sum of each example's values, `(B,)`."""
        return values.new_zeros(len(self._ids)).index_add_(0, keys // self._num_rows, values)
