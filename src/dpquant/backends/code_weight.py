# SPDX-License-Identifier: Apache-2.0
"""A quantized weight whose two products are both convolutions of codes, on any unit that convolves codes exactly.

The input gradient is a convolution with the transposed kernel: of the output gradient itself for stride 1, of one part
of the kernel for each phase of a larger stride, of the zero-stuffed output gradient for a dilated kernel with a stride.

Symbols: B examples, C input channels, O output channels, G groups, H x W input size.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dpquant.backends.algebra import swap_in_out
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor, scaled


class PackedCodes(Protocol):
    """Weight codes `(O, C / G, *kernel)` in the layout of the unit that multiplies them.

    Attributes:
      codes: int8.
    """

    codes: Tensor

    def convolved(self, codes: Tensor, geometry: Geometry) -> Tensor:
        """Convolve codes `(B, C, H, W)`, channels last, to the exact integers, rounded once to float32.

        Returns: a tensor of its own, `(B, O, H', W')`, channels last.
        """
        ...


class CodeWeight:
    """A quantized weight, packed for each product on first use; see `interface.PackedWeight`."""

    def __init__(self, weight: QTensor, geometry: Geometry, pack: Callable[[Tensor], PackedCodes], *, zero: int):
        """Make a weight whose codes are packed by `pack`; `zero` is the zero point of the other operand's codes."""
        self._weight, self._scale = pack(weight.codes), weight.scale
        self._geometry, self._pack, self._zero = geometry, pack, zero
        self._taps: dict[tuple[_Phase, _Phase], PackedCodes] = {}

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        y = scaled(self._weight.convolved(x.codes, self._geometry), x.scale, self._scale)
        return y if bias is None else y.add_(bias[:, None, None])

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        """Return the input gradient: by phases for a stride without dilation, else by zero-stuffing the gradient."""
        by_phases = self._geometry.stride != (1, 1) and self._geometry.dilation == (1, 1)
        x = self._by_phases(grad.codes, size) if by_phases else self._by_stuffing(grad, size)
        return scaled(x, grad.scale, self._scale)

    def _by_phases(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """Run one convolution per phase: input positions equal modulo the stride read the same kernel taps."""
        stride, padding = self._geometry.stride, self._geometry.padding
        channels = self._geometry.groups * self._weight.codes.shape[1]
        phases = list(itertools.product(*map(_phases, self._geometry.kernel, stride, padding, size)))
        shape, layout = (len(codes), channels, *size), torch.channels_last
        full = torch.empty(shape, device=codes.device, memory_format=layout)
        if len(phases) < min(stride[0], size[0]) * min(stride[1], size[1]):
            full.zero_()  # positions of the other phases read no tap
        for rows, columns in phases:
            if (rows, columns) not in self._taps:
                self._taps[rows, columns] = self._pack(self._swapped[:, :, rows.taps][..., columns.taps].contiguous())
            # padding is equal on both sides, so the larger one is used on both and the surplus is cropped
            pad = rows.padding(codes.shape[2]), columns.padding(codes.shape[3])
            geometry = Geometry(kernel=(len(rows.taps), len(columns.taps)), padding=pad, groups=self._geometry.groups)
            part = self._taps[rows, columns].convolved(codes, geometry)
            top, left = rows.first + pad[0], columns.first + pad[1]
            full[:, :, rows.phase :: stride[0], columns.phase :: stride[1]] = part[
                :, :, top : top + rows.count, left : left + columns.count
            ]
        return full

    def _by_stuffing(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        """Convolve the zero-stuffed gradient with the flipped, transposed kernel."""
        g, reach = self._geometry, self._geometry.reach
        padding = (max(reach[0] - g.padding[0], 0), max(reach[1] - g.padding[1], 0))
        crop = (max(g.padding[0] - reach[0], 0), max(g.padding[1] - reach[1], 0))
        stuffed = (size[0] + crop[0] + reach[0] - 2 * padding[0], size[1] + crop[1] + reach[1] - 2 * padding[1])
        codes = _zero_stuffed(grad.codes, g.stride, stuffed, self._zero)
        full = self._transposed.convolved(codes, dataclasses.replace(g, stride=(1, 1), padding=padding))
        return full[:, :, crop[0] : crop[0] + size[0], crop[1] : crop[1] + size[1]]

    @functools.cached_property
    def _swapped(self) -> Tensor:
        return swap_in_out(self._weight.codes, self._geometry.groups)

    @functools.cached_property
    def _transposed(self) -> PackedCodes:
        return self._pack(self._swapped.flip(2, 3).contiguous())


@dataclasses.dataclass(frozen=True)
class _Phase:
    """A phase of an axis: input position phase + stride * m gets sum_k gradient[m + first + k] * kernel[taps[k]].

    Attributes:
      count: number of positions m.
    """

    phase: int
    count: int
    taps: tuple[int, ...]
    first: int

    def padding(self, length: int) -> int:
        """Return the zero padding, equal on both sides, that a gradient of this length needs."""
        last = self.count - 1 + self.first + len(self.taps) - 1
        return max(-self.first, last - (length - 1), 0)


def _phases(kernel: int, stride: int, padding: int, size: int) -> list[_Phase]:
    """Return the phases of an axis that read at least one kernel tap, for an input of `size`."""
    found = []
    for phase in range(min(stride, size)):
        # in the forward product, output position u reads input position stride * u - padding + i by tap i
        taps = tuple(i for i in reversed(range(kernel)) if (phase + padding - i) % stride == 0)
        if taps:
            count = (size - phase + stride - 1) // stride
            found.append(_Phase(phase, count, taps, (phase + padding - taps[0]) // stride))
    return found


def _zero_stuffed(codes: Tensor, stride: tuple[int, int], size: tuple[int, int], zero: int) -> Tensor:
    """Return a plane of `size` with the codes placed `stride` apart and zero points elsewhere."""
    if stride == (1, 1) and codes.shape[2:] == size:
        return codes
    plane = torch.full((*codes.shape[:2], *size), zero, dtype=codes.dtype, device=codes.device)
    plane = plane.contiguous(memory_format=torch.channels_last)
    slots = plane[:, :, :: stride[0], :: stride[1]]
    rows, columns = min(slots.shape[2], codes.shape[2]), min(slots.shape[3], codes.shape[3])
    slots[:, :, :rows, :columns] = codes[:, :, :rows, :columns]
    return plane
