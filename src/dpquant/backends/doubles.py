# SPDX-License-Identifier: Apache-2.0
"""Backends with one planted bug each, for tests and experiments that show that a check catches the bug.

NOT PRIVATE, or WRONG: they are not in the registry, and no run may train on them.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import (
    Accumulator,
    Backend,
    Method,
    NormKernel,
    Norms,
    Operands,
    PackedWeight,
    SumKernel,
)
from dpquant.backends.qtensor import QTensor, scaled
from dpquant.formats import Precision, RoleFormat


class Wrapped:
    """Delegates to another backend; a subclass overrides one method.

    Attributes:
      inner: the other backend.
      name: the name of the subclass and of the other backend.
      device_type, units: of the other backend.
    """

    def __init__(self, inner: Backend):
        self.inner = inner
        self.name = f"{type(self).__name__} of {inner.name}"
        self.device_type, self.units = inner.device_type, inner.units

    def refusal(self, precision: Precision, device: torch.device) -> str | None:
        return self.inner.refusal(precision, device)

    def exactness(self, precision: Precision, device: torch.device) -> str:
        return self.inner.exactness(precision, device)

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        return self.inner.quantize(x, role, row_keys)

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> PackedWeight:
        return self.inner.pack(weight, geometry, max_code=max_code)

    def methods(self, operands: Operands) -> Sequence[Method]:
        return self.inner.methods(operands)


class SharedScale(Wrapped):
    """NOT PRIVATE: one scale for the whole batch, so that the largest example decides how all others are rounded.

    Clipping then does not bound the influence of an example.
    """

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        if len(x) == 0:
            return self.inner.quantize(x, role, row_keys)
        whole = self.inner.quantize(x.reshape(1, -1, *x.shape[2:]), role, row_keys[:1])
        shared = dataclasses.replace(whole, scale=whole.scale.expand(len(x)).contiguous())
        return shared.rearranged(lambda part: part.reshape(x.shape).contiguous(memory_format=torch.channels_last))


class BlocksOfExamples(Wrapped):
    """NOT PRIVATE: a block of `mxfp4` is examples instead of channels, as it would be in wgrad's sum over the batch."""

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        if role.blocks is None or len(x) == 0:
            return self.inner.quantize(x, role, row_keys)
        channels = self.inner.quantize(x.transpose(0, 1), role, row_keys[:1].repeat(x.shape[1]))
        shared = channels.rearranged(lambda part: part.transpose(0, 1))
        return dataclasses.replace(shared, scale=torch.ones(len(x)))  # that of every row, with powers of two


class OffByOne(Wrapped):
    """WRONG: adds one to every accumulator of a product, and to every element of a summed weight gradient."""

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> PackedWeight:
        return _OffByOneWeight(self.inner.pack(weight, geometry, max_code=max_code), weight.scale)

    def methods(self, operands: Operands) -> Sequence[Method]:
        return [
            dataclasses.replace(one, norms=_off_by_one_norms(one.norms), sum=_off_by_one_sum(one.sum))
            for one in self.inner.methods(operands)
        ]


class _OffByOneWeight:
    def __init__(self, inner: PackedWeight, scale: Tensor):
        self._inner, self._scale = inner, scale

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        return self._one_more(self._inner.forward(x, bias), x)

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        return self._one_more(self._inner.input_gradient(grad, size), grad)

    def _one_more(self, product: Tensor, operand: QTensor) -> Tensor:
        return product + scaled(torch.ones_like(product), operand.scale, self._scale)


def _off_by_one_norms(inner: NormKernel) -> NormKernel:
    """Return a kernel with correct norms whose materialised gradients, if any, are too large by one."""

    def norms(operands: Operands, /) -> Norms:
        found = inner(operands)
        return found if found.gradients is None else dataclasses.replace(found, gradients=found.gradients + 1)

    return norms


def _off_by_one_sum(inner: SumKernel) -> SumKernel:
    return lambda operands: _OffByOneSum(inner(operands))


class _OffByOneSum:
    def __init__(self, inner: Accumulator):
        self._inner = inner

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        self._inner.add(operands, weights_B)

    def value(self) -> Tensor:
        return self._inner.value() + 1
