# SPDX-License-Identifier: Apache-2.0
"""Number formats, recipes and precisions: immutable descriptions, without tensors and without torch.

A value is `code * scale`, and a format defines the set of codes. One rule covers all formats: near a magnitude t the
spacing of the codes is

    quantum(t) = 2^(max(floor(log2 t), min_exponent) - mantissa_bits),        and |code| <= max_code.

Below 2^(min_exponent + 1) the spacing is constant (the subnormals of a floating-point format). In a uniform integer
format all codes lie in this range. A recipe gives a format and a rounding to each role: weight, activation and output
gradient. A precision gives a recipe, or full precision, to each of a layer's three products.

Users write them as text:

    role         the name of a format; then ~ for stochastic rounding, @ and a clip,   int8, e3m0~, int4@2.5#, int4@4+
                 + for unsigned codes in rows without negative values, # for a
                 scale per channel
    recipe       a name, or the roles of weight, activation and gradient               luq-fp4, int4,int4,e3m0~
    precision    full, a recipe, or those of forward, dgrad and wgrad                  full/luq-fp4/luq-fp4

Sources: E3M0 from LUQ (Chmiel et al. 2021, arXiv:2112.10769), with alpha = absmax / 64 so that 15 values fit 4 bits;
the FP8 formats from OCP 8-bit Floating Point Specification (OFP8), revision 1.0.
"""

import dataclasses
import enum
import math
import re
from typing import cast

from dpquant.errors import FormatError

_ROLE = re.compile(
    r"(?P<name>[a-z0-9-]+)(?P<stochastic>~)?(@(?P<clip>[0-9.]*[1-9][0-9]*))?(?P<one_sided>\+)?(?P<channels>#)?"
)


class Rounding(enum.Enum):
    """Rule by which a value between two codes is rounded to one of them."""

    STOCHASTIC = "stochastic"  # up with probability equal to the fraction, which is unbiased
    NEAREST = "nearest"  # to the nearer code; ties away from zero


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleFormat:
    """Format, rounding and scale rule of one role.

    A row is a set of values with one scale: an example of an activation or gradient, a weight, or a channel of it.

    Attributes:
      format: the number format.
      rounding: the rounding rule.
      clip: the largest code represents `clip` times the root mean square of the row, but at most its largest magnitude.
        Larger values saturate, which is biased. The mean square is over the lines and columns up to the last one that
        is not zero, so that padding does not change it. None: the largest code represents the largest magnitude.
      per_channel: a weight has one scale per output channel, or per input channel in the product with output gradients;
        otherwise it has a single scale.
      one_sided: a row without negative values, as after ReLU, uses `format.one_sided`, which has twice as many levels.

    Raises:
      FormatError: `format` is not a NumberFormat, `rounding` is not a Rounding, `clip` is not above zero, or the
        one-sided codes do not fit int8.
    """

    format: NumberFormat
    rounding: Rounding
    clip: float | None = None
    per_channel: bool = False
    one_sided: bool = False

    def __post_init__(self):
        if not isinstance(self.format, NumberFormat):
            raise FormatError(
                f"Expected format to be a NumberFormat; got format={self.format!r}. A role needs the format's facts. "
                "Look one up by number_format(name)."
            )
        if not isinstance(self.rounding, Rounding):
            raise FormatError(
                f"Expected rounding to be a Rounding; got rounding={self.rounding!r}. There are two ways to round. "
                "Give Rounding.STOCHASTIC or Rounding.NEAREST."
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise FormatError(f"Expected clip > 0 and finite; got clip={self.clip}. Values from 2 to 4 make sense.")
        if self.one_sided and not self.format.one_sided.fits_int8:
            raise FormatError(
                f"Expected format {self.format.name!r} without +; got codes of one sign up to "
                f"{self.format.one_sided.max_code}. They do not fit int8. Leave + out."
            )

    @property
    def max_code(self) -> int:
        """Return the largest magnitude of a code."""
        return self.format.one_sided.max_code if self.one_sided else self.format.max_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Format and rounding of each operand of a quantized layer. Users choose a recipe by `format=`.

    Attributes:
      name: as users write it and as records show it.
      weight: of the layer's weight, which has one scale, or one per channel (`RoleFormat.per_channel`).
      activation: of the layer's input, which has one scale per example.
      gradient: of the gradient of the layer's output, which has one scale per example.

    Raises:
      FormatError: the name is empty, a role is not a RoleFormat, or a role other than the weight is per channel.
    """

    name: str
    weight: RoleFormat
    activation: RoleFormat
    gradient: RoleFormat

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise FormatError(
                f"Expected name to be a non-empty string; got name={self.name!r}. Records name the recipe. "
                "Give it a name."
            )
        for role in ("weight", "activation", "gradient"):
            if not isinstance(getattr(self, role), RoleFormat):
                raise FormatError(
                    f"Expected {role} to be a RoleFormat; got {role}={getattr(self, role)!r}. A recipe states every "
                    "role. Give RoleFormat(format=..., rounding=...)."
                )
        if self.activation.per_channel or self.gradient.per_channel:
            raise FormatError(
                "Expected per_channel of the weight alone; got it of another role. The scales of an example's channels "
                "cannot be taken out of a product's sum. Leave # out there."
            )

    @property
    def roles(self) -> tuple[RoleFormat, RoleFormat, RoleFormat]:
        """Return the roles weight, activation and gradient."""
        return self.weight, self.activation, self.gradient

    @property
    def product_bits(self) -> tuple[int, int, int]:
        """Return the number of bits of the wider operand of forward, dgrad and wgrad."""
        weight, activation, gradient = (role.format.bits for role in self.roles)
        return max(weight, activation), max(weight, gradient), max(activation, gradient)

    @property
    def fits_int8(self) -> bool:
        """Return whether the codes of all roles are integers in -127..127, which int8 instructions can multiply."""
        return all(role.format.fits_int8 for role in self.roles)

    @property
    def max_code(self) -> int:
        """Return the largest magnitude of a code of any role."""
        return max(role.max_code for role in self.roles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Recipe of each of a layer's three products; None: full precision.

    Attributes:
      forward: of the product of activations and weight, which gives the output.
      dgrad: of the product of output gradients and weight, which gives the input gradient.
      wgrad: of the product of output gradients and activations, which gives each example's weight gradient.
    """

    forward: Recipe | None = None
    dgrad: Recipe | None = None
    wgrad: Recipe | None = None

    @property
    def recipes(self) -> tuple[Recipe | None, Recipe | None, Recipe | None]:
        """Return the recipes of forward, dgrad and wgrad."""
        return self.forward, self.dgrad, self.wgrad

    @property
    def quantized(self) -> bool:
        """Return whether any product runs quantized."""
        return any(self.recipes)

    @property
    def name(self) -> str:
        """Return the precision as users write it."""
        names = ["full" if recipe is None else recipe.name for recipe in self.recipes]
        return names[0] if len(set(names)) == 1 else "/".join(names)

    @property
    def fits_int8(self) -> bool:
        """Return whether all codes are integers in -127..127."""
        return all(recipe is None or recipe.fits_int8 for recipe in self.recipes)

    @property
    def max_code(self) -> int:
        """Return the largest magnitude of any code; 0 in full precision."""
        return max((recipe.max_code for recipe in self.recipes if recipe is not None), default=0)

    def share(self, most_bits: int = 8) -> float:
        """Return the share of the multiplications whose operands have at most `most_bits` bits: 0, 1/3, 2/3 or 1.

        The three products have equal numbers of multiplications.
        """
        bits = [recipe.product_bits[i] for i, recipe in enumerate(self.recipes) if recipe is not None]
        return sum(b <= most_bits for b in bits) / 3


FULL_PRECISION = Precision()

E3M0 = NumberFormat(name="e3m0", exponent_bits=3, mantissa_bits=0, min_exponent=0, max_code=64)
INT4 = NumberFormat(name="int4", exponent_bits=0, mantissa_bits=3, min_exponent=3, max_code=7)
INT8 = NumberFormat(name="int8", exponent_bits=0, mantissa_bits=7, min_exponent=7, max_code=127)
FP8_E4M3 = NumberFormat(name="fp8-e4m3", exponent_bits=4, mantissa_bits=3, min_exponent=-6, max_code=448)
FP8_E5M2 = NumberFormat(name="fp8-e5m2", exponent_bits=5, mantissa_bits=2, min_exponent=-14, max_code=57344)
FORMATS = {number_format.name: number_format for number_format in (E3M0, INT4, INT8, FP8_E4M3, FP8_E5M2)}


def _recipe(name: str, forward: NumberFormat, rounding: Rounding, gradient: NumberFormat) -> Recipe:
    """Return a recipe with one format and rounding for weight and activation, and a stochastically rounded gradient."""
    operand = RoleFormat(format=forward, rounding=rounding)
    output_gradient = RoleFormat(format=gradient, rounding=Rounding.STOCHASTIC)
    return Recipe(name=name, weight=operand, activation=operand, gradient=output_gradient)


RECIPES = {
    entry.name: entry
    for entry in (
        _recipe("luq-fp4", E3M0, Rounding.STOCHASTIC, E3M0),  # DPQuant
        _recipe("luq", INT4, Rounding.NEAREST, E3M0),  # LUQ as published, but for the scale: absmax / 64
        Recipe(  # four bits, with uniform levels in the range of most values; measured in docs/paper.md, E8
            name="int4-clip",
            weight=RoleFormat(format=INT4, rounding=Rounding.NEAREST, clip=2.5, per_channel=True),
            activation=RoleFormat(format=INT4, rounding=Rounding.NEAREST, clip=4.0, one_sided=True),
            gradient=RoleFormat(format=E3M0, rounding=Rounding.STOCHASTIC),
        ),
        _recipe("int8", INT8, Rounding.NEAREST, INT8),
        _recipe("fp8", FP8_E4M3, Rounding.NEAREST, FP8_E5M2),
    )
}


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


def recipe(name: str | Recipe) -> Recipe:
    """Return the recipe with this name, or with these three roles; return a Recipe unchanged.

    Raises:
      FormatError: the text is neither. The message lists the known names.
    """
    if isinstance(name, Recipe):
        return name
    if name in RECIPES:
        return RECIPES[name]
    roles = [_role(text) for text in name.split(",")]
    if len(roles) != 3 or None in roles:
        raise FormatError(
            f"Expected format to be one of {', '.join(RECIPES)}, a Recipe, or the formats of weight, activation and "
            f"gradient as in int4,int4,e3m0~; got format={name!r}. A recipe says how each operand is rounded. "
            "Choose one of them."
        )
    weight, activation, gradient = cast(list[RoleFormat], roles)
    return Recipe(name=name, weight=weight, activation=activation, gradient=gradient)


def precision(text: str | Recipe | Precision) -> Precision:
    """Return the precision that a text describes; return a Precision unchanged.

    Args:
      text: `full`, a recipe, or those of forward, dgrad and wgrad, separated by slashes.
    Raises:
      FormatError: the text describes no precision. The message says what is known.
    """
    if isinstance(text, Precision):
        return text
    parts = [text] if isinstance(text, Recipe) else text.split("/")
    if len(parts) not in (1, 3):
        raise FormatError(
            f"Expected one or three recipes in format; got format={text!r}. A layer has three products: forward, dgrad "
            "and wgrad. Write one for all of them, or three, as in full/luq-fp4/luq-fp4."
        )
    recipes = [None if part == "full" else recipe(part) for part in parts]
    forward, dgrad, wgrad = recipes * 3 if len(recipes) == 1 else recipes
    return Precision(forward=forward, dgrad=dgrad, wgrad=wgrad)


def _role(text: str) -> RoleFormat | None:
    """Return the role that a text such as `int8`, `e3m0~` or `int4@2.5#` describes; None if it describes none."""
    parts = _ROLE.fullmatch(text)
    if parts is None or parts["name"] not in FORMATS:
        return None
    return RoleFormat(
        format=FORMATS[parts["name"]],
        rounding=Rounding.STOCHASTIC if parts["stochastic"] else Rounding.NEAREST,
        clip=float(parts["clip"]) if parts["clip"] else None,
        per_channel=bool(parts["channels"]),
        one_sided=bool(parts["one_sided"]),
    )
