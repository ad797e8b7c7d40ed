# SPDX-License-Identifier: Apache-2.0
"""Noise of a given standard deviation, from a secret key: Gaussian for sums of floats, discrete for sums of integers.

    noise = float32(std * z),    z: standard normals from the key's stream for (stream, step, attempt, name)

Discrete noise is drawn in `grid_noise.py`; the rest of this page is about Gaussian noise.

Every tensor of every step and attempt has a stream of its own, because noise that is used twice can be subtracted. The
plan decides the standard deviation; this file knows neither clipping nor epsilon.

Two 64-bit words a and b of the stream give two normals (Box and Muller), all in float64:

    u = (floor(a / 2^12) + 1/2) / 2^52,   v = (floor(b / 2^12) + 1/2) / 2^52 - 1/2      midpoints of 2^52 equal cells
    r = sqrt(-2 log u),   x = v pi / 2                                                  a quarter of the circle
    (z_1, z_2) = r (cos x, sin x),    both negated where b & 2,   exchanged where b & 1     the other three quarters

Logarithm, sine and cosine are evaluated by series with relative errors below 1e-15. IEEE 754 rounds every operation
involved correctly, so a key gives the same bits on every machine, with any number of threads, with and without the
native kernel. The numpy code in this file defines the result; the native kernel computes the same bits faster.

Truncation: |z| never exceeds sqrt(2 * 53 * log 2) = 8.572. A true normal exceeds it with probability 1.0e-17, which is
once in nine billion steps of a network with 11 million parameters.

Not guaranteed: the privacy proof is about real numbers. Floating-point noise has gaps, and which values a float32 sum
can take depends on the value to which the noise was added. Somebody who reads the last bits of a released gradient can
exploit that (Mironov 2012, "On significance of the least significant bits for differential privacy"; Jin et al., arXiv
2112.05307). Drawing and scaling in float64 does not prevent it; discrete noise does. The time that a draw takes is not
constant either.

Sources: Gaussian mechanism: Dwork and Roth 2014, "The algorithmic foundations of differential privacy", appendix A.
Normals: Box and Muller 1958, "A note on the generation of random normal deviates". Series: Abramowitz and Stegun 1964,
4.1.27, 4.3.65 and 4.3.66.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import SettingError
from dpquant.native import kernels as _native
from dpquant.privacy.grid_noise import discrete_gaussian
from dpquant.privacy.secret import Keyed

SMALLEST_STD, LARGEST_STD = 2.0**-100, 2.0**100  # within them float32 noise neither underflows nor overflows

_PIECE = (
    2**16
)  # words taken from the stream at a time: few enough to stay in the cache until they are turned into noise
ATANH = [1 / k for k in range(1, 20, 2)]  # atanh(s) / s in powers of s^2
SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)]  # sin(x) / x in powers of x^2
COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]  # cos(x) in powers of x^2


class NoiseSource(Keyed):
    """Noise as a function of a secret key and of the tensor, step and attempt that it is for."""

    def gaussian(
        self,
        shape: Sequence[int],
        std: float,
        *,
        stream: str,
        step: int,
        attempt: int,
        name: str,
        part: slice | None = None,
    ) -> Tensor:
        """Return independent N(0, std^2) entries.

        Args:
          shape: of the result.
          std: standard deviation, noise multiplier times sensitivity, in units of the sum to which the noise is added.
          stream: purpose of the noise, `train` or `analysis` in a run; different streams are independent.
          step: number of the step within the stream.
          attempt: number of the attempt, different each time the same step is taken.
          name: the tensor to which the noise is added, unique in its step.
          part: which entries of the flattened tensor to return, from start to stop; None returns all. A part has the
            bits that it has in the whole, and takes the time of its own entries.
        Returns: float32 of that shape, or flat if it is a part, on the CPU. Equal keys and arguments give equal bits.
        Raises:
          SettingError: std is not in [2^-100, 2^100].
        Privacy: reads no data. The privacy of a run depends on these values: add each to one sum, once, and release
          them in no other form.
        """
        if not SMALLEST_STD <= std <= LARGEST_STD:
            raise SettingError(
                f"Expected std in [2^-100, 2^100]; got std={std}. Outside, float32 noise is zero or infinite. "
                "Choose another noise_multiplier or clip norm."
            )
        start, stop = (0, math.prod(shape)) if part is None else (part.start, part.stop)
        odd = start % 2  # a block of two words gives two normals, of which the part may have the second alone
        words = self._key.stream("noise", stream, step, attempt, name, blocks=start // 2)
        noise = torch.empty(odd + stop - start, dtype=torch.float32)
        flat = noise.numpy()  # a numpy view is passed to C++ faster than a torch tensor
        for place in range(0, flat.size, _PIECE):
            piece = flat[place : place + _PIECE]
            self._fill(piece, words.words(piece.size + piece.size % 2), std)
        return noise.view(tuple(shape)) if part is None else noise[odd:]

    def discrete(
        self,
        shape: Sequence[int],
        *,
        stream: str,
        step: int,
        attempt: int,
        name: str,
        part: slice | None = None,
    ) -> Tensor:
        """Return independent integers from the discrete Gaussian of standard deviation 2^28, in steps of a grid.

        Args: as for `gaussian`; but a part takes the time of the whole, as each draw takes as many bits as it needs.
        Returns: int64 of that shape, or flat if it is a part, on the CPU. Equal keys and arguments give equal integers.
        Privacy: as of `gaussian`.
        """
        words = self._key.stream("discrete noise", stream, step, attempt, name)
        noise = torch.from_numpy(discrete_gaussian(words, math.prod(shape)))
        return noise.view(tuple(shape)) if part is None else noise[part]

    def _fill(self, noise: np.ndarray, words: np.ndarray, std: float) -> None:
        """Fill `noise` with `std` times the normals made from the words, rounded to float32."""
        if _native is not None:
            _native.fill_noise(words, noise, std=std, threads=torch.get_num_threads())
        else:
            fill_in_numpy(noise, words, std)


def fill_in_numpy(noise: np.ndarray, words: np.ndarray, std: float) -> None:
    """Fill `noise` as the native kernel does, bit for bit; arguments are those of the kernel."""
    noise[:] = (std * normals(words))[: noise.size]


def normals(words: np.ndarray) -> np.ndarray:
    """Return independent standard normals, made from random words. Defines the result of the native kernel.

    Args:
      words: uint64 `(2 n,)`, uniform and independent.
    Returns: float64 `(2 n,)`; values 2 i and 2 i + 1 are made from words 2 i and 2 i + 1.
    Privacy: reads no data.
    Source: Box and Muller 1958.
    """
    a, b = words.reshape(-1, 2).T
    radius = np.sqrt(-2.0 * log_of(cell_midpoints(a)))
    radius = np.where(b & np.uint64(2), -radius, radius)
    sine, cosine = sine_and_cosine((cell_midpoints(b) - 0.5) * (math.pi / 2))
    exchanged = (b & np.uint64(1)).astype(bool)
    first, second = np.where(exchanged, sine, cosine), np.where(exchanged, cosine, sine)
    return np.stack([radius * first, radius * second], axis=1).reshape(-1)


def cell_midpoints(words: np.ndarray) -> np.ndarray:
    """Return (floor(word / 2^12) + 1/2) / 2^52 in (0, 1), exactly, for each word. The lowest 12 bits are not used."""
    return (words >> np.uint64(12)).astype(np.float64) * 2.0**-52 + 2.0**-53


def log_of(u: np.ndarray, atanh: Sequence[float] = ATANH) -> np.ndarray:
    """Return the natural logarithm of u in (0, 1): e log 2 + 2 atanh((m - 1) / (m + 1)), where u = m 2^e, m near 1."""
    m, e = np.frexp(u)  # m in [1/2, 1)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2 * m, m), np.where(low, e - 1, e)
    s = (m - 1.0) / (m + 1.0)
    return e * math.log(2) + (s + s) * _polynomial(atanh, s * s)


def sine_and_cosine(
    x: np.ndarray, sin: Sequence[float] = SIN, cos: Sequence[float] = COS
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sine and the cosine of x, |x| <= pi / 4, by their series."""
    square = x * x
    return x * _polynomial(sin, square), _polynomial(cos, square)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Return c_0 + c_1 x + c_2 x^2 + ..., by Horner's rule."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total
