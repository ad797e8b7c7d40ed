# SPDX-License-Identifier: Apache-2.0
"""Scales from the values of one row alone: the top of a clipped row, and the scales of its blocks.

A row may be cut into blocks, each with a scale of its own: `size` consecutive channels at one position of a map
`(C, H, W)`, or `size` consecutive values of a row that is no map. The value of an element is then

    code * block scale * row scale

With powers of two, the block scale is the smallest one with max|x| <= max_code * block scale, and the row scale is 1.
With a number format F, the row scale maps the row's largest |x| onto max_code * max_code of F, and the block scale is
the smallest code of F, but for float32 rounding, with max|x| <= max_code * block scale * row scale. Scales are rounded
up: were one rounded down, the largest value of its block would saturate, and stochastic rounding would be biased.

Exactness. E2M1 codes have 2 significant bits, powers of two 1 and E4M3 codes 4. So code * block scale is a float32
without rounding, and so is the product of two of them (12 significant bits at most), as long as the exponent is in
float32's range: with E4M3 always, as the factors are multiples of 2^-9 up to 12 * 448; with powers of two for blocks
whose largest |x| is from 2^-60 to 2^60. Only the sum of products rounds, in an order that depends on the device. Row
scales multiply the sum. E2M1 codes are in units of 0.5, so a scale in the hardware's units is twice ours.

Source: see `formats.py`. NVFP4 has a float32 scale per tensor; here it is per row, for one example must not set the
scale of another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.formats import Blocks
from dpquant.number_formats import NumberFormat

SMALLEST_ABSMAX = 2.0**-100  # rows with a smaller absmax become zero, because max_code / absmax could overflow

_UNITS = 2.0**15  # the largest |x| of a row, in the integer units in which its RMS is computed


def clipped_top(x: Tensor, largest: Tensor, clip: float) -> Tensor:
    """Return the saturation threshold of each row, `(B,)`: `clip` times its RMS, at most its largest |x|."""
    magnitudes = x.reshape(len(x), -1).abs()
    known = largest.isfinite() & (largest >= SMALLEST_ABSMAX)
    units = torch.where(known[:, None], magnitudes * (torch.full_like(largest, _UNITS) / largest)[:, None], 0.0)
    squares = (units.clamp(max=_UNITS) + 0.5).long().square().sum(dim=1)
    top = clip * (squares.double() / _extents(x).double()).sqrt() * (largest.double() / _UNITS)
    return torch.where(known, torch.minimum(largest, top.float()), largest)


def _extents(x: Tensor) -> Tensor:
    """Return the number of elements over which the mean square of each row is taken, `(B,)`.

    For a map it is C * lines * columns, counted up to the last line and the last column with a nonzero element. Padding
    to the longest record of the batch appends lines and columns of zeros; if they counted, a record's scale would
    depend on its batchmates. For rows without four axes it is the number of all elements.
    """
    if x.ndim != 4:
        return torch.full((len(x),), x[0].numel(), device=x.device)
    held_BHW = (x != 0).any(dim=1)
    lines, columns = (
        (held * torch.arange(1, held.shape[1] + 1, device=x.device)).amax(dim=1)
        for held in (held_BHW.any(dim=2), held_BHW.any(dim=1))
    )
    return x.shape[1] * lines * columns


def block_scales(x: Tensor, blocks: Blocks, max_code: int) -> tuple[Tensor, Tensor]:
    """Return the scale of each element's block, in x's shape, and the scale of each row, `(B,)`.

    Args:
      x: float32 `(B, ...)`; with four axes, maps `(B, C, H, W)`, else rows whose blocks are in row-major order.
      blocks: their size and the format of their scales.
      max_code: the largest magnitude of a code.

    Returns: float32. A row whose largest |x| is below 2^-100 has scale 0, and a row that is not finite has scale NaN.

    Privacy: per example, reads no other row.
    """
    magnitudes = (x if x.ndim == 4 else x.reshape(len(x), -1)).abs()
    per_row = (-1, *(1,) * (magnitudes.ndim - 1))
    largest = magnitudes.amax(dim=tuple(range(1, magnitudes.ndim)))
    usable = largest.isfinite() & (largest >= SMALLEST_ABSMAX)
    magnitudes = torch.where(usable.view(per_row), magnitudes, 0.0)

    channels = magnitudes.shape[1]
    whole = F.pad(magnitudes, (0, 0) * (magnitudes.ndim - 2) + (0, -channels % blocks.size))
    top = whole.unflatten(1, (-1, blocks.size)).amax(dim=2)
    if blocks.scale is None:
        scale, row_scale = _power_above(top, max_code), torch.ones_like(largest)
    else:
        most = torch.full_like(largest, blocks.scale.max_code)
        scale = _code_above(top * torch.where(usable, most / largest, 0.0).view(per_row), blocks.scale)
        row_scale = largest / (most * max_code)
    row_scale = torch.where(usable, row_scale, torch.where(largest.isfinite(), 0.0, torch.nan))
    return scale.repeat_interleave(blocks.size, dim=1)[:, :channels].reshape(x.shape), row_scale


def _power_above(top: Tensor, max_code: int) -> Tensor:
    """Return the smallest power of two s with top <= max_code * s; of tops below 2^-100, that of 2^-100."""
    top = top.clamp(min=SMALLEST_ABSMAX)
    power = (top.view(torch.int32) >> 23 << 23).view(torch.float32)  # 2^floor(log2 top): without the mantissa
    scale = power / 2 ** (max_code.bit_length() - 1)
    return torch.where(top > max_code * scale, 2 * scale, scale)


def _code_above(t: Tensor, format: NumberFormat) -> Tensor:
    """Return the smallest code >= t, or the largest code; t >= 0."""
    spacing = quantum(t, format)
    return ((t / spacing).ceil() * spacing).clamp(max=format.max_code)


def quantum(t: Tensor, format: NumberFormat) -> Tensor:
    """Return the spacing of codes at t >= 0, computed exactly from float32's exponent field."""
    exponent = ((t.view(torch.int32) >> 23) - 127).clamp(min=format.min_exponent)
    return ((exponent - format.mantissa_bits + 127) << 23).view(torch.float32)
