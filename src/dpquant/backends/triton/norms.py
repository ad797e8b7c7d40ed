# SPDX-License-Identifier: Apache-2.0
"""Squared norms of per-example weight gradients on GPUs, without writing the gradients to memory.

Each program forms one tile of an example's gradient, G_i = sum_t g_it x_it^T, in registers, squares and sums it, and
writes one number. The receptive fields x_it are read in place, without im2col.

    code norms    the sums are exact in int32; a row of a tile is squared and summed exactly in int64, the rest in
                  float64. `has_code_norms` says for which operands. The result is exact to 2^-50
    value norms   float32 without TF32. Parts of 32 positions are summed by the product, the parts with compensation,
                  and the result is raised by a bound on the round-off, so that it is never below the exact norm

Symbols: B examples, T positions, O output channels, D patch size, P tiles per gradient.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dpquant.backends.interface import Norms, Operands
from dpquant.backends.qtensor import Operand, QTensor
from dpquant.backends.triton.launch import launch

_OUTPUTS = 64
_PATCH = 32
_POSITIONS = 32
_LARGEST_CODE = 127  # also of codes with zero point 128
_UNIT = 2.0**-24  # largest relative error of one rounding to float32

# Relative to sum_t |g_it| |x_it|^T: at most 33 roundings of each part, 2 of the compensated sum, 1 for higher orders
_SUM_ERROR = (_POSITIONS + 4) * _UNIT
# Relative to the squares: each square's own rounding, those of summing a tile's row, 1 for higher orders
_SQUARE_ERROR = (_PATCH + 2) * _UNIT


def has_code_norms(operands: Operands) -> bool:
    """Return whether `code_norms` supports the operands: codes of one byte, no groups, and no integer overflows."""
    if operands.quantized is None or operands.geometry.groups != 1:
        return False
    one_byte = all(q.codes.dtype in (torch.int8, torch.uint8) for q in operands.quantized)
    largest_sum = operands.num_positions * _LARGEST_CODE**2
    return one_byte and _PATCH * largest_sum**2 < 2**63 and largest_sum < 2**31


def has_value_norms(operands: Operands) -> bool:
    """Return whether `value_norms` supports the operands: float32 values, no groups."""
    floats = all(isinstance(one, Tensor) and one.dtype == torch.float32 for one in (operands.x, operands.g))
    return floats and operands.geometry.groups == 1


def code_norms(operands: Operands) -> Norms:
    """Compute the squared norms of weight gradients of codes on int8 tensor cores; see `has_code_norms`.

    Returns: squares_B, float64 `(B,)`, without scales; no gradients.

    Privacy: per example, reads no other row.
    """
    return Norms(squares_B=_squares(operands))


def value_norms(operands: Operands) -> Norms:
    """Compute upper bounds of the squared norms of weight gradients of float32 values; see `has_value_norms`.

    The float32 sums differ from the exact G_i by at most a small multiple of M = sum_t ||g_it|| ||x_it||, which is
    added to the norm. Where the terms of a gradient hardly cancel, the bound exceeds the norm by 3e-6 of it.

    Returns: squares_B, float64 `(B,)`, never below ||G_i||^2; no gradients.

    Privacy: per example, reads no other row.
    """
    norms_B = (_squares(operands) * (1 + _SQUARE_ERROR)).sqrt()
    return Norms(squares_B=(norms_B + _SUM_ERROR * _lengths(operands)).square())


def _lengths(operands: Operands) -> Tensor:
    """Return sum_t ||g_it|| ||x_it||, float64 `(B,)`; a float32 sum of squares of C values is off by a few 2^-24."""
    x, g = operands.values
    geometry = operands.geometry
    squares = x.square().sum(dim=1, keepdim=True)
    patches = F.unfold(squares, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    lengths_BT = patches.double().sum(dim=1).sqrt() * g.flatten(2).square().sum(dim=1).double().sqrt()
    return lengths_BT.sum(dim=1)


def _squares(operands: Operands) -> Tensor:
    """Return the sum of the squares of each example's tiles, float64 `(B,)`."""
    x, g = _memory(operands.x), _memory(operands.g)
    outputs, patch = operands.shapes[1][1], operands.patch_size
    tiles = triton.cdiv(outputs, _OUTPUTS), triton.cdiv(patch, _PATCH)
    squares = torch.empty(len(operands), *tiles, dtype=torch.float64, device=x.device)
    geometry = operands.geometry
    if squares.numel():
        launch(
            _squares_kernel, (squares.numel(),), x, g, squares, *tiles, operands.num_positions, outputs, patch,
            *operands.shapes[0][1:], operands.shapes[1][3],
            geometry.kernel[1], *geometry.stride, *geometry.padding, *geometry.dilation,
            CODES=operands.quantized is not None, ZERO_X=_zero(operands.x), ZERO_G=_zero(operands.g),
            OUTPUTS=_OUTPUTS, PATCH=_PATCH, POSITIONS=_POSITIONS,
        )  # fmt: skip
    return squares.sum(dim=(1, 2))


def _memory(operand: Operand) -> Tensor:
    values = operand.codes if isinstance(operand, QTensor) else operand
    return values.contiguous(memory_format=torch.channels_last)


def _zero(operand: Operand) -> int:
    return operand.zero_point if isinstance(operand, QTensor) else 0


# Not compiled anew for each value that is 1 or a multiple of 16: of these it does not help
_ANY = ["output_tiles", "patch_tiles", "positions", "in_rows", "in_columns", "out_columns", "kernel_columns"]
_ANY += [f"{axis}_{name}" for axis in ("row", "column") for name in ("stride", "padding", "dilation")]


@triton.jit(do_not_specialize=_ANY)
def _squares_kernel(
    x, g, squares, output_tiles, patch_tiles, positions, outputs, patch,
    channels, in_rows, in_columns, out_columns,
    kernel_columns, row_stride, column_stride, row_padding, column_padding, row_dilation, column_dilation,
    CODES: tl.constexpr, ZERO_X: tl.constexpr, ZERO_G: tl.constexpr,
    OUTPUTS: tl.constexpr, PATCH: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Store the sum of squares of one tile, (OUTPUTS, PATCH), of one example's gradient; patch order as in im2col."""
    tile = tl.program_id(0)
    example = (tile // (output_tiles * patch_tiles)).to(tl.int64)
    output = tile // patch_tiles % output_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    d = tile % patch_tiles * PATCH + tl.arange(0, PATCH)
    tap, channel = d // channels, d % channels
    down, right = tap // kernel_columns * row_dilation, tap % kernel_columns * column_dilation
    plane = x + example * in_rows * in_columns * channels + channel
    grads = g + example * positions * outputs + output

    total = tl.zeros((OUTPUTS, PATCH), dtype=tl.int32 if CODES else tl.float32)
    lost = tl.zeros((OUTPUTS, PATCH), dtype=tl.float32)
    for start in range(0, positions, POSITIONS):
        t = start + tl.arange(0, POSITIONS)
        row = (t // out_columns * row_stride - row_padding)[:, None] + down[None, :]
        column = (t % out_columns * column_stride - column_padding)[:, None] + right[None, :]
        in_image = (row >= 0) & (row < in_rows) & (column >= 0) & (column < in_columns)
        read = in_image & (t < positions)[:, None] & (d < patch)[None, :]
        at = plane[None, :] + (row * in_columns + column).to(tl.int64) * channels
        values = tl.load(at, mask=read, other=ZERO_X)
        known = (output < outputs)[:, None] & (t < positions)[None, :]
        factors = tl.load(grads[:, None] + t[None, :].to(tl.int64) * outputs, mask=known, other=ZERO_G)
        if CODES:
            if ZERO_X:
                values = (values ^ ZERO_X).to(tl.int8, bitcast=True)
            if ZERO_G:
                factors = (factors ^ ZERO_G).to(tl.int8, bitcast=True)
            total = tl.dot(factors, values, total, out_dtype=tl.int32)
        else:  # Kahan's compensated sum of the parts; each step depends on rounding, so nothing may be reordered
            part = tl.dot(factors, values, input_precision="ieee", out_dtype=tl.float32) - lost
            longer = total + part
            lost = (longer - total) - part
            total = longer

    if CODES:
        wide = total.to(tl.int64)
        rows = tl.sum(wide * wide, axis=1).to(tl.float64)
    else:
        rows = tl.sum(total * total, axis=1).to(tl.float64)
    tl.store(squares + tile, tl.sum(rows, axis=0))
