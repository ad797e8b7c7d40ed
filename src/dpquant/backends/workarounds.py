# SPDX-License-Identifier: Apache-2.0
"""Convolutions rewritten into equivalent ones: workarounds for oneDNN bugs, and a layout that fills vector lanes.

The bugs were found by comparing random convolutions with exact sums (torch 2.14.1). Operands are codes or values; the
argument `zero` is the stored number that represents zero (the zero point of codes), used for padding.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.geometry import Geometry

LANES = 16  # channels that a vector instruction processes at once


def around_corners(codes: Tensor, g: Geometry, *, zero: int) -> tuple[Tensor, Geometry]:
    """Rewrite geometries for which oneDNN's int8 convolution is wrong (two known cases); return others unchanged.

    It miscounts the zero point for a window that lies entirely in the padding, which is possible if the padding exceeds
    `Geometry.reach` or the kernel is dilated. The input is then padded beforehand. `in_one_column` has the other case.
    """
    codes, g = in_one_column(codes, g, zero=zero)
    empty_window = g.padding != (0, 0) and (
        g.dilation != (1, 1) or g.padding[0] > g.reach[0] or g.padding[1] > g.reach[1]
    )
    if empty_window:
        codes = _padded(codes, g, zero).contiguous(memory_format=torch.channels_last)
        g = dataclasses.replace(g, padding=(0, 0))
    return codes, g


def in_one_column(x: Tensor, g: Geometry, *, zero: int) -> tuple[Tensor, Geometry]:
    """If the output has a single column, crop the input and use column stride 1; else return the arguments unchanged.

    oneDNN reads wrong rows for a single column with a larger stride: always in int8, with one channel in float32 too.
    """
    if g.stride[1] == 1 or x.shape[3] + 2 * g.padding[1] - g.reach[1] - 1 >= g.stride[1]:
        return x, g
    column = _padded(x, g, zero)[..., : g.reach[1] + 1].contiguous(memory_format=torch.channels_last)
    return column, dataclasses.replace(g, padding=(0, 0), stride=(g.stride[0], 1))


def _padded(x: Tensor, g: Geometry, zero: int) -> Tensor:
    top, left = g.padding
    return F.pad(x, (left, left, top, top), value=zero)


def subsampled(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Subsample the input of a strided 1x1 convolution and return the equivalent stride-1 geometry.

    Other convolutions are returned unchanged. oneDNN's own subsampling writes beyond its workspace if there are fewer
    channels than vector lanes, which gives a crash or a wrong gradient (uxlfoundation/oneDNN, issue 6035).
    """
    if geometry.kernel != (1, 1) or geometry.padding != (0, 0):
        return x, geometry
    rows, columns = geometry.stride
    pixels = x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
    return pixels, Geometry(groups=geometry.groups)


def columns_as_channels(x: Tensor, geometry: Geometry, *, zero: int) -> tuple[Tensor, Geometry]:
    """Move kernel columns into the channel axis if there are few channels, so that they fill the vector lanes.

    The patch order (kernel row, kernel column, channel) is preserved.

    Args:
      x: `(B, C, H, W)`, channels last.
      geometry: of the convolution, without groups.
      zero: the stored number that represents zero.
    Returns: an equivalent input, channels last, and its geometry; the arguments if they fill as many lanes already.
    """
    channels, width = x.shape[1], geometry.kernel[1]
    lanes = math.ceil(channels / LANES) * width
    if 2 * math.ceil(channels * width / LANES) > lanes:
        return x, geometry
    left, right, step = geometry.padding[1], geometry.stride[1], geometry.dilation[1]
    x_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left), value=zero).contiguous()
    batch, height, padded = x_BHWC.shape[:3]
    columns = (padded - geometry.reach[1] - 1) // right + 1
    line = padded * channels
    seen = x_BHWC.as_strided(
        (batch, height, columns, width, channels), (height * line, line, right * channels, step * channels, 1)
    )
    narrow = Geometry(
        kernel=(geometry.kernel[0], 1),
        stride=(geometry.stride[0], 1),
        padding=(geometry.padding[0], 0),
        dilation=(geometry.dilation[0], 1),
    )
    together = seen.reshape(batch, height, columns, width * channels)
    return together.contiguous().permute(0, 3, 1, 2), narrow  # reshape may give an overlapping view
