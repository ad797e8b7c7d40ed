# SPDX-License-Identifier: Apache-2.0
"""Convolutions of int8 codes on GPUs: the bits of `reference.ReferenceWeight`, by an implicit matrix product.

One kernel computes the output and the input gradient. Along an axis, output position u of a product reads, for its taps
k = 0, 1, ...,

    source position  u * stride + first + k * step      by      kernel tap  tap + k * tap_step

    output            stride = the convolution's, first = -padding, step = dilation, and all taps
    input gradient    one product per phase: input positions phase + S * u, S the convolution's stride. They read the
                      taps i with (phase + padding - i * dilation) divisible by S, at the quotient, plus u

For stride 1 there is one phase, the convolution with the flipped, transposed kernel. A phase without taps is zeros.

The sums are exact integers in int32; `refusal` says when they are not. The epilogue has the reference's order:
float32(sum), times (example's scale times channel's scale), plus bias, each rounded once: see `launch.py`.

Tile sizes are no outcome of a measurement.

Symbols: B examples, C input channels, O output channels, G groups.
"""

import dataclasses
import functools
import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpquant.backends.algebra import swap_in_out
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.backends.triton.launch import launch
from dpquant.errors import FormatError

_LARGEST_SUM = 2**31 - 1  # of int32


def refusal(shape: tuple[int, ...], groups: int, max_code: int) -> str | None:
    """Return the reason why products with a weight may exceed int32; None if they cannot.

    Args:
      shape: of the weight, `(O, C / G, *kernel)`.
      groups: of the convolution.
      max_code: the largest |code| of any operand.
    """
    terms = max(shape[0] // groups, shape[1]) * math.prod(shape[2:])
    if terms * max_code**2 <= _LARGEST_SUM:
        return None
    return f"sums of {terms} products of codes up to {max_code} may exceed 32 bits"


class TritonWeight:
    """A weight whose codes are multiplied on int8 tensor cores; see `interface.PackedWeight`."""

    def __init__(self, weight: QTensor, geometry: Geometry, max_code: int):
        """Keep a weight's int8 codes `(O, C / G, *kernel)`, without zero point; scale `(1,)` or one per channel.

        Raises:
          FormatError: sums of products of codes up to `max_code` may exceed 32 bits.
        """
        reason = refusal(tuple(weight.codes.shape), geometry.groups, max_code)
        if reason is not None:
            raise FormatError(
                f"Expected products that int32 holds; got weight of shape {tuple(weight.codes.shape)}, but {reason}. "
                "An overflow would silently change the training. Use backend='simulate'."
            )
        self._codes, self._scale, self._geometry = weight.codes, weight.scale, geometry

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        g = self._geometry
        axes = tuple(map(_output_axis, x.codes.shape[2:], g.kernel, g.stride, g.padding, g.dilation))
        y = _empty(x, len(self._codes), tuple(axis.count for axis in axes))
        _multiply(x, self._rows, axes, (self._scale, bias), y, g.groups)
        return y

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        g = self._geometry
        x = _empty(grad, self._codes.shape[1] * g.groups, size)
        for axes in itertools.product(*map(_phases, size, g.kernel, g.stride, g.padding, g.dilation)):
            _multiply(grad, self._swapped_rows, axes, (self._scale, None), x, g.groups)
        return x

    @functools.cached_property
    def _rows(self) -> Tensor:
        """The weight as the kernel reads it, int8 `(O, *kernel, C / G)`."""
        return self._codes.permute(0, 2, 3, 1).contiguous()

    @functools.cached_property
    def _swapped_rows(self) -> Tensor:
        """The weight as the kernel reads it for input gradients, int8 `(C, *kernel, O / G)`."""
        return swap_in_out(self._codes, self._geometry.groups).permute(0, 2, 3, 1).contiguous()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axis:
    """What is read and written along an axis: see the module's docstring.

    Attributes:
      count: number of output positions u.
      taps: number of taps each of them reads.
      stride: between the source positions of u and u + 1.
      first: source position of u = 0 by its first tap.
      step: between the source positions of two taps.
      tap: the first tap.
      tap_step: between two taps.
      place: output position u is written to place + place_step * u.
      place_step: see `place`.
    """

    count: int
    taps: int
    stride: int = 1
    first: int = 0
    step: int = 0
    tap: int = 0
    tap_step: int = 1
    place: int = 0
    place_step: int = 1


def _output_axis(size: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return _Axis(count=count, taps=kernel, stride=stride, first=-padding, step=dilation)


def _phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[_Axis]:
    """Return the phases of an input axis of `size`; together they write each position once."""
    found = []
    for phase in range(min(stride, size)):
        taps = [i for i in range(kernel) if (phase + padding - i * dilation) % stride == 0]
        sources = [(phase + padding - i * dilation) // stride for i in taps]
        axis = _Axis(count=(size - phase + stride - 1) // stride, taps=len(taps), place=phase, place_step=stride)
        if taps:
            axis = dataclasses.replace(axis, first=sources[0], tap=taps[0])
        if len(taps) > 1:
            axis = dataclasses.replace(axis, step=sources[1] - sources[0], tap_step=taps[1] - taps[0])
        found.append(axis)
    return found


def _empty(operand: QTensor, channels: int, size: tuple[int, ...]) -> Tensor:
    shape = (len(operand.codes), channels, *size)
    return torch.empty(shape, device=operand.codes.device, memory_format=torch.channels_last)


def _multiply(
    x: QTensor,
    weight: Tensor,
    axes: tuple[_Axis, ...],
    scale_and_bias: tuple[Tensor, Tensor | None],
    y: Tensor,
    groups: int,
) -> None:
    """Write the products of one pair of axes to y, float32 `(B, G * N, ...)`, channels last.

    Args:
      x: codes, int8 or uint8 with zero point 128, `(B, G * K, ...)`.
      weight: int8 `(G * N, *kernel, K)`.
      axes: rows and columns.
      scale_and_bias: of the channels of y.
      y: every position of `axes` is overwritten.
      groups: G.
    """
    rows, columns = axes
    positions, channels = len(y) * rows.count * columns.count, len(weight) // groups
    if positions * channels == 0:
        return
    assert positions < 2**31  # the kernel counts them in int32; their sums alone would fill 8 GiB
    scale, bias = scale_and_bias
    depth = weight.shape[3]
    tile = {
        "POSITIONS": 128 if positions >= 128 else 32,
        "CHANNELS": min(64, max(16, triton.next_power_of_2(channels))),
        "DEPTH": 64 if depth > 32 else 32,
    }
    grid = (triton.cdiv(positions, tile["POSITIONS"]), triton.cdiv(channels, tile["CHANNELS"]), groups)
    launch(
        _product_kernel, grid, x.codes.contiguous(memory_format=torch.channels_last), weight, x.scale, scale, bias, y,
        positions, channels, depth,
        *x.codes.shape[2:], *weight.shape[1:3], *y.shape[2:],
        *dataclasses.astuple(rows), *dataclasses.astuple(columns),
        PER_CHANNEL=len(scale) > 1, ZERO_POINT=x.zero_point, **tile,
    )  # fmt: skip


# Triton compiles a kernel anew for each argument that becomes 1 or a multiple of 16, unless it is told not to. It helps
# only for pointers and numbers of channels: whole words can be loaded then.
_ANY = ["positions", "in_rows", "in_columns", "kernel_rows", "kernel_columns", "out_rows", "out_columns"]
_ANY += [f"{axis}_{field.name}" for axis in ("row", "column") for field in dataclasses.fields(_Axis)]


@triton.jit(do_not_specialize=_ANY)
def _product_kernel(
    x, weight, scale_B, scale_N, bias, y,
    positions, channels, depth,
    in_rows, in_columns, kernel_rows, kernel_columns, out_rows, out_columns,
    row_count, row_taps, row_stride, row_first, row_step, row_tap, row_tap_step, row_place, row_place_step,
    column_count, column_taps, column_stride, column_first, column_step, column_tap, column_tap_step,
    column_place, column_place_step,
    PER_CHANNEL: tl.constexpr, ZERO_POINT: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write a tile of POSITIONS output positions, of any examples, and CHANNELS channels of one group.

    Depth is the number K of source channels of a group. Programs of axis 0 share positions, of axis 1 channels. The
    arguments from row_count to column_place_step are two `_Axis`.
    """
    group, groups = tl.program_id(2), tl.num_programs(2)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, DEPTH)
    in_tile, in_group = position < positions, channel < channels
    example = position // (row_count * column_count)
    row, column = position // column_count % row_count, position % column_count
    source_row, source_column = row * row_stride + row_first, column * column_stride + column_first
    plane = x + example.to(tl.int64) * in_rows * in_columns * (groups * depth) + group * depth
    filters = weight + (group * channels + channel).to(tl.int64) * (kernel_rows * kernel_columns * depth)

    blocks = tl.cdiv(depth, DEPTH)
    total = tl.zeros((POSITIONS, CHANNELS), dtype=tl.int32)
    for step in range(row_taps * column_taps * blocks):
        tap, from_k = step // blocks, step % blocks * DEPTH
        down, right = tap // column_taps, tap % column_taps
        r, c = source_row + down * row_step, source_column + right * column_step
        in_image = in_tile & (r >= 0) & (r < in_rows) & (c >= 0) & (c < in_columns)
        in_depth = from_k + k < depth
        at = plane + (r * in_columns + c).to(tl.int64) * (groups * depth)
        codes = tl.load(at[:, None] + (from_k + k), mask=in_image[:, None] & in_depth[None, :], other=ZERO_POINT)
        if ZERO_POINT:
            codes = (codes ^ ZERO_POINT).to(tl.int8, bitcast=True)  # code + 128 is code with its sign bit flipped
        at_tap = (row_tap + down * row_tap_step) * kernel_columns + column_tap + right * column_tap_step
        taken = filters + at_tap * depth + from_k
        factors = tl.load(taken[None, :] + k[:, None], mask=in_depth[:, None] & in_group[None, :], other=0)
        total = tl.dot(codes, factors, total, out_dtype=tl.int32)

    out = group * channels + channel
    scale = tl.load(scale_B + example, mask=in_tile, other=0.0)[:, None]
    if PER_CHANNEL:
        scale = scale * tl.load(scale_N + out, mask=in_group, other=0.0)[None, :]
    else:
        scale = scale * tl.load(scale_N)
    value = total.to(tl.float32) * scale
    if bias is not None:
        value = value + tl.load(bias + out, mask=in_group, other=0.0)[None, :]
    out_row, out_column = row_place + row * row_place_step, column_place + column * column_place_step
    pixel = (example.to(tl.int64) * out_rows + out_row) * out_columns + out_column
    at = y + pixel[:, None] * (groups * channels) + out[None, :]
    tl.store(at, value, mask=in_tile[:, None] & in_group[None, :])
