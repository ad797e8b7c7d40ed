# SPDX-License-Identifier: Apache-2.0
"""The native kernels of dpquant: the loops in which profiling found time to be spent.

Maps are channels last, which the kernels do not check. An axis of a convolution (`rows`, `columns`) is given as (in,
out, kernel, stride, padding, dilation). The Python callers document the results.
"""

from collections.abc import Sequence

import numpy as np

def float_kernels() -> list[str]:
    """Return the kernels for float32 that this processor has, fastest first: `avx512`, `avx2`."""

def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    out: np.ndarray,
    *,
    scale: float,
    causal: bool,
    kernel: str,
    threads: int,
) -> None:
    """Fill out (B, N, L, E) from q, k and v (B, N, S, E); a mask (B, N, L, S) is added to the scores.

    Features, a multiple of 16, and a mask's last axis are contiguous; all other strides are free.
    """

def attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    grad: np.ndarray,
    grad_q: np.ndarray,
    grad_k: np.ndarray,
    grad_v: np.ndarray,
    *,
    scale: float,
    causal: bool,
    kernel: str,
    threads: int,
) -> None:
    """Fill the gradients of q, k and v from that of the output; the other arguments are those of `attention`."""

def fill_noise(words: np.ndarray, noise: np.ndarray, *, std: float, threads: int) -> None:
    """Fill noise (n) with samples of N(0, std^2), from n random words if n is even, else from n + 1."""

def quantize_rows(
    x: np.ndarray,
    row_keys: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    clip: float | None,
    *,
    line: int | None,
    channels: int,
    max_code: float,
    uniform: bool,
    stochastic: bool,
    zero_point: int,
    threads: int,
) -> None:
    """Fill codes (one byte each, in x's memory order) and scale (B) from the B rows of x, whose memory has no gaps.

    clip: saturation threshold of a row in root mean squares, at most its largest magnitude; None: no saturation.
    line: number of elements per line key; None: all elements of a row draw under the row key.
    channels: number of elements per column of a line. Unless line is None, the mean square omits lines and columns of
    zeros at a row's end.
    """

def code_kernels() -> list[str]:
    """Return the names of the kernels of `code_products` that this processor supports, fastest first."""

def code_products(
    x: np.ndarray,
    g: np.ndarray,
    out: np.ndarray | None,
    squares: np.ndarray,
    *,
    rows: tuple[int, int, int, int, int, int],
    columns: tuple[int, int, int, int, int, int],
    channels: int,
    outputs: int,
    kernel: str,
    threads: int,
) -> None:
    """Materialise weight gradients of codes; fill squares (batch) with their squared norms.

    If out is given, fill it with the gradients: (batch, outputs, kernel rows, kernel columns, channels).
    """

def add_code_products(
    x: np.ndarray,
    g: np.ndarray,
    weights: np.ndarray,
    totals: np.ndarray,
    *,
    rows: tuple[int, int, int, int, int, int],
    columns: tuple[int, int, int, int, int, int],
    channels: int,
    outputs: int,
    kernel: str,
    threads: int,
) -> None:
    """Add the weighted gradients of `code_products` to totals (parts, outputs, kernel rows, kernel columns, channels).

    The examples are divided among the parts; each part sums its own.
    """

def code_gram_norms(
    x: np.ndarray,
    g: np.ndarray,
    squares: np.ndarray,
    *,
    rows: tuple[int, int, int, int, int, int],
    columns: tuple[int, int, int, int, int, int],
    channels: int,
    outputs: int,
    kernel: str,
    threads: int,
) -> None:
    """Fill squares (batch) with the squared norms of `code_products`, by Gram matrices; with its kernels."""

def code_sum_kernels() -> list[str]:
    """Return the names of the kernels of `add_code_sums` that this processor supports, fastest first."""

def add_code_sums(
    x: np.ndarray,
    g: np.ndarray,
    weights: np.ndarray,
    total: np.ndarray,
    *,
    rows: tuple[int, int, int, int, int, int],
    columns: tuple[int, int, int, int, int, int],
    channels: int,
    outputs: int,
    pieces: int,
    kernel: str,
    threads: int,
) -> None:
    """Add the weighted sum of the gradients of codes to total (outputs, kernel rows, kernel columns, channels).

    pieces: bfloat16 terms needed to represent a weight times a code of g exactly, 1 or 2.
    """

def direct_products(
    x: np.ndarray,
    g: np.ndarray,
    out: np.ndarray,
    *,
    batch: int,
    rows: tuple[int, int, int, int, int, int],
    columns: tuple[int, int, int, int, int, int],
    channels: int,
    outputs: int,
    groups: int,
    kernel: str,
    threads: int,
) -> None:
    """Fill out (batch, groups * outputs, kernel rows, kernel columns, channels) with weight gradients of values."""

def group_norm(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    y: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    *,
    positions: int,
    channels: int,
    groups: int,
    eps: float,
    threads: int,
) -> None:
    """Fill y (B, T, C), mean (B, G) and rstd (B, G) from channels-last x (B, T, C)."""

def group_norm_backward(
    g: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    grad_x: np.ndarray,
    grad_gamma: np.ndarray,
    grad_beta: np.ndarray,
    *,
    positions: int,
    channels: int,
    groups: int,
    threads: int,
) -> None:
    """Fill grad_x (B, T, C), grad_gamma (B, C) and grad_beta (B, C) from channels-last g and x (B, T, C)."""

def tap_kernels() -> list[str]:
    """Return the kernels of `TapWeights` that this processor has, fastest first: `vnni`, `avx2`."""

class TapWeights:
    """Weights of kernel taps, packed for convolutions of codes."""

    def __init__(
        self,
        weight: np.ndarray,
        *,
        taps: list[tuple[int, int]],
        places: list[int],
        groups: int,
        transposed: bool,
        most: int,
        kernel: str,
    ) -> None:
        """Pack weight (O, C / groups, kernel size): tap k is at (row, column) taps[k], place places[k] of the kernel.

        most: the largest magnitude of any code. Raises ValueError if there is no kernel for it.
        """

def convolve_codes(
    x: np.ndarray,
    scales: np.ndarray,
    output_scales: np.ndarray,
    bias: np.ndarray | None,
    out: np.ndarray,
    *,
    parts: Sequence[tuple[TapWeights, tuple[int, ...], tuple[int, ...]]],
    threads: int,
) -> None:
    """Fill out, channels last, by parts (weights, rows, columns). Raises ValueError if sizes do not agree.

    An axis is (in, count, stride, first, step, size): position p < count reads x at p * stride + tap and lies at
    first + p * step of size.
    """
