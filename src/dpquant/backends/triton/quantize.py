# SPDX-License-Identifier: Apache-2.0
"""The quantizer on GPUs: the bits of `backends.quantize._fill_torch`, for powers of two and uniform integers.

A row is cut into tiles of whole lines or parts of lines; each program reads one tile. One pass finds the largest
magnitude of each tile, another one writes the codes. The RMS of a clip takes a pass between them, whose sums are
integers. Without atomics, and with integers alone, the order of programs does not matter.

Maps `(B, C, H, W)` are channels last: a line of W * C elements is contiguous, and an element's index in its line is its
place in memory. Every other row is one line under its row key.

Why the bits are equal on a GPU:
  - Division is IEEE (`div_rn`); Triton's `/` on float32 is approximate. The reciprocal is taken once a program.
  - Products are not contracted with sums: see `launch.py`; and `minimum` stands between them.
  - Subnormals are kept: Triton compiles without flush-to-zero.
  - Rounding is integer arithmetic, as argued in `native/quantize.cpp`: z = t, or t + 1 where t < 1, is a multiple of
    2^-23, and the draw is added to its integer. After the product, the addition t + 1 is the only operation that
    rounds, to nearest, ties to even, as the definition requires.
  - The largest magnitude is found among integers: without its sign a float's bits order like the float, with infinity
    and then NaN above all others.

Symbols: B rows, P tiles per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpquant.backends.triton.launch import launch
from dpquant.formats import RoleFormat, Rounding

_TILE = 2048  # elements a program reads
_SMALLEST_ABSMAX = tl.constexpr(2.0**-100)  # rows with a smaller absmax become zero
_UNITS = tl.constexpr(2.0**15)  # the largest |x| of a row, in the integer units of the RMS
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_ONE = tl.constexpr(2**23)  # 1.0 in units of a draw


def fill(codes: Tensor, x: Tensor, role: RoleFormat, row_keys: Tensor, zero_point: int) -> Tensor:
    """Fill `codes` and return the scales, `(B,)`.

    Args:
      codes: int8, or uint8 with zero point 128, in x's shape.
      x: float32 `(B, ...)`, not empty, contiguous or, with four axes, channels last. Others are copied.
      role: a format of powers of two (E3M0) or of uniform integers up to 127; rounding and clip.
      row_keys: int64 `(B,)`.
      zero_point: 0 or 128.

    Returns: float32 `(B,)`; 0 for rows whose absmax is below 2^-100, NaN for rows that are not finite.

    Privacy: per example, reads no other row.
    """
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    filled = codes if codes.is_contiguous(memory_format=layout) else torch.empty_like(x, dtype=codes.dtype)
    top = largest_magnitudes(x) if role.clip is None else _clipped_top(x, role.clip)
    scale = x.new_empty(len(x))
    rows = _Rows(x)
    launch(
        _codes_kernel, (rows.tiles,), x, row_keys.contiguous(), top, filled, scale, *rows.extents,
        MAP=x.ndim == 4, MAX_CODE=float(role.format.max_code), UNIFORM=role.format.exponent_bits == 0,
        STOCHASTIC=role.rounding is Rounding.STOCHASTIC, ZERO_POINT=zero_point, **rows.tile,
    )  # fmt: skip
    if filled is not codes:
        codes.copy_(filled)
    return scale


def largest_magnitudes(x: Tensor) -> Tensor:
    """Return the largest |x| of each row, float32 `(B,)`; NaN if any is NaN. Rows as in `fill`."""
    rows = _Rows(x)
    largest = torch.empty(len(x), rows.per_row, dtype=torch.int32, device=x.device)
    launch(_largest_kernel, (rows.tiles,), x, largest, *rows.extents, **rows.tile)
    return largest.amax(dim=1).view(torch.float32)


def _clipped_top(x: Tensor, clip: float) -> Tensor:
    """Return the saturation threshold of each row, float32 `(B,)`: `clip` times its RMS, at most its largest |x|.

    Sums of squares and the extents, up to the last line and column of a map with a nonzero element, are exact integers.
    """
    rows, largest = _Rows(x), largest_magnitudes(x)
    squares = torch.empty(len(x), rows.per_row, dtype=torch.int64, device=x.device)
    lines, columns = (torch.empty(squares.shape, dtype=torch.int32, device=x.device) for _ in range(2))
    channels = x.shape[1] if x.ndim == 4 else 1
    tensors = x, largest, squares, lines, columns
    launch(_squares_kernel, (rows.tiles,), *tensors, *rows.extents, channels, **rows.tile)
    elements = channels * lines.amax(1).long() * columns.amax(1).long() if x.ndim == 4 else x[0].numel()
    mean_square = squares.sum(dim=1).double() / torch.as_tensor(elements, device=x.device).double()
    top = (clip * mean_square.sqrt() * (largest.double() / _UNITS.value)).float()
    known = largest.isfinite() & (largest >= _SMALLEST_ABSMAX.value)
    return torch.where(known, torch.minimum(largest, top), largest)


class _Rows:
    """How rows are cut into lines and tiles.

    Attributes:
      extents: number of lines of a row, elements of a line, tiles along the lines and along the elements.
      tile: the lines and elements of a tile, powers of two.
    """

    def __init__(self, x: Tensor):
        lines, length = (x.shape[2], x.shape[1] * x.shape[3]) if x.ndim == 4 else (1, x[0].numel())
        across = min(triton.next_power_of_2(length), _TILE)
        down = min(triton.next_power_of_2(lines), _TILE // across)
        parts = triton.cdiv(lines, down), triton.cdiv(length, across)
        self.extents = lines, length, *parts
        self.tile = {"LINES": down, "ELEMENTS": across}
        self.per_row = parts[0] * parts[1]
        self.tiles = len(x) * self.per_row


_ANY = ["lines", "down", "across"]  # not compiled anew for each value that is 1 or a multiple of 16: it would not help


@triton.jit
def _place(lines, length, down, across, LINES: tl.constexpr, ELEMENTS: tl.constexpr):
    """Return this program's row, its lines `(LINES, 1)` and elements `(1, ELEMENTS)`, offsets in x and their mask."""
    part = tl.program_id(0)
    row, part = part // (down * across), part % (down * across)
    line = (part // across) * LINES + tl.arange(0, LINES)[:, None]
    element = (part % across).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]  # up to 2^32
    offset = (row.to(tl.int64) * lines + line) * length + element
    return row, line, element, offset, (line < lines) & (element < length)


@triton.jit(do_not_specialize=_ANY)
def _largest_kernel(
    x, largest, lines, length, down, across, LINES: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    """Store the bits of the tile's largest |x|."""
    _, _, _, offset, inside = _place(lines, length, down, across, LINES, ELEMENTS)
    bits = tl.load(x + offset, mask=inside, other=0.0).to(tl.int32, bitcast=True) & _MAGNITUDE
    tl.store(largest + tl.program_id(0), tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit(do_not_specialize=[*_ANY, "channels"])
def _squares_kernel(
    x, largest, squares, last_lines, last_columns, lines, length, down, across, channels,
    LINES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Store the sum of squares of the tile's |x| in units of largest / 2^15, and the ends of its nonzero values."""
    row, line, element, offset, inside = _place(lines, length, down, across, LINES, ELEMENTS)
    top = tl.load(largest + row)
    known = (top.to(tl.int32, bitcast=True) < _INFINITY) & (top >= _SMALLEST_ABSMAX)
    inverse = tl.div_rn(tl.full([], _UNITS, tl.float32), tl.where(known, top, 1.0))
    bits = tl.load(x + offset, mask=inside & known, other=0.0).to(tl.int32, bitcast=True) & _MAGNITUDE
    scaled = tl.minimum(bits.to(tl.float32, bitcast=True) * inverse, _UNITS)
    units = (scaled + 0.5).to(tl.int32).to(tl.int64)
    tl.store(squares + tl.program_id(0), tl.sum(tl.sum(units * units, axis=1), axis=0))
    last_line = tl.where(bits != 0, line + 1, 0)
    last_column = tl.where(bits != 0, (element // channels).to(tl.int32) + 1, 0)
    tl.store(last_lines + tl.program_id(0), tl.max(tl.max(last_line, axis=1), axis=0))
    tl.store(last_columns + tl.program_id(0), tl.max(tl.max(last_column, axis=1), axis=0))


@triton.jit
def _line_key(row_key, line):
    """dpquant.rounding.line_keys: splitmix64 at counter line + 1."""
    z = row_key + (line + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _element_bits(index, low, high):
    """dpquant.rounding.element_bits, on uint32."""
    h = index ^ low
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ high
    h = (h ^ (h >> 15)) * 0x846CA68B
    return (h ^ (h >> 16)) >> 9


@triton.jit(do_not_specialize=_ANY)
def _codes_kernel(
    x, row_keys, tops, codes, scale, lines, length, down, across,
    MAP: tl.constexpr, MAX_CODE: tl.constexpr, UNIFORM: tl.constexpr, STOCHASTIC: tl.constexpr,
    ZERO_POINT: tl.constexpr, LINES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write the tile's codes; the first program of a row writes its scale."""
    row, line, element, offset, inside = _place(lines, length, down, across, LINES, ELEMENTS)
    top = tl.load(tops + row)
    finite = top.to(tl.int32, bitcast=True) < _INFINITY
    usable = finite & (top >= _SMALLEST_ABSMAX)
    divisor, most = tl.where(usable, top, 1.0), tl.full([], MAX_CODE, tl.float32)
    if tl.program_id(0) % (down * across) == 0:
        tl.store(scale + row, tl.where(usable, tl.div_rn(divisor, most), tl.where(finite, 0.0, float("nan"))))

    bits = tl.load(x + offset, mask=inside & usable, other=0.0).to(tl.int32, bitcast=True)  # other rows: zeros
    magnitude = (bits & _MAGNITUDE).to(tl.float32, bitcast=True)
    t = tl.minimum(magnitude * tl.div_rn(most, divisor), MAX_CODE)
    shift = tl.where(t < 1.0, 1.0, 0.0)
    z = t + shift
    if STOCHASTIC:
        key = tl.load(row_keys + row).to(tl.uint64, bitcast=True)
        if MAP:
            key = _line_key(key, line)
        draw = _element_bits(element.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32)).to(tl.int32)
    else:
        draw = _ONE // 2
    if UNIFORM:
        code = (((z - shift) * _ONE).to(tl.int32) + draw) >> 23
    else:
        code = (((z.to(tl.int32, bitcast=True) + draw) & _INFINITY).to(tl.float32, bitcast=True) - shift).to(tl.int32)
    code = tl.where(bits < 0, -code, code) + ZERO_POINT
    tl.store(codes + offset, code.to(codes.dtype.element_ty), mask=inside)
