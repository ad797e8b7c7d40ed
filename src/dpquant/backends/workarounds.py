# SPDX-License-Identifier: Apache-2.0
"""Ways round convolutions that oneDNN gets wrong: each gives an equal convolution that it gets right.

Found by comparing random convolutions with exact sums (torch 2.14.1). `zero` is the value that stands for zero.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.geometry import Geometry


def around_corners(codes: Tensor, g: Geometry, *, zero: int) -> tuple[Tensor, Geometry]:
    """An equal convolution that avoids two corners in which oneDNN's int8 convolution gives wrong sums.

    It miscounts the zero point of a window all of whose inputs lie in the padding (possible where the padding exceeds
    the reach, or the kernel is dilated): the padding is laid beforehand. The other is `in_one_column`'s.
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
    """An equal convolution without a stride across, where the output is one column wide; another as it is given.

    There oneDNN reads wrong rows: with int8 always, with float32 where there is one channel.
    """
    if g.stride[1] == 1 or x.shape[3] + 2 * g.padding[1] - g.reach[1] - 1 >= g.stride[1]:
        return x, g
    column = _padded(x, g, zero)[..., : g.reach[1] + 1].contiguous(memory_format=torch.channels_last)
    return column, dataclasses.replace(g, padding=(0, 0), stride=(g.stride[0], 1))


def _padded(x: Tensor, g: Geometry, zero: int) -> Tensor:
    top, left = g.padding
    return F.pad(x, (left, left, top, top), value=zero)


def visited(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """The inputs that a 1x1 convolution visits, and the convolution of stride 1 that walks over them; others as given.

    oneDNN's own way past the strides writes beyond its workspace where channels are fewer than a vector holds: a crash
    or a wrong gradient (uxlfoundation/oneDNN, issue 6035).
    """
    if geometry.kernel != (1, 1) or geometry.padding != (0, 0):
        return x, geometry
    rows, columns = geometry.stride
    pixels = x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
    return pixels, Geometry(groups=geometry.groups)
