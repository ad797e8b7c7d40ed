# SPDX-License-Identifier: Apache-2.0
"""Weight gradients on the native kernels: of values per example, of number codes per example and summed over a batch.

What they compute is `algebra.patch_products`: G_i = sum_t g_it x_it^T, in patch order (kernel row, kernel column,
channel). All operands are channels last and on a CPU; codes are uint8 with zero point 128. Sums of codes are exact
integers, as long as the functions that ask (`has_...`) say yes; nothing here knows of scales, layers or privacy.

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

_MOST_POSITIONS = 2**16  # int32 holds so many products of a signed and an unsigned byte
_MOST_TERMS = 2**17  # and so many of two signed bytes


def direct_products(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The products of values straight from two maps: `(B, O, D)`, groups included; see `has_direct_products`."""
    channels = x.shape[1] // geometry.groups
    products = grad.new_empty(len(x), grad.shape[1], math.prod(geometry.kernel) * channels)
    assert _native is not None
    _native.direct_products(
        _memory(x),
        _memory(grad),
        products.numpy(),
        batch=len(x),
        groups=geometry.groups,
        **_geometry_facts(grad, x, geometry),
    )
    return products


def has_direct_products(x: Tensor) -> bool:
    """Whether `direct_products` can run here on x, codes or values."""
    able = _native is not None and x.device.type == "cpu" and _native.direct_products_available()
    return able and x.dtype != torch.float64


def code_norms(grad: Tensor, x: Tensor, geometry: Geometry, *, kernel: str | None = None) -> Tensor:
    """The squared norms, float64 `(B,)`, of such products of codes, on int8 instructions; see `has_code_products`.

    Args:
      grad: codes of the output gradient, uint8 with zero point 128, channels last.
      x: codes of the input, likewise.
      geometry: without groups.
      kernel: `amx` or `vnni`; None: the fastest that this processor has.
    Returns: of the exact integers, each rounded once to float32.
    """
    squares = torch.empty(len(x), dtype=torch.float64)
    _run_code_products(grad, x, geometry, squares, None, kernel)
    return squares


def code_products(grad: Tensor, x: Tensor, geometry: Geometry, *, kernel: str | None = None) -> Tensor:
    """The products, `(B, O, D)`, exact integers rounded once to float32; arguments as of `code_norms`."""
    products = torch.empty(len(x), grad.shape[1], math.prod(geometry.kernel) * x.shape[1])
    _run_code_products(grad, x, geometry, torch.empty(len(x), dtype=torch.float64), products, kernel)
    return products


def _run_code_products(
    grad: Tensor, x: Tensor, geometry: Geometry, squares: Tensor, products: Tensor | None, kernel: str | None
) -> None:
    assert _native is not None
    _native.code_products(
        _memory(x), _memory(grad), None if products is None else products.numpy(), squares.numpy(),
        kernel=kernel or _native.code_kernels()[0], **_geometry_facts(grad, x, geometry),
    )  # fmt: skip


def add_code_products(
    grad: Tensor, x: Tensor, geometry: Geometry, weights_B: Tensor, totals: Tensor, *, kernel: str | None = None
) -> None:
    """Add these products, weighted and summed over examples, to totals `(threads, O, D)` in place.

    Each thread adds to its own total. The other arguments are those of `code_norms`; weights_B is float32.
    """
    assert _native is not None
    _native.add_code_products(
        _memory(x), _memory(grad), weights_B.contiguous().numpy(), totals.numpy(),
        kernel=kernel or _native.code_kernels()[0], **_geometry_facts(grad, x, geometry),
    )  # fmt: skip


def gram_norms(grad: Tensor, x: Tensor, geometry: Geometry, *, kernel: str | None = None) -> Tensor:
    """The same squared norms by Gram matrices, fast where positions are few; arguments as of `code_norms`."""
    assert _native is not None
    squares = torch.empty(len(x), dtype=torch.float64)
    _native.code_gram_norms(
        _memory(x), _memory(grad), squares.numpy(), kernel=kernel or _native.code_kernels()[0],
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
    """Add these products, weighted and summed over examples, to a total `(O, D)` in place; see `has_code_sums`.

    Sums are float32 sums of exact products.

    Args:
      grad: as of `code_norms`.
      x: as of `code_norms`.
      geometry: as of `code_norms`.
      weights_B: bfloat16 numbers, as float32.
      total: float32.
      bf16_terms: how many bfloat16 numbers add up to a weight times a code of grad, 1 or 2.
      kernel: `amx` or `avx512`; None: the fastest that this processor has.
    """
    assert _native is not None
    _native.add_code_sums(
        _memory(x), _memory(grad), weights_B.contiguous().numpy(), total.numpy(), pieces=bf16_terms,
        kernel=kernel or _native.code_sum_kernels()[0], **_geometry_facts(grad, x, geometry),
    )  # fmt: skip


def has_code_products(x: QTensor, num_positions: int, geometry: Geometry) -> bool:
    """Whether `code_products` and its kin can run on x here, and give the exact integers."""
    return _takes(x, geometry) and num_positions <= _MOST_POSITIONS and _code_products_run()


def has_gram_norms(x: QTensor, grad: QTensor, geometry: Geometry) -> bool:
    """Whether `gram_norms` can run on these operands here, and multiplies exact integers."""
    terms = max(x.codes.shape[1] * math.prod(geometry.kernel), grad.codes.shape[1])
    return has_code_products(x, math.prod(grad.codes.shape[2:]), geometry) and terms <= _MOST_TERMS


def has_code_sums(x: QTensor, geometry: Geometry) -> bool:
    """Whether `add_code_sums` can run on x here, and its products are exact."""
    return _takes(x, geometry) and _code_sums_run()


def _takes(x: QTensor, geometry: Geometry) -> bool:
    """Whether codes and walk are such as the kernels of codes take."""
    return x.zero_point == INT8_ZERO_POINT and x.codes.device.type == "cpu" and geometry.groups == 1


@functools.cache
def _code_products_run() -> bool:
    """Whether the kernels that would be taken exist and are exact."""
    return _native is not None and bool(_native.code_kernels()) and products_are_exact(code_products, gram_norms)


@functools.cache
def _code_sums_run() -> bool:
    return _native is not None and bool(_native.code_sum_kernels()) and sums_are_exact(add_code_sums)


def products_are_exact(products: Callable[..., Tensor], norms: Callable[..., Tensor]) -> bool:
    """Whether these, as `code_products` and `gram_norms`, give the exact integers for the largest codes."""
    grad, x, geometry, exact = _largest_codes()
    found = products(grad, x, geometry), norms(grad, x, geometry)
    return torch.equal(found[0], exact.float()) and torch.equal(found[1], exact.square().sum((1, 2)))


def sums_are_exact(add_sums: Callable[..., None]) -> bool:
    """Whether this, as `add_code_sums`, adds exactly while float32 has all bits of the sums."""
    grad, x, geometry, exact = _largest_codes()
    weights_B = torch.tensor([1.0, 0.5])
    sums = torch.zeros(exact.shape[1:])
    add_sums(grad, x, geometry, weights_B, sums, bf16_terms=2)
    return torch.equal(sums.double(), (exact * weights_B[:, None, None]).sum(0))


def _largest_codes() -> tuple[Tensor, Tensor, Geometry, Tensor]:
    """Codes of +-127 on maps of odd sizes, and their products in float64."""
    geometry = Geometry(kernel=(3, 3), stride=(2, 1), padding=(1, 1))
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        (torch.randint(0, 2, shape, generator=generator) * 254 + 1).to(torch.uint8)
        for shape in ((2, 35, 9, 21), (2, 19, 5, 21))
    )
    x, grad = (codes.contiguous(memory_format=torch.channels_last) for codes in (x, grad))
    values = [codes.double() - INT8_ZERO_POINT for codes in (x, grad)]
    return grad, x, geometry, patch_products(positions(values[1], geometry), im2col(values[0], geometry))


def _memory(maps: Tensor) -> Any:
    """The array of a map whose channels are last, as the kernels take it for granted."""
    assert len(maps) == 0 or maps.is_contiguous(memory_format=torch.channels_last)
    return maps.numpy()


def _geometry_facts(grad: Tensor, x: Tensor, geometry: Geometry) -> Any:
    """What all kernels are told of the convolution: an axis is (in, out, kernel, stride, padding, dilation)."""
    g = geometry
    rows, columns = zip(x.shape[2:], grad.shape[2:], g.kernel, g.stride, g.padding, g.dilation, strict=True)
    return {
        "rows": rows,
        "columns": columns,
        "channels": x.shape[1] // g.groups,
        "outputs": grad.shape[1] // g.groups,
        "threads": torch.get_num_threads(),
    }
