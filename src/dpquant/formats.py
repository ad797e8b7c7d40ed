# SPDX-License-Identifier: Apache-2.0
"""Number formats and recipes: frozen facts, no arithmetic on tensors and no torch.

A value is `code * scale`; a format says which codes there are. One rule covers all of them: near a magnitude t the
codes are spaced by

    quantum(t) = 2^(max(floor(log2 t), min_exponent) - mantissa_bits),        and |code| <= max_code.

Below 2^(min_exponent + 1) the spacing is constant (a floating-point format's subnormals); a uniform integer format is
one that never leaves this range. A recipe names a format and a rounding for each role: weight, activation, output
gradient. A precision says which recipe each of a layer's three products runs in, or that it runs in full precision.

Users write them as text:

    role         a format's name; then ~ for stochastic rounding, @ and a clip,        int8, e3m0~, int4@2.5#, int4@4+
                 + for codes of one sign where that is all there is, # for a
                 scale a channel
    recipe       a name, or the roles of weight, activation and gradient               luq-fp4, int4,int4,e3m0~
    precision    full, a recipe, or what forward, dgrad and wgrad run in               full/luq-fp4/luq-fp4

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
    """How a value between two codes becomes one of them."""

    STOCHASTIC = "stochastic"  # up with probability equal to the fraction: unbiased
    NEAREST = "nearest"  # to the nearer one; a tie goes away from zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Which codes there are: a sign, `exponent_bits` and `mantissa_bits`. Signed codes are symmetric about zero.

    Attributes:
      name: as users write it.
      exponent_bits: 0 for a uniform integer format.
      mantissa_bits: of a uniform integer format, all bits but the sign.
      min_exponent: floor(log2) of the largest magnitudes that are spaced like zero's neighbours.
      max_code: the largest magnitude.
      signed: False: there is no sign, and no code below zero.

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
        """Bits of a code, its sign's included."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def significant_bits(self) -> int:
        """How many bits a code's magnitude has from its first one on: 1 for powers of two."""
        return self.mantissa_bits + (self.exponent_bits > 0)

    @property
    def fits_int8(self) -> bool:
        """Whether every code is an integer in -127..127."""
        return self.min_exponent >= self.mantissa_bits and self.max_code <= 127

    def quantum(self, magnitude: float) -> float:
        """The distance from the code at or below `magnitude` >= 0 to the next one up."""
        exponent = math.frexp(magnitude)[1] - 1 if magnitude > 0 else self.min_exponent
        return math.ldexp(1.0, max(exponent, self.min_exponent) - self.mantissa_bits)

    def levels(self) -> tuple[float, ...]:
        """Every code, ascending."""
        magnitudes = [0.0]
        while magnitudes[-1] < self.max_code:
            magnitudes.append(magnitudes[-1] + self.quantum(magnitudes[-1]))
        return tuple(-magnitude for magnitude in reversed(magnitudes[1:]) if self.signed) + tuple(magnitudes)

    @property
    def one_sided(self) -> "NumberFormat":
        """The uniform format of as many bits whose sign is one more bit of magnitude.

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
    """The format and the rounding of one role, and where its scale comes from.

    Attributes:
      clip: what the largest code stands for, in root mean squares of the row, if its largest magnitude is not less;
        what lies beyond is cut off, which is biased. The mean runs over the lines and columns up to the last that is
        not zero, so that padding changes nothing. None: the largest magnitude.
      per_channel: a weight's scale for each output channel, or for each input channel where it meets output gradients;
        else one for the whole weight.
      one_sided: a row without negative values, as after ReLU, takes `format.one_sided`: twice as many levels.

    Raises:
      FormatError: `format` is no NumberFormat, `rounding` no Rounding, `clip` not above zero, or codes of one sign do
        not fit int8.
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
        """The largest magnitude of a code."""
        return self.format.one_sided.max_code if self.one_sided else self.format.max_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a user picks by `format=`: for each operand of a quantized layer its format and rounding.

    Attributes:
      name: as users write it and as records show it.
      weight: the layer's weight; one scale for the whole tensor.
      activation: the layer's input; one scale per example.
      gradient: the gradient of the layer's output; one scale per example.

    Raises:
      FormatError: the name is empty, or a role is no RoleFormat.
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
        """Weight, activation, gradient."""
        return self.weight, self.activation, self.gradient

    @property
    def product_bits(self) -> tuple[int, int, int]:
        """Bits of the wider operand of each product: forward, dgrad, wgrad."""
        weight, activation, gradient = (role.format.bits for role in self.roles)
        return max(weight, activation), max(weight, gradient), max(activation, gradient)

    @property
    def fits_int8(self) -> bool:
        """Whether the codes of every role are integers in -127..127, so that int8 hardware multiplies them."""
        return all(role.format.fits_int8 for role in self.roles)

    @property
    def max_code(self) -> int:
        """The largest magnitude of any role's codes."""
        return max(role.max_code for role in self.roles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """What each of a layer's three products runs in: a recipe, or None for full precision.

    Attributes:
      forward: of activations with the weight.
      dgrad: of output gradients with the weight.
      wgrad: of output gradients with activations, per example.
    """

    forward: Recipe | None = None
    dgrad: Recipe | None = None
    wgrad: Recipe | None = None

    @property
    def recipes(self) -> tuple[Recipe | None, Recipe | None, Recipe | None]:
        """Of forward, dgrad, wgrad."""
        return self.forward, self.dgrad, self.wgrad

    @property
    def quantized(self) -> bool:
        """Whether any product runs quantized."""
        return any(self.recipes)

    @property
    def name(self) -> str:
        """As users write it."""
        names = ["full" if recipe is None else recipe.name for recipe in self.recipes]
        return names[0] if len(set(names)) == 1 else "/".join(names)

    @property
    def fits_int8(self) -> bool:
        """Whether all codes are integers in -127..127."""
        return all(recipe is None or recipe.fits_int8 for recipe in self.recipes)

    @property
    def max_code(self) -> int:
        """The largest magnitude of any code; 0 in full precision."""
        return max((recipe.max_code for recipe in self.recipes if recipe is not None), default=0)

    def share(self, most_bits: int = 8) -> float:
        """The part of the layer's multiplications whose operands have at most so many bits; products weigh alike."""
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
    """One format and rounding for both forward operands, stochastic rounding for the gradient."""
    operand = RoleFormat(format=forward, rounding=rounding)
    output_gradient = RoleFormat(format=gradient, rounding=Rounding.STOCHASTIC)
    return Recipe(name=name, weight=operand, activation=operand, gradient=output_gradient)


RECIPES = {
    entry.name: entry
    for entry in (
        _recipe("luq-fp4", E3M0, Rounding.STOCHASTIC, E3M0),  # DPQuant
        _recipe("luq", INT4, Rounding.NEAREST, E3M0),  # LUQ as published
        Recipe(  # the same four bits with levels where most values are
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
    """The format of that name.

    Raises:
      FormatError: there is none; the message lists the known ones.
    """
    if name not in FORMATS:
        raise FormatError(
            f"Expected format to be one of {', '.join(FORMATS)}; got format={name!r}. Only these have codes. "
            "Choose one of them."
        )
    return FORMATS[name]


def recipe(name: str | Recipe) -> Recipe:
    """The recipe of that name, or made of three roles; a Recipe is returned as it is.

    Raises:
      FormatError: there is none; the message lists the known ones.
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
    """What a user has written: `full`, a recipe, or what forward, dgrad and wgrad run in, with slashes between them.

    Raises:
      FormatError: it cannot be read; the message says what is known.
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
    """What is written as `int8`, `e3m0~` or `int4@2.5#`; None if it cannot be read."""
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
