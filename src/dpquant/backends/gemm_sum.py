# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of weight gradients, computed from operands by matrix products over many examples' positions."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpquant.backends.algebra import add_patch_products, in_weight_order, weight_gradient
from dpquant.backends.choose import fastest, place
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Operands
from dpquant.backends.precision import bfloat16_factors

_AT_ONCE = 2**23  # bytes of im2col output formed at a time
_EXAMPLES_AT_ONCE = 512  # of outer products: 128 float32 of each take half of a 512 KiB cache
_ENOUGH_POSITIONS = 2048  # with more, a matrix product takes no less time per position


class GemmSum:
    """An accumulator that buffers operands until one large matrix product is efficient.

    Microbatches may have several shapes, as texts of different lengths have. Those of one shape are multiplied
    together, by the method that suits it. Methods leave their totals in one of two orders, which are added at the end.
    """

    def __init__(self, operands: Operands, /, *, enough_positions: int = _ENOUGH_POSITIONS):
        """Begin an empty sum for operands of these shapes (values are not read); `enough_positions` are buffered."""
        x, g = operands.values
        self._shapes = x.shape[1:], g.shape[1:]  # of what waits
        self._like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        self._geometry, self._bf16_terms = operands.geometry, operands.bf16_terms
        self._enough_positions = enough_positions
        self._x: list[Tensor] = []
        self._g: list[Tensor] = []
        self._positions = 0  # that wait
        self._totals: dict[bool, Tensor] = {}  # {whether in patch order: sum}

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        """Buffer one microbatch of operands, which may be empty."""
        x, g = operands.values
        if g.numel() == 0:
            return
        if (x.shape[1:], g.shape[1:]) != self._shapes:
            if self._x:
                self._flush()
            self._shapes = x.shape[1:], g.shape[1:]
        self._x.append(x)
        self._g.append(g * weights_B[:, None, None, None])
        self._positions += g[:, 0].numel()
        if self._positions >= self._enough_positions:
            self._flush()

    def value(self) -> Tensor:
        """Return the sum of all microbatches so far, `(O, C / G, *kernel)`."""
        if self._x:
            self._flush()
        totals = [
            in_weight_order(total.flatten(0, 1), self._geometry) if in_patch_order else total
            for in_patch_order, total in self._totals.items()
        ]
        if not totals:
            (channels, *_), (outputs, *_) = self._shapes
            return torch.zeros(outputs, channels // self._geometry.groups, *self._geometry.kernel, **self._like)
        return sum(totals[1:], totals[0])

    def _flush(self) -> None:
        x, g = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in (self._x, self._g))
        self._x, self._g, self._positions = [], [], 0
        methods = {"convolution": self._add_convolution, "patches": self._add_patches, "bfloat16": self._add_terms}
        if not self._bf16_terms:
            del methods["bfloat16"]
        facts = (self._geometry, (*self._shapes, self._bf16_terms), torch.get_num_threads(), *place(x.device))
        key = ("summed weight gradient", *facts)
        name = fastest(key, {name: partial(self._try, method) for name, method in methods.items()})
        in_patch_order = name != "convolution"
        total = methods[name](g, x, self._totals.get(in_patch_order))
        if total is not None:
            self._totals[in_patch_order] = total

    def _try(self, method: Callable[[Tensor, Tensor, Tensor | None], Tensor | None]) -> None:
        """Run a method on synthetic operands, so that neither values nor number of examples affect the choice."""
        num_examples = math.ceil(self._enough_positions / math.prod(self._shapes[1][1:]))
        x, g = (
            torch.ones(num_examples, *shape, **self._like).contiguous(memory_format=torch.channels_last)
            for shape in self._shapes
        )
        method(g, x, None)

    def _add_convolution(self, g: Tensor, x: Tensor, total: Tensor | None) -> Tensor:
        product = weight_gradient(g, x, self._geometry)
        return product if total is None else total.add_(product)

    def _add_patches(self, g: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        for some_x, some_g in slices(self._geometry, x, g):
            total = add_patch_products(some_g, some_x, self._geometry, total)
        return total

    def _add_terms(self, g: Tensor, x: Tensor, total: Tensor | None) -> Tensor | None:
        """Add patch products with g split into one or two bfloat16 terms, whose sum it is exactly."""
        with bfloat16_factors():
            if self._bf16_terms == 2:
                high = g.bfloat16().float()
                total = self._add_patches(high, x, total)
                g = g - high
            return self._add_patches(g, x, total)


class OuterSum:
    """An accumulator of outer products of values: the sum of w_i g_i x_i^T is a matrix product over the examples.

    It is formed for some examples at a time, so that the narrower factor times the weights stays in a cache. That
    factor comes first, because a product with few columns takes twice as long as its transpose, with few rows.
    """

    def __init__(self, operands: Operands):
        """Begin an empty sum for operands of these shapes (values are not read)."""
        x, g = (operand.flatten(1) for operand in operands.values)
        self._narrow_x = x.shape[1] < g.shape[1]
        narrow, wide = (x, g) if self._narrow_x else (g, x)
        self._total = narrow.new_zeros(narrow.shape[1], wide.shape[1])

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        """Add one microbatch of operands, which may be empty."""
        x, g = (operand.flatten(1) for operand in operands.values)
        narrow, wide = (x, g) if self._narrow_x else (g, x)
        parts = (rows.split(_EXAMPLES_AT_ONCE) for rows in (narrow, wide, weights_B[:, None]))
        for some_narrow, some_wide, some_weights in zip(*parts, strict=True):
            self._total.addmm_((some_narrow * some_weights).t(), some_wide)

    def value(self) -> Tensor:
        """Return the sum of all microbatches so far, `(O, C, 1, 1)`."""
        total = self._total.t().contiguous() if self._narrow_x else self._total
        return total[:, :, None, None]


def slices(geometry: Geometry, x: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the operands a few examples at a time, so that the im2col output of each slice stays in a cache."""
    patch_bytes = 4 * x.shape[1] * math.prod(geometry.kernel) * math.prod(g.shape[2:])
    step = max(_AT_ONCE // patch_bytes, 1)
    return zip(x.split(step), g.split(step), strict=True)
