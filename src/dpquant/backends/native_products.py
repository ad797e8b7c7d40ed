# SPDX-License-Identifier: Apache-2.0
"""Weight gradients on the native kernels: of values per example, and of codes per example or summed over a batch.

The kernels compute the products of `algebra.patch_products`, G_i = sum_t g_it x_it^T, in patch order (kernel row,
kernel column, channel). All operands are channels last and on the CPU; codes are uint8 with zero point 128. Products of
codes are exact integers if the corresponding `has_...` function returns True. Scales are not handled here.

Symbols: B examples, T positions, C channels, O outputs, D = kernel size times C.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpquant.backends.algebra import im2col, patch_products, positions
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.native import kernels as _native

INT8_ZERO_POINT = 128

_MOST_POSITIONS = 2**16  # int32 holds a sum of this many products of a signed and an unsigned byte
_MOST_TERMS = 2**17  # int32 holds a sum of this many products of two signed bytes


def direct_products(grad: Tensor, x: Tensor, geometry: Geometry, *, kernel: str | None = None) -> Tensor:
    """Materialise each example's weight gradient of values without im2col; see `has_direct_products`.

    Args:
      grad: output gradient, float32 `(B, O, H', W')`, channels last.
      x: input, float32 `(B, C, H, W)`, channels last.
      geometry: of the convolution; groups are supported.
      kernel: `avx512` or `avx2`; None: the fastest that this processor has.
    Returns: float32 `(B, O, D)`, D in patch order within a group.
    """
    channels = x.shape[1] // geometry.groups
    products = grad.new_empty(len(x), grad.shape[1], math.prod(geometry.kernel) * channels)
    assert _native is not None
    _native.direct_products(
        memory_of(x),
        memory_of(grad),
        products.numpy(),
        batch=len(x),
        groups=geometry.groups,
        kernel=kernel or _native.float_kernels()[0],
        **_geometry_facts(grad, x, geometry),
    )
    return products


def has_direct_products(x: Tensor) -> bool:
    """Return whether `direct_products` can run on x on this machine; codes are converted to float32 first."""
    able = _native is not None and x.device.type == "cpu" and bool(_native.float_kernels())
    return able and x.dtype != torch.float64


def code_norms(grad: Tensor, x: Tensor, geometry: Geometry, *, kernel: str | None = None) -> Tensor:
    """Compute the squared norms of weight gradients of codes on int8 instructions; see `has_code_products`.

    Args:
      grad: codes of the output gradient, uint8 with zero point 128, `(B, O, H', W')`, channels last.
      x: codes of the input, uint8 with zero point 128, `(B, C, H, W)`, channels last.
      geometry: of the convolution, without groups.
      kernel: `amx`, `vnni` or `avx2`; None: the fastest that this processor has.
    Returns: float64 `(B,)`; the exact integers of each gradient are rounded once to float32 before they are squared.
    """
    squares = torch.empty(len(x), dtype=torch.float64)
    _run_code_products(grad, x, geometry, squares, None, kernel)
    return squares


def code_products(grad: Tensor, x: Tensor, geometry: Geometry, *, kernel: str | None = None) -> Tensor:
    """Materialise the weight gradients of `code_norms`, float32 `(B, O, D)`: exact integers, rounded once."""
    products = torch.empty(len(x), grad.shape[1], math.prod(geometry.kernel) * x.shape[1])
    _run_code_products(grad, x, geometry, torch.empty(len(x), dtype=torch.float64), products, kernel)
    return products


def _run_code_products(
    grad: Tensor, x: Tensor, geometry: Geometry, squares: Tensor, products: Tensor | None, kernel: str | None
) -> None:
    assert _native is not None
    _native.code_products(
        memory_of(x), memory_of(grad), None if products is None else products.numpy(), squares.numpy(),
        kernel=kernel or _native.code_kernels()[0], **_geometry_facts(grad, x, geometry),
    )  # fmt: skip


def add_code_products(
    grad: Tensor, x: Tensor, geometry: Geometry, weights_B: Tensor, totals: Tensor, *, kernel: str | None = None
) -> None:
    """Add the weighted sum over examples of the weight gradients of codes to `totals`, in place.

    Args:
      grad: as in `code_norms`.
      x: as in `code_norms`.
      geometry: as in `code_norms`.
      weights_B: float32 `(B,)`.
      totals: float32 `(threads, O, D)`; each thread adds its examples to its own total.
      kernel: as in `code_norms`.
    """
    assert _native is not None
    _native.add_code_products(
        memory_of(x), memory_of(grad), weights_B.contiguous().numpy(), totals.numpy(),
        kernel=kernel or _native.code_kernels()[0], **_geometry_facts(grad, x, geometry),
    )  # fmt: skip


def gram_norms(grad: Tensor, x: Tensor, geometry: Geometry, *, kernel: str | None = None) -> Tensor:
    """Compute the squared norms of `code_norms` by Gram matrices, which is fast if there are few positions."""
    assert _native is not None
    squares = torch.empty(len(x), dtype=torch.float64)
    _native.code_gram_norms(
        memory_of(x), memory_of(grad), squares.numpy(), kernel=kernel or _native.code_kernels()[0],
        **_geometry_facts(grad, x, geometry),
    )  # fmt: skip
    return squares


def add_code_sums(
    grad: Tensor,
    x: Tensor,
    geometry: Geometry,
    weights_B: Tensor,
    total: Tensor,
    *,
    bf16_terms: int,
    kernel: str | None = None,
) -> None:
    """Add the weighted sum over examples of the weight gradients of codes to `total`, in place; see `has_code_sums`.

    The products are exact and are accumulated in float32.

    Args:
      grad: as in `code_norms`.
      x: as in `code_norms`.
      geometry: as in `code_norms`.
      weights_B: float32 `(B,)`, each of which is a bfloat16 number.
      total: float32 `(O, D)`.
      bf16_terms: bfloat16 terms needed to represent a weight times a code of grad exactly, 1 or 2.
      kernel: `amx` or `avx512`; None: the fastest that this processor has.
    """
    assert _native is not None
    _native.add_code_sums(
        memory_of(x), memory_of(grad), weights_B.contiguous().numpy(), total.numpy(), pieces=bf16_terms,
        kernel=kernel or _native.code_sum_kernels()[0], **_geometry_facts(grad, x, geometry),
    )  # fmt: skip


def has_code_products(x: QTensor, num_positions: int, geometry: Geometry) -> bool:
    """Return whether the int8 kernels of products support x on this machine and are exact for this many positions."""
    return _takes(x, geometry) and num_positions <= _MOST_POSITIONS and _code_products_run()


def has_gram_norms(x: QTensor, grad: QTensor, geometry: Geometry) -> bool:
    """Return whether `gram_norms` supports the operands on this machine and its Gram matrices are exact."""
    terms = max(x.codes.shape[1] * math.prod(geometry.kernel), grad.codes.shape[1])
    return has_code_products(x, math.prod(grad.codes.shape[2:]), geometry) and terms <= _MOST_TERMS


def has_code_sums(x: QTensor, geometry: Geometry) -> bool:
    """Return whether `add_code_sums` supports x on this machine and its products are exact."""
    return _takes(x, geometry) and _code_sums_run()


def _takes(x: QTensor, geometry: Geometry) -> bool:
    """Return True for uint8 codes (zero point 128) on the CPU and a convolution without groups."""
    return x.zero_point == INT8_ZERO_POINT and x.codes.device.type == "cpu" and geometry.groups == 1


@functools.cache
def _code_products_run() -> bool:
    """Return whether this processor has int8 kernels and the fastest of them are exact."""
    return _native is not None and bool(_native.code_kernels()) and products_are_exact(code_products, gram_norms)


@functools.cache
def _code_sums_run() -> bool:
    return _native is not None and bool(_native.code_sum_kernels()) and sums_are_exact(add_code_sums)


def products_are_exact(products: Callable[..., Tensor], norms: Callable[..., Tensor]) -> bool:
    """Return whether two functions like `code_products` and `gram_norms` are exact for the largest codes."""
    grad, x, geometry, exact = _largest_codes()
    found = products(grad, x, geometry), norms(grad, x, geometry)
    return torch.equal(found[0], exact.float()) and torch.equal(found[1], exact.square().sum((1, 2)))


def sums_are_exact(add_sums: Callable[..., None]) -> bool:
    """Return whether a function like `add_code_sums` is exact for sums that float32 can represent."""
    grad, x, geometry, exact = _largest_codes()
    weights_B = torch.tensor([1.0, 0.5])
    sums = torch.zeros(exact.shape[1:])
    add_sums(grad, x, geometry, weights_B, sums, bf16_terms=2)
    return torch.equal(sums.double(), (exact * weights_B[:, None, None]).sum(0))


def _largest_codes() -> tuple[Tensor, Tensor, Geometry, Tensor]:
    """Return operands with codes of +-127 on maps of odd sizes, and their exact products in float64."""
    geometry = Geometry(kernel=(3, 3), stride=(2, 1), padding=(1, 1))
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        (torch.randint(0, 2, shape, generator=generator) * 254 + 1).to(torch.uint8)
        for shape in ((2, 35, 9, 21), (2, 19, 5, 21))
    )
    x, grad = (codes.contiguous(memory_format=torch.channels_last) for codes in (x, grad))
    values = [codes.double() - INT8_ZERO_POINT for codes in (x, grad)]
    return grad, x, geometry, patch_products(positions(values[1], geometry), im2col(values[0], geometry))


def memory_of(maps: Tensor) -> Any:
    """Return a NumPy view of a channels-last tensor; asserts the layout, which the kernels do not check."""
    assert len(maps) == 0 or maps.is_contiguous(memory_format=torch.channels_last)
    return maps.numpy()


def _geometry_facts(grad: Tensor, x: Tensor, geometry: Geometry) -> Any:
    """Return the kernels' arguments for a convolution; an axis is (in, out, kernel, stride, padding, dilation)."""
    g = geometry
    rows, columns = zip(x.shape[2:], grad.shape[2:], g.kernel, g.stride, g.padding, g.dilation, strict=True)
    if g.pointwise:  # one row: kernels take several positions of a row at once, and sequences are maps of one column
        count = math.prod(x.shape[2:])
        rows, columns = (1, 1, 1, 1, 0, 1), (count, count, 1, 1, 0, 1)
    return {
        "rows": rows,
        "columns": columns,
        "channels": x.shape[1] // g.groups,
        "outputs": grad.shape[1] // g.groups,
        "threads": torch.get_num_threads(),
    }
