# SPDX-License-Identifier: Apache-2.0
"""Convolutions rewritten into equivalent ones: workarounds for bugs of oneDNN, and a layout that fills vector lanes.

The bugs were found by comparing random convolutions with exact sums (torch 2.14.1). `zero` is the value that stands for
zero.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.geometry import Geometry

_LANES = 16  # channels that a kernel takes at once


def around_corners(codes: Tensor, g: Geometry, *, zero: int) -> tuple[Tensor, Geometry]:
    """Rewrite geometries for which oneDNN's int8 convolution gives wrong sums: two cases are known.

    It miscounts the zero point of a window all of whose inputs lie in the padding (possible where the padding exceeds
    the reach, or the kernel is dilated): the input is padded beforehand. The other case is `in_one_column`'s.
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

    oneDNN reads wrong rows otherwise: with int8 always, with float32 where there is one channel.
    """
    if g.stride[1] == 1 or x.shape[3] + 2 * g.padding[1] - g.reach[1] - 1 >= g.stride[1]:
        return x, g
    column = _padded(x, g, zero)[..., : g.reach[1] + 1].contiguous(memory_format=torch.channels_last)
    return column, dataclasses.replace(g, padding=(0, 0), stride=(g.stride[0], 1))


def _padded(x: Tensor, g: Geometry, zero: int) -> Tensor:
    top, left = g.padding
    return F.pad(x, (left, left, top, top), value=zero)


def subsampled(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Subsample the input of a strided 1x1 convolution and return the equivalent stride-1 geometry; others unchanged.

    oneDNN's own way past the strides writes beyond its workspace where channels are fewer than a vector holds: a crash
    or a wrong gradient (uxlfoundation/oneDNN, issue 6035).
    """
    if geometry.kernel != (1, 1) or geometry.padding != (0, 0):
        return x, geometry
    rows, columns = geometry.stride
    pixels = x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
    return pixels, Geometry(groups=geometry.groups)


def columns_as_channels(x: Tensor, geometry: Geometry, *, zero: int) -> tuple[Tensor, Geometry]:
    """Move kernel columns into the channel axis where channels are too few to fill the vector lanes.

    The order inside a patch stays the same.

    Args:
      x: `(B, C, H, W)`, channels last.
      geometry: without groups.
      zero: the value that stands for zero.
    Returns: an equivalent input, channels last, and its geometry; the arguments where nothing is gained.
    """
    channels, width = x.shape[1], geometry.kernel[1]
    lanes = math.ceil(channels / _LANES) * width
    if 2 * math.ceil(channels * width / _LANES) > lanes:
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
