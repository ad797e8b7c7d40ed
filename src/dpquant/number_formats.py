# SPDX-License-Identifier: Apache-2.0
"""Number formats: the codes that a value can become. Immutable descriptions, without tensors and without torch.

A value is `code * scale`, and a format defines the set of codes. One rule covers all formats: near a magnitude t the
spacing of the codes is

    quantum(t) = 2^(max(floor(log2 t), min_exponent) - mantissa_bits),        and |code| <= max_code.

Below 2^(min_exponent + 1) the spacing is constant (the subnormals of a floating-point format). In a uniform integer
format all codes lie in this range.

Sources: E3M0 from LUQ (Chmiel et al. 2021, arXiv:2112.10769), with alpha = absmax / 64 so that 15 values fit 4 bits;
the FP8 formats from OCP 8-bit Floating Point Specification (OFP8), revision 1.0; E2M1 from OCP Microscaling Formats
(MX) Specification, version 1.0, in units of its smallest magnitude, 0.5, so that its codes are integers.
"""

import dataclasses
import math

from dpquant.errors import FormatError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Set of codes of a number format. Signed codes are symmetric about zero.

    Attributes:
      name: as users write it.
      exponent_bits: number of exponent bits; 0 for a uniform integer format.
      mantissa_bits: number of mantissa bits; in a uniform integer format, all bits but the sign.
      min_exponent: floor(log2) of the largest magnitudes that have the same spacing as the codes next to zero.
      max_code: the largest magnitude of a code.
      signed: whether codes have a sign bit; without it no code is negative.

    Raises:
      FormatError: the numbers do not describe a format.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    min_exponent: int
    max_code: int
    signed: bool = True

    def __post_init__(self):
        if self.exponent_bits < 0 or self.mantissa_bits < 0 or not 2 <= self.bits <= 8:
            raise FormatError(
                f"Expected bits of format {self.name!r} between 2 and 8; got exponent_bits={self.exponent_bits}, "
                f"mantissa_bits={self.mantissa_bits}. Codes are stored in one byte. Give bits that fit with the sign."
            )
        if not 1 <= self.max_code <= 2**16 or math.fmod(self.max_code, self.quantum(self.max_code)):
            raise FormatError(
                f"Expected max_code of format {self.name!r} to be one of its codes; got max_code={self.max_code}. "
                "The largest magnitude is mapped onto it. Give a value that the format represents."
            )

    @property
    def bits(self) -> int:
        """Return the number of bits of a code, including the sign."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def significant_bits(self) -> int:
        """Return the number of significant bits of a magnitude: 1 if all codes are powers of two."""
        return self.mantissa_bits + (self.exponent_bits > 0)

    @property
    def fits_int8(self) -> bool:
        """Return whether every code is an integer in -127..127."""
        return self.min_exponent >= self.mantissa_bits and self.max_code <= 127

    def quantum(self, magnitude: float) -> float:
        """Return the distance from the largest code <= `magnitude` to the next larger code; `magnitude` >= 0."""
        exponent = math.frexp(magnitude)[1] - 1 if magnitude > 0 else self.min_exponent
        return math.ldexp(1.0, max(exponent, self.min_exponent) - self.mantissa_bits)

    def levels(self) -> tuple[float, ...]:
        """Return all codes in ascending order."""
        magnitudes = [0.0]
        while magnitudes[-1] < self.max_code:
            magnitudes.append(magnitudes[-1] + self.quantum(magnitudes[-1]))
        return tuple(-magnitude for magnitude in reversed(magnitudes[1:]) if self.signed) + tuple(magnitudes)

    @property
    def one_sided(self) -> "NumberFormat":
        """Return the unsigned uniform format with the same number of bits: the sign bit becomes a magnitude bit.

        Raises:
          FormatError: the format is not uniform.
        """
        if self.exponent_bits:
            raise FormatError(
                f"Expected a uniform format for codes of one sign; got format {self.name!r}. Only there the sign can "
                "become a bit of magnitude. Leave + out."
            )
        return dataclasses.replace(
            self,
            name=f"u{self.name}",
            mantissa_bits=self.mantissa_bits + 1,
            min_exponent=self.min_exponent + 1,
            max_code=2 * self.max_code + 1,
            signed=False,
        )


E3M0 = NumberFormat(name="e3m0", exponent_bits=3, mantissa_bits=0, min_exponent=0, max_code=64)
E2M1 = NumberFormat(name="e2m1", exponent_bits=2, mantissa_bits=1, min_exponent=1, max_code=12)
INT4 = NumberFormat(name="int4", exponent_bits=0, mantissa_bits=3, min_exponent=3, max_code=7)
INT8 = NumberFormat(name="int8", exponent_bits=0, mantissa_bits=7, min_exponent=7, max_code=127)
FP8_E4M3 = NumberFormat(name="fp8-e4m3", exponent_bits=4, mantissa_bits=3, min_exponent=-6, max_code=448)
FP8_E5M2 = NumberFormat(name="fp8-e5m2", exponent_bits=5, mantissa_bits=2, min_exponent=-14, max_code=57344)
FORMATS = {number_format.name: number_format for number_format in (E3M0, E2M1, INT4, INT8, FP8_E4M3, FP8_E5M2)}


def number_format(name: str) -> NumberFormat:
    """Return the format with this name.

    Raises:
      FormatError: the name is unknown. The message lists the known ones.
    """
    if name not in FORMATS:
        raise FormatError(
            f"Expected format to be one of {', '.join(FORMATS)}; got format={name!r}. Only these have codes. "
            "Choose one of them."
        )
    return FORMATS[name]
