# SPDX-License-Identifier: Apache-2.0
"""Independent second answers, slow and plain. Nothing here may import dpquant.

Formats: every value by its definition (lists of integers, or bytes decoded one by one), rounding in exact fractions.
Draws: the keys and the hash of dpquant.rounding on Python integers, and the hash's inverse.
Means: which elements of a map they are over, place by place.
"""

import bisect
from fractions import Fraction

import torch
from torch import Tensor

ONE = 2**23  # 1.0 in units of a draw
HALF = 2**22
MASK_32 = 2**32 - 1
FIRST, SECOND = 0x7FEB352D, 0x846CA68B  # the hash's multipliers


def float8_values(exponent_bits: int, mantissa_bits: int, bias: int, num_codes: int) -> list[float]:
    """All finite values of a float8: the first `num_codes` of the 128 bytes without a sign, and their negatives."""
    magnitudes = []
    for byte in range(num_codes):
        exponent, mantissa = byte >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
        assert exponent < 1 << exponent_bits
        fraction = mantissa / (1 << mantissa_bits)
        magnitudes.append(2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction))
    return sorted({sign * magnitude for magnitude in magnitudes for sign in (1, -1)})


VALUES: dict[str, list[float]] = {
    "e3m0": [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64],
    "e2m1": [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12],
    "int4": list(range(-7, 8)),
    "int8": list(range(-127, 128)),
    "fp8-e4m3": float8_values(4, 3, bias=7, num_codes=127),  # byte 127 is NaN
    "fp8-e5m2": float8_values(5, 2, bias=15, num_codes=124),  # bytes 124.. are infinity and NaN
}


def rounded(name: str, value: float, draw: int) -> float:
    """The value of the format that `value` becomes under a 23-bit draw: away from zero if fraction + draw >= 1."""
    magnitudes = [level for level in VALUES[name] if level >= 0]
    magnitude = abs(value)
    above = bisect.bisect_right(magnitudes, magnitude)
    if above == len(magnitudes):
        result = magnitudes[-1]
    else:
        low, high = Fraction(magnitudes[above - 1]), Fraction(magnitudes[above])
        fraction = round((Fraction(magnitude) - low) / (high - low) * ONE)  # Python rounds ties to even
        result = magnitudes[above if fraction + draw >= ONE else above - 1]
    return -result if value < 0 else result


def block_scale(name: str, largest: float, row_largest: float) -> Fraction:
    """The scale of a block of E2M1 codes, row scale included: the smallest with largest <= 12 * scale that there is.

    Of MXFP4 it is a power of two, of NVFP4 an E4M3 number times a scale that maps the row's largest onto 12 * 448.
    """
    if name == "mxfp4":
        scales = [Fraction(2) ** exponent for exponent in range(-110, 127)]
    else:
        row_scale = Fraction(row_largest) / (12 * 448)
        scales = [Fraction(level) * row_scale for level in VALUES["fp8-e4m3"] if level > 0]
    return next(scale for scale in scales if Fraction(largest) <= 12 * scale)


def boundaries(name: str) -> list[float]:
    """float32 values at, just below and just above every level and every midpoint of two levels, up to the largest."""
    levels = torch.tensor(VALUES[name], dtype=torch.float32)
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
    near = [torch.nextafter(points, torch.full_like(points, side)) for side in (-torch.inf, torch.inf)]
    values = torch.cat([points, *near])
    return values[values.abs() <= levels[-1]].unique().tolist()


def extent(maps: list[list[list[float]]]) -> int:
    """How many elements of a map `(C, H, W)` a mean is over: those in no line and no column of zeros at its end."""
    places = [(h, w) for lines in maps for h, line in enumerate(lines) for w, value in enumerate(line) if value != 0]
    return len(maps) * (1 + max(h for h, _ in places)) * (1 + max(w for _, w in places))


def line_key(row_key: int, line: int) -> int:
    """The key, 0 <= key < 2^64, of a map's line: output number `line` of splitmix64 seeded with a row key."""
    z = (row_key + (line + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def hashed(index: int, row_key: int) -> int:
    """The 32 bits whose upper 23 are the draw of element `index` under a 64-bit key (of either sign)."""
    low, high = row_key & MASK_32, (row_key >> 32) & MASK_32
    h = index ^ low
    h = ((h ^ (h >> 16)) * FIRST) & MASK_32
    h = h ^ high
    h = ((h ^ (h >> 15)) * SECOND) & MASK_32
    return h ^ (h >> 16)


def unhashed(h: Tensor, high: int) -> Tensor:
    """The inverse of the hash: index ^ low for given 32 bits h (int64)."""
    h = h ^ (h >> 16)
    h = (h * pow(SECOND, -1, 2**32)) & MASK_32
    h = h ^ (h >> 15) ^ (h >> 30) ^ high
    h = (h * pow(FIRST, -1, 2**32)) & MASK_32
    return h ^ (h >> 16)
