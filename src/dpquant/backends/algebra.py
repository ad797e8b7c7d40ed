# SPDX-License-Identifier: Apache-2.0
"""The products of a convolution in plain torch, on any device: forward, input gradient, per-example weight gradient.

All operands are dense floating-point tensors, which may hold integer codes. A linear layer is a 1x1 convolution
over its positions. This module does not handle scales, layers or privacy.

Symbols: B examples, C input channels, O output channels, G groups, H x W input size, T output positions, D patch size.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.geometry import Geometry
from dpquant.backends.workarounds import in_one_column, subsampled

ROUND_OFF = 2.0**-17
"""Relative margin for float32 round-off: norms are rounded up by it, clip factors down. It exceeds the largest error
measured for a float32 matrix product over 16,384 equal terms, 5.4e-6. Sums of sequential additions can lose more."""

_FLOAT32_PART = 128  # values whose squares are summed in float32
_TERMS = 256  # of a sum by oneDNN: over 512 equal ones it errs by 7.0e-6, over 2,048 by 1.5e-5, and is no faster
_NARROW, _SMALL = 16, 2**22  # columns and rows of a matrix, and multiplications, from which on oneDNN is faster


def _is_matrix(operand: Tensor, geometry: Geometry) -> bool:
    """Return whether a matrix product is faster than torch's convolution, for a 1x1 convolution of this operand.

    It is faster in float64, where torch's convolution runs im2col, and for linear layers: on 1x1 maps, `(B, D)`, and on
    maps of one column whose channels are adjacent, `(B, T, D)`. A convolution would make positions adjacent there, and
    then torch's attention has no fused kernel, and GELU takes six times as long.
    """
    if not geometry.pointwise:
        return False
    linear = operand.shape[2:] == (1, 1) or (operand.shape[3] == 1 and operand.stride(1) == 1)
    return linear or operand.dtype == torch.float64


def rows_by_matrix(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows `(N, C)` by a matrix `(O, C)`, transposed, and add a bias `(O,)`: `(N, O)`, in the operands' dtype.

    On a CPU torch leaves float32 to MKL, which has no kernels for AMD's wide vectors: 4,096 rows by 384 to 1,536 take
    21.8 ms on two cores of a Zen 5, and 9.6 ms by oneDNN, whose product torch keeps for its compiler.
    """
    if _by_onednn(rows, matrix):
        return torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
    return F.linear(rows, matrix, bias)


def _by_onednn(rows: Tensor, matrix: Tensor) -> bool:
    """Return whether oneDNN multiplies: it takes ten microseconds to begin, and gains nothing in a narrow matrix."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return min(matrix.shape) >= _NARROW and len(rows) * matrix.numel() >= _SMALL


def _map_by_matrix(operand: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the channels at every position of `(B, C, H, W)` by a matrix `(O, C)`: `(B, O, H, W)`, a view."""
    products = rows_by_matrix(operand.permute(0, 2, 3, 1).reshape(-1, operand.shape[1]), matrix, bias)
    return products.view(len(operand), *operand.shape[2:], len(matrix)).permute(0, 3, 1, 2)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve `(B, C, H, W)` with `(O, C / G, *kernel)` to `(B, O, H', W')`, in the operands' dtype."""
    if _is_matrix(x, geometry):
        with torch.no_grad():
            return _map_by_matrix(x, weight.flatten(1), bias).detach()  # no view for autograd: it may be overwritten
    x, g = in_one_column(x, geometry, zero=0)
    return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def swap_in_out(weight: Tensor, groups: int) -> Tensor:
    """Exchange a weight's input and output channels: `(O, C / G, *kernel)` -> `(C, O / G, *kernel)`, and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """Compute the gradient of a convolution with respect to its input, in the operands' dtype.

    Args:
      grad: `(B, O, H', W')`.
      weight: `(O, C / G, *kernel)`.
      geometry: of the convolution.
      size: (H, W) of the input.
    Returns: `(B, C, H, W)`.
    """
    if _is_matrix(grad, geometry):
        return _map_by_matrix(grad, weight.flatten(1).t())
    shape = (grad.shape[0], weight.shape[1] * geometry.groups, *size)
    x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)  # its layout counts
    return _convolution_backward(grad, x, weight, geometry, geometry.groups, [True, False, False])[0]


def weight_gradient(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Sum the weight gradient over the batch: grad `(B, O, H', W')`, x `(B, C, H, W)` -> `(O, C / G, *kernel)`."""
    x, geometry = subsampled(x, geometry)
    if geometry.pointwise:
        return _sum_over_positions(*(t.transpose(0, 1).flatten(1) for t in (grad, x)))[:, :, None, None]
    shape = (grad.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    weight = grad.new_empty(1).expand(shape)
    return _convolution_backward(grad, x, weight, geometry, geometry.groups, [False, True, False])[1]


def _sum_over_positions(grad_ON: Tensor, x_CN: Tensor) -> Tensor:
    """Return grad @ x^T, `(O, C)`, over the positions of all examples."""
    if not _by_onednn(grad_ON[:, :_TERMS], x_CN[:, :_TERMS]):
        return grad_ON @ x_CN.t()
    first, *others = zip(grad_ON.split(_TERMS, 1), x_CN.split(_TERMS, 1), strict=True)
    total = rows_by_matrix(*first)
    for part in others:
        total += rows_by_matrix(*part)
    return total


def patch_products(grad_BGTO: Tensor, patches_BGTD: Tensor) -> Tensor:
    """Materialise each example's weight gradient, sum_t grad_t patch_t^T; nothing is summed over examples.

    Args:
      grad_BGTO: output gradients by group and position, from `positions`; float32 values or integer codes.
      patches_BGTD: the receptive field of each position, float32, from `im2col`.
    Returns: float32 `(B, O, D)`, D in patch order; exact for codes whose partial sums are at most 2^24.
    """
    return (grad_BGTO.transpose(2, 3) @ patches_BGTD).flatten(1, 2)


def grouped_products(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Materialise each example's weight gradient by one convolution whose groups are the examples.

    Returns: `(B, O, C / G, *kernel)`, in weight order; the values of `patch_products`.
    """
    x, geometry = subsampled(x, geometry)
    batch, channels = len(x), x.shape[1] // geometry.groups
    shape = (batch * grad.shape[1], channels, *geometry.kernel)
    # the examples become channels of one image; in a channels-last layout that would not be contiguous
    grads, xs = (t.contiguous().flatten(0, 1).unsqueeze(0) for t in (grad, x))
    weight = grad.new_empty(1).expand(shape)
    mask = [False, True, False]
    products = _convolution_backward(grads, xs, weight, geometry, batch * geometry.groups, mask)[1]
    return products.unflatten(0, (batch, -1))


def add_patch_products(grad: Tensor, x: Tensor, geometry: Geometry, total: Tensor | None) -> Tensor:
    """Add the weight gradient of the batch to `total`, `(G, O / G, D)` in patch order, in place; return it."""
    grad_GON = positions(grad, geometry).permute(1, 3, 0, 2).flatten(2)
    patches_GND = im2col(x, geometry).transpose(0, 1).flatten(1, 2)
    if total is None:
        return grad_GON @ patches_GND
    if geometry.groups == 1:  # a batched product with one batch is slower
        total[0].addmm_(grad_GON[0], patches_GND[0])
        return total
    return total.baddbmm_(grad_GON, patches_GND)


def positions(grad: Tensor, geometry: Geometry) -> Tensor:
    """Rearrange output gradients by group and position: `(B, O, H', W')` -> `(B, G, T, O / G)`."""
    return grad.flatten(2).unflatten(1, (geometry.groups, -1)).transpose(2, 3)


def in_weight_order(products: Tensor, geometry: Geometry) -> Tensor:
    """Reorder `(..., O, D)`, D in patch order (kernel row, kernel column, channel), to `(..., O, C / G, *kernel)`."""
    return products.unflatten(-1, (*geometry.kernel, -1)).movedim(-1, -3)


def _convolution_backward(grad, x, weight, geometry: Geometry, groups: int, mask: list[bool]):
    g = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], groups, mask
    )


def im2col(x: Tensor, geometry: Geometry) -> Tensor:
    """Copy out the receptive field of each output position: `(B, C, H, W)` -> `(B, G, T, C / G * kernel size)`.

    The order inside a patch is (kernel row, kernel column, channel): see `in_weight_order`.
    """
    (top, left), (down, right), (step_down, step_right) = geometry.padding, geometry.stride, geometry.dilation
    x_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
    batch, height, width, channels = x_BHWC.shape
    rows = (height - geometry.reach[0] - 1) // down + 1
    columns = (width - geometry.reach[1] - 1) // right + 1
    per_group, line = channels // geometry.groups, width * channels
    size = (batch, geometry.groups, rows, columns, *geometry.kernel, per_group)
    steps = (height * line, per_group, down * line, right * channels, step_down * line, step_right * channels, 1)
    patch = math.prod(geometry.kernel) * per_group
    return x_BHWC.as_strided(size, steps).reshape(batch, geometry.groups, rows * columns, patch)


def patch_grams(x: Tensor, geometry: Geometry) -> Tensor:
    """Form the Gram matrix of the patches, patches @ patches^T of `im2col`: `(B, G, T, T)`.

    It is a sum over kernel taps of shifted parts of the pixels' Gram matrix, so each pair of pixels is multiplied once
    and im2col is not needed.
    """
    (top, left), (down, right), (step_down, step_right) = geometry.padding, geometry.stride, geometry.dilation
    x_BHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    batch, height, width = x_BHWC.shape[:3]
    rows = (height - geometry.reach[0] - 1) // down + 1
    columns = (width - geometry.reach[1] - 1) // right + 1
    pixels_BGNC = x_BHWC.flatten(1, 2).unflatten(2, (geometry.groups, -1)).transpose(1, 2)
    grams = (pixels_BGNC @ pixels_BGNC.transpose(2, 3)).contiguous()
    pixels = height * width
    size = (batch, geometry.groups, *geometry.kernel, rows, columns, rows, columns)
    line = down * width, right  # from one position to the next
    tap = step_down * width * (pixels + 1), step_right * (pixels + 1)
    steps = (geometry.groups * pixels**2, pixels**2, *tap, line[0] * pixels, line[1] * pixels, *line)
    by_tap = grams.as_strided(size, steps)
    total = by_tap[:, :, 0, 0].clone()
    for i, j in itertools.product(*map(range, geometry.kernel)):
        if (i, j) != (0, 0):
            total += by_tap[:, :, i, j]
    return total.flatten(4, 5).flatten(2, 3)


def squares_of_codes(codes: Tensor) -> Tensor:
    """Sum the squares of codes over the last axis, exactly: float64."""
    return codes.double().square().sum(-1)


def squares_of_values(values: Tensor) -> Tensor:
    """Sum the squares of values over the last axis: float64.

    Parts of at most 128 values are summed in float32, with an error of at most 3.3e-7 (measured; ROUND_OFF is 23 times
    as large), and the parts in float64. A float64 copy of all values would take longer than the sum.
    """
    features = values.shape[-1]
    if features <= _FLOAT32_PART:
        return torch.linalg.vector_norm(values, dim=-1).double().square()
    width = max(width for width in range(1, _FLOAT32_PART + 1) if features % width == 0)
    parts = values.unflatten(-1, (-1, width))
    return torch.linalg.vector_norm(parts, dim=-1).double().square().sum(-1)


def row_norms(gradients: Tensor) -> Tensor:
    """Return ||G_i||^2, float64 `(B,)`, of materialised gradients `(B, ...)`.

    The norm along the last axis is computed in float32, the sum of its squares in float64. That is nearly as exact as
    float64 throughout and needs no float64 copy of the gradients.
    """
    width = gradients.shape[-1] if gradients.ndim > 1 else 1  # the parameter may be a scalar
    rows = gradients.reshape(len(gradients), -1, width)
    return torch.linalg.vector_norm(rows, dim=2).double().square().sum(1)
