# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of weight gradients from operands, worked off when there are positions enough for a fast product."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dpquant.backends.choose import fastest
from dpquant.backends.geometry import Geometry
from dpquant.backends.reference import add_patch_products, bfloat16_factors, in_weight_order, weight_gradient

_UNFOLDED = 2**23  # bytes, at once
_ENOUGH_POSITIONS = 2048  # from here on a matrix product over positions takes no less time for each


class WaitingSum:
    """A total whose products wait until they have positions enough for one fast matrix product.

    Args:
      x, g: operands such as will be added, whose values are not read.
      geometry: how the taps walk over x.
      pieces: how many bfloat16 numbers add up to an element of g; 0: it need not be a sum of such.
    """

    def __init__(self, x: Tensor, g: Tensor, geometry: Geometry, pieces: int):
        self._shapes, self._like = (x.shape[1:], g.shape[1:]), {"dtype": x.dtype, "device": x.device}
        self._geometry, self._pieces = geometry, pieces
        self._x: list[Tensor] = []
        self._g: list[Tensor] = []
        self._total: Tensor | None = None
        self._in_patch_order = False

    def add(self, x: Tensor, g: Tensor) -> None:
        """One more batch of operands, the factors in g; there may be no positions in it."""
        if g.numel() == 0:
            return
        self._x.append(x)
        self._g.append(g)
        if sum(t[:, 0].numel() for t in self._g) >= _ENOUGH_POSITIONS:
            self._work_off()

    def value(self) -> Tensor:
        """The sum of all so far, in the weight's order."""
        if self._x:
            self._work_off()
        if self._total is None:
            (channels, *_), (outputs, *_) = self._shapes
            return torch.zeros(outputs, channels // self._geometry.groups, *self._geometry.kernel, **self._like)
        return in_weight_order(self._total.flatten(0, 1), self._geometry) if self._in_patch_order else self._total

    def _work_off(self) -> None:
        x, g = torch.cat(self._x), torch.cat(self._g)
        self._x, self._g = [], []
        ways = {"convolution": self._add_convolution, "patches": self._add_patches, "bfloat16": self._add_pieces}
        if not self._pieces:
            del ways["bfloat16"]
        question = ("summed weight gradient", self._geometry, (*self._shapes, self._pieces), torch.get_num_threads())
        name = fastest(question, {name: partial(self._try, way) for name, way in ways.items()})
        self._in_patch_order = name != "convolution"
        self._total = ways[name](g, x, self._total)

    def _try(self, way: Callable[[Tensor, Tensor, Tensor | None], Tensor | None]) -> None:
        """A way on made-up operands: neither the values that wait here nor their number shall have a say."""
        num_examples = math.ceil(_ENOUGH_POSITIONS / math.prod(self._shapes[1][1:]))
        x, g = (
            torch.ones(num_examples, *shape, **self._like).contiguous(memory_format=torch.channels_last)
            for shape in self._shapes
        )
        way(g, x, None)

    def _add_convolution(self, g: Tensor, x: Tensor, total: Tensor | None) -> Tensor:
        product = weight_gradient(g, x, self._geometry)
        return product if total is None else total.add_(product)

    def _add_patches(self, g: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        for some_x, some_g in slices(self._geometry, x, g):
            total = add_patch_products(some_g, some_x, self._geometry, total)
        return total

    def _add_pieces(self, g: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        """The same, with g as a sum of bfloat16 numbers."""
        with bfloat16_factors():
            if self._pieces == 2:
                high = g.bfloat16().float()
                total = self._add_patches(high, x, total)
                g = g - high
            return self._add_patches(g, x, total)


def slices(geometry: Geometry, x: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The operands, a few examples at a time: unfolded inputs are large, and best used while they are in a cache."""
    patch_bytes = 4 * x.shape[1] * math.prod(geometry.kernel) * math.prod(g.shape[2:])
    step = max(_UNFOLDED // patch_bytes, 1)
    return zip(x.split(step), g.split(step), strict=True)
