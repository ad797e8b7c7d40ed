# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of a parameter that several products use, without adding them up for each example.

    ||A_i + B_i||^2 = ||A_i||^2 + ||B_i||^2 + 2 <A_i, B_i>

The inner product is zero where the two lie in different rows of the parameter: the projections of an attention. For a
table that is both input embedding and output layer it follows from the looked-up rows alone, without any table per
example:

    <A_i, B_i> = sum_ts g_is[id_it] (x_is . e_it)     A_i: rows id_it get e_it;     B_i = sum_s g_is x_is^T

A and B may cancel, so both have to be added with one factor. Of codes the factor c_i s_i is rounded down to a bfloat16
(`weight_gradients.scaled_weights`); A_i is then added with that number over s_i.

Symbols: B examples, T positions that look up, S positions of the output layer, D features, V rows of the table.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpquant.backends.algebra import ROUND_OFF
from dpquant.engine.contributions import Contribution, Lookup, Materialised, WeightedSum, distances
from dpquant.engine.weight_gradients import LazyWeightGradient, MaterialisedWeightGradient, scaled_weights

_FLOAT64_AT_ONCE = 2**22  # elements of the (example, T, S) products that are formed at a time, 32 MiB each


@dataclasses.dataclass
class Summed:
    """The sum of several contributions to one parameter, which are kept apart.

    Attributes:
      parts: contributions of which any two have inner products that need no table per example: see `can_be_summed`.
    """

    parts: Sequence[Contribution]

    @property
    def kind(self) -> Hashable:
        return type(self), *(part.kind for part in self.parts)

    def squared_norms(self) -> Tensor:
        squares = [part.squared_norms() for part in self.parts]
        total_B = torch.stack(squares).sum(0)
        crossed_B = _inner_products(self.parts, self.parts, different=True)
        if crossed_B is None:
            return total_B
        # what cancels leaves the round-off of all parts
        margin_B = ROUND_OFF * torch.stack([square.sqrt() for square in squares]).sum(0).square()
        return (total_B + crossed_B).clamp(min=0) + margin_B

    def per_example(self) -> Tensor:
        return torch.stack([part.per_example() for part in self.parts]).sum(0)

    def inner_products(self, other: Contribution) -> Tensor:
        if isinstance(other, Materialised):
            return other.inner_products(self)
        others = other.parts if isinstance(other, Summed) else [other]
        products_B = _inner_products(self.parts, others, different=False)
        return self.parts[0].squared_norms().float() * 0 if products_B is None else products_B.float()

    def squared_distances(self, other: Contribution) -> Tensor:
        """Add up the distances of the parts, plus twice the inner products of their differences.

        Contributions that do not match part by part are materialised.
        """
        if not isinstance(other, Summed) or self.kind != other.kind:
            return distances(self, other)
        total_B = torch.stack([a.squared_distances(b) for a, b in zip(self.parts, other.parts, strict=True)]).sum(0)
        for number, pair in enumerate(zip(self.parts, other.parts, strict=True)):
            for another in zip(self.parts[:number], other.parts[:number], strict=True):
                mine, its = (_tied(one, two) for one, two in zip(pair, another, strict=True))
                if mine is not None and its is not None:
                    gap = mine[0].minus(its[0])
                    total_B = total_B + 2 * (cross_products(gap, mine[1]) - cross_products(gap, its[1]))
        return total_B.clamp(min=0)

    def tensors(self) -> Sequence[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]

    def factors(self, weights_B: Tensor) -> Tensor:
        """Return the factors with which all parts can be added for these example weights, at most as large.

        They differ from the weights where a tied layer's gradients are products of codes.
        """
        for one in self.parts:
            if isinstance(one, LazyWeightGradient) and any(_tied(one, other) for other in self.parts):
                scale_B = one.operands.scale_B
                if scale_B is not None:
                    return torch.where(scale_B > 0, scaled_weights(weights_B, scale_B) / scale_B, weights_B)
        return weights_B

    def begin_sum(self) -> "SumOfSums":
        return SumOfSums([part.begin_sum() for part in self.parts])

    def take(self, rows: Tensor) -> "Summed":
        return Summed([part.take(rows) for part in self.parts])

    def masked(self, keep_B: Tensor) -> "Summed":
        return Summed([part.masked(keep_B) for part in self.parts])


class SumOfSums:
    """The weighted sums of several contributions, which are added at the end."""

    def __init__(self, sums: Sequence[WeightedSum[Any]]):
        self._sums = sums

    def add(self, part: Summed, weights_B: Tensor) -> None:
        factors_B = part.factors(weights_B)
        for one, its_sum in zip(part.parts, self._sums, strict=True):
            # a little more, which rounding down takes away again
            weights = factors_B * (1 + 2**-22) if isinstance(one, LazyWeightGradient) else factors_B
            its_sum.add(one, weights if factors_B is not weights_B else weights_B)

    def value(self) -> Tensor:
        return torch.stack([one.value() for one in self._sums]).sum(0)


def can_be_summed(parts: Sequence[Contribution]) -> bool:
    """Return whether any two of these contributions to one parameter have a cheap inner product."""
    pairs = [(one, other) for number, one in enumerate(parts) for other in parts[:number]]
    return all(_apart(*pair) or _tied(*pair) is not None for pair in pairs)


def _inner_products(ours: Sequence[Contribution], theirs: Sequence[Contribution], *, different: bool) -> Tensor | None:
    """Return the sum of the inner products of all pairs, float64 `(B,)`; None if all pairs are orthogonal.

    Args:
      ours: contributions.
      theirs: contributions to the same parameter.
      different: leave out the pairs of a contribution with itself.
    """
    found = [
        _inner_product(one, other)
        for one in ours
        for other in theirs
        if not (different and one is other) and not _apart(one, other)
    ]
    return torch.stack(found).sum(0) if found else None


def _inner_product(one: Contribution, other: Contribution) -> Tensor:
    tied = _tied(one, other)
    return (one.inner_products(other) if tied is None else cross_products(*tied)).double()


def _apart(one: Contribution, other: Contribution) -> bool:
    """Return whether two contributions lie in different rows of the parameter."""
    match one, other:
        case (LazyWeightGradient() | MaterialisedWeightGradient(), LazyWeightGradient() | MaterialisedWeightGradient()):
            return one.crop.layout.apart_from(other.crop.layout)
        case _:
            return False


def _tied(one: Contribution, other: Contribution) -> tuple[Lookup, LazyWeightGradient] | None:
    """Return a lookup and a linear layer's weight gradient, if that is what the two are."""
    lookup, weight = (one, other) if isinstance(one, Lookup) else (other, one)
    if not isinstance(lookup, Lookup) or not isinstance(weight, LazyWeightGradient):
        return None
    whole = weight.operands.geometry.pointwise and not weight.crop.layout.transposed
    return (lookup, weight) if whole and weight.crop.layout.rows is None else None


def cross_products(lookup: Lookup, weight: LazyWeightGradient) -> Tensor:
    """Return <A_i, B_i> of a table's lookups and of its use as the weight of a linear layer, float64 `(B,)`.

    Privacy: per example.
    """
    (ids_BT, e_BTD), (x, g) = lookup.tensors(), weight.operands.values
    x_BDS, g_BVS = x.flatten(2), g.flatten(2)
    scale_B = weight.operands.scale_B
    at_once = max(_FLOAT64_AT_ONCE // max(ids_BT.shape[1] * max(x_BDS.shape[2], x_BDS.shape[1]), 1), 1)
    found = []
    for ids, e, x, g in zip(*(t.split(at_once) for t in (ids_BT, e_BTD, x_BDS, g_BVS)), strict=True):
        meets_bTS = e.double() @ x.double()
        looked_up_bTS = g.gather(1, ids.long()[:, :, None].expand(-1, -1, g.shape[2])).double()
        found.append((meets_bTS * looked_up_bTS).sum((1, 2)))
    products_B = torch.cat(found) if found else e_BTD.new_zeros(len(ids_BT), dtype=torch.float64)
    return products_B if scale_B is None else products_B * scale_B.double()
