# SPDX-License-Identifier: Apache-2.0
"""Forward products and input gradients of codes on the native kernels of `native/code_convolutions.cpp`.

Processors with AVX2 but no VNNI instructions sum products of bytes in 16 bits. oneDNN's int8 convolution may saturate
there for codes above 64, and is slower. With AVX-512 VNNI it is exact and its products take as long as ours, but it
takes ten times as long to pack weights, and scales and bias need further passes over the result. With AMX it is faster.
Both products are sums over kernel taps:

    forward           y[p]            = sum over taps k of  weight[k]   * x[p * stride + k * dilation - padding]
    input gradient    x[r + m stride] = sum over taps k of  weight[k]^T * y[m + (r + padding - k * dilation) / stride]

where r is a phase of the input positions; a tap whose fraction is no integer does not reach it.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpquant.backends.geometry import Geometry
from dpquant.backends.native_products import memory_of
from dpquant.backends.qtensor import QTensor
from dpquant.native import kernels as _native


def native_kernels() -> Sequence[str]:
    """Return the kernels of `NativeWeight` that this processor has, `vnni` and `avx2`, the fastest first."""
    return () if _native is None else _native.tap_kernels()


def faster_than_onednn() -> bool:
    """Return whether `NativeWeight` is to be preferred where oneDNN's int8 convolution is exact too."""
    return _native is not None and _native.code_kernels()[:1] == ["vnni"]


class NativeWeight:
    """A weight whose codes are multiplied by a native kernel, exact for any codes; see `interface.PackedWeight`."""

    def __init__(self, weight: QTensor, geometry: Geometry, max_code: int, *, kernel: str | None = None):
        """Pack nothing yet; `kernel` is one of `native_kernels`, None: the fastest."""
        self._kernel = kernel or native_kernels()[0]
        self._codes, self._scale = weight.codes.contiguous(), weight.scale
        self._geometry, self._max_code = geometry, max_code
        self._by_phases: dict[tuple[_Phase, _Phase], Any] = {}

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        g = self._geometry
        facts = zip(x.codes.shape[2:], g.kernel, g.stride, g.padding, g.dilation, strict=True)
        sizes = [(size + 2 * pad - step * (taps - 1) - 1) // stride + 1 for size, taps, stride, pad, step in facts]
        y = _empty(x, len(self._codes), (sizes[0], sizes[1]))
        walks = [
            (size, count, stride, 0, 1, count)
            for size, count, stride in zip(x.codes.shape[2:], sizes, g.stride, strict=True)
        ]
        self._convolve([(self._forward_taps, *walks)], x, y, bias)
        return y

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        g = self._geometry
        x = _empty(grad, self._codes.shape[1] * g.groups, size)
        rows, columns = self._phases
        if any(not phase.taps for phase in (*rows, *columns)):
            x.zero_()  # no tap reaches the positions of some phases
        parts = []
        for down, across in itertools.product(rows[: size[0]], columns[: size[1]]):
            if down.taps and across.taps:
                walks = [
                    (length, (total - phase.first + stride - 1) // stride, 1, phase.first, stride, total)
                    for length, total, phase, stride in zip(
                        grad.codes.shape[2:], size, (down, across), g.stride, strict=True
                    )
                ]
                parts.append((self._backward_taps(down, across), *walks))
        self._convolve(parts, grad, x, None)
        return x

    def _convolve(self, parts: Sequence[Any], operand: QTensor, out: Tensor, bias: Tensor | None) -> None:
        assert _native is not None
        _native.convolve_codes(
            memory_of(operand.codes), operand.scale.contiguous().numpy(), self._scale.contiguous().numpy(),
            None if bias is None else bias.detach().contiguous().numpy(), out.numpy(),
            parts=parts, threads=torch.get_num_threads(),
        )  # fmt: skip

    @functools.cached_property
    def _forward_taps(self) -> Any:
        g = self._geometry
        rows, columns = (
            [(k, k * step - pad) for k in range(taps)]
            for taps, step, pad in zip(g.kernel, g.dilation, g.padding, strict=True)
        )
        return self._packed(rows, columns, transposed=False)

    @functools.cached_property
    def _phases(self) -> tuple[list["_Phase"], list["_Phase"]]:
        g = self._geometry
        rows, columns = map(_phases, g.kernel, g.stride, g.padding, g.dilation)
        return rows, columns

    def _backward_taps(self, down: "_Phase", across: "_Phase") -> Any:
        if (down, across) not in self._by_phases:
            self._by_phases[down, across] = self._packed(down.taps, across.taps, transposed=True)
        return self._by_phases[down, across]

    def _packed(self, rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]], *, transposed: bool) -> Any:
        """Pack the weights of these taps, (index in the kernel, pixel that it reads), of each axis."""
        assert _native is not None
        pairs = list(itertools.product(rows, columns))
        return _native.TapWeights(
            self._codes.flatten(2).numpy(),
            taps=[(row, column) for (_, row), (_, column) in pairs],
            places=[i * self._geometry.kernel[1] + j for (i, _), (j, _) in pairs],
            groups=self._geometry.groups,
            transposed=transposed,
            most=self._max_code,
            kernel=self._kernel,
        )


class _Phase(NamedTuple):
    """Input positions first, first + stride, ... of an axis, and the taps (index, gradient's pixel) that reach them."""

    first: int
    taps: tuple[tuple[int, int], ...]


def _phases(kernel: int, stride: int, padding: int, dilation: int) -> list[_Phase]:
    return [
        _Phase(
            first,
            tuple(
                (k, (first + padding - k * dilation) // stride)
                for k in range(kernel)
                if (first + padding - k * dilation) % stride == 0
            ),
        )
        for first in range(stride)
    ]


def _empty(operand: QTensor, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.empty(len(operand.codes), channels, *size, memory_format=torch.channels_last)
