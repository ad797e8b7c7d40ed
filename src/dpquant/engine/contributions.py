# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of one parameter from one call of its module, evaluated lazily.

A contribution computes each example's squared norm and adds the weighted gradients to a sum. It stores either the
materialised gradients or the operands that they are products of (`engine/weight_gradients.py`). Norm and sum are
computed from the same gradients, so clip factors apply to the gradients that are summed. This module does not clip.

Symbols: B examples, T positions, D features, S (example, table row) pairs with at least one lookup.
Source: book-keeping, Bu et al., arXiv 2210.00038.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from dpquant.backends.algebra import ROUND_OFF, row_norms

_FLOAT64_AT_ONCE = 2**17  # elements; a float64 copy of that many takes 1 MiB, which stays in a cache


class Contribution(Protocol):
    """The per-example gradients G_i of one parameter from one call of its module, evaluated lazily."""

    def squared_norms(self) -> Tensor:
        """Return ||G_i||^2, float64 `(B,)`, rounded up: never less than the squared norm of what the sum adds."""
        ...

    def per_example(self) -> Tensor:
        """Return the materialised G_i, float32 `(B, *parameter shape)`."""
        ...

    def inner_products(self, other: "Contribution") -> Tensor:
        """Return <G_i, G'_i> with other gradients of the same parameter and examples, `(B,)`."""
        ...

    def squared_distances(self, other: "Contribution") -> Tensor:
        """Return ||G_i - G'_i||^2 to other gradients of the same parameter and number of examples, float64 `(B,)`."""
        ...

    def tensors(self) -> Sequence[Tensor]:
        """Return the tensors that the G_i are computed from, the examples first: if they are equal, so are the G_i."""
        ...

    @property
    def kind(self) -> Hashable:
        """A key: contributions to one parameter can be added to the same `WeightedSum` if their kinds are equal."""
        ...

    def begin_sum(self) -> "WeightedSum[Self]":
        """Return an empty sum that takes contributions of this kind."""
        ...

    def take(self, rows: Tensor) -> "Contribution":
        """Return the contribution restricted to these examples, given by index."""
        ...

    def masked(self, keep_B: Tensor) -> "Contribution":
        """Return the contribution to a sum with zeros in place of the examples that are not kept, bool `(B,)`."""
        ...


Part = TypeVar("Part", contravariant=True)


class WeightedSum(Protocol[Part]):
    """Accumulates the weighted sum of one parameter's per-example gradients over any number of microbatches."""

    def add(self, part: Part, weights_B: Tensor) -> None:
        """Add sum_i w_i G_i; the weights are float32 `(B,)`."""
        ...

    def value(self) -> Tensor:
        """Return the sum so far, float32, in the parameter's shape."""
        ...


def distances(one: Contribution, other: Contribution) -> Tensor:
    """Return ||G_i - G'_i||^2, float64 `(B,)`, by materialising both: works for any two kinds of contributions."""
    return Materialised(one.per_example() - other.per_example()).squared_norms()


def rows_or_zero(keep_B: Tensor, rows: Tensor) -> Tensor:
    """Return the rows `(B, ...)` that are kept, and zeros in place of the others, NaN included."""
    return torch.where(keep_B.view(-1, *[1] * (rows.ndim - 1)), rows, 0.0)


@dataclasses.dataclass
class Materialised:
    """Materialised per-example gradients.

    Attributes:
      gradients: `(B, *parameter shape)`.
      squares_B: their squared norms, float64 `(B,)`; None: not computed yet.
    """

    gradients: Tensor
    squares_B: Tensor | None = None

    @property
    def kind(self) -> Hashable:
        return type(self)

    def squared_norms(self) -> Tensor:
        return row_norms(self.gradients) if self.squares_B is None else self.squares_B

    def per_example(self) -> Tensor:
        return self.gradients

    def inner_products(self, other: Contribution) -> Tensor:
        return (self.per_example() * other.per_example()).reshape(len(self.gradients), -1).sum(1)

    def squared_distances(self, other: Contribution) -> Tensor:
        return distances(self, other)

    def tensors(self) -> Sequence[Tensor]:
        return (self.gradients,)

    def begin_sum(self) -> "DenseSum":
        return DenseSum(self.gradients)

    def factors(self, weights_B: Tensor) -> Tensor:
        """Return the factors `(B,)` of the stored gradients for these example weights: here the weights themselves."""
        return weights_B

    def take(self, rows: Tensor) -> Self:
        squares_B = None if self.squares_B is None else self.squares_B[rows]
        return dataclasses.replace(self, gradients=self.gradients[rows], squares_B=squares_B)

    def masked(self, keep_B: Tensor) -> "Materialised":
        return dataclasses.replace(self, gradients=rows_or_zero(keep_B, self.gradients))


class DenseSum:
    """The weighted sum of materialised gradients, by matrix-vector products."""

    def __init__(self, gradients: Tensor, finish: Callable[[Tensor], Tensor] = lambda total: total):
        """Begin an empty sum of gradients of this shape; `finish` converts the total to the parameter's shape."""
        self._total, self._finish = gradients.new_zeros(gradients.shape[1:]), finish

    def add(self, part: Materialised, weights_B: Tensor) -> None:
        rows = part.gradients.reshape(len(part.gradients), self._total.numel())
        self._total.view(-1).addmv_(rows.t(), part.factors(weights_B).to(self._total.dtype))

    def value(self) -> Tensor:
        return self._finish(self._total)


class TableSum:
    """The weighted sum of embedding gradients, in a table of the embedding's shape."""

    def __init__(self, total: Tensor):
        self._total = total

    def add(self, part: "Lookup", weights_B: Tensor) -> None:
        self._total.index_add_(0, *part.weighted_rows(weights_B))

    def value(self) -> Tensor:
        return self._total


class Lookup:
    """Per-example gradients of an embedding table, stored as output gradients `g` and looked-up rows `ids`.

    Within an example, the gradients of all positions that look up the same row are summed first. The norm is the norm
    of these row sums, and the row sums are added to the total. Memory grows with the number of positions, but neither
    with the size of the table nor with pairs of positions.

    Args:
      ids_BT: the table row that each position looks up, int32 or int64, in [0, num_rows).
      g_BTD: the output gradient of each position, which is added to its row.
      num_rows: number of rows of the table.
      float64_at_once: number of elements that are copied to float64 at a time.
    """

    def __init__(self, ids_BT: Tensor, g_BTD: Tensor, num_rows: int, *, float64_at_once: int = _FLOAT64_AT_ONCE):
        self._ids, self._g, self._num_rows = ids_BT, g_BTD, num_rows
        self._float64_at_once = float64_at_once

    @staticmethod
    def merged(lookups: Sequence["Lookup"]) -> "Lookup":
        """Return the per-example gradients of one table, summed over several calls on the same examples."""
        ids, g = (torch.cat(parts, 1) for parts in zip(*((lookup._ids, lookup._g) for lookup in lookups), strict=True))
        return Lookup(ids, g, lookups[0]._num_rows)

    def squared_norms(self) -> Tensor:
        keys_S, sums_SD = self._sums
        # Squares of the float32 row sums, not of exact ones: a sum that overflows float32 is infinite here too.
        squares_S = torch.cat([sums.double().square().sum(1) for sums in sums_SD.split(self._at_once)])
        # Rounded up, so that it also bounds the exact sums, which rounding to float32 may have made smaller.
        return self._by_example(keys_S, squares_S) * (1 + ROUND_OFF)

    def per_example(self) -> Tensor:
        keys_S, sums_SD = self._sums
        table = self._g.new_zeros(len(self._ids) * self._num_rows, self._g.shape[2])
        return table.index_add_(0, keys_S, sums_SD).unflatten(0, (-1, self._num_rows))

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

    def tensors(self) -> Sequence[Tensor]:
        return self._ids, self._g

    @property
    def kind(self) -> Hashable:
        return type(self)

    def begin_sum(self) -> "TableSum":
        return TableSum(self._g.new_zeros(self._num_rows, self._g.shape[2]))

    def minus(self, other: "Lookup") -> "Lookup":
        """Return the difference to other gradients of the same table and examples."""
        return Lookup.merged([self, Lookup(other._ids, -other._g, self._num_rows)])

    def weighted_rows(self, weights_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the table row of each (example, row) pair, `(S,)`, and its weighted row sum, `(S, D)`."""
        keys_S, sums_SD = self._sums
        weights_S = weights_B.to(sums_SD.dtype)[keys_S // self._num_rows]
        return keys_S % self._num_rows, sums_SD * weights_S[:, None]

    def take(self, rows: Tensor) -> "Lookup":
        return Lookup(self._ids[rows], self._g[rows], self._num_rows)

    def masked(self, keep_B: Tensor) -> "Lookup":
        keys_S, sums_SD = self._sums
        kept = Lookup(self._ids, self._g, self._num_rows)
        kept._sums = keys_S, rows_or_zero(keep_B[keys_S // self._num_rows], sums_SD)  # the sums whose norms were taken
        return kept

    def _aligned(self, other: "Lookup") -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys of all (example, row) pairs that either has, and the row sums of both, zero where missing.

        Pairs that only one of them has are kept, so that an infinite sum times a missing one gives NaN.
        """
        keys, places = distinct(torch.cat([self._sums[0], other._sums[0]]))
        ours, theirs = (
            sums.new_zeros(len(keys), sums.shape[1]).index_add_(0, its_places, sums)
            for its_places, sums in zip(
                places.split([len(self._sums[0]), len(other._sums[0])]), (self._sums[1], other._sums[1]), strict=True
            )
        )
        return keys, ours, theirs

    @functools.cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """The keys `(S,)`, example * num_rows + row, and row sums `(S, D)` of all (example, row) pairs with a lookup.

        Positions are summed in float64: float32 loses 1.5e-4 of a sum of 16,384 equal terms (the case of
        `tests/engine/test_contributions.py`). A few examples are summed at a time, as float64 copies of all examples
        would not stay in a cache.
        """
        keys, sums = [], []
        firsts = torch.arange(len(self._ids), device=self._ids.device)[:, None] * self._num_rows
        num_examples = max(self._at_once // max(self._ids.shape[1], 1), 1)
        for keys_BT, g_BTD in zip((firsts + self._ids).split(num_examples), self._g.split(num_examples), strict=True):
            keys_S, places_BT = distinct(keys_BT)
            total_SD = torch.zeros(len(keys_S), g_BTD.shape[2], dtype=torch.float64, device=g_BTD.device)
            total_SD.index_add_(0, places_BT.flatten(), g_BTD.flatten(0, 1).double())
            keys.append(keys_S)
            sums.append(total_SD.to(g_BTD.dtype))
        return torch.cat(keys), torch.cat(sums)

    @property
    def _at_once(self) -> int:
        """The number of rows of D features that are copied to float64 at a time."""
        return max(self._float64_at_once // max(self._g.shape[2], 1), 1)

    def _by_example(self, keys: Tensor, values: Tensor) -> Tensor:
        """Sum the values of each example's pairs: `(B,)`."""
        return values.new_zeros(len(self._ids)).index_add_(0, keys // self._num_rows, values)


def distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys `(S,)` among which each of these integers is, and the place of each integer in them."""
    return keys.unique(return_inverse=True) if keys.device.type == "cpu" else distinct_and_more(keys)


def distinct_and_more(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return as many keys as there are integers, the distinct ones first, and the place of each integer in them.

    The keys to which no integer refers repeat the first. Their number, which a GPU would have to tell, is not needed.
    """
    ordered, order = keys.flatten().sort()
    begins = torch.ones_like(ordered)
    begins[1:] = ordered[1:] != ordered[:-1]
    number = begins.cumsum(0) - 1
    found = ordered[:1].repeat(len(ordered)).scatter_(0, number, ordered)
    return found, torch.empty_like(order).scatter_(0, order, number).view(keys.shape)
