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
    *,
    inner: int,
    outer_stride: int,
    inner_stride: int,
    max_code: float,
    uniform: bool,
    stochastic: bool,
    zero_point: int,
    threads: int,
) -> None:
    """Fill codes (one byte each, in x's memory order) and scale (B) from the B rows of the dense x."""
