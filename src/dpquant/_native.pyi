# SPDX-License-Identifier: Apache-2.0
"""The loops of dpquant that profiling proved to matter. Python modules state what they compute."""

import numpy as np

def fill_noise(words: np.ndarray, noise: np.ndarray, *, std: float, threads: int) -> None:
    """Fill noise (n) with N(0, std^2) from n random words, or from n + 1 if n is odd."""

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
    """Fill codes (one byte each, in x's memory order) and scale (B) from the B rows of the dense x.

    clip: the root mean squares that a row's largest code stands for, if that is less than its largest magnitude.
    line: how many elements of a row draw under one line's key; None: all, under the row's own.
    channels: how many elements of a line make a column. Lines and columns of zeros at a row's end are not in the mean,
    unless line is None.
    """

def code_kernels() -> list[str]:
    """The kernels of `code_products` that this processor has, fastest first."""

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
    """Fill out (batch, outputs, kernel rows, kernel columns, channels), if given, and squares (batch).

    squares are the sums of its squares; an axis is (in, out, kernel, stride, padding, dilation).
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
    """Add weights (batch) times the examples' products to totals (parts, outputs, kernel rows, columns, channels).

    Each part gets those of its share of the examples.
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
    """Fill squares (batch) with the squared norms of the examples' products; kernels as of `code_products`."""

def code_sum_kernels() -> list[str]:
    """The kernels of `add_code_sums` that this processor has, fastest first."""

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
    """Add weights (batch) times the examples' products to total (outputs, kernel rows, kernel columns, channels).

    pieces: how many bfloat16 numbers a weight times a code of g may need.
    """

def direct_products_available() -> bool:
    """Whether this processor has a kernel for `direct_products`."""

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
    threads: int,
) -> None:
    """Fill out (batch, groups * outputs, kernel rows, kernel columns, channels) from channels-last maps.

    An axis is (in, out, kernel, stride, padding, dilation).
    """

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
    """Fill y, and mean and rstd (B, G), from channels-last x (B, T, C)."""

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
    """Fill grad_x, and grad_gamma and grad_beta (B, C), from channels-last g and x (B, T, C)."""
